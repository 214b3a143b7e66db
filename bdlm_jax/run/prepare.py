"""From a config to what all models share: the split, the frozen candidates, the texts, the vocabulary, the shapes."""

import dataclasses
import functools
import gzip
import json
import logging
import lzma
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from bdlm_jax.data import candidates as candidate_files
from bdlm_jax.data import interactions, readers, splits, twins
from bdlm_jax.data.candidates import Candidates
from bdlm_jax.data.interactions import Interactions
from bdlm_jax.data.splits import TEST, TRAIN, VALIDATION, Split
from bdlm_jax.domain.closed_form import CLOSED_FORM
from bdlm_jax.domain.models import MODELS, SETTINGS, takes
from bdlm_jax.lm import hf_config, hf_weights, vocabulary
from bdlm_jax.lm.config import LMConfig
from bdlm_jax.lm.vocabulary import Vocabulary
from bdlm_jax.runtime.files import damaged_file, read_json, write_checksums, write_json
from bdlm_jax.types import InputError

_LOG = logging.getLogger(__name__)

PARTS = {"validation": VALIDATION, "test": TEST}
_PROTOCOLS = ("protocols", "text_protocols")  # settings of config.evaluate
UNTRAINED = ("item_pop", *CLOSED_FORM)
KNOWN = {"validation": (TRAIN,), "test": (TRAIN, VALIDATION)}  # what may be known when a part is predicted


class Data(NamedTuple):
    """What every model of a run sees.

    slices: {name: (I,) bool} over target items; "all" is always there.
    candidates: {"validation" | "test": {protocol: Candidates}}.
    item_texts: I strings; user_texts: U strings, or None where no user field is asked for.
    corpus: documents for pretraining, maybe empty.
    fingerprint: counts and hashes of the table and of every candidate file.
    dropped: {raw id of a user whom the filters leave out: why}.
    """

    split: Split
    slices: dict[str, np.ndarray]
    candidates: dict[str, dict[str, Candidates]]
    item_texts: list[str]
    user_texts: list[str] | None
    corpus: list[str]
    world: twins.World | None
    fingerprint: dict
    dropped: dict[str, str] = {}  # noqa: RUF012 (never written to)

    @property
    def n_users(self) -> int:
        return self.split.interactions.n_users

    @property
    def n_items(self) -> int:
        return self.split.interactions.n_items


class Texts(NamedTuple):
    """Tokens of every item's title (cut to `max_title_tokens`) and of every user's context, if there is any."""

    vocabulary: Vocabulary
    titles: list[np.ndarray]
    contexts: list[np.ndarray] | None


def prepare_data(config: ml_collections.ConfigDict, folder: Path) -> Data:
    """Reads or generates the data, splits it, and writes candidates and fingerprint to `folder` once.

    A second call checks that both are unchanged.
    """
    c, world, dropped = config.data, None, {}
    if c.kind == "twins":
        world = twins.make_world(seed=config.seed, **c.options.to_dict())
        split = world.split
    else:
        table = readers.load_source(c.kind, c.path, **c.options.to_dict())
        if not isinstance(table, Split):
            table, dropped = _filtered(config, table)
        split = table if isinstance(table, Split) else _split(config, table)
    table = split.interactions
    empty = [part for part in PARTS if not split.counts()[part]]
    # Only what needs no training needs no validation either.
    if "test" in empty or (empty and not {*config.models} <= {*UNTRAINED}):
        raise InputError(f"the {empty[-1]} part of the data has no interaction to predict; choose another data.split.")
    fingerprint = {**table.fingerprint(), "parts": split.counts()}
    _check_fingerprint(folder / "fingerprint.json", fingerprint)  # first: other data would look like leaking candidates
    made = {part: _candidates(config, folder, split, part) for part in PARTS}
    for name in made["test"]:
        candidate_files.check_independent(split, made["validation"][name], made["test"][name])
    slices = {"all": np.ones(table.n_items, bool)}
    if world is not None:
        slices |= world.item_slices
        for part, number in PARTS.items():
            made[part] |= twins.slice_candidates(world, number, c.candidates_seed)
    else:
        slices["cold"] = split.degree(TRAIN, VALIDATION) == 0
        if c.split == "cold_items":
            slices["warm"] = ~slices["cold"]
            for part, number in PARTS.items():
                pool = np.setdiff1d(split.cases(number)[1], split.edges(*KNOWN[part])[1])
                made[part]["cold20"] = candidate_files.make_pool_candidates(
                    split, number, pool=pool, n_negatives=19, seed=c.candidates_seed, name="cold20"
                )
    fingerprint["candidates"] = {f"{part}/{name}": c.sha256 for part, sets in made.items() for name, c in sets.items()}
    _check_fingerprint(folder / "fingerprint.json", fingerprint)
    write_json(folder / "fingerprint.json", fingerprint)
    return Data(
        split=split,
        slices=slices,
        candidates=made,
        item_texts=_item_texts(config, table),
        user_texts=table.user_text(tuple(c.user_fields)) if c.user_fields else None,
        corpus=_corpus(config.pretrain, world),
        world=world,
        fingerprint=fingerprint,
        dropped=dropped,
    )


