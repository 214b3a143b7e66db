"""Amazon Beauty, the 5-core of 2014 that papers use: leave-one-out, both arms against LightGCN, on two CPU cores.

python -m bdlm_jax.main --config experiments/beauty.py --workdir runs/beauty --config.data.path=FOLDER
python -m bdlm_jax.main --config experiments/beauty.py --workdir runs/beauty --config.data.path=data/beauty \
    --config.data.kind=amazon     # the publisher's files: data.download.fetch_amazon("Beauty", 2014, "data/beauty")

FOLDER holds interactions.csv.gz (user_id, item_id, order) and items.csv.gz (item_id, title): 22,363 users, 12,101
items, 198,502 interactions; 52 targets of the test are cold. They come from McAuley's Amazon product data of 2014,
https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/: reviews_Beauty_5.json.gz, meta_Beauty.json.gz.
S3-Rec (github.com/aHuiWang/CIKM2020-S3Rec, data/data_process.py) keeps reviews of any rating and sorts each user's by
unixReviewTime alone, so that those of one day stay in the order of the file. The reader `amazon` does the same.

The settings were found on another edition of Beauty (22,332 users, 12,086 items; docs/results.md) and are not tuned on
this one yet.

SASRec alone, seed 0, 24 epochs: test HR@10/full .0890, NDCG@10/full .0535; published are .0928 and .0523 (eSASRec),
.0921 and .0531 (RAILS). On 6,000 of the validation cases NDCG@10/full was .023, .040, .057, .064, .066 and .068 after
every fourth epoch: still rising. It reads 20 items, for 95 % of histories have no more. (Its windows were an item
shorter then, so that the state after 20 items had learned nothing: what is there now is not measured yet.)

Both losses reach both shared tables, the LM's that of users by the propagation alone: <uid> is never shown.
"""

from experiments import defaults


def get_config(arg="short"):
    """Returns the config: "short" has the main models, "table" every baseline and control."""
    c = defaults.get_config()
    c.data.kind = "table"
    c.data.path = "data/amazon-beauty-standard"
    c.tokenizer.vocab_size = 4096
    c.pretrain.corpus = ""  # general text, a document a line
    c.pretrain.max_tokens = 1_000_000
    c.pretrain.epochs = 1.0
    c.pretrain.replay_share = 0.02
    c.lm.batch_rows = 16
    c.lm.learning_rate = 2e-3
    c.lm.learning_rate_shared = 2e-3
    c.lm.dropout = 0.4
    c.lm.warmup_steps = 100
    c.lm.max_text_targets = 16
    c.prompts.titled_share = 0.01
    c.prompts.length = 104
    c.prompts.user_dropout = 1.0
    c.prompts.max_items = 50
    c.prompts.card_copies = 0.5
    c.domain.batch_size = 16_384
    c.domain.learning_rate = 5e-3
    c.domain.epochs = 100
    c.domain.evaluate_every = 10
    c.mf.learning_rate = 1e-2
    c.mf.epochs = 60
    c.sasrec.length = 20
    c.sasrec.dropout = 0.5
    c.sasrec.learning_rate = 2e-3
    c.sasrec.schedule = "cosine"
    c.sasrec.warmup_steps = 100
    c.sasrec.epochs = 24
    c.sasrec.evaluate_every = 4
    c.sasrec.softmax_items = 1024
    c.lm_alone.text_epochs = 0.15
    c.lm_alone.ids_times = 1.0
    c.mutual.reads = "propagated"
    c.mutual.learning_rate_bridge = 1e-3
    c.mutual.rounds = 2
    c.mutual.lm_epochs = 10.0
    c.mutual.lm_epochs_a_round = 5.0
    c.mutual.domain_epochs_a_round = 3
    c.mutual.domain_learning_rate = 1e-3
    c.mutual.kl_users = 2048
    c.mutual.kl_items = 4096
    c.mutual.distill_epochs = 60
    c.mutual.distill_learning_rate = 1e-2
    c.mutual.lm.text = 0.1
    c.mutual.lm.align_user = 0.01
    c.mutual.lm.align_item = 0.5
    c.mutual.lm.kl = 0.01
    c.evaluate.text_protocols = ("cand20",)
    c.models = defaults.choose({"short": c.models, "table": defaults.whole_table(c)}, arg)
    return c


def get_hyper():
    """Returns three seeds, each with every item and with a drawn part in the domain arm's score-level term."""
    return defaults.product(defaults.sweep("mutual.kl_items", (4096, 0)), defaults.sweep("seed", range(3)))
