"""The card of an exported language model: a README whose example, ready to run, recommends as this package does."""

import json
from pathlib import Path

import tokenizers
import transformers

from bdlm_jax import __version__
from bdlm_jax.lm import lora
from bdlm_jax.lm.vocabulary import UNNAMED_USER
from bdlm_jax.serving.artefact import ServedLM
from bdlm_jax.serving.catalogue import Catalogue

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [recommendation, bdlm]
---
# A language model that recommends
The model `{row}` of a run on "{data}", written by bdlm_jax (a reconstruction of BDLM, arXiv 2311.03778). Each of its
{n_users} users and {n_items} items is one token, `<uid_0>` … and `<iid_0>` …, numbered as `ids.json` lists them.
The logits of the item tokens after a history are the recommendation:
```python
{code}```
It was trained on the last {max_items} items of a history at most, and {max_tokens} tokens; the example cuts a longer
history as the run does. {unnamed}
{apart}
`model.generate` writes plain text: `suppress_tokens` in generation_config.json keeps the tokens of users and items out
of it; with `suppress_tokens=None` they may be written.
What it writes is generated, not looked up; the terms of its base model and of its data go on applying to it.
Written by bdlm_jax {version} with {versions}; both versions 4 and 5 of transformers load it.

## Measured by the run, on its test users
| metric | value | users |
|---|---|---|
{cells}
"""
_CARD_CODE = """import json

{imports}import torch
{peft}from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file lies
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
{load}with open(f"{{folder}}/ids.json", encoding="utf-8") as file:
    ids = json.load(file)
history = [ids["item_ids"].index(item) for item in {example}]
head, tail = tokenizer.convert_tokens_to_ids({head}), tokenizer.convert_tokens_to_ids({tail})
pieces = [{piece} for i in history[-{max_items}:]]
while len(pieces) > 1 and len(head) + sum(map(len, pieces)) + len(tail) > {max_tokens}:
    del pieces[0]  # the oldest
prompt = sum(pieces, head) + tail
logits = model(torch.tensor([prompt])).logits[0, -1, {first}:{stop}].detach()
{texts}logits[history] = -float("inf")
for i in logits.topk({k}).indices.tolist():
    print(ids["item_ids"][i], ids["titles"][i])
{write}"""
_CARD_APART = """The adapters in `recommends/` (for PEFT: `pip install peft`) recommend and do not write. Without them,
as within `disable_adapter`, the model is the one that it was made from, and writes what that wrote{measured}."""
_CARD_LOAD = """model = PeftModel.from_pretrained(model, f"{folder}/recommends")
"""
_CARD_WRITE = """with model.disable_adapter():  # plain text, as the model wrote before
    text = model.generate(tokenizer("The", return_tensors="pt").input_ids, max_new_tokens=16)
print(tokenizer.decode(text[0]))
"""
_CARD_TEXTS = """# What likeness of items adds, which no weight of the model holds:
texts = safetensors.torch.load_file(f"{folder}/text_head.safetensors")
said = texts["content"][history]
logits += texts["content"] @ (texts["last"] * said[-1] + texts["mean"] * said.mean(0))
"""
_CARD_METRICS = ("hr@1", "hr@10", "ndcg@10")


def model_card(workdir: Path, arm: ServedLM, catalogue: Catalogue, *, row: str) -> str:
    """Writes the card; `row` is the model's name in the results."""
    vocabulary, prompts, n_items = arm.vocabulary, arm.prompts, len(catalogue.item_ids)
    apart = lora.LORA in arm.params
    shows_user = prompts.user_token if prompts.kind != "text" else "none"
    mark, title = 'tokenizer.convert_tokens_to_ids([f"<iid_{i}>"])', 'ids["title_tokens"][i]'
    pieces = {"ids": mark, "ids_titles": f"{mark} + {title}", "text": f"{title} + [{vocabulary.eos}]"}
    head = vocabulary.tokenizer.convert_ids_to_tokens(list(vocabulary.head))
    code = _CARD_CODE.format(
        example=catalogue.item_ids[:2],
        head=head + [UNNAMED_USER] * (shows_user == "start"),
        piece=pieces[prompts.kind],
        tail=[UNNAMED_USER] * (shows_user == "end"),
        max_items=prompts.max_items,
        max_tokens=prompts.max_tokens,
        imports="import safetensors.torch\n" if arm.texts else "",
        peft="from peft import PeftModel\n" if apart else "",
        load=_CARD_LOAD if apart else "",
        write=_CARD_WRITE if apart else "",
        texts=_CARD_TEXTS if arm.texts else "",
        first=vocabulary.item_tokens.start,
        stop=vocabulary.item_tokens.start + n_items,
        k=min(10, max(1, n_items - 2)),
    )
    named = f"`{UNNAMED_USER}` stands for the user" + ("." if prompts.unnamed else "; a known one is `<uid_0>` ….")
    versions = {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__}
    path = workdir / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    language, measured = results.get("language", {}), ""
    if row == "bdlm_lm" and "adapters" in language:
        measured = " (perplexity on {text} held out: {after:.2f}, and {adapters:.2f} with them)".format(**language)
    cells = [
        f"| {cell['metric']} | {cell['value']:.4f} | {cell['users']} |"
        for cell in results.get("rows", ())
        if (cell["model"], cell["slice"]) == (row, "all") and cell["metric"].split("/")[0] in _CARD_METRICS
    ]
    return _CARD.format(
        row=row,
        version=__version__,
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        data=results.get("data", {}).get("name", workdir.name),
        n_users=len(catalogue.user_ids),
        n_items=n_items,
        code=code,
        max_items=prompts.max_items,
        max_tokens=prompts.max_tokens,
        unnamed="" if shows_user == "none" else named,
        apart=_CARD_APART.format(measured=measured) if apart else "",
        cells="\n".join(cells),
    )
