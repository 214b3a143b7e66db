"""Refuses a config that cannot run, in one sentence and before any work.

Misspelt keys and wrong types are refused where they are written: `experiments/defaults.py` locks its config. Here are
what each setting may be, combinations that exclude each other, paths that are not there, and batches on devices.
"""

import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

from bdlm_jax.data import twins
from bdlm_jax.data.readers import READERS, reader_options
from bdlm_jax.domain.arm import Inputs
from bdlm_jax.domain.graph import BACKENDS
from bdlm_jax.domain.lightgcn import LAYER_WEIGHTS
from bdlm_jax.domain.models import MODELS, make_arm
from bdlm_jax.lm import causal_lm, hf_weights, lora
from bdlm_jax.lm.config import LMConfig
from bdlm_jax.lm.prompts import USER_TOKENS
from bdlm_jax.lm.vocabulary import count_tokens
from bdlm_jax.mutual.losses import ALIGN, WHOLE_BATCH
from bdlm_jax.mutual.optimizer import OPTIMIZERS, SCHEDULES
from bdlm_jax.mutual.sharing import READS
from bdlm_jax.run import shipped
from bdlm_jax.run.contenders import OTHERS
from bdlm_jax.run.controls import CONTROLS
from bdlm_jax.run.prepare import UNTRAINED, domain_settings, lm_shape, own_folder, title_room, tokenizer_folder
from bdlm_jax.runtime import parallel, sharding
from bdlm_jax.runtime.log import TRACKERS, check_tracker
from bdlm_jax.types import InputError

SLICE_PROTOCOLS = ("pair", "cold20", "knowledge20")  # of the twins world
SPLITS = ("leave_one_out", "global_time", "ratio", "cold_items")  # of data/splits.py
SELECTABLE = ("hr@1", "ndcg@10")  # what validation computes
# Of anything that is counted: indices and numbers of steps are int32. Phases stand in a list, layers in one program.
_BELOW = {r"layers|blocks": 1_000, r"epochs|rounds": 1_000_000, "": 2**31}
_LARGEST_WORLD = 1_000_000  # users, sentences, …
_DATA = ("twins", *READERS)
_FREE = ("data.candidates.", "data.options.", "domain.options.")  # sections whose keys an experiment chooses


class Rule(NamedTuple):
    """What a setting may be: a test, and the same in words."""

    holds: Callable[[Any], bool]
    words: str


def _from(least: float, most: float = math.inf, below: float = math.inf) -> Rule:
    words = f"a number of at least {least:g}"
    words += f" and at most {most:g}" if most < math.inf else f" and below {below:g}" if below < math.inf else ""
    return Rule(lambda v: not isinstance(v, bool) and least <= v <= most and v < below, words)


def _holds(rule: Rule, value: Any) -> bool:
    try:
        return bool(rule.holds(value))
    except (TypeError, ValueError, OverflowError):  # of another type than the setting
        return False


def _word(choices: Iterable[str]) -> Rule:
    return Rule(lambda v: v in choices, "one of " + ", ".join(choices))


def _words(least: int, choices: Iterable[str] = ()) -> Rule:
    def holds(v):
        several = isinstance(v, (tuple, list))  # a lone word is a sequence of letters
        return (
            several
            and len(set(v)) == len(v) >= least
            and all(isinstance(w, str) and (not choices or w in choices) for w in v)
        )

    return Rule(holds, "a tuple of different words" + (" out of " + ", ".join(choices) if choices else ""))


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


