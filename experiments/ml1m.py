"""MovieLens-1M."""

from experiments import defaults


def get_config():
    c = defaults.get_config()
    c.data.kind = "movielens"
    c.data.path = "../shared/data/ml-1m"
    c.data.item_fields = ("title", "genres")
    c.tokenizer.vocab_size = 4096
    c.lm.batch_rows = 64
    c.lm.dropout = 0.2
    c.prompts.kind = "ids"
    c.prompts.length = 104
    c.prompts.max_items = 100
    c.domain.batch_size = 131072
    c.domain.learning_rate = 5e-2
    c.domain.epochs = 26
    c.domain.evaluate_every = 2
    return c
