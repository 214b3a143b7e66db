"""Your own language model: a Hugging Face directory (or hub id) of the Llama, Mistral, Qwen, GPT-2 or Gemma family.

python -m bdlm_jax.main --config experiments/own_lm.py --workdir runs/own_lm --config.data.path=FOLDER \
    --config.lm.path=MODEL                                                # own_lm.py:long for long histories

Begins from its weights and its tokenizer. "short" and "long" are those of experiments/own_data.py, with adapters that
recommend and do not write (`lm.speaks`): plain text is written by the model as it came, so that there is no language to
lose and nothing that holds the adapters back. "merged" has your model write through its adapters, on the embedded twins
world: its language is kept by rows of general text among the others, of pretrain.corpus or, without one, what the model
itself wrote before; the run says what its perplexity was before BDLM and after it. That costs a good part of what it
recommends by (experiments/ml1m_own_lm.py). Rates of 0 follow from lm.trains (full, lora, bridge), from lm.speaks and
from the model's width (bdlm_jax/run/rates.py).

On validation, seed 7, a film model of a million parameters has .140 (LM arm) and .147 (domain arm) of NDCG@10/full on
MovieLens-100K ("long"; LightGCN .074, a decoder from scratch .140), .077 and .076 on standard Beauty ("short"; ItemGCN
.074, the decoder .079): 14 and 38 minutes of a core that another run shared.

In "short" and "long" the LM's loss reaches the item table alone, as in experiments/own_data.py.
In "merged" both losses reach both shared tables.
"""

from experiments import defaults, own_data


def get_config(arg="short"):
    """Returns the config: "short" and "long" for your interactions, "merged" for a model that writes as it ranks."""
    c = defaults.choose({"short": _beside, "long": _beside, "merged": _merged}, arg)(arg)
    c.lm.path = "<your model>"  # give it on the command line
    c.lm.trains = "lora"  # full: every weight; bridge: the language model stays as it is
    c.lm.row_std = c.lm_alone.row_std = 0.0  # <iid> rows as large as the text rows
    c.lm.learning_rate = c.lm.learning_rate_shared = c.mutual.learning_rate_bridge = 0.0
    c.lm.warmup_steps = 100
    # A large model: bfloat16 throughout, less memory for activations, and for full the smaller optimiser.
    # c.lm.dtype = c.lm.param_dtype = "bfloat16"
    # c.lm.remat, c.lm.accumulate, c.lm.optimizer = True, 4, "adafactor"
    return c


def _beside(arg):
    c = own_data.get_config(arg)
    c.lm.speaks = "base"
    c.lm.lora_rank = 64
    c.lm.lora_alpha = 64.0
    c.pretrain.samples = 1024  # of its own, by which the run tells what its adapters would do to its language
    return c


def _merged(_):
    c = defaults.get_config()
    c.models = ("item_pop", "lightgcn", "text_lm", "ids_lm", "bdlm")
    c.lm.lora_rank = 16
    c.lm.lora_alpha = 32.0
    c.lm.dropout = 0.0
    c.lm.text_row_rate = 0.1  # with full: a row that no title holds must not drift from those that do
    c.pretrain.epochs = 1.0  # of a pretrain.corpus, before the rest
    c.pretrain.learning_rate = 0.0
    c.pretrain.samples = 1024  # few would be learnt by heart
    c.pretrain.replay_share = 0.25
    c.mutual.lm.text = 4.0  # which language pulls with, beside the items
    c.prompts.card_copies = 4.0  # a model that reads already needs to see a title less often
    return c
