"""What is left of a run for serving: two arms that load apart from each other, and the catalogue they speak of.

The domain arm is two tables and, for inner-product models, NumPy alone: it loads without JAX, without transformers and
without the language model's weights. What needs them is imported where it is used.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bdlm_jax.runtime.files import (
    damaged_file,
    load_safetensors,
    read_json,
    replacing,
    save_safetensors,
    write_checksums,
    write_json,
)
from bdlm_jax.serving.catalogue import Catalogue
from bdlm_jax.types import Array, InputError, Params

FORMAT = 3
_FACTS = ("model", "options", "dot", "reads_history")  # of the domain arm, in the manifest


@dataclasses.dataclass(frozen=True, eq=False)
class ServedDomain:
    """The domain arm: encoded tables, and what rebuilds the model where they do not suffice."""

    model: str  # a name of `domain.models.MODELS`
    user_UD: np.ndarray  # the known users
    item_ID: np.ndarray
    degree_I: np.ndarray  # interactions over which the tables were propagated
    domain: Params = dataclasses.field(default_factory=dict)  # what the model owns beside the tables
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # the model's settings
    dot: bool = True  # the score is the inner product of two rows
    reads_history: bool = False  # the model makes a new user's row of their history

    @cached_property
    def rebuilt(self):
        """The model itself, which knows nobody: it reads and scores."""
        from bdlm_jax.domain.arm import Inputs
        from bdlm_jax.domain.models import make_arm

        return make_arm(self.model, Inputs(width=self.item_ID.shape[1]), self.options)


@dataclasses.dataclass(frozen=True, eq=False)
class ServedLM:
    """The LM arm: decoder, rows of the id tokens, and how its prompts are made."""

    params: Params
    config: Any  # `LMConfig`
    id_rows_XM: Array  # of <uid> and <iid>
    vocabulary: Any  # `Vocabulary`
    titles: list[np.ndarray]  # tokens of every item
    contexts: list[np.ndarray] | None  # tokens of every user
    prompts: Any  # `PromptOptions`
    texts: Any = None  # `TextHead`, where items' texts weigh in the scores


def is_served(workdir: str | os.PathLike) -> bool:
    """Tells whether an earlier start of the run has written what is served, and all of it is whole."""
    path = Path(workdir, "serving", "serving.json")
    try:
        return path.is_file() and damaged_file(path.parent) is None and _read(path).get("format") == FORMAT
    except InputError:
        return False


def write_serving(workdir: str | os.PathLike, catalogue: Catalogue, domain: ServedDomain, lm: ServedLM) -> None:
    """Writes workdir/serving, from which `load_*` give the same records back; whole or not at all."""
    tables = {"user": domain.user_UD, "item": domain.item_ID, "degree": domain.degree_I, "domain": domain.domain}
    tokens = {"titles": _joined(lm.titles)} | ({"contexts": _joined(lm.contexts)} if lm.contexts else {})
    tokens |= {"content": lm.texts.content_IC} if lm.texts else {}
    manifest = {
        "format": FORMAT,
        "domain": {name: getattr(domain, name) for name in _FACTS},
        "lm": {
            "config": dataclasses.asdict(lm.config),
            "vocabulary": {"n_users": lm.vocabulary.n_users, "n_items": lm.vocabulary.n_items},
            "prompts": dataclasses.asdict(lm.prompts),
            "texts": {"last": lm.texts.last, "mean": lm.texts.mean} if lm.texts else None,
        },
    }
    with replacing(Path(workdir, "serving")) as folder:
        folder.mkdir()
        (folder / "catalogue.json").write_text(
            json.dumps(catalogue.names | {"dropped": catalogue.dropped}), encoding="utf-8"
        )
        save_safetensors(folder / "catalogue.safetensors", {"indptr": catalogue.indptr, "item": catalogue.item})
        save_safetensors(folder / "domain.safetensors", tables)
        save_safetensors(folder / "lm.safetensors", {"lm": lm.params, "id_rows": lm.id_rows_XM, **tokens})
        lm.vocabulary.tokenizer.save_pretrained(str(folder / "tokenizer"))
        write_json(folder / "serving.json", manifest)
        write_checksums(folder)


def load_catalogue(workdir: str | os.PathLike) -> Catalogue:
    folder, _ = _open(workdir)
    with _shaped(folder / "catalogue.json", "catalogue"):
        catalogue = Catalogue(**_read(folder / "catalogue.json"), **_read(folder / "catalogue.safetensors"))
        n_users, n_items = len(catalogue.indptr) - 1, len(catalogue.item_ids)
        whole = len(catalogue.user_ids) == n_users and len(catalogue.titles) == n_items
        if not whole or catalogue.item.max(initial=0) >= n_items or catalogue.indptr[-1] != len(catalogue.item):
            raise ValueError("its names and its tables are not of one length")
    return catalogue


def load_domain_arm(workdir: str | os.PathLike) -> ServedDomain:
    """Reads the domain arm; neither JAX nor the LM's weights are touched."""
    folder, manifest = _open(workdir)
    tree = _read(folder / "domain.safetensors")
    with _shaped(folder / "serving.json", "domain arm"):
        tables = {"user_UD": tree["user"], "item_ID": tree["item"], "degree_I": tree["degree"]}
        return ServedDomain(**tables, domain=tree.get("domain", {}), **manifest["domain"])