def _item_texts(config, table) -> list[str]:
    """What the LMs read of items; without any, an LM would train on nothing and nobody would see it."""
    texts, fields = table.item_text(tuple(config.data.item_fields)), ", ".join(config.data.item_fields)
    titled = sum(map(bool, texts))
    _LOG.info("data: %d of %d items have a text (%s)", titled, len(texts), fields)
    reads = [word for word in config.models if word not in (*MODELS, *UNTRAINED)]
    if not titled and reads and config.data.titles != "none":
        raise InputError(
            f"config.data: no item has a text (data.item_fields is {fields}), which {reads[0]} reads: give titles "
            "whose ids are written as those of the interactions, or set config.data.titles=none."
        )
    return texts


def prepare_vocabulary(config: ml_collections.ConfigDict, data: Data, folder: Path) -> Vocabulary:
    """Loads the run's tokenizer, or trains one on the item texts and the corpus and keeps it in `folder`.

    A language model of `lm.path` comes with its own, whose special tokens and chat template stay as they are; the
    vocabulary has at least as many text rows as the model.
    """
    own = own_folder(config.lm.path) if config.lm.path else None
    if config.tokenizer.path or own:
        tokenizer = vocabulary.load_tokenizer(config.tokenizer.path or own)
    elif (folder / "tokenizer.json").exists() and damaged_file(folder) is None:
        tokenizer = vocabulary.load_tokenizer(folder)
    else:
        texts = [*data.item_texts, *(data.user_texts or []), *data.corpus[:50_000]]
        tokenizer = vocabulary.train_tokenizer(texts, config.tokenizer.vocab_size)
        tokenizer.save_pretrained(str(folder))
        write_checksums(folder)
    rows = lm_shape(config).vocab_size if own else 0
    return Vocabulary(tokenizer, n_users=data.n_users, n_items=data.n_items, min_text=rows)


def encode_texts(config: ml_collections.ConfigDict, data: Data, vocabulary: Vocabulary) -> Texts:
    limit = config.prompts.max_title_tokens
    titles = [title[:limit] for title in vocabulary.encode_text(data.item_texts)]
    contexts = [c[:limit] for c in vocabulary.encode_text(data.user_texts)] if data.user_texts else None
    return Texts(vocabulary, titles, contexts)


@functools.cache
def own_folder(path: str) -> Path:
    """The local folder of `lm.path`; the hub is asked once."""
    return hf_weights.find_folder(path)


def lm_shape(config: ml_collections.ConfigDict, n_text: int | None = None) -> LMConfig:
    """The decoder's shape from the config's own words, or from the config.json of `lm.path` or `lm.config`.

    Without `n_text`, the vocabulary's number of text rows, it has the config's or the config.json's.
    """
    c = config.lm
    how = {"remat": c.remat and (c.remat_keeps if c.remat_keeps == "dots" else True), "attention": c.attention}
    how |= {"dtype": c.dtype, "dropout": c.dropout}
    if c.path or c.config:
        shape = hf_config.lm_config_from_hf(own_folder(c.path) if c.path else _read_config_json(c.config), **how)
        return shape if n_text is None else dataclasses.replace(shape, vocab_size=n_text)
    sizes = ("width", "n_layers", "n_heads", "n_kv_heads", "mlp_width", "tie_embeddings")
    try:
        return LMConfig(n_text or config.tokenizer.vocab_size, **{name: c[name] for name in sizes}, **how)
    except InputError as error:
        raise InputError(f"config.lm: {error}") from None


def domain_settings(config: ml_collections.ConfigDict, model: str) -> dict:
    """What a domain model is built with, for `domain.models.make_arm`."""
    c = config.domain
    options = c.options.to_dict() if model == c.model else {}
    settings = {name: c[name] for name in SETTINGS}
    own = {name: config.get(model, {}).get(name) for name in takes(model)}
    return {**settings, **{name: value for name, value in own.items() if value is not None}, **options}


def training_setting(config: ml_collections.ConfigDict, model: str, name: str) -> Any:
    """How a domain model trains: by the section of its name, else by `config.domain`; None where neither says it."""
    found = config.get(model, {}).get(name)
    return config.domain.get(name) if found is None else found


def _read_config_json(path: str) -> dict:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"config.lm.config: {path} cannot be read ({error}); give a config.json.") from error


