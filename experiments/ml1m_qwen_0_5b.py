"""MovieLens-1M with Qwen2.5-0.5B, fully fine-tuned on one device. Not trained by us yet.

python -m bdlm_jax.main --config experiments/ml1m_qwen_0_5b.py --dry_run         # what it needs; no weights, no data
python -m bdlm_jax.main --config experiments/ml1m_qwen_0_5b.py --workdir runs/ml1m_qwen --config.data.path=FOLDER \
    --config.lm.path=QWEN_FOLDER                                                 # the weights: Qwen/Qwen2.5-0.5B
"""

from pathlib import Path

from experiments import ml1m

SHAPE = Path(__file__).parent / "models" / "qwen2.5_0.5b.json"


def get_config():
    """Returns the config."""
    c = ml1m.get_config()
    c.models = ("item_pop", "lightgcn", "bdlm")
    c.dry_run.n_users = 6040
    c.dry_run.n_items = 3706
    c.dry_run.devices = 1
    c.dry_run.device = "h200"
    c.lm.config = str(SHAPE)
    c.lm.dtype = "bfloat16"
    c.lm.remat = True
    c.lm.dropout = 0.0
    c.lm.row_std = 0.0
    c.lm.batch_rows = 32
    c.lm.learning_rate = 1e-4
    c.lm.learning_rate_shared = 1e-3
    c.prompts.length = 512
    c.prompts.kind = "ids_titles"
    c.prompts.max_items = 40
    return c
