"""Amazon Beauty (5-core): leave-one-out, both arms against LightGCN, on two CPU cores.

python -m bdlm_jax.main --config experiments/amazon_beauty.py --workdir runs/beauty --config.data.path=FOLDER

FOLDER holds interactions.csv.gz (user_id, item_id, order) and items.tsv.gz (item, asin, title). Seed 0 on two CPU cores
that other work shared, with --config.pretrain.corpus=REVIEWS.txt.xz (IMDb reviews, of which max_tokens are read): 64
minutes in all stages. Test, HR@1/cand100 and NDCG@10/full: LightGCN .183 .031, ids-only LM .206 .035, BDLM's domain arm
.240 .052, its LM arm .243 .053: +31 % and +33 % in HR@1 over LightGCN, +16 % and +18 % over the ids-only LM. The LM arm
was best on validation after its first 10 epochs already.

Both losses reach both shared tables, the LM's that of users by the propagation alone: <uid> is never shown.
"""

from experiments import defaults


def get_config():
    """Returns the config."""
    c = defaults.get_config()
    c.data.kind = "table"
    c.data.path = "data/amazon-beauty"
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
    return c


def get_hyper():
    """Returns three seeds, each with every item and with a drawn part in the domain arm's score-level term."""
    return defaults.product(defaults.sweep("mutual.kl_items", (4096, 0)), defaults.sweep("seed", range(3)))
