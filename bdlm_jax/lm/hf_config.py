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
from bdlm_jax.types import InputError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3_text")
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu"}
_REFUSED = {  # a field, and the only values of it that our decoder computes
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "use_bidirectional_attention": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
}
_SESSION = ("dtype", "remat", "dropout", "attention")  # how we compute, of which a config.json says nothing


def lm_config_from_hf(
    source: str | Path | dict,
    *,
    dtype: str = "float32",
    remat: bool | str = False,
    dropout: float = 0.0,
    attention: str = "einsum",
    vocab_size: int | None = None,
) -> LMConfig:
    """Reads the decoder's options from a Hugging Face model's configuration.

    Args:
        source: a folder with config.json, or its content.
        dtype: see `LMConfig`, as the next three.
        remat: see `LMConfig`.
        dropout: see `LMConfig`.
        attention: see `LMConfig`.
        vocab_size: V where it shall exceed the checkpoint's (added tokens, rows that make it divisible).

    Returns:
        LMConfig, its `family` being the model_type.

    Raises:
        InputError: no readable config.json, an unknown model_type, or a field whose value our decoder cannot compute.
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
    return LMConfig(
        vocab_size=n_rows if vocab_size is None else vocab_size,
        width=full.hidden_size,
        n_layers=full.num_hidden_layers,
        n_heads=full.num_attention_heads,
        tie_embeddings=bool(full.tie_word_embeddings),
        family=family,
        max_positions=full.max_position_embeddings,
        dtype=dtype,
        remat=remat,
        dropout=dropout,
        attention=attention,
        **(_gpt2_options(full, where) if family == "gpt2" else _rotary_options(full, family, where)),
    )


def hf_config(config: LMConfig, *, vocab_size: int | None = None, **extra) -> dict[str, Any]:
    """Writes what `lm_config_from_hf` reads: the content of a config.json.

    Args:
        config: a decoder's options; one of our own exports as a Llama.
        vocab_size: rows of the exported embedding, where other tokens follow the V text rows.
        **extra: further fields (bos_token_id, ...).

    Returns:
        A dict for `json.dump`; read back it gives `config`, but for how we compute (dtype, remat, dropout, attention).

    Raises:
        InputError: the family does not have what the config asks for.
    """
    write = _gpt2_fields if config.family == "gpt2" else _rotary_fields
    fields = {
        "model_type": config.family,
        "architectures": [_ARCHITECTURES.get(config.family)],
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "float32",
        **write(config),
    }
    session = {name: getattr(config, name) for name in _SESSION}
    again = lm_config_from_hf(fields, **session)
    # A config that never named its longest row or its families' constants gets them here.
    filled = {
        name: getattr(again, name)
        for name in ("max_positions", "head_width", "query_scalar", "local_layers", "window")
        if getattr(config, name) is None and _same_meaning(config, again, name)
    }
    asked = dataclasses.replace(config, **filled)
    for field in dataclasses.fields(LMConfig):
        if getattr(asked, field.name) != getattr(again, field.name):
            raise InputError(
                f"the family {config.family} has no {field.name} {getattr(config, field.name)!r} (it would read "
                f"{getattr(again, field.name)!r}): set the family that has it, or change the option."
            )
    return {**fields, "vocab_size": vocab_size or config.vocab_size, **extra}


def _same_meaning(config, again, name):
    if name == "head_width":
        return config.head_dim == again.head_dim
    if name == "query_scalar":
        return again.query_scalar == config.head_dim
    if name == "local_layers":
        return config.is_local == again.is_local
    return name == "max_positions"


def _read(source):
    if isinstance(source, dict):
        return dict(source), "the model's configuration"
    path = Path(source) / "config.json"
    try:
        return json.loads(path.read_text()), str(path)
    except FileNotFoundError:
        raise InputError(f"{source} holds no config.json: give the folder of a Hugging Face model.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}.") from error


def _complete(raw, family, where):
    """The family's configuration object, its defaults filled in."""
    from transformers import AutoConfig

    rest = {k: v for k, v in raw.items() if k not in ("model_type", "auto_map", "transformers_version")}
    rest = copy.deepcopy(rest)  # transformers writes into what it is given
    try:
        return AutoConfig.for_model(family, **rest)
    except Exception as error:  # transformers raises a class of its own for every field
        words = " ".join(str(error).split())
        raise InputError(f"{where} is no valid configuration of the family {family}: {words}") from error


def _gpt2_options(full, where):
    return {
        "n_kv_heads": full.num_attention_heads,
        "mlp_width": full.n_inner or 4 * full.hidden_size,
        "norm": "layer",
        "norm_eps": full.layer_norm_epsilon,
        "activation": _activation(full.activation_function, "activation_function", where),
        "gated": False,
        "attention_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "positions": "learned",
    }


def _gpt2_fields(config):
    return {
        "n_embd": config.width,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.mlp_width,
        "n_positions": config.max_positions,
        "activation_function": {"gelu_tanh": "gelu_new", "gelu": "gelu", "silu": "silu"}[config.activation],
        "layer_norm_epsilon": config.norm_eps,
    }


