"""From a config to what all models share: the split, the frozen candidates, the texts, the vocabulary."""

import gzip
import json
import lzma
from pathlib import Path
from typing import NamedTuple

import ml_collections
import numpy as np

from bdlm_jax.data import candidates as candidates_lib
from bdlm_jax.data import interactions as interactions_lib
from bdlm_jax.data import readers, splits
from bdlm_jax.data import twins as synthetic
from bdlm_jax.data.candidates import Candidates
from bdlm_jax.data.splits import TEST, TRAIN, VALIDATION, Split
from bdlm_jax.lm import hf_config as families
from bdlm_jax.lm import hf_weights as huggingface
from bdlm_jax.lm import vocabulary as vocabulary_lib
from bdlm_jax.types import InputError

PARTS = {"validation": VALIDATION, "test": TEST}
KNOWN = {"validation": (TRAIN,), "test": (TRAIN, VALIDATION)}  # what may be known when a part is predicted


class Data(NamedTuple):
    """What every model of a run sees.

    split: the interactions and their parts.
    slices: {name: (I,) bool} over target items; "all" is always there.
    candidates: {"validation" | "test": {protocol: Candidates}}.
    item_texts: I strings; user_texts: U strings, or None where no user field is asked for.
    corpus: documents for pretraining, maybe empty.
    world: the twins world, or None.
    fingerprint: counts and hashes of the table and of every candidate file.
    """

    split: Split
    slices: dict[str, np.ndarray]
    candidates: dict[str, dict[str, Candidates]]
    item_texts: list[str]
    user_texts: list[str] | None
    corpus: list[str]
    world: synthetic.World | None
    fingerprint: dict

    @property
    def n_users(self) -> int:
        return self.split.interactions.n_users

    @property
    def n_items(self) -> int:
        return self.split.interactions.n_items


def prepare_data(config: ml_collections.ConfigDict, folder: Path) -> Data:
    """Reads or generates the data, splits it, and writes the candidate files once.

    Args:
      config: the run's config.
      folder: where candidates and the fingerprint are kept; a second call checks that both are unchanged.

    Returns:
      Data.

    Raises:
      InputError: data that cannot be used, or data other than the folder was begun with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    world = None
    if config.data.kind == "twins":
        world = synthetic.make_world(seed=config.seed, **config.data.options.to_dict())
        split = world.split
    else:
        table = readers.load_source(config.data.kind, config.data.path, **config.data.options.to_dict())
        split = table if isinstance(table, Split) else _split(config, table)
    table = split.interactions
    empty = [part for part in PARTS if not split.counts()[part]]
    # Only what needs no training needs no validation either.
    if "test" in empty or (empty and tuple(config.models) != ("item_pop",)):
        raise InputError(f"the {empty[-1]} part of the data has no interaction to predict; choose another data.split.")
    fingerprint = {**table.fingerprint(), "parts": split.counts()}
    _check_fingerprint(folder / "fingerprint.json", fingerprint)  # first: other data would look like leaking candidates
    made = {
        part: {
            name: _candidates(folder, split, part, name, n, config.seed) for name, n in config.data.candidates.items()
        }
        for part in PARTS
    }
    slices = {"all": np.ones(table.n_items, bool)}
    if world is not None:
        slices |= world.item_slices
        for part, number in PARTS.items():
            made[part] |= synthetic.slice_candidates(world, number, config.seed)
    else:
        slices["cold"] = split.degree(TRAIN, VALIDATION) == 0
    fingerprint["candidates"] = {f"{part}/{name}": c.sha256 for part, sets in made.items() for name, c in sets.items()}
    _check_fingerprint(folder / "fingerprint.json", fingerprint)
    partial = folder / "fingerprint.json.partial"
    partial.write_text(json.dumps(fingerprint, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(folder / "fingerprint.json")
    return Data(
        split=split,
        slices=slices,
        candidates=made,
        item_texts=table.item_text(tuple(config.data.item_fields)),
        user_texts=table.user_text(tuple(config.data.user_fields)) if config.data.user_fields else None,
        corpus=_corpus(config, world),
        world=world,
        fingerprint=fingerprint,
    )


def prepare_vocabulary(config: ml_collections.ConfigDict, data: Data, folder: Path) -> vocabulary_lib.Vocabulary:
    """Loads the run's tokenizer, or trains one on the item texts and the corpus and keeps it in `folder`.

    A language model of `lm.path` comes with its own, whose special tokens and chat template stay as they are; the
    vocabulary has at least as many text rows as the model.
    """
    own = huggingface.find_folder(config.lm.path) if config.lm.path else None
    if config.tokenizer.path or own:
        tokenizer = vocabulary_lib.load_tokenizer(config.tokenizer.path or own)
    elif (folder / "tokenizer.json").exists():
        tokenizer = vocabulary_lib.load_tokenizer(folder)
    else:
        texts = [*data.item_texts, *(data.user_texts or []), *data.corpus[:50_000]]
        tokenizer = vocabulary_lib.train_tokenizer(texts, config.tokenizer.vocab_size)
        vocabulary_lib.save_tokenizer(folder, tokenizer)
    rows = families.lm_config_from_hf(own).vocab_size if own else 0
    return vocabulary_lib.Vocabulary(tokenizer, n_users=data.n_users, n_items=data.n_items, min_text=rows)


def _split(config, table) -> Split:
    if config.data.min_rating:
        table = interactions_lib.filter_rating(table, minimum=config.data.min_rating)
    if config.data.min_user or config.data.min_item:
        table = interactions_lib.k_core(table, user=config.data.min_user or 1, item=config.data.min_item or 1)
    shares = {"validation": config.data.validation, "test": config.data.test}
    if config.data.split == "leave_one_out":
        return splits.leave_one_out(table)
    if config.data.split == "global_time":
        return splits.global_time(table, **shares)
    return splits.ratio(table, **shares, seed=config.seed)


def _candidates(folder: Path, split: Split, part: str, name: str, n_negatives: int, seed: int) -> Candidates:
    path = folder / f"{part}_{name}.npz"
    if path.exists():
        made = candidates_lib.load_candidates(path)
    else:
        made = candidates_lib.make_candidates(split, PARTS[part], n_negatives=n_negatives, seed=seed, name=name)
        candidates_lib.save_candidates(path, made)
    candidates_lib.check_candidates(split, made)
    return made


def _check_fingerprint(path: Path, fingerprint: dict) -> None:
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if any(before.get(name) != value for name, value in json.loads(json.dumps(fingerprint)).items()):
            raise InputError(f"{path} was written for other data than the config gives now: choose a new --workdir.")


def _corpus(config, world) -> list[str]:
    path = config.pretrain.corpus
    if not path:
        return list(world.corpus) if world is not None else []
    if not Path(path).is_file():
        raise InputError(
            f"config.pretrain.corpus: {path} is no file; give a text file (.txt, .gz, .xz), a document a line."
        )
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(Path(path).suffix, open)
    documents, words = [], 0
    with opener(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            documents.append(line.strip())
            words += line.count(" ") + 1
            if words > config.pretrain.max_tokens:  # a word is at least a token, so this is enough
                break
    return [document for document in documents if document]