def load_lm_arm(workdir: str | os.PathLike) -> ServedLM:
    from bdlm_jax.lm.config import LMConfig
    from bdlm_jax.lm.prompts import PromptOptions
    from bdlm_jax.lm.text_head import TextHead
    from bdlm_jax.lm.vocabulary import Vocabulary, load_tokenizer

    folder, manifest = _open(workdir)
    if damaged := damaged_file(folder, *(path.relative_to(folder).as_posix() for path in folder.glob("tokenizer/*"))):
        raise _refusal(damaged, "its checksum differs")
    tree = _read(folder / "lm.safetensors")
    with _shaped(folder / "serving.json", "LM arm"):
        facts = manifest["lm"]
        config = LMConfig(**facts["config"])
        tokenizer = load_tokenizer(folder / "tokenizer")
        return ServedLM(
            params=tree["lm"],
            config=config,
            id_rows_XM=tree["id_rows"],
            vocabulary=Vocabulary(tokenizer, min_text=config.vocab_size, **facts["vocabulary"]),
            titles=_cut(tree["titles"]),
            contexts=_cut(tree["contexts"]) if "contexts" in tree else None,
            prompts=PromptOptions(**facts["prompts"]),
            texts=TextHead(tree["content"], **facts["texts"]) if facts.get("texts") else None,
        )


def _joined(arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    ends = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    return {"indptr": ends, "token": np.concatenate([np.zeros(0, np.int32), *arrays]).astype(np.int32)}


def _cut(joined: dict[str, np.ndarray]) -> list[np.ndarray]:
    return np.split(joined["token"], joined["indptr"][1:-1])


def _open(workdir: str | os.PathLike) -> tuple[Path, dict]:
    folder = Path(workdir, "serving")
    if not (folder / "serving.json").is_file():
        raise InputError(
            f'{workdir} holds no finished run with "bdlm" among its models: run bdlm_jax.main on it first.'
        )
    manifest = _read(folder / "serving.json")
    if manifest.get("format") != FORMAT:
        raise InputError(f"{folder} was written by another version of bdlm_jax: run bdlm_jax.main on {workdir} again.")
    return folder, manifest


def _read(path: Path) -> dict:
    remedy = f"delete {path.parent} and run bdlm_jax.main again"
    if path.suffix != ".safetensors":
        if damaged_file(path.parent, path.name):
            raise _refusal(path, "its checksum differs")
        return read_json(path, remedy=remedy)
    try:
        return load_safetensors(path)
    except InputError as error:
        raise InputError(f"{str(error).rstrip('.')}: {remedy}.") from error


@contextlib.contextmanager
def _shaped(path: Path, what: str) -> Iterator[None]:
    """Names the file where a block does not find in it what an `what` has."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise InputError(
            f"{path} holds no {what} ({error}): delete {path.parent} and run bdlm_jax.main again."
        ) from error


def _refusal(path: Path, why: object) -> InputError:
    return InputError(f"{path} cannot be read ({why}): delete {path.parent} and run bdlm_jax.main again.")