def _rotary_options(full, family, where):
    gemma, qwen3 = family.startswith("gemma"), family == "qwen3"
    word = "hidden_activation" if gemma else "hidden_act"
    head_dim = getattr(full, "head_dim", None) or full.hidden_size // full.num_attention_heads
    biased = bool(getattr(full, "attention_bias", False))
    ropes = full.rope_parameters
    local_rope_theta = None
    if family == "gemma3_text":
        local, ropes = ropes["sliding_attention"], ropes["full_attention"]
        if local["rope_type"] != "default":
            raise InputError(f"{where} scales the rotary positions of its local layers, which is not implemented.")
        local_rope_theta = float(local["rope_theta"])
    window = full.sliding_window if hasattr(full, "sliding_window") else None
    layers = getattr(full, "layer_types", None) if family != "mistral" else None
    local_layers = None
    if layers is not None:
        local_layers = tuple(kind == "sliding_attention" for kind in layers)
        if strange := set(layers) - {"sliding_attention", "full_attention"}:
            raise InputError(
                f"{where} has layer_types {sorted(strange)}; sliding_attention and full_attention are read."
            )
        if not any(local_layers):
            window = local_layers = None
    return {
        "n_kv_heads": full.num_key_value_heads,
        "mlp_width": full.intermediate_size,
        "head_width": head_dim,
        "rope_theta": float(ropes["rope_theta"]),
        "rope_scaling": _rope_scaling(ropes, full, where),
        "norm_eps": full.rms_norm_eps,
        "attention_bias": family == "qwen2" or biased,
        "output_bias": family != "qwen2" and biased,
        "mlp_bias": bool(getattr(full, "mlp_bias", False)),
        "activation": _activation(getattr(full, word), word, where),
        "norm_offset": gemma,
        "post_norms": gemma,
        "qk_norm": qwen3 or family == "gemma3_text",
        "window": window,
        "local_layers": local_layers,
        "local_rope_theta": local_rope_theta,
        "attention_softcap": getattr(full, "attn_logit_softcapping", None) if family == "gemma2" else None,
        "logit_softcap": getattr(full, "final_logit_softcapping", None),
        "query_scalar": full.query_pre_attn_scalar if gemma else None,
        "scale_embedding": gemma,
    }


def _rotary_fields(config):
    gemma = config.family.startswith("gemma")
    fields = {
        "hidden_size": config.width,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "intermediate_size": config.mlp_width,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "hidden_activation" if gemma else "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(
            config.activation, config.activation
        ),
    }
    if config.rope_scaling is not None:
        fields["rope_scaling"] = _rope_fields(config.rope_scaling)
    if config.max_positions is not None:
        fields["max_position_embeddings"] = config.max_positions
    if config.family not in ("qwen2", "mistral"):
        fields["attention_bias"] = config.output_bias
    if config.family == "llama":
        fields["mlp_bias"] = config.mlp_bias
    else:
        fields["sliding_window"] = config.window
    if config.family in ("qwen2", "qwen3"):
        fields["use_sliding_window"] = config.window is not None
    if config.family not in ("llama", "mistral"):
        fields["layer_types"] = ["sliding_attention" if local else "full_attention" for local in config.is_local]
    if gemma:
        fields["query_pre_attn_scalar"] = config.query_scalar or config.head_dim
        fields["attn_logit_softcapping"] = config.attention_softcap
        fields["final_logit_softcapping"] = config.logit_softcap
    if config.family == "gemma3_text":
        fields["rope_local_base_freq"] = config.local_rope_theta
    return fields


def _activation(word, field, where):
    if word not in _ACTIVATIONS:
        raise InputError(f"{where} sets {field} to {word!r}; {', '.join(_ACTIVATIONS)} are implemented.")
    return _ACTIVATIONS[word]


def _rope_scaling(ropes, full, where):
    kind = ropes.get("rope_type", "default")
    if ropes.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"{where} rotates a part of each head (partial_rotary_factor), which is not implemented.")
    if kind == "default":
        return None
    if kind == "linear":
        return "linear", float(ropes["factor"])
    original = ropes.get("original_max_position_embeddings") or full.max_position_embeddings
    if kind == "llama3":
        return "llama3", *(float(ropes[k]) for k in ("factor", "low_freq_factor", "high_freq_factor")), original
    if kind == "yarn" and not ropes.get("mscale"):
        factor = float(ropes["factor"])
        size = ropes.get("attention_factor")
        if size is None:
            size = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        fast, slow = float(ropes.get("beta_fast") or 32), float(ropes.get("beta_slow") or 1)
        return "yarn", factor, original, float(size), fast, slow, int(ropes.get("truncate", True))
    raise InputError(
        f"{where} has rope_type {kind!r}; default, linear, llama3 and yarn (without mscale) are implemented."
    )


def _rope_fields(scaling):
    kind, *numbers = scaling
    names = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "yarn": (
            "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate",
        ),
    }[kind]  # fmt: skip
    fields = {"rope_type": kind, **dict(zip(names, numbers))}
    return {**fields, "truncate": bool(fields["truncate"])} if kind == "yarn" else fields
