"""Refuses a config that cannot run, in one sentence and before any work: misspelt settings, wrong types, words that
nothing knows, numbers out of range, paths that are not there, combinations that exclude each other.
"""

import difflib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from bdlm_jax.data import readers
from bdlm_jax.data import twins as synthetic
from bdlm_jax.domain.graph import BACKENDS
from bdlm_jax.domain.models import MODELS as DOMAIN_MODELS
from bdlm_jax.lm.prompts import USER_TOKENS
from bdlm_jax.mutual import optimizer as optimizers
from bdlm_jax.mutual.losses import ALIGN, WHOLE_BATCH
from bdlm_jax.run import build as arms
from bdlm_jax.runtime import parallel
from bdlm_jax.runtime import sharding as mesh
from bdlm_jax.types import InputError

MODELS = ("item_pop", "mf", "lightgcn", "text_lm", "ids_lm", "bdlm")
SLICE_PROTOCOLS = ("pair", "cold20", "knowledge20")  # of the twins world
SELECTABLE = ("hr@1", "ndcg@10")  # what validation computes
_READERS = {"twins": synthetic.make_world, **readers.READERS}


class Rule(NamedTuple):
    """What a setting may be: a test, and the same in words."""

    holds: Callable[[Any], bool]
    words: str


def _whole(least: int) -> Rule:
    return Rule(lambda v: _is(v, int) and v >= least, f"a whole number of at least {least}")


def _number(least: float, below: float | None = None) -> Rule:
    words = f"a number of at least {least:g}" + (f" and below {below:g}" if below is not None else "")
    return Rule(lambda v: _is(v, int, float) and least <= v and (below is None or v < below), words)


def _positive() -> Rule:
    return Rule(lambda v: _is(v, int, float) and 0 < v < float("inf"), "a number above 0")


def _word(*choices: str) -> Rule:
    return Rule(lambda v: v in choices, "one of " + ", ".join(choices))


def _words(least: int, *choices: str) -> Rule:
    def holds(v):
        fits = isinstance(v, (tuple, list)) and len(v) >= least and len(set(v)) == len(v)
        return fits and all(isinstance(w, str) and (not choices or w in choices) for w in v)

    return Rule(holds, "a tuple of different words" + (" out of " + ", ".join(choices) if choices else ""))


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _is(value, *types) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


_TEXT = Rule(lambda v: isinstance(v, str), "a text")
_PATTERN = Rule(lambda v: isinstance(v, str) and _compiles(v), "a regular expression")
_FLAG = Rule(lambda v: isinstance(v, bool), "True or False")

