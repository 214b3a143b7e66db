"""Writes docs/scale.md: what MovieLens-1M with Vicuna-7B needs on several machines, by `--dry_run`.

python benchmarks/scale_tables.py [TITLE ...]       # these tables anew (all, without any), a minute or two each on two
                                                    # cores; needs no accelerator, weights or data
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "experiments/ml1m_llm.py:vicuna_7b"
LORA = ["lm.trains=lora", "lm.param_dtype=bfloat16", "lm.lora_rank=16", "lm.lora_alpha=32.0"]
V5E = ["dry_run.device=tpu_v5e", "dry_run.devices=16", "lm.batch_rows=64"]
TABLES = {
    "The 7B config on eight H200s: full fine-tuning, float32 weights and AdamW": [],
    "On one H200: LoRA, bfloat16 weights": ["dry_run.devices=1", "parallel=jit", "lm.batch_rows=16", *LORA],
    "On one H200: full fine-tuning, float32 weights and AdamW": [
        "dry_run.devices=1", "parallel=jit", "lm.batch_rows=16", "dry_run.compile=False",
    ],
    "On a TPU v5e-16: full fine-tuning, float32 weights and AdamW": V5E,
    "On a TPU v5e-16: the same, tensor 2": [*V5E, "mesh.tensor=2", "dry_run.compile=False"],
    "On a TPU v5e-16: full fine-tuning, bfloat16 weights and Adafactor without master weights": [
        *V5E, "lm.param_dtype=bfloat16", "lm.optimizer=adafactor", "lm.master_weights=False",
    ],
    "On a TPU v5e-16: LoRA, bfloat16 weights": [*V5E, *LORA],
    "A shop on eight H200s: a million users, 200,000 items, 20 million interactions": [
        "dry_run.n_users=1000000", "dry_run.n_items=200000", "dry_run.n_interactions=20000000", "dry_run.compile=False",
    ],
}  # fmt: skip
HEAD = """# Scale

Written by `python benchmarks/scale_tables.py`; each table is one command, which needs neither weights nor data.

"By hand" counts shapes: every leaf of parameters, optimiser state and gradients as it is sharded, and formulas for
activations (`bdlm_jax/run/plan.py`). "XLA" is the same step compiled on pretended CPU devices, without an array being
made; its arguments hold the state, the batch and what does not change. Its temporaries are those of XLA's CPU backend,
which computes bfloat16 in float32, keeps no flash attention and sums gradients whole before it cuts them: read them as
an upper bound for activations and gradients together, and as a check that nothing grows with the number of devices.
Collectives of XLA are the sizes of their results, loops counted in full; by hand they are what a device sends.
No table here was measured on the machine that it names. Of an H200's memory, five steps were
([performance/h200](performance/h200/results.md)): this count, for the code that ran there, was .6 and 3 % from two, 5
and 8 % above two others, and 34 % below LoRA with products kept, which has been mended and not been measured since.

On a mesh a training step of LightGCN holds on each device its rows of the tables and of what optimisers keep of them,
the edges that end there, and a part of the interactions of which batches are drawn. What is still whole: all rows while
a layer is computed, where each user's interactions begin, a batch and its draws. Evaluation propagates on each device
over the whole graph.
"""


def table(title, words):
    command = ["-m", "bdlm_jax.main", "--config", CONFIG, "--dry_run", *[f"--config.{word}" for word in words]]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return f"## {title}\n\n`python {' '.join(command)}`\n\n{done.stdout.strip()}\n"


def main(titles):
    page = ROOT / "docs" / "scale.md"
    kept = {part.partition("\n")[0]: f"## {part}" for part in page.read_text(encoding="utf-8").split("\n## ")[1:]}
    made = [table(title, words) if title in titles or not titles else kept[title] for title, words in TABLES.items()]
    page.write_text("\n".join(text.rstrip("\n") + "\n" for text in [HEAD, *made]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
