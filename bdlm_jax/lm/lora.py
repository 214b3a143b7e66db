"""Low-rank adapters beside frozen weights: W + alpha/rank · A·B, chosen by path patterns.

Training computes x·W + (x·A)·B beside each other, so that no merged copy and no gradient as large as W is ever held;
what is served and exported is merged (where plain text is the base's, exported apart: hf_adapters). The adapters are a
subtree, params["lm"]["lora"], that mirrors the decoder's; the base leaves stay as they were loaded. Source: Hu et al.
2021 (LoRA, arXiv 2106.09685), equation 3.
"""

import re

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from bdlm_jax.types import Array, InputError, Params, leaf_name

LORA = "lora"  # the subtree's name within params["lm"]
BESIDE = "layers"  # where every leaf with adapters is a kernel, whose product they stand beside
NOT_DECODER = ("bridge", LORA)


def init_lora(key: Array, params: Params, *, rank: int, targets: str, alpha: float) -> Params:
    """Draws adapters for every decoder leaf whose path matches: A uniform in ±1/√in, B zero: nothing changes yet.

    Args:
      params: the decoder's tree; a bridge or adapters in it are left alone.
      targets: regular expression that a leaf's whole path must match, as in "layers/self_attn/(q|v)_proj/kernel".
      alpha: scale of an adapter, in units of 1/rank.

    Returns:
      {"alpha": (), <the matching paths>: {"a": (..., in, r), "b": (..., r, out)}} float32; leading axes as the leaf's.
    """
    drawn = {("alpha",): jnp.asarray(alpha, jnp.float32)}
    for number, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params), 1):
        name, names = leaf_name(path), tuple(part.key for part in path)
        if names[0] in NOT_DECODER or not re.fullmatch(targets, name):
            continue
        if leaf.ndim < 2 + (BESIDE in names):
            raise InputError(
                f"config.lm.lora_targets matches {name} of shape {leaf.shape}, which is no matrix; "
                "end the pattern in /kernel, say."
            )
        *lead, n_in, n_out = leaf.shape
        a = jax.random.uniform(jax.random.fold_in(key, number), (*lead, n_in, rank), minval=-1.0, maxval=1.0)
        drawn |= {(*names, "a"): a * n_in**-0.5, (*names, "b"): jnp.zeros((*lead, rank, n_out))}
    if len(drawn) == 1:
        raise InputError(
            f"config.lm.lora_targets {targets!r} matches no leaf of the decoder; paths look like {name!r}."
        )
    return unflatten_dict(drawn)


def variables(lm: Params) -> Params:
    """Splits a tree into the Flax variables of the decoder, which adds (x·A)·B beside x·W.

    Returns:
      {"params": the tree without "lora"[, "lora": A and B of the layers' kernels, alpha/rank within A]}.
    """
    lm = merge_tables(lm)
    if LORA not in lm:
        return {"params": lm}
    base, adapters = _split(lm)

    def scale(path, leaf):
        return adapters["alpha"] / leaf.shape[-1] * leaf if path[-1].key == "a" else leaf

    return {"params": base, LORA: jax.tree_util.tree_map_with_path(scale, {BESIDE: adapters[BESIDE]})}


def merge_tables(lm: Params) -> Params:
    """Merges the adapters of tables (embedding, head, positions), whose rows are looked up; kernels keep theirs.

    Without any the argument itself comes back.
    """
    if LORA not in lm or set(lm[LORA]) <= {"alpha", BESIDE}:
        return lm
    base, adapters = _split(lm)
    merged = _add(base, {name: value for name, value in adapters.items() if name != BESIDE}, adapters["alpha"])
    return {**merged, LORA: {name: adapters[name] for name in ("alpha", BESIDE)}} if BESIDE in adapters else merged


def merge(lm: Params) -> Params:
    """Returns the tree without adapters: W + alpha/rank · A·B, to serve and to export.

    A pure function of the tree, so the base leaves are never overwritten: the way back is the tree itself, to the bit.
    Sums are float32, leaves keep their dtype; without adapters the argument itself comes back.
    """
    if LORA not in lm:
        return lm
    base, adapters = _split(lm)
    return _add(base, adapters, adapters["alpha"])


def without(lm: Params) -> Params:
    """Returns the tree with its adapters taken off: the model as it came."""
    return _split(lm)[0] if LORA in lm else lm


def _split(lm: Params) -> tuple[Params, Params]:
    return {name: value for name, value in lm.items() if name != LORA}, lm[LORA]


def _add(base: Params, adapters: Params, alpha: Array) -> Params:
    if isinstance(base, dict):
        return {**base, **{name: _add(base[name], adapters[name], alpha) for name in adapters if name != "alpha"}}
    a, b = adapters["a"], adapters["b"]
    delta = alpha / a.shape[-1] * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return (base.astype(jnp.float32) + delta).astype(base.dtype)
