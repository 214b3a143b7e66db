"""MovieLens-100K, both arms taught by the sum of the LM's scores and those of LightGCN as it was alone.

python -m bdlm_jax.main --config experiments/ml100k_pool.py --workdir runs/ml100k_pool --config.data.path=FOLDER

Data, domain models and baselines are those of experiments/ml100k.py. What differs: no rounds, and the LM hears nothing
of users before the lessons; in these both arms learn, in turn and on one table, from the sum. The LM's settings are
those of experiments/own_data.py:long, tried on validation with seed 7 alone (docs/experiments.md): LM .129 before the
lessons, .140 after them; the ids-only LM, with twice the epochs, .130.

Test, NDCG@10 in full ranking, means of ten seeds: LM arm .128, domain arm .133, ids-only LM .110, LightGCN .072. With
the LM as the only teacher (`bdlm_lm_teaches`) .121 and .125: the sum's part is 6 % in both arms, in all ten seeds and
in nine, though with 943 users no claim (docs/results.md). LightGCN, the ids-only LM, BDLM and that control took 10
minutes of one core, another run on the other; SASRec takes 7 more.

<uid> is never shown, and rows are read as they stand: the LM's loss reaches the item table alone.
"""

from experiments import defaults, ml100k

CONTROLS = ("bdlm_lm_teaches", "bdlm_domain_teaches", "bdlm_warm_taught")


def get_config(arg="short"):
    """Returns the config: "short" has the main models, "table" what each teacher is worth too."""
    c = ml100k.get_config()
    c.tuned_on = (7,)
    c.lm.batch_rows = 32
    c.lm.learning_rate = c.lm.learning_rate_shared = 3e-3
    c.lm_alone.ids_times = 2.0
    c.prompts.user_dropout = 1.0
    c.prompts.titled_share = 0.01
    c.mutual.lm_epochs_a_round = 4.0
    c.mutual.domain_epochs_a_round = 0
    c.mutual.lm.align_user = 0.0
    c.mutual.lm.kl = 0.0
    c.mutual.teacher = "pool"
    c.mutual.taught.rounds = 2
    c.mutual.distill_epochs = 40
    main = ("lightgcn", "sasrec", "ids_lm", "bdlm")
    c.models = defaults.choose({"short": main, "table": (*main, *CONTROLS, "cached", "pool", "pool_alone")}, arg)
    return c


def get_hyper():
    """Returns the seeds of docs/results.md: ten, without that of `tuned_on`."""
    return defaults.sweep("seed", [seed for seed in range(1, 12) if seed != 7])
