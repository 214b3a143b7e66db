"""MovieLens-1M around an own language model: does it gain, and does it still speak?

python -m bdlm_jax.pretrain --corpus films.jsonl.xz --out models/film-1m --width 128 --layers 3 --heads 4 --kv_heads 2 \
    --vocab_size 4096 --length 128 --epochs 1
python -m bdlm_jax.main --config experiments/ml1m_own_lm.py --workdir runs/own_lora --config.data.path=FOLDER \
    --config.lm.path=models/film-1m --config.seed=2 --config.lm.trains=lora        # or bridge, or full
python -m bdlm_jax.main --config experiments/ml1m_own_lm.py:base --workdir runs/own_base --config.data.path=FOLDER \
    --config.lm.path=models/film-1m --config.seed=2

The data's settings are those of experiments/ml1m.py, the language model's those of experiments/own_lm.py:merged; the
LM has 2 epochs here, where experiments/ml1m.py has 16. A part of one core, the three at once: 44 to 57 minutes, of
which LoRA used 15 of the core's time; the model itself 16 minutes. Test, seed 2, NDCG@10/full of the LM arm and
the domain arm (LightGCN .040, the scratch decoder after its 16 epochs .178 for both), and how far the perplexity on its
own samples rose: bridge .100 .103, +0.0 %; lora .142 .143, +4.0 %; full .144 .145, +7.3 % (docs/experiments.md).

`:base` takes all settings but the model from experiments/ml1m.py, its 16 epochs and its rates too, and trains adapters
of rank 64 that recommend and do not write (`lm.speaks`): there is no language that they could lose. Test, seed 2: LM
arm .183, domain arm .183, its perplexity on its own samples +0.0 % (with the adapters left on 27 times as high); 87
minutes of about half a core.

As in experiments/ml1m.py the LM's loss reaches the item table alone.
"""

from experiments import defaults, ml1m, own_lm


def get_config(arg="short"):
    """Returns the config: "short" has two epochs, "base" 16 of adapters that recommend and do not write."""
    c, own = ml1m.get_config(), own_lm.get_config("merged")
    c.models = ("lightgcn", "bdlm")
    c.lm.path = own.lm.path
    if defaults.choose({"short": False, "base": True}, arg):
        c.lm.trains, c.lm.speaks = "lora", "base"
        c.lm.lora_rank, c.lm.lora_alpha = 64, 64.0
        c.pretrain.samples = 1024
        return c
    c.lm.update(own.lm)
    c.lm.batch_rows = 32
    c.lm.max_text_targets = 104  # all of a row
    c.lm_alone.row_std = own.lm_alone.row_std
    c.pretrain.update(own.pretrain)
    c.pretrain.samples = 2048
    c.prompts.card_copies = 1.0
    c.mutual.learning_rate_bridge = own.mutual.learning_rate_bridge
    c.mutual.lm.text = own.mutual.lm.text
    c.mutual.rounds = 1
    c.mutual.lm_epochs = 1.5
    c.mutual.lm_epochs_a_round = 0.5
    c.mutual.distill_epochs = 20
    return c


def get_hyper():
    """Returns the three ways to train an own model, with the seed of docs/results_own_lm.md."""
    return defaults.product(defaults.sweep("lm.trains", ("bridge", "lora", "full")), defaults.sweep("seed", (2,)))
