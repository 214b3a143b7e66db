"""Compares the decoder with transformers' torch models, and stores what they compute for the suite to check.

Every case is a tiny random model of a family with awkward shapes. Needs torch:

    python tests/golden/make_golden.py            # writes tests/golden/<case>/ anew
    python tests/golden/make_golden.py --docs     # writes docs/parity.md, from fresh models
"""

import argparse
import copy
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file

from bdlm_jax.lm.causal_lm import lm_hidden, text_logits
from bdlm_jax.lm.hf_config import lm_config_from_hf
from bdlm_jax.lm.hf_weights import export_tensors, load_lm

HERE = Path(__file__).parent
N_ROWS, LENGTH, N_TOKENS = 4, 11, 101
_LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
_SIZES = {
    "vocab_size": N_TOKENS, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
_GEMMA = {"head_dim": 6, "query_pre_attn_scalar": 10, "sliding_window": 3}
CASES = {  # configurations as a hub's config.json has them
    "llama": {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": _LLAMA3, "tie_word_embeddings": False},
    "llama_biased": {
        "model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "mistral": {"model_type": "mistral", "sliding_window": 4, "tie_word_embeddings": False},
    "qwen2": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
        "rope_theta": 1e6, "tie_word_embeddings": True,
    },
    "qwen3": {
        "model_type": "qwen3", "head_dim": 6, "rope_theta": 1e4, "rope_scaling": _YARN, "tie_word_embeddings": False,
    },
    "gpt2": {
        "model_type": "gpt2", "vocab_size": N_TOKENS, "n_embd": 24, "n_layer": 2, "n_head": 6, "n_positions": 64,
        "n_inner": 20, "bos_token_id": None, "eos_token_id": None,
    },
    "gemma2": {
        "model_type": "gemma2", **_GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0,
        "tie_word_embeddings": True,
    },
    "gemma3": {
        "model_type": "gemma3_text", **_GEMMA, "num_hidden_layers": 3, "intermediate_size": 12,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_theta": 1e4, "rope_local_base_freq": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "tie_word_embeddings": True,
    },
}  # fmt: skip
STORED = tuple(case for case in CASES if case != "llama_biased")  # its options are GPT-2's and Gemma 3's too


def make_batch(case: str, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Draws four rows: a whole one, one padded left, one padded right, one at far positions."""
    generator = np.random.default_rng(seed)
    tokens_BL = generator.integers(0, N_TOKENS, (N_ROWS, LENGTH)).astype(np.int32)
    mask_BL = np.ones((N_ROWS, LENGTH), bool)
    mask_BL[1, :4] = False
    mask_BL[2, -3:] = False
    positions_BL = np.maximum(np.cumsum(mask_BL, axis=1) - 1, 0).astype(np.int32)
    if case == "gpt2":
        positions_BL[3] += 40
    elif "sliding_window" in CASES[case]:
        positions_BL[3] += 200  # transformers measures a window in tokens, which are positions where these are dense
    else:
        positions_BL[3] *= 37
    return {"tokens": tokens_BL, "mask": mask_BL, "positions": positions_BL}


def write_model(case: str, folder: Path, *, seed: int = 0):
    """Saves a random torch model of the case, in bfloat16, and returns it in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = copy.deepcopy(CASES[case])  # transformers writes into what it is given
    family = fields.pop("model_type")
    config = AutoConfig.for_model(family, **(fields if family == "gpt2" else {**_SIZES, **fields}))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.3)
            if "norm" in name and name.endswith("weight") and "gemma" not in family:
                parameter += 1
    model.to(torch.bfloat16).save_pretrained(folder)
    # Read back, for the cast has rounded the rotary frequencies too, which are no weights.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def torch_results(model, batch) -> dict[str, np.ndarray]:
    """Returns logits, hidden states and the gradient of the next-token loss by transformers' names."""
    import torch

    tokens, mask, positions = (torch.tensor(batch[name]).long() for name in ("tokens", "mask", "positions"))
    how = {"output_hidden_states": True, "use_cache": False}
    out = model(input_ids=tokens, attention_mask=mask, position_ids=positions, **how)
    pairs = (mask[:, 1:] & mask[:, :-1]).bool()
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1][pairs], tokens[:, 1:][pairs])
    model.zero_grad()
    loss.backward()
    gradient = {f"gradient.{name}": p.grad.numpy().copy() for name, p in model.named_parameters()}
    return {
        "logits": out.logits.detach().numpy(),
        "hidden": out.hidden_states[-1].detach().numpy(),
        "loss": loss.detach().numpy().reshape(1),
        **gradient,
    }


