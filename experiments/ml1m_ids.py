"""MovieLens-1M, an LM that reads ids alone and starts from LightGCN; the sum of both teaches at the end.

python -m bdlm_jax.main --config experiments/ml1m_ids.py --workdir runs/ml1m_ids --config.data.path=FOLDER

As experiments/ml1m_pool.py, without texts, rounds and alignment.

As it does there, the LM's loss reaches the item table alone.
"""

from experiments import defaults, ml1m_pool


def get_config(arg="short"):
    """Returns the config: "short" has the main models, "table" what head and teacher are worth too."""
    c = ml1m_pool.get_config()
    c.tuned_on = (0, 1, 2, 3)
    c.prompts.titled_share = 0.0
    c.prompts.card_copies = 0.0
    c.pretrain.replay_share = 0.0
    c.mutual.domain_epochs_a_round = 0
    c.mutual.lm.text = 0.0
    for arm in (c.mutual.lm, c.mutual.domain):
        arm.align_user = arm.align_item = 0.0
    more = ("bdlm_lm_teaches", "bdlm_headless", "cached", "pool", "pool_alone")
    c.models = defaults.choose({"short": c.models, "table": (*c.models, *more)}, arg)
    return c


def get_hyper():
    """Returns the seeds of docs/results.md."""
    return defaults.sweep("seed", (4, 5))
