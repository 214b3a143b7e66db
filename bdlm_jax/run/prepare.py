"""From a config to what all models share: the split, the frozen candidates, the texts, the vocabulary, the shapes."""

import dataclasses
import functools
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from bdlm_jax.data import candidates as candidate_files
from bdlm_jax.data import corpus, interactions, prepared, readers, splits, twins
from bdlm_jax.data.candidates import Candidates
from bdlm_jax.data.interactions import Interactions
from bdlm_jax.data.splits import TRAIN, VALIDATION, Split
from bdlm_jax.domain.closed_form import CLOSED_FORM
from bdlm_jax.domain.models import MODELS, SETTINGS, takes
from bdlm_jax.lm import hf_config, hf_weights, vocabulary
from bdlm_jax.lm.config import LMConfig
from bdlm_jax.lm.vocabulary import Vocabulary
from bdlm_jax.run import ranked
from bdlm_jax.run.ranked import KNOWN, PARTS, judged_cases
from bdlm_jax.runtime.files import damaged_file, read_json, replacing, write_checksums, write_json
from bdlm_jax.types import InputError

_LOG = logging.getLogger(__name__)
WHOLE_SOFTMAX, DRAWN = 50_000, 4096  # items

HELD_OUT, _MOST_HELD_OUT = 20, 1000  # one document of so many, of an own model's corpus; so many at most
UNTRAINED = ("item_pop", *CLOSED_FORM)


class Data(NamedTuple):
    """What every model of a run sees.

    slices: {name: (I,) bool} over target items; "all" is always there.
    candidates: {"validation" | "test": {protocol: Candidates}}.
    item_texts: I strings; user_texts: U strings, or None where no user field is asked for.
    corpus: documents for pretraining, maybe empty.
    held_out: documents of `pretrain.corpus` that no own model trains on: what its language is measured by.
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
    held_out: Sequence[str] = ()
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
    cut: frozenset[int] = frozenset()  # items whose title is longer
    cards: list[np.ndarray] | None = None  # what is read of every item on its card; None: the titles (run/glosses.py)


def prepare_data(config: ml_collections.ConfigDict, folder: Path) -> Data:
    """Reads or generates the data, splits it, and writes candidates and fingerprint to `folder` once.

    A second call checks that both are unchanged.
    """
    c, world, dropped = config.data, None, {}
    if c.kind == "twins":
        world = twins.make_world(seed=config.seed, **c.options.to_dict())
        split = world.split
    else:
        _LOG.info("reading %s", c.path)
        kept = config.runtime.kept_data
        load = functools.partial(prepared.load_prepared, kept) if kept else readers.load_source
        table = load(c.kind, c.path, **c.options.to_dict())
        if isinstance(table, Interactions):
            _LOG.info("%d users, %d items, %d interactions; splitting", table.n_users, table.n_items, len(table))
        if not isinstance(table, Split):
            table, dropped = _filtered(config, table)
        split = table if isinstance(table, Split) else _split(config, table)
    table = split.interactions
    empty = [part for part in PARTS if not split.counts()[part]]
    # Only what needs no training needs no validation either.
    if "test" in empty or (empty and not {*config.models} <= {*UNTRAINED}):
        raise InputError(f"the {empty[-1]} part of the data has no interaction to predict; choose another data.split.")
    fingerprint = {**table.fingerprint(), "parts": split.counts()}
    judged = {part: judged_cases(config, split, part) for part in PARTS}
    if drawn := {part: len(case_M) for part, case_M in judged.items() if case_M is not None}:
        fingerprint["judged"] = drawn
        _LOG.info("every model is judged on drawn cases (evaluate.cases=0 takes all): %s", drawn)
    _check_fingerprint(folder / "fingerprint.json", fingerprint)  # first: other data would look like leaking candidates
    _LOG.info("drawing candidates, or checking those of an earlier start")
    protocols = ranked.fillable(config, split)
    made = {part: ranked.freeze(config, folder, split, part, protocols) for part in PARTS}
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
                    split, number, pool=pool, case_M=judged[part], n_negatives=19, seed=c.candidates_seed, name="cold20"
                )
    fingerprint["candidates"] = {f"{part}/{name}": c.sha256 for part, sets in made.items() for name, c in sets.items()}
    _check_fingerprint(folder / "fingerprint.json", fingerprint)
    write_json(folder / "fingerprint.json", fingerprint)
    documents, held_out = _corpus(config, world)
    return Data(
        split=split,
        slices=slices,
        candidates=made,
        item_texts=_item_texts(config, table),
        user_texts=table.user_text(tuple(c.user_fields)) if c.user_fields else None,
        corpus=documents,
        world=world,
        fingerprint=fingerprint,
        held_out=held_out,
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
    elif titled < len(texts) / 2 and reads and config.data.titles != "none":
        _LOG.warning(
            "most items have no text, and %s reads nothing of them: compare how ids are written in both files, and "
            "data.item_fields (%s)", reads[0], fields,
        )  # fmt: skip
    if nan := sum(text.strip().lower() == "nan" for text in texts):
        _LOG.warning("the text of %d items is %r, as empty cells are often written: leave them empty", nan, "nan")
    return texts


def prepare_vocabulary(config: ml_collections.ConfigDict, data: Data, folder: Path) -> Vocabulary:
    """Loads the run's tokenizer, or trains one on the item texts and the corpus and keeps it in `folder`.

    A language model of `lm.path` comes with its own, whose special tokens and chat template stay as they are; the
    vocabulary has at least as many text rows as the model.
    """
    own = bool(config.lm.path)
    if given := tokenizer_folder(config):
        tokenizer = vocabulary.load_tokenizer(given)
    elif (folder / "tokenizer.json").exists() and damaged_file(folder) is None:
        tokenizer = vocabulary.load_tokenizer(folder)
    else:
        texts = [*data.item_texts, *(data.user_texts or []), *data.corpus[:50_000]]
        tokenizer = vocabulary.train_tokenizer(texts, config.tokenizer.vocab_size)
        with replacing(folder) as whole:
            vocabulary.save_tokenizer(tokenizer, whole)
            write_checksums(whole)
    rows = lm_shape(config).vocab_size if own else 0
    chat = vocabulary.chat_head(tokenizer) if _chats(config, tokenizer) else ()
    prompts, needed = config.prompts, max(0, len(chat) - 1) + title_room(config)
    if prompts.length < needed:
        raise InputError(
            f"config.prompts.length {prompts.length} cannot hold one title behind the {len(chat)} tokens that begin a "
            f"conversation; use a length of at least {needed}, or set prompts.chat to never."
        )
    return Vocabulary(tokenizer, n_users=data.n_users, n_items=data.n_items, min_text=rows, chat=chat)


def title_room(config: ml_collections.ConfigDict) -> int:
    """The least length of a row: one title, a user's context, and what stands around them."""
    return config.prompts.max_title_tokens * (2 if config.data.user_fields else 1) + 4