@partial(jax.jit, static_argnames="config")
def _our_loss_and_gradient(params, config, tokens_BL, positions_BL, mask_BL):
    def loss_of(params):
        hidden_BLM = lm_hidden(params, config, tokens_BL, positions_BL, mask_BL.astype(jnp.int32), None)
        logits_BLV = text_logits(params, config, hidden_BLM)
        pairs = mask_BL[:, 1:] & mask_BL[:, :-1]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits_BLV[:, :-1], tokens_BL[:, 1:])
        return jnp.sum(nll, where=pairs) / pairs.sum(), (logits_BLV, hidden_BLM)

    return jax.value_and_grad(loss_of, has_aux=True)(params)


def our_results(folder: Path, batch) -> dict[str, np.ndarray]:
    """Returns what `torch_results` does, from our decoder on the saved model."""
    config = lm_config_from_hf(folder)
    inputs = (batch[name] for name in ("tokens", "positions", "mask"))
    (loss, (logits, hidden)), gradient = _our_loss_and_gradient(load_lm(folder, config), config, *inputs)
    return {
        "logits": np.asarray(logits),
        "hidden": np.asarray(hidden),
        "loss": np.asarray(loss).reshape(1),
        **{f"gradient.{name}": array for name, array in export_tensors(gradient, config)},
    }


def differences(ours, theirs, mask_BL) -> dict[str, float]:
    """The largest absolute ones of logits and states at tokens; of each gradient, relative to its largest entry."""
    assert ours.keys() == theirs.keys(), "the two models do not have the same tensors"
    found = {name: float(np.abs(ours[name] - theirs[name])[mask_BL].max()) for name in ("logits", "hidden")}
    gradients = [name for name in theirs if name.startswith("gradient.")]
    found["gradient"] = max(float(np.abs(ours[n] - theirs[n]).max() / np.abs(theirs[n]).max()) for n in gradients)
    return found


def _write_golden() -> None:
    for case in STORED:
        folder = HERE / case
        model, batch = write_model(case, folder), make_batch(case)
        (folder / "generation_config.json").unlink(missing_ok=True)
        save_file({**batch, **torch_results(model, batch)}, folder / "expected.safetensors")
        sys.stdout.write(f"{case}\n")


def _write_docs(path: Path) -> None:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    lines = [
        "# Parity with transformers",
        "",
        f"Largest differences between our decoder (JAX {jax.__version__}) and transformers {transformers.__version__} "
        f"on torch {torch.__version__.split('+')[0]}, CPU, float32, three random tiny models for each case: "
        "6 query heads on 2 key heads (GPT-2: 6 on 6), 101 tokens, rows padded left and right, one row at far "
        "positions. Logits and hidden states: absolute, at tokens; gradient of the next-token loss: of each tensor "
        "against its largest entry. Written by `python tests/golden/make_golden.py --docs`.",
        "",
        "| case | model_type | logits | hidden | gradient | largest logit |",
        "|---|---|---|---|---|---|",
    ]
    for case in CASES:
        worst = {"logits": 0.0, "hidden": 0.0, "gradient": 0.0, "size": 0.0}
        for seed in (1, 2, 3):
            with tempfile.TemporaryDirectory() as folder:
                model, batch = write_model(case, Path(folder), seed=seed), make_batch(case, seed=seed)
                theirs = torch_results(model, batch)
                found = differences(our_results(Path(folder), batch), theirs, batch["mask"])
            found["size"] = float(np.abs(theirs["logits"]).max())
            worst = {name: max(worst[name], found[name]) for name in worst}
        shown = " | ".join(f"{worst[name]:.1e}" for name in ("logits", "hidden", "gradient"))
        lines.append(f"| {case} | {CASES[case]['model_type']} | {shown} | {worst['size']:.1f} |")
        sys.stdout.write(lines[-1] + "\n")
    lines += ["", "The configurations:", "```json", *(json.dumps({c: f}) for c, f in CASES.items()), "```", ""]
    path.write_text("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", action="store_true", help="write docs/parity.md instead")
    if parser.parse_args().docs:
        _write_docs(HERE.parents[1] / "docs" / "parity.md")
    else:
        _write_golden()
