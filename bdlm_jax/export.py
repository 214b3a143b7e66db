"""python -m bdlm_jax.export --workdir DIR --format domain|hf --out DIR2: what a finished run takes to other programs.

`domain` is two tables whose inner products are the scores, for NumPy and vector indexes; `hf` is a Hugging Face
directory whose vocabulary ends in the users and items. A folder appears whole or not at all.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bdlm_jax.serving import artefact as serving
from bdlm_jax.serving.artefact import ServedLM
from bdlm_jax.serving.catalogue import Catalogue
from bdlm_jax.types import InputError

FORMATS = ("domain", "hf")
EXAMPLE = '''"""python recommend.py USER [K]: raw id, score and title of the best items that the user has not had."""

import json
import pathlib
import sys

import numpy as np
from safetensors.numpy import load_file

folder = pathlib.Path(__file__).resolve().parent
table, seen = load_file(folder / "embeddings.safetensors"), load_file(folder / "seen.safetensors")
ids = json.loads((folder / "ids.json").read_text(encoding="utf-8"))


def recommend(user, k=10):
    row = ids["user_ids"].index(user)
    scores = table["item"] @ table["user"][row]
    scores[seen["item"][seen["indptr"][row] : seen["indptr"][row + 1]]] = -np.inf
    best = np.argsort(-scores, kind="stable")[: min(k, int(np.isfinite(scores).sum()))]
    return [(ids["item_ids"][i], float(scores[i]), ids["titles"][i]) for i in best]


if __name__ == "__main__":
    for item, score, title in recommend(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 10):
        print(f"{item}\\t{score:.4f}\\t{title}")
'''


def export_domain(*, workdir: str | os.PathLike, out: str | os.PathLike) -> Path:
    """Writes the domain arm as two tables: score(u, i) = user[u] · item[i].

    `out` holds embeddings.safetensors ("user" (U, D), "item" (I, D), float32), ids.json (raw ids and titles in the
    order of the rows), seen.safetensors ("indptr" (U+1,), "item": what each user has had, oldest first), manifest.json
    (sizes and the sha256 of every file) and recommend.py, which needs NumPy and safetensors alone.

    Args:
        workdir: the directory of a finished run.
        out: the folder to write; it must not exist, or be empty.

    Returns:
        `out`.

    Raises:
        InputError: no finished run, a domain model whose score is no inner product, or `out` is taken.
    """
    arm, catalogue = serving.load_domain_arm(workdir), serving.load_catalogue(workdir)
    if not arm.dot:
        raise InputError(
            f'{workdir} has the domain model "{arm.model}", whose score is no inner product of two rows: '
            "export a run whose domain model scores by inner products, or use bdlm_jax.recommend."
        )

    def write(folder: Path) -> None:
        from safetensors.numpy import save_file

        tables = {"user": arm.user_UD, "item": arm.item_ID}
        save_file({name: np.ascontiguousarray(rows, np.float32) for name, rows in tables.items()},
                  folder / "embeddings.safetensors")  # fmt: skip
        save_file({"indptr": catalogue.indptr, "item": catalogue.item}, folder / "seen.safetensors")
        ids = {"user_ids": catalogue.user_ids, "item_ids": catalogue.item_ids, "titles": catalogue.titles}
        (folder / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
        (folder / "recommend.py").write_text(EXAMPLE, encoding="utf-8")
        facts = {
            "format": "bdlm_jax domain 1",
            "model": arm.model,
            "score": "inner product of a row of user and a row of item",
            "n_users": len(arm.user_UD),
            "n_items": len(arm.item_ID),
            "width": int(arm.item_ID.shape[1]),
            "files": _checksums(folder),
        }
        (folder / "manifest.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    return _whole(Path(out), write)


def export_hf(*, workdir: str | os.PathLike, out: str | os.PathLike) -> Path:
    """Writes the LM arm as a Hugging Face directory, whose item logits after a history are our scores.

    `out` holds config.json, generation_config.json, model.safetensors (or shards and their index), the tokenizer with
    a token for every user and item, ids.json (raw ids and titles; item i is <iid_i>) and README.md with the way to
    prompt it. It loads with transformers' AutoModelForCausalLM and AutoTokenizer.

    Args:
        workdir: the directory of a finished run.
        out: the folder to write; it must not exist, or be empty.

    Returns:
        `out`.

    Raises:
        InputError: no finished run, `out` is taken, or a tokenizer whose numbers leave no place (see `hf_folder`).
    """
    from bdlm_jax.lm import hf_folder

    arm, catalogue = serving.load_lm_arm(workdir), serving.load_catalogue(workdir)

    def write(folder: Path) -> None:
        hf_folder.write_hf_folder(
            folder, arm.params, arm.config, arm.vocabulary, arm.id_rows_XM, max_tokens=arm.prompts["max_tokens"]
        )
        ids = {"user_ids": catalogue.user_ids, "item_ids": catalogue.item_ids, "titles": catalogue.titles}
        if arm.prompts["kind"] != "ids":
            # Tokens, not text: some tokenizers split a text otherwise behind another token than alone.
            ids["title_tokens"] = [title.tolist() for title in arm.titles]
        (folder / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
        (folder / "README.md").write_text(_model_card(Path(workdir), arm, catalogue), encoding="utf-8")

    return _whole(Path(out), write)


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
{table}
"""
_CARD_CODE = """import json

import torch
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
logits[history] = -float("inf")
for i in logits.topk({k}).indices.tolist():
    print(ids["item_ids"][i], ids["titles"][i])
"""
_CARD_METRICS = ("hr@1", "hr@10", "ndcg@10")


