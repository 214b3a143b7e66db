"""Rotary positions (Su et al., arXiv 2104.09864) and the ways in which models stretch them to longer rows."""

import math

import jax.numpy as jnp

from bdlm_jax.types import Array


def rope_angles(positions: Array, *, width: int, theta: float, scaling: tuple | None) -> tuple[Array, Array]:
    """Computes the cosine and sine of the rotary angles.

    Args:
        positions: (..., L) integer positions.
        width: K, width of a head.
        theta: base of the frequencies θ^(-2k/K).
        scaling: see `LMConfig.rope_scaling`.

    Returns:
        (cos, sin), each (..., L, 1, K/2) float32.
    """
    half = width // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    size = 1.0
    if scaling is not None:
        name, *numbers = scaling
        if name == "llama3":
            frequency = _llama3(frequency, *numbers)
        elif name == "linear":
            frequency = frequency / numbers[0]
        else:
            frequency, size = _yarn(frequency, width, theta, *numbers)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    if size != 1.0:
        return jnp.cos(angle) * size, jnp.sin(angle) * size
    return jnp.cos(angle), jnp.sin(angle)


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
