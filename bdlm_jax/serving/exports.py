"""What a finished run takes to other programs: two tables for NumPy, or a Hugging Face directory with its card."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bdlm_jax.runtime.files import replacing, save_safetensors
from bdlm_jax.serving.artefact import ServedLM, load_catalogue, load_domain_arm, load_lm_arm
from bdlm_jax.serving.catalogue import Catalogue
from bdlm_jax.types import InputError

EXAMPLE = Path(__file__).with_name("tables_example.py")  # goes along as recommend.py


def export_domain(*, workdir: str | os.PathLike, out: str | os.PathLike) -> Path:
    """Writes the domain arm as two tables, score(u, i) = user[u] · item[i], into a new or empty folder; returns it.

    `out` holds embeddings.safetensors ("user" (U, D), "item" (I, D), float32), ids.json (raw ids and titles in the
    order of the rows), seen.safetensors ("indptr" (U+1,), "item": what each user has had, oldest first), manifest.json
    (sizes and the sha256 of every file) and recommend.py, which needs NumPy and safetensors alone.
    """
    arm, catalogue = load_domain_arm(workdir), load_catalogue(workdir)
    if not arm.dot:
        raise InputError(
            f'{workdir} has the domain model "{arm.model}", whose score is no inner product of two rows: '
            "export a run with a model whose score is, or use bdlm_jax.recommend."
        )
    with _new_folder(out) as folder:
        save_safetensors(folder / "embeddings.safetensors", {"user": arm.user_UD, "item": arm.item_ID})
        save_safetensors(folder / "seen.safetensors", {"indptr": catalogue.indptr, "item": catalogue.item})
        (folder / "ids.json").write_text(json.dumps(catalogue.names), encoding="utf-8")
        shutil.copyfile(EXAMPLE, folder / "recommend.py")
        facts = {
            "format": "bdlm_jax domain 1",
            "model": arm.model,
            "score": "inner product of a row of user and a row of item",
            "n_users": len(arm.user_UD),
            "n_items": len(arm.item_ID),
            "width": int(arm.item_ID.shape[1]),
            "files": {path.name: _checksum(path) for path in sorted(folder.iterdir())},
        }
        (folder / "manifest.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return Path(out)


def export_hf(*, workdir: str | os.PathLike, out: str | os.PathLike) -> Path:
    """Writes the LM arm as a Hugging Face directory, whose item logits after a history are our scores; returns it.

    `out`, new or empty, holds config.json, generation_config.json, model.safetensors (or shards and their index), the
    tokenizer with a token for every user and item, ids.json (raw ids and titles; item i is <iid_i>), README.md with the
    way to prompt it, and text_head.safetensors where the items' texts weigh in the scores. It loads with transformers'
    AutoModelForCausalLM and AutoTokenizer.
    """
    from bdlm_jax.lm.hf_folder import write_hf_folder

    arm, catalogue = load_lm_arm(workdir), load_catalogue(workdir)
    names = catalogue.names
    if arm.prompts.kind != "ids":
        # Tokens, not text: some tokenizers split a text otherwise behind another token than alone.
        names["title_tokens"] = [title.tolist() for title in arm.titles]
    with _new_folder(out) as folder:
        write_hf_folder(
            folder, arm.params, arm.config, arm.vocabulary, arm.id_rows_XM, max_tokens=arm.prompts.max_tokens
        )
        if arm.texts:
            head = {name: np.asarray(value, np.float32) for name, value in arm.texts._asdict().items()}
            save_safetensors(folder / "text_head.safetensors", head | {"content": head.pop("content_IC")})
        (folder / "ids.json").write_text(json.dumps(names), encoding="utf-8")
        (folder / "README.md").write_text(_model_card(Path(workdir), arm, catalogue), encoding="utf-8")
    return Path(out)


@contextlib.contextmanager
def _new_folder(out: str | os.PathLike) -> Iterator[Path]:
    out = Path(out)
    for above in out.parents:
        if above.is_file():
            raise InputError(f"{out} cannot be written, for {above} is a file; give --out another folder.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists and is not empty: give --out a new folder, or remove it first.")
    with replacing(out) as folder:
        folder.mkdir()
        yield folder


def _checksum(path: Path) -> dict:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [recommendation, bdlm]
---
# A language model that recommends
The LM arm of a BDLM run on "{data}", written by bdlm_jax (a reconstruction of arXiv 2311.03778). Each of its
{n_users} users and {n_items} items is one token, `<uid_0>` … and `<iid_0>` …, numbered as `ids.json` lists them.
The logits of the item tokens after a history are the recommendation:
```python
{code}```
It was trained on the last {max_items} items of a history at most, and {max_tokens} tokens. {unnamed}
What it writes as text is generated, not looked up; the terms of its base model and of its data go on applying to it.

## Measured by the run, on its test users
| metric | value | users |
|---|---|---|
{cells}
"""
_CARD_CODE = """import json

{imports}import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file lies
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
with open(f"{{folder}}/ids.json", encoding="utf-8") as file:
    ids = json.load(file)
history = [ids["item_ids"].index(item) for item in {example}]
prompt = tokenizer.convert_tokens_to_ids({head})
for i in history:
    prompt += {piece}
{tail}logits = model(torch.tensor([prompt])).logits[0, -1, {first}:{stop}].detach()
{texts}logits[history] = -float("inf")
for i in logits.topk({k}).indices.tolist():
    print(ids["item_ids"][i], ids["titles"][i])
"""
_CARD_TEXTS = """# What the items' texts add, which no weight of the model holds:
texts = safetensors.torch.load_file(f"{folder}/text_head.safetensors")
said = texts["content"][history]
logits += texts["content"] @ (texts["last"] * said[-1] + texts["mean"] * said.mean(0))
"""
_CARD_METRICS = ("hr@1", "hr@10", "ndcg@10")


