"""Writes docs/scale.md: what MovieLens-1M with Vicuna-7B needs on several machines, by `--dry_run`.

python benchmarks/scale_tables.py        # a minute or two a table on two cores; needs no accelerator, weights or data
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
}  # fmt: skip
HEAD = """# Scale

Written by `python benchmarks/scale_tables.py`; each table is one command, which needs neither weights nor data.

"By hand" counts shapes: every leaf of parameters, optimiser state and gradients as it is sharded, and formulas for
activations (`bdlm_jax/run/plan.py`). "XLA" is the same step compiled on pretended CPU devices, without an array being
made; its arguments hold the state, the batch and what does not change. Its temporaries are those of XLA's CPU backend,
which computes bfloat16 in float32, keeps no flash attention and sums gradients whole before it cuts them: read them as
an upper bound for activations and gradients together, and as a check that nothing grows with the number of devices.
Collectives of XLA are the sizes of their results, loops counted in full; by hand they are what a device sends.
No table here was measured on the machine that it names.
"""


def table(title, words):
    command = ["-m", "bdlm_jax.main", "--config", CONFIG, "--dry_run", *[f"--config.{word}" for word in words]]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return f"## {title}\n\n`python {' '.join(command)}`\n\n{done.stdout.strip()}\n"


if __name__ == "__main__":
    made = [table(*entry) for entry in TABLES.items()]
    (ROOT / "docs" / "scale.md").write_text("\n".join([HEAD, *made]), encoding="utf-8")
