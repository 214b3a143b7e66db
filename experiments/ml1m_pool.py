"""MovieLens-1M, the domain arm taught by the sum of the LM's scores and those of LightGCN as it was alone.

python -m bdlm_jax.main --config experiments/ml1m_pool.py --workdir runs/ml1m_pool --config.data.path=FOLDER

All else is as in experiments/ml1m.py: LightGCN by itself is far below the LM here, and yet knows what the LM does not.
The weight of its scores is chosen on validation, .25 with seed 7: .183 of the sum, .176 of the LM, and .183 of the
domain arm that learned from the sum where it is .176 from the LM alone (docs/experiments.md). Test, mean of seeds 2
and 7: domain arm .184, from the LM alone .176, LM arm .176; SASRec .165 with seed 2.

As it does there, the LM's loss reaches the item table alone.
"""

from experiments import defaults, ml1m


def get_config(arg="short"):
    """Returns the config: "short" has the main models, "table" what the teacher beside the LM is worth too."""
    c = ml1m.get_config()
    c.mutual.teacher = "pool"
    main = ("lightgcn", "sasrec", "ids_lm", "bdlm")
    more = ("bdlm_lm_teaches", "cached", "pool", "pool_alone")
    c.models = defaults.choose({"short": main, "table": (*main, *more)}, arg)
    return c


def get_hyper():
    """Returns the seeds of docs/results.md."""
    return defaults.sweep("seed", (2, 7))
