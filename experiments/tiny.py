"""The smallest whole run, every stage in seconds, for end-to-end tests and the notebook; its numbers mean nothing.

python -m bdlm_jax.main --config experiments/tiny.py --workdir runs/tiny

Both losses reach both shared tables.
"""

from experiments import defaults


def get_config():
    c = defaults.get_config()
    c.data.options = {
        "n_users": 150, "n_categories": 4, "n_styles": 3, "n_materials": 4, "n_twins": 16, "n_singles": 4,
        "n_cold": 8, "n_knowledge": 8, "history": 10, "min_history": 5, "n_sentences": 200,
    }  # fmt: skip
    c.data.candidates = {"cand20": 19}
    c.evaluate.protocols = ("cand20", "full")
    c.evaluate.text_protocols = ("cand20",)
    c.evaluate.chunk = 64
    c.tokenizer.vocab_size = 300
    c.lm.width = 16
    c.lm.n_layers = 1
    c.lm.mlp_width = 32
    c.lm.batch_rows = 8
    c.lm.warmup_steps = 5
    c.prompts.length = 96
    c.prompts.max_title_tokens = 8
    c.shared.width = 16
    c.pretrain.epochs = 1.0
    c.domain.n_layers = 2
    c.domain.epochs = 4
    c.domain.evaluate_every = 2
    c.domain.batch_size = 512
    c.mf.epochs = 2
    c.sasrec.epochs = 2
    c.lm_alone.text_epochs = 1.0
    c.mutual.text_head = "words"
    c.mutual.text_width = 16
    c.mutual.rounds = 1
    c.mutual.lm_epochs = 1.0
    c.mutual.lm_epochs_a_round = 1.0
    c.mutual.domain_epochs_a_round = 2
    c.mutual.kl_users = 32
    c.mutual.distill_epochs = 4
    c.runtime.log = "none"
    return c
