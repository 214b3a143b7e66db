"""What is left of a run for serving: two arms that load apart from each other, and the catalogue they speak of.

The domain arm is two tables and, for inner-product models, NumPy alone: it loads without JAX, without transformers and
without the language model's weights. What needs them is imported where it is used.
"""

import dataclasses
import json
import os
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bdlm_jax.types import Array, InputError, Params

FORMAT = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Catalogue:
    """Who and what a run knows: raw ids, titles, and every known interaction in time order.

    Args:
        user_ids: U raw ids.
        item_ids: I raw ids.
        titles: I titles.
        indptr: (U+1,) where each user's items begin in `item`.
        item: item indices, of training, validation and test together.
    """

    user_ids: list[str]
    item_ids: list[str]
    titles: list[str]
    indptr: np.ndarray
    item: np.ndarray

    @cached_property
    def user_index(self) -> dict[str, int]:
        return {raw: index for index, raw in enumerate(self.user_ids)}

    @cached_property
    def item_index(self) -> dict[str, int]:
        return {raw: index for index, raw in enumerate(self.item_ids)}

    @cached_property
    def title_index(self) -> dict[str, list[int]]:
        """The items of every title, in lower case."""
        made: dict[str, list[int]] = {}
        for index, title in enumerate(self.titles):
            made.setdefault(title.strip().casefold(), []).append(index)
        return made

    def history(self, user: int) -> np.ndarray:
        """All items of a user, oldest first."""
        return self.item[self.indptr[user] : self.indptr[user + 1]]


@dataclasses.dataclass(frozen=True, eq=False)
class ServedDomain:
    """The domain arm: encoded tables and, where the score is no inner product, its params.

    Args:
        model: "lightgcn", "mf", "ncf" or "sasrec".
        user_UD: (U, D) representations of the known users.
        item_ID: (I, D).
        degree_I: (I,) interactions over which the tables were propagated.
        domain: what the model owns beside the tables; {} for inner-product models of two tables.
        options: what rebuilds the model ("width", "length").
    """

    model: str
    user_UD: np.ndarray
    item_ID: np.ndarray
    degree_I: np.ndarray
    domain: Params
    options: dict[str, int]


@dataclasses.dataclass(frozen=True, eq=False)
class ServedLM:
    """The LM arm: decoder, rows of the id tokens, and how its prompts are made.

    Args:
        params: the decoder's params.
        config: its `LMConfig`.
        id_rows_XM: (X, M) rows of <uid> and <iid>.
        vocabulary: numbers the tokens.
        titles: token array of every item.
        contexts: token array of every user, or None.
        prompts: options of `history_prompt` ("kind", "user_token", "unnamed", …).
    """

    params: Params
    config: Any
    id_rows_XM: Array
    vocabulary: Any
    titles: list[np.ndarray]
    contexts: list[np.ndarray] | None
    prompts: dict[str, Any]


