"""Your own interactions: a folder with interactions.csv (user_id, item_id, timestamp) and items.csv (item_id, title).

python -m bdlm_jax.main --config experiments/own_data.py --workdir runs/own --config.data.path=FOLDER

Sized for a CPU and some ten thousand users; nothing here was tuned on your data. For 15,000 users, 6,000 items and
150,000 interactions all of it is 36 minutes of one core: BDLM 20, the ids-only LM 10, the text-only LM 3, LightGCN 2
(the steps of every stage times what a few of them took; the whole was not run). Other layouts: set data.options to the
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
    # What items are called is soon read: with more of it a catalogue of thousands takes hours (experiments/beauty.py).
    c.prompts.titled_share = 0.02
    c.prompts.card_copies = 1.0
    c.domain.batch_size = 16384
    c.domain.epochs = 60
    c.lm_alone.text_epochs = 4.0
    c.evaluate.text_protocols = ("cand20",)  # cand100 takes five times as long
    return c
