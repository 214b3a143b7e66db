"""Items that nobody has had: a drawn tenth of all items is known by its text alone, and asked for among all others.

python -m bdlm_jax.main --config experiments/cold_items.py:beauty --workdir runs/cold_beauty --config.data.path=FOLDER
python -m bdlm_jax.main --config experiments/cold_items.py:ml1m --workdir runs/cold_ml1m --config.data.path=FOLDER

Beauty's settings are those of experiments/beauty_itemgcn.py, MovieLens-1M's those of experiments/ml1m_pool.py, and none
was chosen for cold items. Every interaction with a cold item is a case ("cold"); what a user had of the others is left
one out ("warm"). Trained as ever, every model ranks cold items behind all others, for a softmax over items and BPR
alike make rows short that are never the answer: `evaluate.cold_lift` moves the rows of cold items, of every model
alike, by what validation chooses with warm and cold targets weighed alike. A row "_unlifted" is the model without it.
Beware of hr@10/cand100 of cold targets by itself: where cold items are lifted far, their hundred candidates hold ten
cold ones, and any order of them will do. hr@1/cold20, the target among twenty cold items, no lift can move.

Test (docs/results_cold.md). MovieLens-1M, seed 2: HR@10/cand100 of cold targets .49 (LM arm) and .39 (domain arm),
NDCG@10/full of warm ones .175 → .172 and .184 → .182; HR@1/cold20 .11 and .15 (ItemGCN .15, chance .05); 51 minutes of
one core, shared at the end. Beauty, seeds 0 to 2: HR@1/cold20 .26, .26, .24 and .24, .23, .22; HR@10/cand100 of cold
targets .80, .88, .85 and .77, .79, .77, NDCG@10/full of warm ones .061 → .051 and .062 → .054; 26 minutes of one core a
seed. With `cold_lift=validation`, by the mean over all cases, Beauty's warm targets keep .058 and .060; MovieLens-1M's,
where most cases are cold, fall to .017 and .030: do not serve that.

As in the two experiments, the LM's loss reaches the item table alone.
"""

from experiments import beauty_itemgcn, defaults, ml1m_pool


def get_config(arg="beauty"):
    """Returns the config of one data set."""
    c = defaults.choose({"beauty": beauty_itemgcn, "ml1m": ml1m_pool}, arg).get_config()
    c.models = ("lightgcn", "itemgcn", "ids_lm", "bdlm")
    c.data.split = "cold_items"
    c.evaluate.cold_lift = "kinds"
    c.mutual.text_head = "none"  # cold items have no rows in the graph
    if arg == "ml1m":
        c.itemgcn.length = 100
    return c


def get_hyper():
    """Returns the seeds of docs/results.md."""
    return defaults.sweep("seed", range(3))
