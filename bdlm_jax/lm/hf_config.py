"""A Hugging Face `config.json` into the options of our decoder, and back.

transformers' `AutoConfig` supplies each family's defaults; torch is not needed, and no code of a checkpoint is run:
`auto_map` is ignored, and a model_type that is not listed here is refused.
"""

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from bdlm_jax.lm.config import LMConfig
from bdlm_jax.runtime.files import refuse_pointer
from bdlm_jax.types import InputError

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_SIZES = {  # our name: theirs
    "width": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "mlp_width": "intermediate_size",
    "head_width": "head_dim",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
_GPT2_SIZES = {
    "width": "n_embd",
    "n_layers": "n_layer",
    "n_heads": "n_head",
    "mlp_width": "n_inner",
    "max_positions": "n_positions",
    "norm_eps": "layer_norm_epsilon",
}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu"}
_ROPES = {  # the numbers behind the name in `LMConfig.rope_scaling`
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"),
}
_REFUSED = {  # a field, and the only values of it that our decoder computes
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "use_bidirectional_attention": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
}
_SESSION = ("dtype", "remat", "dropout", "attention")  # how we compute, of which a config.json says nothing


def lm_config_from_hf(source: str | Path | dict, *, vocab_size: int | None = None, **session) -> LMConfig:
    """Reads the decoder's options from a Hugging Face model's configuration; their `family` is its model_type.

    Args:
        source: a folder with config.json, or its content.
        vocab_size: V where it shall exceed the checkpoint's (added tokens, rows that make it divisible).
        **session: of _SESSION.
    """
    raw, where = _read(source)
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise InputError(f"{where} has model_type {family!r}; the language models read here are {', '.join(FAMILIES)}.")
    full = _complete(raw, family, where)
    for field, allowed in _REFUSED.items():
        value = getattr(full, field, allowed[0])
        if value not in allowed:
            raise InputError(f"{where} sets {field} to {value!r}; only {allowed[0]!r} is implemented.")
    n_rows = full.vocab_size
    if vocab_size is not None and vocab_size < n_rows:
        raise InputError(f"vocab_size {vocab_size} is below the {n_rows} rows of {where}: raise it, or leave it out.")
    read = _gpt2_options if family == "gpt2" else _rotary_options
    return LMConfig(
        vocab_size=vocab_size or n_rows,
        family=family,
        tie_embeddings=bool(full.tie_word_embeddings),
        **read(full, family, where),
        **session,
    )


def hf_config(config: LMConfig) -> dict[str, Any]:
    """Writes what `lm_config_from_hf` reads back as `config`, but for how we compute: the content of a config.json.

    One of our own decoders is written as a Llama; what its family has not is refused.
    """
    write = _gpt2_fields if config.family == "gpt2" else _rotary_fields
    fields = {
        "model_type": config.family,
        "architectures": [FAMILIES.get(config.family)],
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "float32",
        **write(config),
    }
    again = lm_config_from_hf(fields, **{name: getattr(config, name) for name in _SESSION})
    asked, given = _spelled_out(config, again), _spelled_out(again, again)
    for field in dataclasses.fields(LMConfig):
        if getattr(asked, field.name) != getattr(given, field.name):
            raise InputError(
                f"the family {config.family} has no {field.name} {getattr(config, field.name)!r} (it would read "
                f"{getattr(again, field.name)!r}): set the family that has it, or change the option."
            )
    return fields


def _spelled_out(config, again):
    """The config with what a None of it means; a longest row that it never named is that of its family."""
    return dataclasses.replace(
        config,
        head_width=config.head_dim,
        query_scalar=config.query_scalar or config.head_dim,
        local_layers=config.is_local,
        max_positions=config.max_positions or again.max_positions,
    )


def _read(source):
    if isinstance(source, dict):
        return dict(source), "the model's configuration"
    path = Path(source) / "config.json"
    try:
        refuse_pointer(path)
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{source} holds no config.json: give the folder of a Hugging Face model.") from None
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a model's settings by name: fetch it again.")
    return content, str(path)


def _complete(raw, family, where):
    """The family's configuration object, its defaults filled in."""
    from transformers import AutoConfig

    rest = {k: v for k, v in raw.items() if k not in ("model_type", "auto_map", "transformers_version")}
    try:
        return AutoConfig.for_model(family, **copy.deepcopy(rest))  # it writes into what it is given
    except Exception as error:  # transformers raises a class of its own for every field
        words = " ".join(str(error).split())
        raise InputError(f"{where} is no valid configuration of the family {family}: {words}") from error


def _gpt2_options(full, family, where):
    return {
        **{ours: getattr(full, theirs) for ours, theirs in _GPT2_SIZES.items()},
        "n_kv_heads": full.n_head,
        "mlp_width": full.n_inner or 4 * full.n_embd,
        "norm": "layer",
        "activation": _activation(full, "activation_function", where),
        "gated": False,
        "attention_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "positions": "learned",
    }


def _gpt2_fields(config):
    activation = {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation)
    sizes = {theirs: getattr(config, ours) for ours, theirs in _GPT2_SIZES.items()}
    return {**sizes, "activation_function": activation}


def _rotary_options(full, family, where):
    gemma = family.startswith("gemma")
    biased = bool(getattr(full, "attention_bias", False))
    local_rope_theta, ropes = None, full.rope_parameters
    if family == "gemma3_text":
        local, ropes = ropes["sliding_attention"], ropes["full_attention"]
        if local["rope_type"] != "default":
            raise InputError(f"{where} scales the rotary positions of its local layers, which is not implemented.")
        local_rope_theta = float(local["rope_theta"])
    return {
        **{ours: getattr(full, theirs, None) for ours, theirs in _SIZES.items()},
        **_windows(full, family, where),
        "head_width": getattr(full, "head_dim", None) or full.hidden_size // full.num_attention_heads,
        "rope_theta": float(ropes["rope_theta"]),
        "rope_scaling": _rope_scaling(ropes, full, where),
        "local_rope_theta": local_rope_theta,
        "attention_bias": family == "qwen2" or biased,
        "output_bias": family != "qwen2" and biased,
        "mlp_bias": bool(getattr(full, "mlp_bias", False)),
        "activation": _activation(full, "hidden_activation" if gemma else "hidden_act", where),
        "norm_offset": gemma,
        "post_norms": gemma,
        "qk_norm": family in ("qwen3", "gemma3_text"),
        "attention_softcap": getattr(full, "attn_logit_softcapping", None) if family == "gemma2" else None,
        "logit_softcap": getattr(full, "final_logit_softcapping", None),
        "query_scalar": full.query_pre_attn_scalar if gemma else None,
        "scale_embedding": gemma,
    }


def _rotary_fields(config):
    family, gemma = config.family, config.family.startswith("gemma")
    fields = {theirs: getattr(config, ours) for ours, theirs in _SIZES.items() if getattr(config, ours) is not None}
    activation = {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation)
    fields |= {"head_dim": config.head_dim, "rope_theta": config.rope_theta}
    fields["hidden_activation" if gemma else "hidden_act"] = activation
    if config.rope_scaling is not None:
        kind, *numbers = config.rope_scaling
        fields["rope_scaling"] = {"rope_type": kind, **dict(zip(_ROPES[kind], numbers))}
    if family not in ("qwen2", "mistral"):
        fields["attention_bias"] = config.output_bias
    if family == "llama":
        fields["mlp_bias"] = config.mlp_bias
    else:
        fields["sliding_window"] = config.window
    if family in ("qwen2", "qwen3"):
        fields["use_sliding_window"] = config.window is not None
    if family not in ("llama", "mistral"):
        fields["layer_types"] = ["sliding_attention" if local else "full_attention" for local in config.is_local]
    if gemma:
        fields["query_pre_attn_scalar"] = config.query_scalar or config.head_dim
        fields["attn_logit_softcapping"] = config.attention_softcap
        fields["final_logit_softcapping"] = config.logit_softcap
    if family == "gemma3_text":
        fields["rope_local_base_freq"] = config.local_rope_theta
    return fields


def _windows(full, family, where):
    window = getattr(full, "sliding_window", None)
    layers = getattr(full, "layer_types", None)
    if family == "mistral" or layers is None:  # all of its layers are alike
        return {"window": window}
    if strange := set(layers) - {"sliding_attention", "full_attention"}:
        raise InputError(f"{where} has layer_types {sorted(strange)}; sliding_attention and full_attention are read.")
    local_layers = tuple(kind == "sliding_attention" for kind in layers)
    return {"window": window, "local_layers": local_layers} if any(local_layers) else {}


def _activation(full, field, where):
    word = getattr(full, field)
    if word not in _ACTIVATIONS:
        raise InputError(f"{where} sets {field} to {word!r}; {', '.join(_ACTIVATIONS)} are implemented.")
    return _ACTIVATIONS[word]


def _rope_scaling(ropes, full, where):
    kind = ropes.get("rope_type", "default")
    if ropes.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"{where} rotates a part of each head (partial_rotary_factor), which is not implemented.")
    if kind == "default":
        return None
    if kind not in _ROPES or (kind == "yarn" and ropes.get("mscale")):
        raise InputError(f"{where} has rope_type {kind!r}; default, {', '.join(_ROPES)} (no mscale) are implemented.")
    factor = float(ropes["factor"])
    usual = {
        "original_max_position_embeddings": full.max_position_embeddings,
        "attention_factor": 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "truncate": True,
    }
    given = usual | {name: value for name, value in ropes.items() if value is not None}
    kinds = {"original_max_position_embeddings": int, "truncate": bool}
    return kind, *(kinds.get(name, float)(given[name]) for name in _ROPES[kind])