RULES = {
    "name": _TEXT, "seed": _whole(0), "parallel": _word("jit", "pmap", "mesh"), "models": _words(1, *MODELS),
    "select": _TEXT,
    "data.kind": _word(*_READERS), "data.path": _TEXT, "data.min_rating": _number(0), "data.min_user": _whole(0),
    "data.min_item": _whole(0), "data.split": _word("leave_one_out", "global_time", "ratio"),
    "data.validation": _number(0, 1), "data.test": _number(0, 1), "data.item_fields": _words(1),
    "data.user_fields": _words(0), "tokenizer.path": _TEXT, "tokenizer.vocab_size": _whole(261),
    "lm.width": _whole(2), "lm.n_layers": _whole(1), "lm.n_heads": _whole(1), "lm.n_kv_heads": _whole(1),
    "lm.mlp_width": _whole(1), "lm.dropout": _number(0, 1), "lm.dtype": _word("float32", "bfloat16"), "lm.remat": _FLAG,
    "lm.remat_keeps": _word("nothing", "dots"), "lm.attention": _word("einsum", "xla", "cudnn"),
    "lm.tie_embeddings": _FLAG, "lm.learning_rate": _positive(), "lm.learning_rate_shared": _number(0),
    "lm.weight_decay": _number(0), "lm.clip_norm": _number(0), "lm.warmup_steps": _whole(0), "lm.batch_rows": _whole(1),
    "lm.max_text_targets": _whole(1),
    "lm.row_std": _number(0),
    "lm.path": _TEXT, "lm.config": _TEXT, "lm.trains": _word("full", "lora", "bridge"), "lm.lora_rank": _whole(1),
    "lm.lora_alpha": _positive(), "lm.lora_targets": _PATTERN, "lm.optimizer": _word(*optimizers.OPTIMIZERS),
    "lm.schedule": _word(*optimizers.SCHEDULES), "lm.accumulate": _whole(1),
    "lm.param_dtype": _word("float32", "bfloat16"), "lm.master_weights": _FLAG,
    "pretrain.corpus": _TEXT, "pretrain.max_tokens": _whole(1), "pretrain.epochs": _number(0),
    "pretrain.learning_rate": _positive(), "pretrain.replay_share": _number(0),
    "prompts.kind": _word("ids", "ids_titles"), "prompts.titled_share": _number(0), "prompts.length": _whole(8),
    "prompts.max_items": _whole(1), "prompts.max_title_tokens": _whole(1), "prompts.user_token": _word(*USER_TOKENS),
    "prompts.read_named": _FLAG, "prompts.user_dropout": _number(0, 1.0001), "prompts.card_copies": _number(0),
    "shared.width": _whole(1), "shared.std": _positive(), "shared.trained_by": _word("both", "lm", "domain", "none"),
    "shared.initial": _word("domain", "random"),
    "domain.popularity": _number(0),
    "domain.model": _word(*DOMAIN_MODELS), "domain.n_layers": _whole(0),
    "domain.layer_weights": _word("uniform", "learned"), "domain.backend": _word(*BACKENDS),
    "domain.learning_rate": _positive(), "domain.regularisation": _number(0), "domain.batch_size": _whole(1),
    "domain.epochs": _whole(1), "domain.evaluate_every": _whole(1),
    "domain.test_graph": _word("train", "train+validation"),
    "mf.learning_rate": _positive(), "mf.regularisation": _number(0), "mf.epochs": _whole(1),
    "lm_alone.ids_times": _positive(), "lm_alone.text_epochs": _positive(),
    "mutual.reads": _word("layer0", "propagated"), "mutual.align": _word(*ALIGN),
    "mutual.user_dropout": _number(0, 1.0001), "mutual.learning_rate_bridge": _positive(),
    "mutual.temperature": _positive(), "mutual.rounds": _whole(0), "mutual.lm_epochs": _number(0),
    "mutual.lm_epochs_a_round": _number(0), "mutual.domain_epochs_a_round": _whole(0),
    "mutual.domain_learning_rate": _positive(), "mutual.kl_users": _whole(1), "mutual.kl_items": _whole(0),
    "mutual.distill_epochs": _whole(1), "mutual.distill_learning_rate": _positive(),
    **{f"mutual.lm.{name}": _number(0) for name in ("item", "text", "align_user", "align_item", "kl")},
    **{f"mutual.domain.{name}": _number(0) for name in ("bpr", "align_user", "align_item", "kl")},
    "evaluate.protocols": _words(1), "evaluate.text_protocols": _words(0), "evaluate.chunk": _whole(1),
    "evaluate.text_history": _whole(1),
    "distributed.coordinator": _TEXT, "distributed.processes": _whole(1), "distributed.process": _whole(0),
    "dry_run.n_users": _whole(0), "dry_run.n_items": _whole(0), "dry_run.devices": _whole(1),
    "dry_run.device": _word("a100", "h100", "h200", "tpu_v5e", "tpu_v5p", "tpu_v6e"), "dry_run.compile": _FLAG,
    **{f"mesh.{axis}": _whole(-1) for axis in mesh.AXES},
    "runtime.checkpoint_seconds": _number(0), "runtime.tensorboard": _FLAG,
}  # fmt: skip
_FREE = ("data.options", "data.candidates", "domain.options")  # whose keys the config chooses
_OPTIONAL = ("name",)