_ABOVE_0 = Rule(lambda v: 0 < v < math.inf, "a number above 0")
_TYPES = _word(("float32", "bfloat16"))
RULES = {
    "seed": Rule(lambda v: type(v) is int and 0 <= v < 2**32, "a whole number of at least 0 and below 2**32"),
    "tuned_on": Rule(lambda v: all(type(seed) is int and seed >= 0 for seed in v), "a tuple of seeds"),
    "parallel": _word(("jit", "pmap", "mesh")), "models": _words(1, (*MODELS, *OTHERS)),
    "data.kind": _word(_DATA), "data.split": _word(SPLITS), "data.refit": _word(("none", "validation")),
    "data.titles": _word(("required", "none")),
    "data.validation": _from(0, below=1), "data.test": _from(0, below=1), "data.cold_share": _from(0, below=1),
    "data.item_fields": _words(1),
    "data.user_fields": _words(0), "tokenizer.vocab_size": _from(261), "lm.width": _from(2),
    "sasrec.schedule": _word(SCHEDULES), "sasrec.dropout": _from(0, below=1),
    "itemgcn.schedule": _word(SCHEDULES), "itemgcn.dropout": _from(0, below=1),
    "lm.dropout": _from(0, below=1), "lm.dtype": _TYPES, "lm.param_dtype": _TYPES,
    "lm.remat_keeps": _word(("nothing", "dots")), "lm.attention": _word(("einsum", "xla", "cudnn")),
    "lm.trains": _word(("full", "lora", "bridge")), "lm.optimizer": _word(OPTIMIZERS), "lm.schedule": _word(SCHEDULES),
    "evaluate.cold_lift": _word(("none", "validation", "kinds")), "lm.speaks": _word(("trained", "base")),
    "lm.lora_targets": Rule(_is_pattern, "a regular expression"), "prompts.kind": _word(("ids", "ids_titles")),
    "prompts.length": _from(8), "prompts.user_token": _word(USER_TOKENS),
    "prompts.chat": _word(("auto", "always", "never")),
    "prompts.gloss": Rule(lambda v: not v or v.count("{}") == 1, "empty, or a text in which {} stands for the title"),
    "prompts.user_dropout": _from(0, most=1), "domain.popularity": _from(0, most=10),
    "mf.popularity": _from(0, most=10),
    "shared.trained_by": _word(("both", "lm", "domain", "none")),
    "mutual.text_head": _word(("none", "words", "graph")), "mutual.teacher": _word(("lm", "domain", "pool")),
    "mutual.taught.lm": _word(("goes_on", "afresh")),
    "shared.initial": _word(("domain", "propagated", "random")),
    "domain.model": _word(MODELS), "domain.layer_weights": _word(LAYER_WEIGHTS), "domain.backend": _word(BACKENDS),
    "domain.test_graph": _word(("train", "train+validation")), "mutual.reads": _word(READS),
    "mutual.align": _word(ALIGN), "evaluate.protocols": _words(1),
    "evaluate.text_protocols": _words(0),
    **{f"{model}.softmax_items": _from(-1) for model in ("lm", "sasrec", "itemgcn")},
    "evaluate.cases": _from(-1), "runtime.log": _word(TRACKERS),
    **{f"mesh.{axis}": _from(-1) for axis in sharding.AXES},
}  # fmt: skip
_MANY = {
    _ABOVE_0: """lm.lora_alpha shared.std domain.learning_rate mf.learning_rate mf.std
        sasrec.learning_rate sasrec.std itemgcn.learning_rate itemgcn.std lm_alone.ids_times lm_alone.text_epochs
        ease.l2 mutual.temperature mutual.domain_learning_rate mutual.distill_learning_rate""",
    _from(1): """lm.n_layers lm.n_heads lm.n_kv_heads lm.mlp_width lm.batch_rows lm.max_text_targets lm.lora_rank
        lm.accumulate pretrain.max_tokens prompts.max_items prompts.max_title_tokens shared.width mutual.text_width
        domain.batch_size domain.epochs domain.evaluate_every mf.epochs item_knn.neighbours sasrec.epochs
        sasrec.batch_size sasrec.evaluate_every sasrec.length sasrec.n_blocks sasrec.n_heads mutual.kl_users
        itemgcn.epochs itemgcn.batch_size itemgcn.evaluate_every itemgcn.length
        mutual.distill_epochs evaluate.chunk evaluate.text_history distributed.processes dry_run.devices""",
    _from(0): """lm.learning_rate pretrain.learning_rate mutual.learning_rate_bridge pretrain.samples lm.text_row_rate
        data.candidates_seed data.split_seed lm_alone.row_std evaluate.validation_users
        data.min_rating data.min_user data.min_item lm.learning_rate_shared lm.weight_decay lm.clip_norm
        lm.warmup_steps lm.row_std pretrain.epochs pretrain.replay_share prompts.titled_share prompts.card_copies
        domain.n_layers domain.regularisation mf.regularisation mutual.rounds mutual.lm_epochs
        mutual.lm_epochs_a_round mutual.domain_epochs_a_round mutual.taught.rounds mutual.taught.lm_epochs
        mutual.taught.domain_epochs mutual.taught.kl mutual.kl_items mutual.lm.item mutual.lm.text
        mutual.lm.align_user mutual.lm.align_item mutual.lm.kl mutual.domain.bpr mutual.domain.align_user
        mutual.domain.align_item mutual.domain.kl distributed.process dry_run.n_users dry_run.n_items
        dry_run.n_interactions sasrec.warmup_steps sasrec.weight_decay itemgcn.n_layers
        itemgcn.text_neighbours
        itemgcn.warmup_steps itemgcn.weight_decay item_knn.shrink
        runtime.checkpoint_seconds""",
}
RULES |= {key: rule for rule, keys in _MANY.items() for key in keys.split()}


