"""Amazon Beauty, the 5-core of 2014 that papers use: leave-one-out, both arms against LightGCN, on two CPU cores.

python -m bdlm_jax.main --config experiments/beauty.py --workdir runs/beauty --config.data.path=FOLDER
python -m bdlm_jax.main --config experiments/beauty.py --workdir runs/beauty --config.data.path=data/beauty \
    --config.data.kind=amazon     # the publisher's files: python -m bdlm_jax.data.download Beauty --out data/beauty

FOLDER holds interactions.csv.gz (user_id, item_id, order) and items.csv.gz (item_id, title): 22,363 users, 12,101
items, 198,502 interactions; 52 targets of the test are cold. They come from McAuley's Amazon product data of 2014,
https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/: reviews_Beauty_5.json.gz, meta_Beauty.json.gz.
S3-Rec (github.com/aHuiWang/CIKM2020-S3Rec, data/data_process.py) keeps reviews of any rating and sorts each user's by
unixReviewTime alone, so that those of one day stay in the order of the file. The reader `amazon` does the same.

Chosen on validation alone (10,000 of its cases, NDCG@10/full, seed 7, which the table has not; docs/experiments.md):
* Ids-only LM, 20 epochs: softmax over all items .061 in 417 s of a core, over 1,024 drawn .049 in 156 s. Drawn, twice
  the epochs .061, and at twice the rate (4e-3) .063 in 281 s. Here it has thrice those of BDLM, whose rows are more.
* BDLM's LM, 1,024 drawn, 20 epochs in two rounds: .069, at twice the rate .070; 10 epochs without rounds .068. There,
  with `lm.kl` and `lm.align_user` at .01 .068, at a third more time; with .2 of the cards .068, at an eighth less.
* Distillation, 10 epochs at the rate 1e-2 .042, at 1e-1 .063; there .068 after 40, and less after 60.
* SASRec, 24 epochs: .024, .042, .056, .065, .068, .068 after every fourth. It reads 20 items, for 95 % of histories
  have no more. LightGCN, 100 epochs: .036, and no more after 80.

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
    c.lm.softmax_items = 1024
    c.lm.learning_rate = 4e-3
    c.lm.learning_rate_shared = 4e-3
    c.lm.dropout = 0.4
    c.lm.warmup_steps = 100
    c.lm.max_text_targets = 16
    c.prompts.titled_share = 0.01
    c.prompts.length = 104
    c.prompts.user_dropout = 1.0
    c.prompts.max_items = 50
    c.prompts.card_copies = 0.2
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
    c.itemgcn.length = 20
    c.itemgcn.softmax_items = 1024
    c.lm_alone.text_epochs = 4.0
    c.lm_alone.ids_times = 3.0
    c.mutual.reads = "propagated"
    c.mutual.learning_rate_bridge = 1e-3
    c.mutual.rounds = 2
    c.mutual.lm_epochs = 6.0
    c.mutual.lm_epochs_a_round = 3.0
    c.mutual.domain_epochs_a_round = 3
    c.mutual.domain_learning_rate = 1e-3
    c.mutual.kl_users = 2048
    c.mutual.kl_items = 4096
    c.mutual.distill_epochs = 60
    c.mutual.distill_learning_rate = 1e-1
    c.mutual.lm.text = 0.1
    c.mutual.lm.align_user = 0.0
    c.mutual.lm.align_item = 0.5
    c.mutual.lm.kl = 0.0
    c.evaluate.text_protocols = ("cand20",)
    c.models = defaults.choose({"short": c.models, "table": defaults.whole_table(c)}, arg)
    return c


def get_hyper():
    """Returns three seeds, each with every item and with a drawn part in the domain arm's score-level term."""
    return defaults.product(defaults.sweep("mutual.kl_items", (4096, 0)), defaults.sweep("seed", range(3)))