def check_config(config: ml_collections.ConfigDict, *, paths: bool = True) -> None:
    """Checks every setting by itself, then together, then the paths and the devices.

    Args:
      config: as an experiment's `get_config()` makes it.
      paths: whether what the config names must be there.

    Raises:
      InputError: names the setting, says what it may be.
    """
    _check_settings(config)
    _check_data(config)
    _check_models(config)
    _check_evaluation(config)
    if paths:
        _check_paths(config)
    _check_devices(config, n_devices=parallel.device_count())


def name_config(config: ml_collections.ConfigDict, path: str) -> ml_collections.ConfigDict:
    """Notes the experiment file's name, with its argument, in the config, for reports."""
    file, _, argument = path.partition(":")
    with config.unlocked():
        config.name = Path(file).stem + (f"_{argument}" if argument else "")
    return config


def _check_settings(config) -> None:
    settings = dict(_flatten(config))
    for key, value in settings.items():
        if key.rpartition(".")[0] in _FREE or key in _FREE:
            continue
        if key not in RULES:
            near = difflib.get_close_matches(key, RULES, n=1)
            raise InputError(f"config.{key} is no setting" + (f"; did you mean config.{near[0]}?" if near else "."))
        if not RULES[key].holds(value):
            raise InputError(f"config.{key} is {value!r}; it must be {RULES[key].words}.")
    for key in RULES:
        if key not in settings and key not in _OPTIONAL:
            raise InputError(f"config.{key} is missing; begin with experiments/defaults.py, which has every setting.")


def _check_data(config) -> None:
    data = config.data
    options = data.options.to_dict()
    known = [name for name in inspect.signature(_READERS[data.kind]).parameters if name not in ("path", "seed")]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(known) or 'none'}."
            raise InputError(f"config.data.options.{name} is no option of the data kind {data.kind}{meant}")
    if data.kind == "twins" and data.path:
        raise InputError(
            "config.data.path is set, but the data kind twins is generated; set data.kind, or leave path empty."
        )
    if data.kind == "adjacency" and tuple(config.models) != ("item_pop",):
        raise InputError(
            "config.data.kind adjacency has no validation part, which only models=('item_pop',) can do without."
        )
    if data.split != "leave_one_out" and not (
        data.validation > 0 and data.test > 0 and data.validation + data.test < 1
    ):
        raise InputError(
            f"config.data.validation and data.test must be above 0 and below 1 together with split {data.split}."
        )
    for name, n in data.candidates.items():
        if not re.fullmatch(r"\w+", name) or name in ("full", *SLICE_PROTOCOLS):
            raise InputError(f"config.data.candidates.{name} is a reserved or unusable name; call it cand{n + 1}, say.")
        if not _is(n, int) or n < 1:
            raise InputError(
                f"config.data.candidates.{name} is {n!r}; it must be a whole number of negatives, at least 1."
            )


def _check_models(config) -> None:
    prompts = config.prompts
    _check_lm(config)
    needed = prompts.max_title_tokens * (2 if config.data.user_fields else 1) + 4
    if prompts.length < needed:
        raise InputError(
            f"config.prompts.length {prompts.length} cannot hold one title of prompts.max_title_tokens "
            f"{prompts.max_title_tokens}; use a length of at least {needed}."
        )
    if config.domain.model == "mf" and "mf" in config.models:
        raise InputError(
            "config.models holds mf and domain.model is mf too; take mf out of models, or choose another arm."
        )
    if config.domain.model == "sasrec" and config.shared.width % 2:
        raise InputError(f"config.shared.width {config.shared.width} must be even for domain.model sasrec.")
    m = config.mutual
    trained = m.lm_epochs or (m.rounds and m.lm_epochs_a_round)
    if "bdlm" in config.models and not trained:
        raise InputError(
            "config.models holds bdlm, but no LM epoch is asked for; raise mutual.lm_epochs or mutual.rounds."
        )
    if "ids_lm" in config.models and not trained:
        raise InputError(
            "config.models holds ids_lm, but mutual.lm_epochs and mutual.rounds give it no epoch; raise one."
        )
    if "bdlm" in config.models and not m.lm.item:
        raise InputError("config.mutual.lm.item is 0, so BDLM's LM would never learn to recommend; raise it.")