def check_config(config: ml_collections.ConfigDict, *, paths: bool = True) -> None:
    """Checks every setting by itself, then together, then the paths (unless not asked for) and the devices."""
    check_complete(config)
    settings = dict(_flatten(config))
    for key, value in settings.items():
        if value is None and ".options." not in key:  # ConfigDict lets it stand for anything
            raise InputError(f"config.{key} is None; give a value, as experiments/defaults.py does.")
        if isinstance(value, str) and "\0" in value:
            raise InputError(f"config.{key} is {value!r}, which holds a null byte; take that out.")
    for key, rule in RULES.items():
        if not _holds(rule, settings[key]):
            finite = ", and finite" if settings[key] in (math.inf, -math.inf) else ""
            raise InputError(f"config.{key} is {settings[key]!r}; it must be {rule.words}{finite}.")
        counts = isinstance(settings[key], int) or re.search("epochs|times|copies|share$", key)
        most = next(below for words, below in _BELOW.items() if re.search(words, key))
        if counts and settings[key] >= most and not key.endswith("seed"):
            raise InputError(f"config.{key} is {settings[key]!r}; it must be below {most:,d}.")
    _check_data(config.data, config.models)
    _check_models(config)
    _check_lm(config, lm_shape(config))
    _check_evaluation(config)
    check_tracker(config.runtime.log)
    if paths:
        _check_paths(config)
    _check_devices(config, n_devices=parallel.device_count())


def check_complete(config: ml_collections.ConfigDict) -> None:
    """Refuses a config that lacks a setting, before anything reads one."""
    usual, settings = shipped.default_config(), dict(_flatten(config))
    for key in RULES if usual is None else dict(_flatten(usual)):
        if key not in settings and not key.startswith(_FREE):
            raise InputError(f"config.{key} is missing; begin with experiments/defaults.py, which has every setting.")


def name_config(config: ml_collections.ConfigDict, path: str) -> ml_collections.ConfigDict:
    """Notes the experiment file's name, with its argument, in the config, for reports."""
    file, _, argument = path.partition(":")
    with config.unlocked():
        config.name = Path(file).stem + (f"_{argument}" if argument else "")
    return config


def _check_data(data, models) -> None:
    world = [name for name in inspect.signature(twins.make_world).parameters if name != "seed"]
    known = world if data.kind == "twins" else reader_options(data.kind)
    for name in data.options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(known) or 'none'}."
            raise InputError(f"config.data.options.{name} is no option of the data kind {data.kind}{meant}")
        if data.kind == "twins":
            _check_size(name, data.options[name], usual=inspect.signature(twins.make_world).parameters[name].default)
    for name, n in data.candidates.items():
        if type(n) is not int or n < 1:
            raise InputError(f"config.data.candidates.{name} is {n!r}; it must be a number of negatives, at least 1.")
        if not re.fullmatch(r"\w+", name) or name in ("full", *SLICE_PROTOCOLS):
            raise InputError(f"config.data.candidates.{name} is a reserved or unusable name; call it cand{n + 1}, say.")
    if data.kind == "twins" and data.path:
        raise InputError("config.data.path is set, but the data kind twins is generated; leave the path empty.")
    if data.kind == "adjacency" and not {*models} <= {*UNTRAINED}:
        raise InputError(f"config.data.kind adjacency has no validation part; only {', '.join(UNTRAINED)} do without.")
    shares = data.validation > 0 < data.test and data.validation + data.test < 1
    if data.split in ("global_time", "ratio") and not shares:
        raise InputError(f"config.data.validation and test must be above 0, below 1 together with split {data.split}.")
    for name in ("min_rating", "min_user", "min_item"):
        if data.kind in ("twins", "adjacency") and data[name]:
            raise InputError(f"config.data.{name} is {data[name]}, but data of the kind {data.kind} come as they are.")
    if data.kind in ("twins", "adjacency") and data.split != "leave_one_out":
        raise InputError(f"config.data.split is {data.split}, but data of the kind {data.kind} are split already.")


