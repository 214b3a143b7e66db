"""MovieLens-1M with a public LM, fully fine-tuned. Not trained by us yet; docs/scale.md has the tables.

python -m bdlm_jax.main --config experiments/ml1m_llm.py:vicuna_7b --dry_run    # what it needs; no weights, no data
python -m bdlm_jax.main --config experiments/ml1m_llm.py:vicuna_7b --workdir runs/ml1m_vicuna_7b \
    --config.data.path=FOLDER --config.lm.path=VICUNA_FOLDER                    # the weights: lmsys/vicuna-7b-v1.5

vicuna_7b is the paper's setting, for eight H200s: the paper names the model and that all of it trains; rates, batch and
schedule are ours. qwen_0_5b is Qwen/Qwen2.5-0.5B on one device.

As in ml1m.py the LM's loss reaches the item table alone: <uid> is never shown.
"""

from pathlib import Path

from experiments import defaults, ml1m

SHAPES = Path(__file__).parent / "models"
LMS = {
    "vicuna_7b": {
        "lm.config": str(SHAPES / "vicuna_7b.json"), "lm.batch_rows": 64, "lm.learning_rate": 2e-5,
        "lm.weight_decay": 0.0, "parallel": "mesh", "mesh.data": 1, "mesh.fsdp": -1, "dry_run.devices": 8,
    },
    "qwen_0_5b": {"lm.config": str(SHAPES / "qwen2.5_0.5b.json"), "lm.batch_rows": 32, "lm.learning_rate": 1e-4},
}  # fmt: skip


def get_config(arg="vicuna_7b"):
    """Returns the config of one of `LMS`."""
    c = ml1m.get_config()
    c.models = ("item_pop", "lightgcn", "bdlm")
    c.dry_run.n_users = 6040
    c.dry_run.n_items = 3706
    c.dry_run.device = "h200"
    c.lm.dtype = "bfloat16"
    c.lm.remat = True
    c.lm.dropout = 0.0
    c.lm.row_std = 0.0
    c.lm.learning_rate_shared = 1e-3
    c.prompts.length = 512
    c.prompts.kind = "ids_titles"
    c.prompts.max_items = 40
    c.update_from_flattened_dict(defaults.choose(LMS, arg))
    return c