def _model_card(workdir: Path, arm: ServedLM, catalogue: Catalogue) -> str:
    from bdlm_jax.lm.vocabulary import UNNAMED_USER

    vocabulary, prompts, n_items = arm.vocabulary, arm.prompts, len(catalogue.item_ids)
    shows_user = prompts.user_token if prompts.kind != "text" else "none"
    mark, title = 'tokenizer.convert_tokens_to_ids([f"<iid_{i}>"])', 'ids["title_tokens"][i]'
    pieces = {"ids": mark, "ids_titles": f"{mark} + {title}", "text": f"{title} + [{vocabulary.eos}]"}
    code = _CARD_CODE.format(
        example=catalogue.item_ids[:2],
        head=[vocabulary.tokenizer.bos_token] + [UNNAMED_USER] * (shows_user == "start"),
        piece=pieces[prompts.kind],
        tail=f"prompt += tokenizer.convert_tokens_to_ids([{UNNAMED_USER!r}])\n" if shows_user == "end" else "",
        imports="import safetensors.torch\n" if arm.texts else "",
        texts=_CARD_TEXTS if arm.texts else "",
        first=vocabulary.item_tokens.start,
        stop=vocabulary.item_tokens.start + n_items,
        k=min(10, max(1, n_items - 2)),
    )
    named = f"`{UNNAMED_USER}` stands for the user" + ("." if prompts.unnamed else "; a known one is `<uid_0>` ….")
    path = workdir / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    cells = [
        f"| {row['metric']} | {row['value']:.4f} | {row['users']} |"
        for row in results.get("rows", ())
        if (row["model"], row["slice"]) == ("bdlm_lm", "all") and row["metric"].split("/")[0] in _CARD_METRICS
    ]
    return _CARD.format(
        data=results.get("data", {}).get("name", workdir.name),
        n_users=len(catalogue.user_ids),
        n_items=n_items,
        code=code,
        max_items=prompts.max_items,
        max_tokens=prompts.max_tokens,
        unnamed="" if shows_user == "none" else named,
        cells="\n".join(cells),
    )