def write_serving(run, lm_params: Params, domain_params: Params) -> Path:
    """Writes workdir/serving, whole or not at all; what an earlier start of the run has written stays.

    Args:
        run: a `stages.Run`.
        lm_params: the whole tree of the chosen LM arm.
        domain_params: the whole tree of the chosen domain arm.

    Returns:
        The folder.
    """
    from bdlm_jax.runtime.files import save_safetensors

    folder = run.folder / "serving"
    if _read_json(folder / "serving.json").get("format") == FORMAT:
        return folder
    partial = folder.with_name("serving.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_catalogue(partial, run.data.split)
    domain, facts = _domain_tensors(run, domain_params)
    save_safetensors(partial / "domain.safetensors", domain)
    lm, lm_facts = _lm_tensors(run, lm_params)
    save_safetensors(partial / "lm.safetensors", lm)
    run.texts.vocabulary.tokenizer.save_pretrained(str(partial / "tokenizer"))
    manifest = {"format": FORMAT, "domain": facts, "lm": lm_facts}
    (partial / "serving.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return folder


def load_catalogue(workdir: str | os.PathLike) -> Catalogue:
    """Reads the catalogue of a finished run.

    Args:
        workdir: the run directory.

    Returns:
        Catalogue.

    Raises:
        InputError: the run has not been finished, or its files are broken.
    """
    folder, _ = _open(workdir)
    texts, arrays = _read_json(folder / "catalogue.json"), _read_tensors(folder / "catalogue.safetensors")
    try:
        return Catalogue(**texts, **arrays)
    except TypeError as error:
        raise InputError(
            f"{folder}/catalogue.json and its tensors do not hold a catalogue; delete {folder}."
        ) from error


def load_domain_arm(workdir: str | os.PathLike) -> ServedDomain:
    """Reads the domain arm; neither JAX nor the LM's weights are touched for an inner-product model.

    Args:
        workdir: the run directory.

    Returns:
        ServedDomain.

    Raises:
        InputError: the run has not been finished, or its files are broken.
    """
    folder, manifest = _open(workdir)
    facts, domain = manifest["domain"], {}
    if facts["has_params"]:
        from bdlm_jax.runtime.files import load_safetensors

        domain = load_safetensors(folder / "domain.safetensors", prefix="domain")
    tables = _read_tensors(folder / "domain.safetensors")
    return ServedDomain(
        model=facts["model"],
        user_UD=tables["user"],
        item_ID=tables["item"],
        degree_I=tables["degree"],
        domain=domain,
        options=facts["options"],
    )


def load_lm_arm(workdir: str | os.PathLike) -> ServedLM:
    """Reads the LM arm.

    Args:
        workdir: the run directory.

    Returns:
        ServedLM.

    Raises:
        InputError: the run has not been finished, or its files are broken.
    """
    from bdlm_jax.lm import causal_lm
    from bdlm_jax.lm.vocabulary import Vocabulary, load_tokenizer
    from bdlm_jax.runtime.files import load_safetensors

    folder, manifest = _open(workdir)
    facts, tree = manifest["lm"], load_safetensors(folder / "lm.safetensors")
    shape = facts["config"]
    if shape["rope_scaling"] is not None:
        shape["rope_scaling"] = tuple(shape["rope_scaling"])
    config = causal_lm.LMConfig(**shape)
    return ServedLM(
        params=tree["lm"],
        config=config,
        id_rows_XM=tree["id_rows"],
        vocabulary=Vocabulary(load_tokenizer(folder / "tokenizer"), min_text=config.vocab_size, **facts["vocabulary"]),
        titles=_cut(tree["titles"]),
        contexts=_cut(tree["contexts"]) if "contexts" in tree else None,
        prompts=facts["prompts"],
    )


def _write_catalogue(folder: Path, split) -> None:
    from bdlm_jax.data.splits import TEST, TRAIN, VALIDATION
    from bdlm_jax.runtime.files import save_safetensors

    table = split.interactions
    texts = {
        "user_ids": table.user_ids.tolist(),
        "item_ids": table.item_ids.tolist(),
        "titles": table.item_fields["title"].tolist(),
    }
    (folder / "catalogue.json").write_text(json.dumps(texts), encoding="utf-8")
    indptr, item = split.histories(TRAIN, VALIDATION, TEST)
    save_safetensors(folder / "catalogue.safetensors", {"indptr": indptr, "item": item})


def _domain_tensors(run, params: Params) -> tuple[dict, dict]:
    """The tables as they stand at test time, and the facts that rebuild the model."""
    import jax

    from bdlm_jax.run import stages
    from bdlm_jax.run.prepare import KNOWN

    arm, c = stages.make_test_arm(run), run.config
    user_UD, item_ID = jax.jit(arm.encode)(params["shared"], params["domain"])
    known = KNOWN["test"] if c.domain.test_graph == "train+validation" else KNOWN["validation"]
    needs = c.domain.model in ("ncf", "sasrec")
    tensors = {
        "user": np.asarray(user_UD, np.float32),
        "item": np.asarray(item_ID, np.float32),
        "degree": run.data.split.degree(*known),
        "domain": params["domain"] if needs else {},
    }
    options = {"width": int(c.shared.width), "length": int(c.prompts.max_items)}
    return tensors, {"model": c.domain.model, "has_params": needs, "options": options}


def _lm_tensors(run, params: Params) -> tuple[dict, dict]:
    """Decoder, id rows and tokens, and the facts that make prompts."""
    import jax

    from bdlm_jax.lm import lora
    from bdlm_jax.mutual import lm_step
    from bdlm_jax.run import stages

    c, vocabulary, config = run.config, run.texts.vocabulary, stages.lm_config(run)
    bridge = stages.make_bridge(run, reads=c.mutual.reads)
    id_rows = jax.jit(lm_step.id_rows, static_argnames=("bridge", "arm"))
    rows_XM, _ = id_rows(params, bridge=bridge, arm=stages.make_arm(run, c.domain.model))
    tensors = {
        "lm": {name: value for name, value in lora.merge(params["lm"]).items() if name != "bridge"},
        "id_rows": np.asarray(rows_XM, np.float32),
        "titles": _joined(run.texts.titles),
    }
    if run.texts.contexts:
        tensors["contexts"] = _joined(run.texts.contexts)
    facts = {
        "config": dataclasses.asdict(config),
        "vocabulary": {
            "n_users": vocabulary.n_users,
            "n_items": vocabulary.n_items,
            "user_capacity": vocabulary.user_capacity,
            "item_capacity": vocabulary.item_capacity,
        },
        "prompts": {
            "kind": c.prompts.kind,
            "user_token": c.prompts.user_token,
            "unnamed": not c.prompts.read_named,
            "max_items": c.prompts.max_items,
            "max_tokens": c.prompts.length,
        },
    }
    return tensors, facts


def _joined(arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    ends = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    return {"indptr": ends, "token": np.concatenate([np.zeros(0, np.int32), *arrays]).astype(np.int32)}


def _cut(joined: dict[str, np.ndarray]) -> list[np.ndarray]:
    return np.split(joined["token"], joined["indptr"][1:-1])


def _open(workdir: str | os.PathLike) -> tuple[Path, dict]:
    folder = Path(workdir) / "serving"
    manifest = _read_json(folder / "serving.json")
    if not manifest:
        raise InputError(
            f'{workdir} holds no finished run with "bdlm" among its models: run bdlm_jax.main on it first.'
        )
    if manifest.get("format") != FORMAT:
        raise InputError(f"{folder} was written by another version of bdlm_jax: run bdlm_jax.main on {workdir} again.")
    return folder, manifest


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({error}): delete {path.parent} and run bdlm_jax.main again.") from error


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a flat file; not by `runtime.checkpoint`, which imports JAX."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}): delete {path.parent}, run bdlm_jax.main again.") from error
