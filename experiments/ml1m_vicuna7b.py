"""MovieLens-1M with Vicuna-7B, fully fine-tuned: the paper's setting, on eight H200s. Not trained by us yet.

python -m bdlm_jax.main --config experiments/ml1m_vicuna7b.py --dry_run          # what it needs; no weights, no data
python -m bdlm_jax.main --config experiments/ml1m_vicuna7b.py --workdir runs/ml1m_vicuna7b --config.data.path=FOLDER \
    --config.lm.path=VICUNA_FOLDER                                               # the weights: lmsys/vicuna-7b-v1.5

The paper names the model and that all of it trains; rates, batch and schedule are ours. docs/scale.md has the tables.
"""

from pathlib import Path

from experiments import ml1m

SHAPE = Path(__file__).parent / "models" / "vicuna_7b.json"


def get_config():
    """Returns the config."""
    c = ml1m.get_config()
    c.models = ("item_pop", "lightgcn", "bdlm")
    c.parallel = "mesh"
    c.mesh.data = 1
    c.mesh.fsdp = -1
    c.dry_run.n_users = 6040
    c.dry_run.n_items = 3706
    c.dry_run.devices = 8
    c.dry_run.device = "h200"
    c.lm.config = str(SHAPE)
    c.lm.dtype = "bfloat16"
    c.lm.remat = True
    c.lm.dropout = 0.0
    c.lm.row_std = 0.0
    c.lm.batch_rows = 64
    c.lm.learning_rate = 2e-5
    c.lm.learning_rate_shared = 1e-3
    c.lm.weight_decay = 0.0
    c.prompts.length = 512
    c.prompts.kind = "ids_titles"
    c.prompts.max_items = 40
    return c
