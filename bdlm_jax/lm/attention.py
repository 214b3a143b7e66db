"""Attention under a mask, ours and JAX's, and rotary positions.

Queries come scaled, as (..., L, G, R, K): R query heads on each of G key heads. Masks are True where a query sees.
"""

import math

import jax
import jax.numpy as jnp

from bdlm_jax.types import Array, InputError

_MASKED = -1e30  # finite: a row of padding must not become NaN
_BLOCK, _BLOCKS = 128, 4  # queries in a block at least, and blocks at most


def attend(q: Array, k: Array, v: Array, mask: Array, *, implementation: str, softcap: float | None) -> Array:
    """Computes softmax(q k) v in rows: k and v (B, L, G, K), mask (B, L, L) in which no query sees a key behind it.

    `implementation` and `softcap` are the `attention` and `attention_softcap` of `LMConfig`.
    """
    b, length, g, r, width = q.shape
    if implementation == "cudnn" and (backend := jax.default_backend()) != "gpu":
        raise InputError(f'attention "cudnn" needs an NVIDIA GPU, and JAX runs on {backend}: use "xla" or "einsum".')
    if implementation != "einsum":
        heads = q.reshape(b, length, g * r, width)
        out = jax.nn.dot_product_attention(heads, k, v, mask=mask[:, None], scale=1.0, implementation=implementation)
        return out.reshape(q.shape)
    # A query sees no key behind it, so blocks of queries leave out the keys behind their last: on CPU 10 % of a step.
    size = max(_BLOCK, -(-length // _BLOCKS))
    ends = [(start, min(start + size, length)) for start in range(0, length, size)]
    blocks = [attend_block(q[:, s:e], k[:, :e], v[:, :e], mask[:, s:e, :e], softcap) for s, e in ends]
    return jnp.concatenate(blocks, axis=1) if len(blocks) > 1 else blocks[0]


def attend_block(q: Array, k: Array, v: Array, mask: Array, softcap: float | None) -> Array:
    """Computes as `attend`, in float32, for T queries over any S keys: mask (B, T, S)."""
    # One matrix product for each key head, and the division after it: on CPU 10 % of a step less than the einsum on q's
    # own axes or jax.nn.dot_product_attention.
    b, length, g, r, width = q.shape
    n_keys = k.shape[1]
    q = q.transpose(0, 2, 3, 1, 4).reshape(b * g, r * length, width)
    k, v = (x.transpose(0, 2, 1, 3).reshape(b * g, n_keys, width) for x in (k, v))
    scores = jnp.einsum("btk,bsk->bts", q, k, preferred_element_type=jnp.float32).reshape(b, g * r, length, n_keys)
    scores = soft_cap(scores, softcap) + jnp.where(mask, 0.0, _MASKED)[:, None]
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1).reshape(b * g, r * length, 1)
    weights = weights.astype(v.dtype).reshape(b * g, r * length, n_keys)
    out = jnp.einsum("bts,bsk->btk", weights, v, preferred_element_type=jnp.float32) / total
    return out.reshape(b, g, r, length, width).transpose(0, 3, 1, 2, 4)


def attend_with_prefix(
    q: Array, k: Array, v: Array, mask: Array, prefix: tuple[Array, Array], prefix_mask: Array, *, softcap: float | None
) -> Array:
    """Computes as `attend` for C continuations of each row; each sees the keys of its row's prefix before its own.

    Args:
        q, k, v: (B, C, T, G, R, K), and twice (B, C, T, G, K); the mask is (B, C, T, T).
        prefix: (keys, values), each (B, P, G, K): they are not copied for each continuation.
        prefix_mask: (B, C or 1, T or 1, P).
    """
    prefix_k, prefix_v = prefix
    before = jnp.einsum("bctgrk,bpgk->bcgrtp", q, prefix_k, preferred_element_type=jnp.float32)
    before = jnp.where(prefix_mask[:, :, None, None], soft_cap(before, softcap), _MASKED)
    own = jnp.einsum("bctgrk,bcsgk->bcgrts", q, k, preferred_element_type=jnp.float32)
    own = jnp.where(mask[:, :, None, None], soft_cap(own, softcap), _MASKED)
    weights = jax.nn.softmax(jnp.concatenate([before, own], axis=-1), axis=-1).astype(v.dtype)
    weights_before, weights_own = jnp.split(weights, [prefix_k.shape[1]], axis=-1)
    out = jnp.einsum("bcgrtp,bpgk->bctgrk", weights_before, prefix_v)
    return out + jnp.einsum("bcgrts,bcsgk->bctgrk", weights_own, v)


def soft_cap(x: Array, cap: float | None) -> Array:
    """cap·tanh(x / cap), which stays within ±cap; None caps nothing. Source: Gemma 2, arXiv 2408.00118, section 2."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def rope_angles(positions: Array, *, width: int, theta: float, scaling: tuple | None) -> tuple[Array, Array]:
    """Computes cosine and sine of the rotary angles, each (..., L, 1, K/2), of positions (..., L) and frequencies
    θ^(-2k/K), stretched to longer rows as `LMConfig.rope_scaling` says. Source: Su et al., arXiv 2104.09864.
    """
    half = width // 2
    frequency, size = theta ** (-jnp.arange(half, dtype=jnp.float32) / half), 1.0
    name, *numbers = scaling or (None,)
    if name == "llama3":
        frequency = _llama3(frequency, *numbers)
    elif name == "linear":
        frequency = frequency / numbers[0]
    elif name == "yarn":
        frequency, size = _yarn(frequency, width, theta, *numbers)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle) * size, jnp.sin(angle) * size


def rotate(x: Array, rope: tuple[Array, Array]) -> Array:
    """Turns each pair (x_k, x_{k+K/2}) of queries or keys (..., L, H, K) by its angle."""
    cos, sin = rope
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _llama3(frequency, factor, low, high, original):
    turns = original * frequency / (2 * math.pi)
    smooth = jnp.clip((turns - low) / (high - low), 0, 1)
    return (1 - smooth) * frequency / factor + smooth * frequency


def _yarn(frequency, width, theta, factor, original, attention_factor, beta_fast, beta_slow, truncate):
    """Peng et al., arXiv 2309.00071: fast pairs stay, slow ones are interpolated, a ramp between them."""

    def pair_that_turns(times):
        return width * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    slow = jnp.clip((jnp.arange(width // 2, dtype=jnp.float32) - low) / (high - low), 0, 1)
    return frequency / factor * slow + frequency * (1 - slow), attention_factor