def _check_lm(config) -> None:
    lm = config.lm
    if lm.path and lm.config:
        raise InputError("config.lm.path and lm.config are both set; the weights of a path have their own config.json.")
    if lm.accumulate > 1 and config.mutual.align in WHOLE_BATCH:
        others = " or ".join(name for name in ALIGN if name not in WHOLE_BATCH)
        raise InputError(
            f"config.lm.accumulate needs mutual.align {others}: {config.mutual.align} compares a whole batch."
        )
    if lm.batch_rows % lm.accumulate:
        raise InputError(
            f"config.lm.batch_rows {lm.batch_rows} does not divide into lm.accumulate {lm.accumulate} parts."
        )
    if lm.trains == "bridge" and lm.path and config.pretrain.corpus:
        raise InputError("config.lm.trains bridge freezes the decoder, so pretrain.corpus has nothing to train.")
    if lm.attention == "cudnn" and lm.dtype != "bfloat16":
        raise InputError('config.lm.attention "cudnn" computes in lm.dtype bfloat16 alone; set it, or use "xla".')
    if lm.path or lm.config:
        shape = arms.own_lm_config(config)
        if shape.positions == "learned" and config.prompts.length > shape.max_positions:
            raise InputError(
                f"config.prompts.length {config.prompts.length} is above the {shape.max_positions} positions of "
                f"{lm.path or lm.config}; shorten it."
            )
        return
    if lm.width % lm.n_heads:
        raise InputError(f"config.lm.width {lm.width} is no multiple of lm.n_heads {lm.n_heads}; change one of them.")
    if lm.n_heads % lm.n_kv_heads:
        raise InputError(
            f"config.lm.n_heads {lm.n_heads} is no multiple of lm.n_kv_heads {lm.n_kv_heads}; change one of them."
        )
    if (lm.width // lm.n_heads) % 2:
        raise InputError(f"config.lm.width / lm.n_heads is {lm.width // lm.n_heads}; rotary positions need it even.")


def _check_evaluation(config) -> None:
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
        raise InputError(
            f"config.select is {config.select!r}; it must be {' or '.join(SELECTABLE)}, "
            f"a slash, and one of {', '.join(protocols)}."
        )


def _check_paths(config) -> None:
    data, tokenizer = config.data, config.tokenizer.path
    if data.kind != "twins" and not data.path:
        raise InputError(f"config.data.path is empty; give the file or folder that the data kind {data.kind} reads.")
    for key, path in (
        ("data.path", data.path),
        ("tokenizer.path", tokenizer),
        ("pretrain.corpus", config.pretrain.corpus),
    ):
        if path and not Path(path).exists():
            raise InputError(
                f"config.{key}: {path} is not there; check the path, or run from the folder it is relative to."
            )
    if config.pretrain.corpus and not Path(config.pretrain.corpus).is_file():
        raise InputError(
            f"config.pretrain.corpus: {config.pretrain.corpus} is no file; give a text file, a document a line."
        )


def _check_devices(config, *, n_devices: int) -> None:
    if config.parallel == "jit":
        return
    if config.parallel == "mesh":
        sizes = mesh.mesh_sizes(config.mesh.to_dict(), n_devices)
        n_devices = sizes["data"] * sizes["fsdp"]  # a batch is not split over tensor
    for key, size in (
        ("lm.batch_rows", config.lm.batch_rows),
        ("domain.batch_size", config.domain.batch_size),
        ("mutual.kl_users", config.mutual.kl_users),
    ):
        if size % n_devices:
            raise InputError(
                f"config.{key} {size} does not divide over {n_devices} devices with parallel {config.parallel}; "
                f"use {max(1, round(size / n_devices)) * n_devices}."
            )


def _flatten(config, prefix: str = ""):
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict) and prefix + name not in _FREE:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