def _check_size(name: str, value: Any, *, usual: float) -> None:
    """Refuses a size of the twins world of another type, or beyond what a generated world is for."""
    number = type(value) is type(usual) or (type(value) is int and type(usual) is float)
    if not number or not abs(value) <= _LARGEST_WORLD:
        kind = "a whole number" if type(usual) is int else "a number"
        raise InputError(f"config.data.options.{name} is {value!r}; it must be {kind} of at most {_LARGEST_WORLD:,}.")


def _check_models(config) -> None:
    prompts, m, models = config.prompts, config.mutual, config.models
    if prompts.length < (needed := title_room(config)):
        raise InputError(
            f"config.prompts.length {prompts.length} cannot hold one title of prompts.max_title_tokens "
            f"{prompts.max_title_tokens}; use a length of at least {needed}."
        )
    switched = [CONTROLS[word].settings(config).get("domain.model", "") for word in models if word in CONTROLS]
    for name in dict.fromkeys(name for name in (config.domain.model, *models, *switched) if name in MODELS):
        try:  # over no interactions: a model knows best what it cannot be
            make_arm(name, Inputs(config.shared.width), domain_settings(config, name))
        except InputError as error:
            raise InputError(f"config.domain or shared.width: {error}") from None
    if not (m.lm_epochs or (m.rounds and m.lm_epochs_a_round)):
        for name in models:
            if re.match("bdlm|ids_lm|cached|pool", name):
                raise InputError(f"config.models holds {name}, but no LM epoch; raise mutual.lm_epochs or rounds.")
    if m.taught.rounds and not (m.taught.lm_epochs or m.taught.domain_epochs):
        raise InputError("config.mutual.taught.rounds is set, but a lesson has no epoch; raise taught.lm_epochs.")
    if m.taught.rounds and m.taught.lm == "afresh" and m.teacher != "lm" and m.text_head == "none":
        raise InputError(
            f'config.mutual.teacher is "{m.teacher}", but at every place of a history (mutual.taught.lm is "afresh") '
            'it has nothing to say beside the LM; set mutual.text_head to "graph" or "words".'
        )
    if any(re.match("bdlm|cached|pool$", name) for name in models) and not m.lm.item:
        raise InputError("config.mutual.lm.item is 0, so BDLM's LM would never learn to recommend; raise it.")


def _check_lm(config, shape: LMConfig) -> None:
    lm, length = config.lm, config.prompts.length
    reads = config.pretrain.epochs and (config.pretrain.corpus or config.data.kind == "twins")
    if config.prompts.gloss and not (lm.path or reads):
        raise InputError(
            "config.prompts.gloss asks a language model that has read nothing; give lm.path or pretrain.corpus and "
            "epochs, or leave it empty."
        )
    if lm.path and lm.config:
        raise InputError("config.lm.path and lm.config are both set; the weights of a path have their own config.json.")
    if lm.accumulate > 1 and (align := config.mutual.align) in WHOLE_BATCH:
        raise InputError(f"config.lm.accumulate needs another mutual.align than {align}, which compares a whole batch.")
    if lm.batch_rows % lm.accumulate:
        raise InputError(f"config.lm.batch_rows {lm.batch_rows} does not divide into lm.accumulate {lm.accumulate}.")
    if lm.trains == "lora":  # shapes alone: no weight is drawn or read
        options = {"rank": lm.lora_rank, "targets": lm.lora_targets, "alpha": lm.lora_alpha}
        init = functools.partial(lora.init_lora, **options)
        made = jax.eval_shape(lambda key: init(key, causal_lm.init_lm(key, shape)), jax.random.key(0))
        if lm.speaks == "base" and (beyond := sorted({*made} - {"alpha", lora.BESIDE})):
            raise InputError(
                f"config.lm.lora_targets matches {beyond[0]}, and lm.speaks base exports adapters of the layers alone; "
                "narrow the pattern, to layers/.*_proj/kernel, say."
            )
    if lm.speaks == "base" and lm.trains != "lora":
        raise InputError(
            f"config.lm.speaks base takes adapters off, and lm.trains {lm.trains} has none; set lm.trains to lora, or "
            "lm.speaks to trained."
        )
    if lm.speaks == "base" and config.pretrain.corpus:
        raise InputError(
            "config.lm.speaks base leaves plain text to the model as it came, so pretrain.corpus has nothing to train; "
            "take it out, or set lm.speaks to trained."
        )
    if lm.trains == "bridge" and lm.path and config.pretrain.corpus:
        raise InputError("config.lm.trains bridge freezes the decoder, so pretrain.corpus has nothing to train.")
    if shape.max_positions is not None:
        source, title = lm.path or lm.config, config.prompts.max_title_tokens + 1
        told = f"the {shape.max_positions} positions of {source}; lower it"
        if length > shape.max_positions:
            raise InputError(f"config.prompts.length {length} is above {told}.")
        if "text_lm" in config.models and length + title > shape.max_positions:
            raise InputError(f"config.prompts.length {length} and the {title} tokens of a title are above {told}.")


