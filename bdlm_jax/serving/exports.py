"""What a finished run takes to other programs: two tables for NumPy, or a Hugging Face directory with its card."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bdlm_jax.runtime.files import file_sha256, replacing, save_safetensors
from bdlm_jax.serving import artefact
from bdlm_jax.types import InputError

EXAMPLE = Path(__file__).with_name("tables_example.py")  # goes along as recommend.py


def export_domain(*, workdir: str | os.PathLike, out: str | os.PathLike, arm: str = "") -> Path:
    """Writes a domain model as two tables, score(u, i) = user[u] · item[i], into a new or empty folder; returns it.

    `out` holds embeddings.safetensors ("user" (U, D), "item" (I, D), float32), ids.json (raw ids and titles in the
    order of the rows), seen.safetensors ("indptr" (U+1,), "item": what each user has had, oldest first), manifest.json
    (sizes and the sha256 of every file) and recommend.py, which needs NumPy and safetensors alone. The default arm is
    BDLM's, or else the first.
    """
    served, catalogue = artefact.load_domain_arm(workdir, arm), artefact.load_catalogue(workdir)
    if not served.dot:
        raise InputError(
            f'{workdir} has the domain model "{served.model}", whose score is no inner product of two rows: '
            "export a model whose score is (--arm), or use bdlm_jax.recommend."
        )
    with _new_folder(out) as folder:
        save_safetensors(folder / "embeddings.safetensors", {"user": served.user_UD, "item": served.items})
        save_safetensors(folder / "seen.safetensors", {"indptr": catalogue.indptr, "item": catalogue.item})
        (folder / "ids.json").write_text(json.dumps(catalogue.names), encoding="utf-8")
        shutil.copyfile(EXAMPLE, folder / "recommend.py")
        facts = {
            "format": "bdlm_jax domain 1",
            "model": served.model,
            "score": "inner product of a row of user and a row of item",
            "n_users": len(served.user_UD),
            "n_items": len(served.item_ID),
            "width": int(served.item_ID.shape[1]),
            "files": {
                path.name: {"sha256": file_sha256(path), "bytes": path.stat().st_size}
                for path in sorted(folder.iterdir())
            },
        }
        (folder / "manifest.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return Path(out)


def export_hf(*, workdir: str | os.PathLike, out: str | os.PathLike, arm: str = "") -> Path:
    """Writes an LM as a Hugging Face directory, whose item logits after a history are our scores; returns it.

    `out`, new or empty, holds config.json, generation_config.json, model.safetensors (or shards and their index), the
    tokenizer with a token for every user and item, ids.json (raw ids and titles; item i is <iid_i>), README.md with the
    way to prompt it, and text_head.safetensors where likeness of items weighs in the scores. It loads with
    transformers' AutoModelForCausalLM and AutoTokenizer. Of a run with `lm.speaks` base the weights are those that the
    model came with, and recommends/ holds the adapters by which it ranks, for PEFT. The default arm is BDLM's, or else
    the first.
    """
    from bdlm_jax.lm import lora
    from bdlm_jax.lm.hf_adapters import FOLDER, write_adapters
    from bdlm_jax.lm.hf_folder import write_hf_folder
    from bdlm_jax.serving.card import model_card

    arm = artefact.find_arm(workdir, arm, kind="lm")
    served, catalogue = artefact.load_lm_arm(workdir, arm), artefact.load_catalogue(workdir)
    row, names = artefact.served_arms(workdir)[arm]["row"], catalogue.names
    if served.prompts.kind != "ids":
        # Tokens, not text: some tokenizers split a text otherwise behind another token than alone.
        names["title_tokens"] = [title.tolist() for title in served.titles]
    with _new_folder(out) as folder:
        own = lora.without(served.params), served.config, served.vocabulary, served.id_rows_XM
        scored_IM = served.items if served.lift else None
        write_hf_folder(folder, *own, scored_IM=scored_IM, max_tokens=served.prompts.max_tokens)
        if lora.LORA in served.params:
            write_adapters(folder / FOLDER, served.params, served.config)
        if served.texts:
            head = {name: np.asarray(value, np.float32) for name, value in served.texts._asdict().items()}
            save_safetensors(folder / "text_head.safetensors", head | {"content": head.pop("content_IC")})
        (folder / "ids.json").write_text(json.dumps(names), encoding="utf-8")
        (folder / "README.md").write_text(model_card(Path(workdir), served, catalogue, row=row), encoding="utf-8")
    return Path(out)


@contextlib.contextmanager
def _new_folder(out: str | os.PathLike) -> Iterator[Path]:
    out = Path(out)
    for above in out.parents:
        if above.exists() and not above.is_dir():
            raise InputError(f"{out} cannot be written, for {above} is a file; give --out another folder.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists and is not empty: give --out a new folder, or remove it first.")
    with replacing(out) as folder:
        folder.mkdir()
        yield folder
