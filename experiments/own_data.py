"""Your own interactions: a folder with interactions.csv (user_id, item_id, timestamp) and items.csv (item_id, title).

python -m bdlm_jax.main --config experiments/own_data.py --workdir runs/own --config.data.path=FOLDER

Sized for a CPU and some ten thousand users; nothing here was tuned on your data. Other layouts: set data.options to the
arguments of the reader (`bdlm_jax/data/readers.py`), or data.kind to movielens, recbole or amazon.

Both losses reach both shared tables.
"""

from experiments import defaults


def get_config():
    c = defaults.get_config()
    c.data.kind = "table"
    c.data.path = "data/own"
    # Columns with other names, and a table in one file:
    # c.data.options = {"columns": {"user": "customer", "item": "sku", "time": "when"}, "items": "products.csv"}
    c.data.min_user = 3  # the training part needs an interaction beside the two held out
    c.data.min_item = 1
    c.tokenizer.vocab_size = 4096
    c.lm.batch_rows = 32
    c.lm.dropout = 0.2
    c.prompts.length = 128
    c.prompts.max_items = 50
    c.domain.batch_size = 16384
    c.domain.epochs = 60
    return c