def _check_evaluation(config) -> None:
    if config.evaluate.cold_lift != "none" and config.mutual.text_head != "none":
        raise InputError(
            "config.evaluate.cold_lift and mutual.text_head are both set, and no LM is served with both; set either to "
            "none."
        )
    protocols = (*config.data.candidates, "full")
    for key, allowed in (("protocols", protocols), ("text_protocols", protocols[:-1])):
        for name in config.evaluate[key]:
            if name not in allowed:
                why = " (text_lm scores given candidates only)" if name == "full" else ""
                raise InputError(f"config.evaluate.{key} holds {name!r}{why}; it may hold {', '.join(allowed)}.")
    if "text_lm" in config.models and "cand20" not in protocols:
        raise InputError("config.models holds text_lm, which is selected on cand20; add cand20 to data.candidates.")
    metric, _, protocol = config.select.partition("/")
    if metric not in SELECTABLE or protocol not in protocols:
        words = f"{' or '.join(SELECTABLE)}, a slash, and one of {', '.join(protocols)}"
        raise InputError(f"config.select is {config.select!r}; it must be {words}.")
    if config.data.options.get("duplicates") == "keep" and "full" in (*config.evaluate.protocols, protocol):
        raise InputError(
            "config.data.options.duplicates keep leaves among the targets what a user had before, and the protocol "
            "full ranks only what is new; take full out of evaluate.protocols and select."
        )


def _check_paths(config) -> None:
    data, corpus = config.data, config.pretrain.corpus
    if data.kind != "twins" and not data.path:
        raise InputError(f"config.data.path is empty; give the file or folder that the data kind {data.kind} reads.")
    paths = {"data.path": data.path, "tokenizer.path": config.tokenizer.path, "pretrain.corpus": corpus}
    for key, path in paths.items():
        if path and not Path(path).exists():
            raise InputError(f"config.{key}: {path} is not there; check the path, or the folder that you run from.")
    if config.lm.trains != "full" and not config.lm.path:
        raise InputError(f"config.lm.trains is {config.lm.trains}, but lm.path names no model; give one, or set full.")
    if config.lm.path:
        _check_model(own_folder(config.lm.path), tokenizer_folder(config), lm_shape(config))
    if corpus and not Path(corpus).is_file():
        raise InputError(f"config.pretrain.corpus: {corpus} is no file; give a text file, a document a line.")


@functools.cache
def _check_model(folder: Path, tokenizer: Path, shape: LMConfig) -> None:
    """Looks at every file of an own model: a faulty one is refused here, not after what is trained before it."""
    hf_weights.check_folder(folder, shape)
    if (n := count_tokens(tokenizer)) > shape.vocab_size:
        raise InputError(
            f"{tokenizer}: its tokenizer has {n} tokens, more than the {shape.vocab_size} rows of the embedding in "
            f"{folder}; give the model's own."
        )


def _check_devices(config, *, n_devices: int) -> None:
    if config.runtime.store and jax.process_count() > 1:
        raise InputError("config.runtime.store is for one process; leave it empty where several train one model.")
    if config.parallel == "jit":
        return
    if config.parallel == "mesh":
        sizes = sharding.mesh_sizes(config.mesh.to_dict(), n_devices)
        n_devices = sizes["data"] * sizes["fsdp"]  # a batch is not split over tensor
    for section, name in (
        ("lm", "batch_rows"),
        ("domain", "batch_size"),
        ("sasrec", "batch_size"),
        ("itemgcn", "batch_size"),
        ("mutual", "kl_users"),
    ):
        if (size := config[section][name]) % n_devices:
            raise InputError(
                f"config.{section}.{name} {size} does not divide over {n_devices} devices with parallel "
                f"{config.parallel}; use {max(1, round(size / n_devices)) * n_devices}."
            )


def _flatten(config, prefix: str = ""):
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
