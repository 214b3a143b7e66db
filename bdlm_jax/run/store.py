"""Stages that runs share: each lies in `runtime.store` under the hash of all that its training reads.

The run directory holds a link. What a stage takes from other stages is hashed by its content, so a change of settings
trains again what reads it and what follows from it, and nothing else. Code counts by the package's version alone.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import jax
import ml_collections
import numpy as np

from bdlm_jax import __version__
from bdlm_jax.domain.closed_form import CLOSED_FORM
from bdlm_jax.domain.models import MODELS
from bdlm_jax.run.prepare import Data, Texts, lm_shape
from bdlm_jax.runtime.files import write_json
from bdlm_jax.runtime.log import Stopped
from bdlm_jax.types import leaf_name

_LOG = logging.getLogger(__name__)

# Settings that no training reads, as patterns of keys. Data, candidates, words and teachers are hashed by content.
_NEVER = r"""name models tuned_on runtime\..* dry_run\..* distributed\..* tokenizer\..* data\.(?!candidates_seed).*
    evaluate\.(protocols|text_protocols|cases|cold_lift) mutual\.teacher"""
_ALONE = r"""domain\..* shared\.trained_by pretrain\.(corpus|epochs|learning_rate)
    prompts\.(kind|titled_share|card_copies|max_title_tokens|gloss) """
_TAUGHT = r"lm_alone\..* pretrain\.(corpus|epochs|learning_rate) domain\.epochs evaluate\.text_history "
# Those that a stage does not read besides; what is not named here is hashed.
UNREAD = {
    "pretrain": r"""lm_alone\..* mutual\..* domain\..* select evaluate\..* lm\.learning_rate_shared
        shared\.trained_by
        prompts\.(?!(length|user_dropout)$).* pretrain\.(replay_share|samples)""",
    "text_lm": _ALONE + r"mutual\..* lm_alone\.(?!text_epochs$).* prompts\.read_named",
    "ids_lm": _ALONE + r"mutual\.(?!(lm_epochs.*|rounds)$).* lm_alone\.text_epochs evaluate\.text_history",
    "bdlm": _TAUGHT + r"mutual\.(distill_|text_|taught\.).* domain\.test_graph",
    "taught": _TAUGHT + r"mutual\.(distill_epochs|text_.*) domain\.test_graph",
    "distill": _TAUGHT + r"mutual\.(text_|taught\.).* domain\.test_graph",
    "refresh": _TAUGHT + r"mutual\.(text_|taught\.).* evaluate\..*",
    **dict.fromkeys(MODELS, r"""lm\..* pretrain\..* lm_alone\..* mutual\..* prompts\.(?!max_items$).*
        shared\.trained_by domain\.test_graph evaluate\.text_history"""),
}  # fmt: skip


def is_read(config: ml_collections.ConfigDict, stage: str, key: str) -> bool:
    """Says whether a stage's training may read a setting; of the models' own sections it reads one at most."""
    section = key.split(".")[0]
    others = section in (*MODELS, *CLOSED_FORM) and section != stage
    if others and (stage in MODELS or section != config.domain.model or not is_read(config, stage, "domain.model")):
        return False
    return not any(re.fullmatch(pattern, key) for pattern in f"{_NEVER} {UNREAD.get(stage, '')}".split())


def stage_inputs(
    config: ml_collections.ConfigDict,
    data: Data,
    texts: Texts,
    stage: str,
    *,
    parents: Any,
    select: str = "",
    **facts: Any,
) -> dict:
    """All that a stage's training reads, short enough to keep.

    Args:
      parents: what the stage takes from other stages, a tree of arrays.
      select: the metric that validation chooses by; only its candidates count, and none without it.
      facts: what else tells stages of one name apart, as JSON has it.
    """
    settings = dict(_flat(json.loads(config.to_json_best_effort())))
    protocol = select.partition("/")[2]
    return {
        "stage": stage,
        "version": __version__,
        "settings": {key: value for key, value in settings.items() if is_read(config, stage, key)},
        "table": data.fingerprint["sha256"],
        "parts": _sha(data.split.part_E),
        "candidates": data.fingerprint["candidates"].get(f"validation/{protocol}", ""),
        "words": None if stage in MODELS else _sha(_words(config, data, texts)),
        "parents": _sha(parents),
        "select": select,
        **facts,
    }


@contextlib.contextmanager
def stage_folder(store: str, link: Path, inputs: Callable[[], dict], *, stop: Any = None) -> Iterator[Path]:
    """Gives the folder in which a stage is trained, held against other processes, and leaves `link` to it.

    Without a store, and where a run began without one, that is `link` itself. A link that leads somewhere is followed:
    a run goes on where it was. Who waits for another's training can be stopped by `stop`.
    """
    if not store or (link.is_dir() and not link.is_symlink()):
        yield link
        return
    told = None
    if not link.is_dir():
        told = inputs()
        name = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
        folder = Path(store) / f"{told['stage']}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        _link(link, folder)
    folder = link.resolve()
    with _hold(folder, stop):
        if told:
            write_json(folder / "inputs.json", told)
        yield folder


def _hold(folder: Path, stop) -> contextlib.AbstractContextManager:
    """Waits for its turn; the system lets go of the lock of a process that dies."""
    lock, waits = filelock.FileLock(folder / "lock"), False
    while True:
        try:
            return lock.acquire(timeout=1)
        except filelock.Timeout:
            if not waits:
                _LOG.info("another run trains %s; waiting for it", folder)
            waits = True
            if stop is not None and stop.requested:
                raise Stopped(stop.code) from None


def _link(link: Path, folder: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    partial = link.with_name(link.name + ".partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(os.path.relpath(folder.resolve(), link.parent.resolve()), target_is_directory=True)
    os.replace(partial, link)


def _words(config: ml_collections.ConfigDict, data: Data, texts: Texts) -> dict:
    """What LM stages read beside interactions; the decoder's shape, too, for it may come from a file."""
    known = sorted(texts.vocabulary.tokenizer.get_vocab().items())
    tokens = {"titles": texts.titles, "contexts": texts.contexts or [], "cut": [np.array(sorted(texts.cut), np.int32)]}
    tokens["cards"] = texts.cards or []
    return {
        "shape": repr(lm_shape(config, texts.vocabulary.n_text)),
        "vocabulary": json.dumps([texts.vocabulary.n_text, known]),
        "corpus": "\x1e".join(data.corpus),
        **{name: np.concatenate([np.append(t, -1) for t in some]) for name, some in tokens.items() if some},
    }


def _sha(tree: Any) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(leaf.encode("utf-8", "surrogatepass") if isinstance(leaf, str) else leaf)
        digest.update(f"{leaf_name(path)} {array.dtype} {np.shape(leaf)}\x1d".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _flat(tree: dict, prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
