"""The quickstart's ablation: the same world, the LM without its general-text corpus (slice `knowledge`).

python -m bdlm_jax.main --config experiments/quickstart_no_pretrain.py --workdir runs/quickstart_no_pretrain
"""

from experiments import defaults


def get_config():
    """Returns the config."""
    c = defaults.get_config()
    c.models = ("lightgcn", "text_lm", "bdlm")
    c.pretrain.epochs = 0.0
    c.pretrain.replay_share = 0.0
    return c
