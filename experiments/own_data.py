"""Your own interactions: a folder with interactions.csv (user_id, item_id, timestamp) and items.csv (item_id, title).

python -m bdlm_jax.main --config experiments/own_data.py --workdir runs/own --config.data.path=FOLDER
python -m bdlm_jax.main --config experiments/own_data.py:long --workdir runs/own --config.data.path=FOLDER

Nothing here is tuned on your data. "short", the default, is for histories of some tens of items, as shops have them,
and takes the settings of experiments/beauty_itemgcn.py. "long" is for histories of a hundred items, as of films: those
of experiments/ml1m_pool.py, with LightGCN's batches for some hundred thousand interactions and lessons for both arms
(MovieLens-100K, docs/experiments.md). Other layouts: set data.options to the arguments of the reader
(`bdlm_jax/data/readers.py`), or data.kind to movielens, recbole or amazon.

"long" on MovieLens latest-small (610 users), of which nothing was tuned: docs/results_own_data.md.

In both the LM's loss reaches the item table alone: users are read from items, or <uid> is never shown.
"""

from experiments import beauty_itemgcn, defaults, ml1m_pool

VARIANTS = {"short": beauty_itemgcn, "long": ml1m_pool}


def get_config(arg="short"):
    """Returns the settings for short histories, or for long ones."""
    c = defaults.choose(VARIANTS, arg).get_config()
    c.tuned_on = ()
    c.data = defaults.get_config().data
    c.data.kind = "table"
    c.data.path = "data/own"
    # Columns with other names, and a table in one file:
    # c.data.options = {"columns": {"user": "customer", "item": "sku", "time": "when"}, "items": "products.csv"}
    c.data.min_user = 3  # the training part needs an interaction beside the two held out
    c.data.min_item = 1
    c.models = ("item_pop", *c.models)
    if arg == "long":
        c.lm_alone.ids_times = 2.0
        c.prompts.card_copies = 0.5
        c.domain.batch_size = 4096
        c.domain.learning_rate = 1e-2
        c.domain.epochs = 100
        c.domain.evaluate_every = 5
        c.mutual.lm_epochs = 8.0
        c.mutual.lm_epochs_a_round = 4.0
        c.mutual.domain_epochs_a_round = 0
        c.mutual.taught.rounds = 2
        c.mutual.distill_learning_rate = 1e-2
    return c
