"""What is left of a run for serving: arms that load apart from each other, and the catalogue they speak of.

BDLM's arms are called "domain" and "lm", a model alone as its row of the results. A domain model is two tables and,
where its score is their inner product, NumPy alone: it loads without JAX, without transformers and without a language
model's weights. What needs them is imported where it is used.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bdlm_jax.evaluation.lift import Lift
from bdlm_jax.runtime.files import (
    damaged_file,
    file_sha256,
    load_safetensors,
    read_json,
    replacing,
    save_safetensors,
    write_checksums,
    write_json,
)
from bdlm_jax.serving.catalogue import Catalogue
from bdlm_jax.types import Array, InputError, Params

FORMAT = 4
_FACTS = ("model", "options", "dot", "reads_history")  # of a domain model, in the manifest


@dataclasses.dataclass(frozen=True, eq=False)
class ServedDomain:
    """A domain model: encoded tables, and what rebuilds the model where they do not suffice."""

    model: str  # a name of `domain.models.MODELS`
    user_UD: np.ndarray  # the known users
    item_ID: np.ndarray
    degree_I: np.ndarray  # interactions over which the tables were propagated
    domain: Params = dataclasses.field(default_factory=dict)  # what the model owns beside the tables
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # the model's settings
    dot: bool = True  # the score is the inner product of two rows
    reads_history: bool = False  # the model makes a new user's row of their history
    lift: Any = None  # `Lift`, where cold items' rows are moved
    search: Any = None  # of `index.make_index`, where items are looked for by one

    @cached_property
    def items(self) -> np.ndarray:
        """Rows of the items as they are scored, of which near ones are alike."""
        return self.lift.move(self.item_ID) if self.lift else self.item_ID

    @cached_property
    def sieve(self):
        """Of `sieve.make_sieve`, which copies the items' table in a byte a number."""
        from bdlm_jax.serving.sieve import make_sieve

        return make_sieve(self.items)

    @cached_property
    def rebuilt(self):
        """The model itself, which knows nobody: it reads and scores."""
        from bdlm_jax.domain.arm import Inputs
        from bdlm_jax.domain.models import make_arm

        return make_arm(self.model, Inputs(width=self.item_ID.shape[1]), self.options)


@dataclasses.dataclass(frozen=True, eq=False)
class ServedLM:
    """A language model: decoder, rows of the id tokens, and how its prompts are made."""

    params: Params  # with adapters beside the decoder where they are not to touch plain text
    config: Any  # `LMConfig`
    id_rows_XM: Array  # of <uid> and <iid>
    vocabulary: Any  # `Vocabulary`
    titles: list[np.ndarray]  # tokens of every item
    contexts: list[np.ndarray] | None  # tokens of every user
    prompts: Any  # `PromptOptions`
    texts: Any = None  # `TextHead`, where items' texts weigh in the scores
    lift: Any = None  # `Lift`, where cold items' rows are moved

    @cached_property
    def items(self) -> np.ndarray:
        """Rows of the items' tokens as they are scored, of which near ones are alike."""
        first = self.vocabulary.item_tokens.start - self.vocabulary.n_text
        rows_IM = np.asarray(self.id_rows_XM[first : first + len(self.titles)])
        return self.lift.move(rows_IM) if self.lift else rows_IM

    @cached_property
    def placed(self) -> tuple[Params, Array]:
        """Decoder, with adapters merged, and rows where JAX computes, put there once."""
        import jax

        from bdlm_jax.lm import lora

        return jax.device_put((lora.merge(self.params), self.id_rows_XM))


Arm = ServedDomain | ServedLM


def served_arms(workdir: str | os.PathLike) -> dict[str, dict]:
    """The manifest's facts of every arm that is served, in the order of the run's models; none where nothing is.

    "kind" is "domain" or "lm", "row" the model's name in the results.
    """
    path = Path(workdir, "serving", "serving.json")
    if not path.is_file():
        return {}
    manifest = _read(path)
    try:
        return {facts["arm"]: facts for facts in manifest["arms"]} if manifest.get("format") == FORMAT else {}
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no manifest: delete {path.parent}, run bdlm_jax.main again.") from error


