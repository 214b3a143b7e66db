"""Attention under a mask: our own products, JAX's and cuDNN's, and the two forms that read keys from before.

Queries come scaled, as (..., L, G, R, K): R query heads on each of G key heads.
"""

import jax
import jax.numpy as jnp

from bdlm_jax.runtime.parallel import device_summary
from bdlm_jax.types import Array, InputError

_MASKED = -1e30  # finite: a row of padding must not become NaN
_BLOCK, _BLOCKS = 128, 4  # queries in a block at least, and blocks at most


def attend(q: Array, k: Array, v: Array, mask: Array, *, implementation: str, softcap: float | None) -> Array:
    """Computes softmax(q k) v.

    Args:
        q: (B, L, G, R, K) scaled queries.
        k: (B, L, G, K) keys.
        v: (B, L, G, K) values.
        mask: (B, L, L) bool, True where a query sees a key: no key behind it.
        implementation: "einsum", "xla" or "cudnn".
        softcap: see `LMConfig.attention_softcap`.

    Returns:
        (B, L, G, R, K).

    Raises:
        InputError: "cudnn" without a GPU.
    """
    b, length, g, r, width = q.shape
    if implementation == "cudnn" and "(cpu)" in device_summary():
        raise InputError('attention "cudnn" needs an NVIDIA GPU, and JAX sees CPUs only: use "xla" or "einsum".')
    if implementation != "einsum":
        heads = q.reshape(b, length, g * r, width)
        out = jax.nn.dot_product_attention(heads, k, v, mask=mask[:, None], scale=1.0, implementation=implementation)
        return out.reshape(q.shape)
    # A query sees no key behind it, so blocks of queries leave out the keys behind their last: on CPU 10 % of a step.
    size = max(_BLOCK, -(-length // _BLOCKS))
    ends = [(start, min(start + size, length)) for start in range(0, length, size)]
    blocks = [_attend_block(q[:, s:e], k[:, :e], v[:, :e], mask[:, s:e, :e], softcap) for s, e in ends]
    return jnp.concatenate(blocks, axis=1) if len(blocks) > 1 else blocks[0]


def _attend_block(q, k, v, mask, softcap):
    # One matrix product for each key head, and the division after it: on CPU 10 % of a step less than the einsum on q's
    # own axes or jax.nn.dot_product_attention.
    b, length, g, r, width = q.shape
    n_keys = k.shape[1]
    q = q.transpose(0, 2, 3, 1, 4).reshape(b * g, r * length, width)
    k, v = (x.transpose(0, 2, 1, 3).reshape(b * g, n_keys, width) for x in (k, v))
    scores = jnp.einsum("btk,bsk->bts", q, k, preferred_element_type=jnp.float32).reshape(b, g * r, length, n_keys)
    scores = _cap(scores, softcap) + jnp.where(mask, 0.0, _MASKED)[:, None]
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1).reshape(b * g, r * length, 1)
    weights = weights.astype(v.dtype).reshape(b * g, r * length, n_keys)
    out = jnp.einsum("bts,bsk->btk", weights, v, preferred_element_type=jnp.float32) / total
    return out.reshape(b, g, r, length, width).transpose(0, 3, 1, 2, 4)


def attend_with_prefix(
    q: Array,
    k: Array,
    v: Array,
    mask: Array,
    prefix_k: Array,
    prefix_v: Array,
    prefix_mask: Array,
    *,
    softcap: float | None,
) -> Array:
    """Computes as `attend` for C continuations of each row; each sees the keys of its row's prefix before its own.

    Args:
        q: (B, C, T, G, R, K) scaled queries.
        k: (B, C, T, G, K) keys.
        v: (B, C, T, G, K) values.
        mask: (B, C, T, T) bool.
        prefix_k: (B, P, G, K) keys of the prefix.
        prefix_v: (B, P, G, K) values of the prefix.
        prefix_mask: (B, C or 1, T or 1, P) bool.
        softcap: see `LMConfig.attention_softcap`.

    Returns:
        (B, C, T, G, R, K).
    """
    before = jnp.einsum("bctgrk,bpgk->bcgrtp", q, prefix_k, preferred_element_type=jnp.float32)
    before = jnp.where(prefix_mask[:, :, None, None], _cap(before, softcap), _MASKED)
    own = jnp.einsum("bctgrk,bcsgk->bcgrts", q, k, preferred_element_type=jnp.float32)
    own = jnp.where(mask[:, :, None, None], _cap(own, softcap), _MASKED)
    weights = jax.nn.softmax(jnp.concatenate([before, own], axis=-1), axis=-1).astype(v.dtype)
    weights_before, weights_own = jnp.split(weights, [prefix_k.shape[1]], axis=-1)
    return jnp.einsum("bcgrtp,bpgk->bctgrk", weights_before, prefix_v) + jnp.einsum(
        "bcgrts,bcsgk->bctgrk", weights_own, v
    )


def attend_cached(q: Array, k: Array, v: Array, mask: Array, *, softcap: float | None) -> Array:
    """Computes as `attend` for one query a row over the S slots of a cache.

    Args:
        q: (B, 1, G, R, K) scaled queries.
        k: (B, S, G, K) keys.
        v: (B, S, G, K) values.
        mask: (B, S) bool.
        softcap: see `LMConfig.attention_softcap`.

    Returns:
        (B, 1, G, R, K).
    """
    scores = jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None, None], _cap(scores, softcap), _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bgrts,bsgk->btgrk", weights, v, preferred_element_type=jnp.float32)


def _cap(scores, cap):
    return scores if cap is None else cap * jnp.tanh(scores / cap)
