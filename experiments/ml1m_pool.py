"""MovieLens-1M, both arms with what LightGCN alone knows: by a teacher, and by a head.

python -m bdlm_jax.main --config experiments/ml1m_pool.py --workdir runs/ml1m_pool --config.data.path=FOLDER

All else is as in experiments/ml1m.py: LightGCN by itself is far below the LM here, and yet knows what the LM does not.
The domain arm learns at the end from the sum of the LM's scores and LightGCN's; likeness of items in LightGCN weighs in
the LM's scores (`mutual.text_head`). All weights are chosen on validation. There, seed 7, the LM has .176 and with the
head .182, the sum with LightGCN's rows of users .183, and the domain arm that learned from it .183
(docs/experiments.md). Test, NDCG@10/full, means of seeds 2, 3 and 7: LM arm .181 (.175 without the head), domain arm
.183 (.176 from the LM alone); SASRec .166 and the ids-only LM .169 (seeds 2 and 3). The main models took 57 minutes of
one core, another run on the other (seed 3).

As it does there, the LM's loss reaches the item table alone.
"""

from experiments import defaults, ml1m


def get_config(arg="short"):
    """Returns the config: "short" has the main models, "table" what the teacher beside the LM is worth too."""
    c = ml1m.get_config()
    c.mutual.teacher = "pool"
    c.mutual.text_head = "graph"
    main = ("lightgcn", "sasrec", "ids_lm", "bdlm")
    more = ("bdlm_lm_teaches", "bdlm_warm_taught", "cached", "pool", "pool_alone")
    c.models = defaults.choose({"short": main, "table": (*main, *more)}, arg)
    return c


def get_hyper():
    """Returns the seeds of docs/results.md."""
    return defaults.sweep("seed", (2, 3, 7))