def is_served(workdir: str | os.PathLike) -> bool:
    """Tells whether an earlier start of the run has written what is served, and all of it is whole."""
    try:
        return bool(served_arms(workdir)) and damaged_file(Path(workdir, "serving")) is None
    except InputError:
        return False


def forget_damaged(workdir: str | os.PathLike) -> None:
    """Removes what is served unless all of it is whole, so that the run writes it anew."""
    if not is_served(workdir):
        shutil.rmtree(Path(workdir, "serving"), ignore_errors=True)


def write_arm(workdir: str | os.PathLike, name: str, arm: Arm, catalogue: Catalogue, *, row: str = "") -> None:
    """Writes an arm to workdir/serving, and the catalogue with the first; it is served once all of it is on disk."""
    folder, arms = Path(workdir, "serving"), served_arms(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    written = [f"{name}.safetensors", "serving.json"]
    if first := not arms:
        write_json(folder / "catalogue.json", catalogue.names | {"dropped": catalogue.dropped})
        save_safetensors(folder / "catalogue.safetensors", {"indptr": catalogue.indptr, "item": catalogue.item})
        written += ["catalogue.json", "catalogue.safetensors"]
    facts, tensors = (_lm if isinstance(arm, ServedLM) else _domain)(arm)
    if isinstance(arm, ServedLM) and not any(other["kind"] == "lm" for other in arms.values()):
        from bdlm_jax.lm.vocabulary import save_tokenizer

        with replacing(folder / "tokenizer") as tokenizer:  # one for all, for a run has one
            save_tokenizer(arm.vocabulary.tokenizer, tokenizer)
        written += [path.relative_to(folder).as_posix() for path in folder.glob("tokenizer/*")]
    save_safetensors(folder / f"{name}.safetensors", tensors)
    arms[name] = {"arm": name, "row": row or name, **facts}
    write_json(folder / "serving.json", {"format": FORMAT, "arms": [*arms.values()]})
    write_checksums(folder, written, keep=not first)  # an arm is not read again for each that follows


def load_catalogue(workdir: str | os.PathLike) -> Catalogue:
    folder, _ = _open(workdir)
    with _shaped(folder / "catalogue.json", "catalogue"):
        catalogue = Catalogue(**_read(folder / "catalogue.json"), **_read(folder / "catalogue.safetensors"))
        n_users, n_items = len(catalogue.indptr) - 1, len(catalogue.item_ids)
        whole = len(catalogue.user_ids) == n_users and len(catalogue.titles) == n_items
        if not whole or catalogue.item.max(initial=0) >= n_items or catalogue.indptr[-1] != len(catalogue.item):
            raise ValueError("its names and its tables are not of one length")
    return catalogue


def find_arm(workdir: str | os.PathLike, name: str = "", *, kind: str = "") -> str:
    """The name of an arm that is served: by default BDLM's, or else the first (of a kind, where one is given).

    An arm is also found by its name in the results.
    """
    _, arms = _open(workdir)
    name = next((arm for arm, facts in arms.items() if name and facts.get("row") == name), name)
    fitting = [arm for arm, facts in arms.items() if kind in ("", facts["kind"])]
    if not fitting:
        what = {"domain": "domain model", "lm": "language model"}[kind]
        raise InputError(f"{workdir} serves no {what}, but {', '.join(arms)}: train one in it, or take another run.")
    if name and name not in fitting:
        raise InputError(f"arm {name!r} is none of this run's: choose one of {', '.join(fitting)}.")
    return name or min(fitting, key=("domain", "lm", *fitting).index)


def identity(workdir: str | os.PathLike, name: str = "") -> str:
    """Tells an arm, by default `find_arm`'s, from any that was trained or written otherwise: its name and checksums."""
    folder, name = Path(workdir, "serving"), find_arm(workdir, name)
    return f"{name} {file_sha256(folder / f'{name}.safetensors')} {file_sha256(folder / 'catalogue.json')}"


def load_arm(workdir: str | os.PathLike, name: str = "") -> Arm:
    """Reads an arm, by default `find_arm`'s."""
    name = find_arm(workdir, name)
    return (load_lm_arm if _open(workdir)[1][name]["kind"] == "lm" else load_domain_arm)(workdir, name)


def load_domain_arm(workdir: str | os.PathLike, name: str = "") -> ServedDomain:
    """Reads a domain model; neither JAX nor an LM's weights are touched."""
    name = find_arm(workdir, name, kind="domain")
    folder, arms = _open(workdir)
    tree = _read(folder / f"{name}.safetensors")
    with _shaped(folder / "serving.json", "domain model"):
        tables = {"user_UD": tree["user"], "item_ID": tree["item"], "degree_I": tree["degree"]}
        more = {"domain": tree.get("domain", {}), "lift": _lift(tree)}
        return ServedDomain(**tables, **more, **{fact: arms[name][fact] for fact in _FACTS})


def load_lm_arm(workdir: str | os.PathLike, name: str = "") -> ServedLM:
    from bdlm_jax.lm.config import LMConfig
    from bdlm_jax.lm.prompts import PromptOptions
    from bdlm_jax.lm.text_head import TextHead
    from bdlm_jax.lm.vocabulary import Vocabulary, load_tokenizer

    name = find_arm(workdir, name, kind="lm")
    folder, arms = _open(workdir)
    if damaged := damaged_file(folder, *(path.relative_to(folder).as_posix() for path in folder.glob("tokenizer/*"))):
        raise _refusal(damaged, "its checksum differs")
    facts, tree = arms[name], _read(folder / f"{name}.safetensors")
    with _shaped(folder / "serving.json", "language model"):
        config, words = LMConfig(**facts["config"]), facts["vocabulary"]
        words["chat"] = tuple(words.get("chat", ()))  # JSON has lists
        tokenizer = load_tokenizer(folder / "tokenizer")
        return ServedLM(
            params=tree["lm"],
            config=config,
            id_rows_XM=tree["id_rows"],
            vocabulary=Vocabulary(tokenizer, min_text=config.vocab_size, **words),
            titles=_cut(tree["titles"]),
            contexts=_cut(tree["contexts"]) if "contexts" in tree else None,
            prompts=PromptOptions(**facts["prompts"]),
            texts=TextHead(tree["content"], **facts["texts"]) if facts.get("texts") else None,
            lift=_lift(tree),
        )


def _domain(arm: ServedDomain) -> tuple[dict, dict]:
    tensors = {"user": arm.user_UD, "item": arm.item_ID, "degree": arm.degree_I, "domain": arm.domain}
    tensors |= {"lift": arm.lift._asdict()} if arm.lift else {}
    return {"kind": "domain", **{fact: getattr(arm, fact) for fact in _FACTS}}, tensors


def _lm(arm: ServedLM) -> tuple[dict, dict]:
    tensors = {"lm": arm.params, "id_rows": arm.id_rows_XM, "titles": _joined(arm.titles)}
    tensors |= {"contexts": _joined(arm.contexts)} if arm.contexts else {}
    tensors |= {"content": arm.texts.content_IC} if arm.texts else {}
    tensors |= {"lift": arm.lift._asdict()} if arm.lift else {}
    facts = {
        "kind": "lm",
        "config": dataclasses.asdict(arm.config),
        "vocabulary": {name: getattr(arm.vocabulary, name) for name in ("n_users", "n_items", "chat")},
        "prompts": dataclasses.asdict(arm.prompts),
        "texts": {"last": arm.texts.last, "mean": arm.texts.mean} if arm.texts else None,
    }
    return facts, tensors


def _lift(tree: dict) -> Lift | None:
    return Lift(**tree["lift"]) if "lift" in tree else None


def _joined(arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    ends = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    return {"indptr": ends, "token": np.concatenate([np.zeros(0, np.int32), *arrays]).astype(np.int32)}


def _cut(joined: dict[str, np.ndarray]) -> list[np.ndarray]:
    return np.split(joined["token"], joined["indptr"][1:-1])


def _open(workdir: str | os.PathLike) -> tuple[Path, dict[str, dict]]:
    folder = Path(workdir, "serving")
    if not (folder / "serving.json").is_file():
        raise InputError(
            f"{workdir} holds no finished run that recommends: run bdlm_jax.main on it first, with a domain model, "
            "ids_lm or bdlm among its models."
        )
    if not (arms := served_arms(workdir)):
        raise InputError(f"{folder} was written by another version of bdlm_jax: run bdlm_jax.main on {workdir} again.")
    return folder, arms


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
