"""Low-rank adapters beside frozen weights: W + alpha/rank · A·B, chosen by path patterns.

Training computes x·W + (x·A)·B beside each other, so that no merged copy and no gradient as large as W is ever held;
what is served and exported is merged.

The adapters are a subtree, params["lm"]["lora"], that mirrors the decoder's; the base leaves stay as they were loaded,
so that nothing has to be undone. Source: Hu et al. 2021 (LoRA, arXiv 2106.09685), equation 3.
"""

import re

import jax
import jax.numpy as jnp

from bdlm_jax.types import Array, InputError, Params

LORA = "lora"  # the subtree's name within params["lm"]
BESIDE = "layers"  # where every leaf with adapters is a kernel, whose product they stand beside
NOT_DECODER = ("bridge", LORA)


def init_lora(key: Array, params: Params, *, rank: int, targets: str, alpha: float) -> Params:
    """Draws adapters for every decoder leaf whose path matches: A uniform in ±1/√in, B zero: nothing changes yet.

    Args:
      key: a JAX key.
      params: the decoder's tree (a bridge or adapters in it are left alone).
      rank: r, of every adapter.
      targets: regular expression that a leaf's whole path must match, as in "layers/self_attn/(q|v)_proj/kernel".
      alpha: scale of an adapter, in units of 1/rank.

    Returns:
      {"alpha": (), <the matching paths>: {"a": (..., in, r), "b": (..., r, out)}} float32; leading axes as the leaf's.

    Raises:
      InputError: no leaf matches, or one that is no matrix does.
    """
    tree: Params = {"alpha": jnp.asarray(alpha, jnp.float32)}
    paths = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        names = [part.key for part in path]
        paths.append("/".join(names))
        if names[0] in NOT_DECODER or not re.fullmatch(targets, paths[-1]):
            continue
        if leaf.ndim < 2 + ("layers" in names):
            raise InputError(
                f"config.lm.lora_targets matches {paths[-1]} of shape {leaf.shape}, which is no matrix; "
                "end the pattern in /kernel, say."
            )
        *lead, n_in, n_out = leaf.shape
        a = jax.random.uniform(jax.random.fold_in(key, len(paths)), (*lead, n_in, rank), minval=-1.0, maxval=1.0)
        _put(tree, names, {"a": a * n_in**-0.5, "b": jnp.zeros((*lead, rank, n_out))})
    if len(tree) == 1:
        raise InputError(
            f"config.lm.lora_targets {targets!r} matches no leaf of the decoder; paths look like {paths[-1]!r}."
        )
    return tree


def variables(lm: Params) -> Params:
    """Splits a tree into the Flax variables of the decoder, which adds (x·A)·B beside x·W.

    Args:
      lm: params["lm"], with or without "lora".

    Returns:
      {"params": the tree without "lora"[, "lora": A and B of the layers' kernels, alpha/rank within A]}.
    """
    lm = merge_tables(lm)
    if LORA not in lm:
        return {"params": lm}
    tree, lora = _split(lm)

    def scaled(adapters):
        if set(adapters) == {"a", "b"}:
            return {"a": lora["alpha"] / adapters["a"].shape[-1] * adapters["a"], "b": adapters["b"]}
        return {name: scaled(value) for name, value in adapters.items()}

    return {"params": tree, LORA: scaled({BESIDE: lora[BESIDE]})}


def merge_tables(lm: Params) -> Params:
    """Merges the adapters of tables (embedding, head, positions), whose rows are looked up; kernels keep theirs.

    Args:
      lm: params["lm"], with or without "lora".

    Returns:
      The tree; where no table has adapters it is the argument itself.
    """
    if LORA not in lm or set(lm[LORA]) <= {"alpha", BESIDE}:
        return lm
    tree, lora = _split(lm)
    tree = _added(tree, {name: value for name, value in lora.items() if name != BESIDE}, sign=1.0)
    return {**tree, LORA: {name: lora[name] for name in ("alpha", BESIDE)}} if BESIDE in lora else tree


def merge(lm: Params) -> Params:
    """Returns the tree without adapters: W + alpha/rank · A·B, to serve and to export.

    A pure function of the tree, so the base leaves are never overwritten: the way back is the tree itself, to the bit.

    Args:
      lm: params["lm"], with or without "lora".

    Returns:
      The tree without "lora"; without adapters it is the argument itself. Sums are float32, leaves keep their dtype.
    """
    if LORA not in lm:
        return lm
    return _added(*_split(lm), sign=1.0)


def unmerge(merged: Params, lora: Params) -> Params:
    """Takes the adapters out of merged weights of which no base was kept: W' - alpha/rank · A·B.

    Equal to the base up to the one rounding of each of the two sums, at most an ulp of the larger of |W| and |W'| in
    the leaf's dtype; where the base was kept (any run's own params), use that instead: it is exact.

    Args:
      merged: of `merge`.
      lora: the adapters that went into it.

    Returns:
      params["lm"], the base with the adapters beside it.
    """
    return {**_added(merged, lora, sign=-1.0), LORA: lora}


def _split(lm: Params) -> tuple[Params, Params]:
    return {name: value for name, value in lm.items() if name != LORA}, lm[LORA]


def _added(tree: Params, lora: Params, *, sign: float) -> Params:
    alpha = lora["alpha"]

    def add(base, adapters):
        if set(adapters) == {"a", "b"} and not isinstance(base, dict):
            a, b = adapters["a"], adapters["b"]
            delta = (sign * alpha / a.shape[-1]) * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
            return (base.astype(jnp.float32) + delta).astype(base.dtype)
        return {**base, **{name: add(base[name], adapters[name]) for name in adapters}}

    return add(tree, {name: value for name, value in lora.items() if name != "alpha"})


def _put(tree: Params, names: list[str], value: Params) -> None:
    for name in names[:-1]:
        tree = tree.setdefault(name, {})
    tree[names[-1]] = value