def _model_card(workdir: Path, arm: ServedLM, catalogue: Catalogue) -> str:
    from bdlm_jax.lm.vocabulary import UNNAMED_USER

    vocabulary, prompts, n_items = arm.vocabulary, arm.prompts, len(catalogue.item_ids)
    shows_user = prompts["kind"] != "text" and prompts["user_token"]
    mark, title = 'tokenizer.convert_tokens_to_ids([f"<iid_{i}>"])', 'ids["title_tokens"][i]'
    pieces = {"ids": mark, "ids_titles": f"{mark} + {title}", "text": f"{title} + [{vocabulary.eos}]"}
    code = _CARD_CODE.format(
        example=catalogue.item_ids[:2],
        head=[vocabulary.tokenizer.bos_token] + [UNNAMED_USER] * (shows_user == "start"),
        piece=pieces[prompts["kind"]],
        tail=f"prompt += tokenizer.convert_tokens_to_ids([{UNNAMED_USER!r}])\n" if shows_user == "end" else "",
        first=vocabulary.item_tokens.start,
        stop=vocabulary.item_tokens.start + n_items,
        k=min(10, max(1, n_items - 2)),
    )
    named = f"`{UNNAMED_USER}` stands for the user" + ("." if prompts["unnamed"] else "; a known one is `<uid_0>` ….")
    path = workdir / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    cells = {
        row["metric"]: row for row in results.get("rows", ()) if (row["model"], row["slice"]) == ("bdlm_lm", "all")
    }
    lines = ["| metric | value | users |", "|---|---|---|"]
    lines += [f"| {m} | {row['value']:.4f} | {row['users']} |" for m, row in cells.items()
              if m.split("/")[0] in _CARD_METRICS]  # fmt: skip
    return _CARD.format(
        data=results.get("data", {}).get("name", workdir.name),
        n_users=len(catalogue.user_ids),
        n_items=n_items,
        code=code,
        max_items=prompts["max_items"],
        max_tokens=prompts["max_tokens"],
        unnamed=named if shows_user not in (False, "none") else "",
        table="\n".join(lines),
    )


def _checksums(folder: Path) -> dict[str, dict]:
    """{name: {"sha256", "bytes"}} of all files of a folder."""
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = {
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
                "bytes": path.stat().st_size,
            }
    return found


def _whole(out: Path, write: Callable[[Path], None]) -> Path:
    """Lets `write` fill a folder beside `out`, which then takes its name: whole or not at all."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists and is not empty: give --out a new folder, or remove it first.")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if out.exists():
        out.rmdir()
    os.replace(partial, out)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: those after the program's name; None: of this process.

    Returns:
        The exit code: 0, or 2 after a sentence on stderr.
    """
    parser = argparse.ArgumentParser(prog="python -m bdlm_jax.export", description="Exports a finished run.")
    parser.add_argument("--workdir", required=True, help="the run directory")
    parser.add_argument("--format", choices=FORMATS, required=True, help="domain: two tables; hf: a language model")
    parser.add_argument("--out", required=True, help="the folder to write")
    given = parser.parse_args(arguments)
    try:
        folder = {"domain": export_domain, "hf": export_hf}[given.format](workdir=given.workdir, out=given.out)
    except InputError as error:
        print(f"bdlm_jax: {error}", file=sys.stderr)
        return 2
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size:>14,}  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
