"""MovieLens-1M with lessons: both arms learn from the sum of the LM's scores and those of LightGCN as it was alone.

python -m bdlm_jax.main --config experiments/ml1m_lessons.py --workdir runs/ml1m_lessons --config.data.path=FOLDER

All else is as in experiments/ml1m.py: LightGCN by itself is far below the LM here, and yet knows what the LM does not.
In the lessons the LM alone moves the table; then the domain arm is distilled from the sum of the LM that was taught and
LightGCN.

The LM's loss reaches the item table alone, as it does there.
"""

from experiments import defaults, ml1m

CONTROLS = ("bdlm_lm_teaches", "bdlm_domain_teaches", "bdlm_to_domain")


def get_config(arg="short"):
    """Returns the config: "short" has the main models, "table" what each ingredient is worth too."""
    c = ml1m.get_config()
    c.mutual.teacher = "pool"
    c.mutual.taught.rounds = 1
    c.mutual.taught.lm_epochs = 10.0
    c.mutual.taught.domain_epochs = 0
    main = ("lightgcn", "sasrec", "ids_lm", "bdlm")
    c.models = defaults.choose({"short": main, "table": (*main, *CONTROLS, "cached", "pool", "pool_alone")}, arg)
    return c


def get_hyper():
    """Returns the seeds of docs/results.md."""
    return defaults.sweep("seed", range(2, 5))
