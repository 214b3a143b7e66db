"""Your own language model: a Hugging Face directory (or hub id) of the Llama, Mistral, Qwen, GPT-2 or Gemma family.

python -m bdlm_jax.main --config experiments/own_lm.py --workdir runs/own_lm --config.lm.path=FOLDER

Begins from its weights and its tokenizer, on the embedded twins world; for your interactions, take the data settings of
experiments/own_data.py. Nothing here was tuned on your model.

Both losses reach both shared tables.
"""

from experiments import defaults


def get_config():
    c = defaults.get_config()
    c.models = ("item_pop", "lightgcn", "text_lm", "ids_lm", "bdlm")
    c.lm.path = ""  # give it on the command line
    c.lm.trains = "lora"  # full: every weight; bridge: the language model stays as it is
    c.lm.lora_rank = 16
    c.lm.lora_alpha = 32.0
    c.lm.row_std = c.lm_alone.row_std = 0.0  # <iid> rows as large as the text rows
    c.lm.dropout = 0.0
    c.lm.learning_rate = 2e-4  # 2e-5 for full
    c.lm.learning_rate_shared = 2e-4
    c.lm.warmup_steps = 100
    c.mutual.learning_rate_bridge = 1e-3
    # A large model: bfloat16 throughout, less memory for activations, and for full the smaller optimiser.
    # c.lm.dtype = c.lm.param_dtype = "bfloat16"
    # c.lm.remat, c.lm.accumulate, c.lm.optimizer = True, 4, "adafactor"
    return c