def _chats(config: ml_collections.ConfigDict, tokenizer) -> bool:
    """Says whether histories stand in a conversation: by `prompts.chat`, and by a model's name where it leaves that."""
    word = config.prompts.chat
    if word == "always" and not tokenizer.chat_template:
        raise InputError("config.prompts.chat is always, but the tokenizer has no chat template; set it to never.")
    name = _own_name(config.lm.path) if config.lm.path else ""
    named = re.search(r"instruct|chat|[-_]it\b", name, re.IGNORECASE)
    return bool(tokenizer.chat_template) and (word == "always" or (word == "auto" and bool(named)))


def _own_name(path: str) -> str:
    """What a model is called: the end of its hub id or folder, or what the hub's cache calls a snapshot."""
    folder = Path(path).absolute()
    return folder.parents[1].name if folder.parent.name == "snapshots" else folder.name


def encode_texts(config: ml_collections.ConfigDict, data: Data, vocabulary: Vocabulary) -> Texts:
    limit, whole = config.prompts.max_title_tokens, vocabulary.encode_text(data.item_texts)
    titles, cut = [title[:limit] for title in whole], frozenset(i for i, t in enumerate(whole) if len(t) > limit)
    if cut:
        told = "%d of %d titles are longer than prompts.max_title_tokens (%d) and are cut there, the longest from %d"
        _LOG.info(told, len(cut), len(whole), limit, max(map(len, whole)))
    contexts = [c[:limit] for c in vocabulary.encode_text(data.user_texts)] if data.user_texts else None
    return Texts(vocabulary, titles, contexts, cut)


def tokenizer_folder(config: ml_collections.ConfigDict) -> Path | None:
    """Where a tokenizer is given: in `tokenizer.path`, else beside the weights of `lm.path`."""
    given = config.tokenizer.path or (own_folder(config.lm.path) if config.lm.path else None)
    return given and Path(given)


@functools.cache
def own_folder(path: str) -> Path:
    """The local folder of `lm.path`; the hub is asked once."""
    if path.startswith("<"):  # what stands in experiments/own_lm.py
        raise InputError("config.lm.path is not given: --config.lm.path=FOLDER, a Hugging Face directory or a hub id.")
    try:
        return hf_weights.find_folder(path)
    except InputError as error:
        raise InputError(f"config.lm.path: {error}") from error


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


def drawn_items(asked: int, n_items: int, *, told: str = "") -> int:
    """How many items a batch's softmax draws beside its targets; 0: it runs over the whole catalogue.

    Asked for 0 it is the whole up to `WHOLE_SOFTMAX` items, and `DRAWN` above, which the log is `told`; -1 is the whole
    whatever its size (ours).
    """
    if asked or n_items <= WHOLE_SOFTMAX:
        return max(0, asked)
    if told:
        _LOG.info("%s: %d of the %d items are drawn for each batch's softmax", told, DRAWN, n_items)
    return DRAWN


def _read_config_json(path: str) -> dict:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except (OSError, ValueError) as error:
        raise InputError(f"config.lm.config: {path} cannot be read ({error}); give a config.json.") from error
    return content


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


def _check_fingerprint(path: Path, fingerprint: dict) -> None:
    if path.exists():
        before = read_json(path, remedy="delete it if the data are the same as before")
        if any(before.get(name) != value for name, value in json.loads(json.dumps(fingerprint)).items()):
            raise InputError(f"{path} was written for other data than the config gives now: choose a new --workdir.")


def _corpus(config, world) -> tuple[list[str], list[str]]:
    """The documents of `pretrain.corpus`, and those held out of it for an own model; else those of the world.

    An own model (`lm.path`) without a corpus brings a language of its own, which the world's would change.
    """
    c = config.pretrain
    if not c.corpus:
        return list(world.corpus) if world is not None and not config.lm.path else [], []
    try:
        documents = corpus.read_documents(c.corpus, max_tokens=c.max_tokens)
    except InputError as error:
        raise InputError(f"config.pretrain.corpus: {error}") from error
    if not config.lm.path or len(documents) < 2:
        return documents, []
    n = min(max(1, len(documents) // HELD_OUT), _MOST_HELD_OUT)
    drawn = set(np.random.default_rng(len(documents)).permutation(len(documents))[:n].tolist())
    held_out = [document for number, document in enumerate(documents) if number in drawn]
    return [document for number, document in enumerate(documents) if number not in drawn], held_out