def _filtered(config, table) -> tuple[Interactions, dict[str, str]]:
    """Drops what `min_rating` and the k-core drop; also says of every user who goes why."""
    c, dropped, filters = config.data, {}, []
    if c.min_rating:
        filter_rating = functools.partial(interactions.filter_rating, minimum=c.min_rating)
        filters.append((f"rated below data.min_rating {c.min_rating:g}", filter_rating))
    if c.min_user or c.min_item:
        core = functools.partial(interactions.k_core, user=c.min_user or 1, item=c.min_item or 1)
        filters.append((f"fewer than data.min_user {c.min_user} or min_item {c.min_item} ask for", core))
    for why, filtered in filters:
        before, table = table, filtered(table)
        _LOG.info("data: %d interactions dropped: %s", len(before) - len(table), why)
        gone = set(before.user_ids.tolist()).difference(table.user_ids.tolist())
        dropped |= dict.fromkeys(gone, f"the interactions that the data have are {why}")
    _LOG.info("data: %d interactions kept", len(table))
    return table, dropped


def _split(config, table) -> Split:
    c = config.data
    if c.split == "leave_one_out":
        return splits.leave_one_out(table)
    if c.split == "global_time":
        return splits.global_time(table, validation=c.validation, test=c.test)
    if c.split == "ratio":
        return splits.ratio(table, validation=c.validation, test=c.test, seed=c.split_seed)
    drawn = {"share": c.cold_share, "seed": c.split_seed}
    split = splits.cold_items(table, **drawn)
    splits.check_cold_items(split, splits.draw_cold_items(table, **drawn))
    return split


def _candidates(config, folder: Path, split: Split, part: str) -> dict[str, Candidates]:
    found = {}
    for name, n in config.data.candidates.items():
        if n >= split.interactions.n_items:
            _refuse_if_used(config, name, n, n_items=split.interactions.n_items)
            continue
        path = folder / f"{part}_{name}.npz"
        try:
            found[name] = candidate_files.load_candidates(path)
        except InputError as error:  # a damaged file: the same draw again, which the fingerprint holds to the first
            if path.exists():
                _LOG.warning("%s They are drawn again.", error)
            seed = config.data.candidates_seed
            made = candidate_files.make_candidates(split, PARTS[part], n_negatives=n, seed=seed, name=name)
            candidate_files.save_candidates(path, made)
            found[name] = candidate_files.load_candidates(path)
        candidate_files.check_candidates(split, found[name])
        if part == "test" and (short := int((found[name].items_NC < 0).any(axis=1).sum())):
            told = "of %d cases rank fewer than the %d others of %s: their users have had nearly all items"
            _LOG.warning(f"%d {told}", short, len(found[name]), n, name)
    return found


def _refuse_if_used(config, name: str, n: int, *, n_items: int) -> None:
    """A protocol that the catalogue cannot fill would be another one under its name."""
    e, select = config.evaluate, config.select.partition("/")[2]
    ranked_by_text = name == "cand20" and "text_lm" in config.models
    if name in (*e.protocols, *e.text_protocols, select) or ranked_by_text:
        fit = {key: tuple(p for p in e[key] if config.data.candidates.get(p, 0) < n_items) for key in _PROTOCOLS}
        told = " and ".join(f"config.evaluate.{key}={words}" for key, words in fit.items())
        told += ", choose another config.select" if name == select else ""
        told += ", and take text_lm, which needs cand20, out of config.models" if ranked_by_text else ""
        raise InputError(
            f"config.data.candidates.{name} asks for {n} others beside each target, and the data have {n_items} items: "
            f"set {told}."
        )
    _LOG.warning("candidates %s are left out: the data have %d items", name, n_items)


def _check_fingerprint(path: Path, fingerprint: dict) -> None:
    if path.exists():
        before = read_json(path, remedy="delete it if the data are the same as before")
        if any(before.get(name) != value for name, value in json.loads(json.dumps(fingerprint)).items()):
            raise InputError(f"{path} was written for other data than the config gives now: choose a new --workdir.")


def _corpus(config, world) -> list[str]:
    """The documents of `pretrain.corpus` (.txt, .gz, .xz, one a line), or those of the world."""
    if not config.corpus:
        return list(world.corpus) if world is not None else []
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(Path(config.corpus).suffix, open)
    documents, words = [], 0
    try:
        with opener(config.corpus, "rt", encoding="utf-8") as lines:
            for line in lines:
                if "\0" in line:
                    raise ValueError("it is no text")
                documents.append(line.strip())
                words += line.count(" ") + 1
                if words > config.max_tokens:  # a word is at least a token, so this is enough
                    break
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise InputError(
            f"config.pretrain.corpus: {config.corpus} cannot be read ({error}); give a whole UTF-8 text file "
            "(.txt, .gz, .xz), a document a line."
        ) from error
    documents = [document for document in documents if document]
    if not documents:
        raise InputError(f"config.pretrain.corpus: {config.corpus} holds no text; give a document a line, or no path.")
    return documents
