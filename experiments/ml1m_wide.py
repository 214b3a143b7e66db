"""MovieLens-1M with everything twice as wide, and an LM that reads ids alone and starts from LightGCN's table.

python -m bdlm_jax.main --config experiments/ml1m_wide.py --workdir runs/ml1m_wide --config.data.path=FOLDER

Head and teacher are those of experiments/ml1m_pool.py: likeness of items in LightGCN weighs in the LM's scores, and the
domain arm learns at the end from the sum of both. The shared table and the LM are 128 wide in place of 64, and so are
LightGCN and SASRec. Texts, rounds and alignment, which had cost there (docs/results.md) and on validation cost an LM of
this width too (on a table of 64), are left out: the LM cannot say what an item is.

Chosen on validation with seed 7 (docs/experiments.md): the LM has .189, with the head .194, the domain arm .200, SASRec
.182 (.176, .182, .183 of experiments/ml1m_pool.py, and .167). Test, NDCG@10/full, means of seeds 4, 5 and 6: LM arm
.194 (.187 without the head), domain arm .196 (.194 from the LM alone), LightGCN .043; in seed 4
the ids-only LM .181 and SASRec .176. LightGCN and BDLM took 43 minutes of one core, another run on the other; SASRec
and the ids-only LM take 32 more each.

As in experiments/ml1m.py, the LM's loss reaches the item table alone.
"""

from experiments import defaults, ml1m_pool


def get_config(arg="short"):
    """Returns the config: "short" has the main models, "table" what start, head and teacher are worth too."""
    c = ml1m_pool.get_config()
    c.tuned_on = (0, 1, 2, 3)  # of 2 and 3 the tests of experiments/ml1m_pool.py said that texts cost
    c.shared.width = 128
    c.lm.width = 128
    c.lm.n_heads = 4
    c.lm.n_kv_heads = 4
    c.lm.mlp_width = 384
    c.lm.learning_rate = 2e-3
    c.prompts.titled_share = 0.0
    c.prompts.card_copies = 0.0
    c.pretrain.replay_share = 0.0
    c.mutual.domain_epochs_a_round = 0
    c.mutual.lm.text = 0.0
    for arm in (c.mutual.lm, c.mutual.domain):
        arm.align_user = arm.align_item = 0.0
    more = ("bdlm_lm_teaches", "bdlm_headless", "bdlm_random", "cached", "pool", "pool_alone")
    c.models = defaults.choose({"short": c.models, "table": (*c.models, *more)}, arg)
    return c


def get_hyper():
    """Returns the seeds of docs/results.md."""
    return defaults.sweep("seed", (4, 5, 6))
