"""Free text from a causal LM: greedy, or drawn with a temperature and top-p.

All shapes are static: a prompt runs once (`prefill`), then one compiled loop over `decode_token`, each of which writes
one slot of a cache of keys and values. Positions are those of `lm_hidden` on the row without its padding, whichever
side that stands on.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bdlm_jax.lm import lora
from bdlm_jax.lm.causal_lm import check_length, read_prefix, text_logits
from bdlm_jax.lm.config import LMConfig
from bdlm_jax.lm.decoder import Decoder, window_masks
from bdlm_jax.types import Array, InputError, Params


class Cache(NamedTuple):
    """Keys and values of S slots, and what stands in them."""

    k: Array  # (depth, B, S, key heads, K), rotated, in the compute dtype
    v: Array  # (depth, B, S, key heads, K)
    position_BS: Array
    mask_BS: Array  # True where a token stands
    next_B: Array  # position of each row's next token
    slot: Array  # () of the next token, the same in every row


@partial(jax.jit, static_argnames=("config", "max_new", "temperature", "top_p"))
def generate(
    params: Params,
    config: LMConfig,
    tokens_BL: Array,
    mask_BL: Array,
    *,
    max_new: int,
    eos: int,
    pad: int,
    key: Array | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    allowed_V: Array | None = None,
    id_rows_XM: Array | None = None,
) -> Array:
    """Writes text tokens behind prompts, until `eos` or `max_new`.

    Args:
        tokens_BL: prompts, padded on either side; every prompt has at least one token, and `mask_BL` is True there.
        max_new: T, the most tokens written.
        temperature: divides the logits before drawing, for which a key is needed; 0 takes the likeliest token.
        top_p: draws among the fewest tokens whose probabilities reach this sum (Holtzman et al. 2020, section 3.1).
        allowed_V: the tokens that may be written, at least one; None: all.
        id_rows_XM: rows of the id tokens, where prompts hold some; they are read and never written.

    Returns:
        (B, T) text tokens: the text, `eos` where there was room for it, `pad`.
    """
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature is {temperature}, it must be 0 (the likeliest token) or above.")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}, it must be above 0 and at most 1.")
    if max_new < 1:
        raise InputError(f"max_new is {max_new}, at least one token must be asked for.")
    if key is None and temperature > 0:
        raise InputError("a temperature above 0 draws tokens: give a key.")
    row_B = jnp.arange(len(tokens_BL))

    def choose(t, hidden_BM):
        logits_BV = text_logits(params, config, hidden_BM)
        if allowed_V is not None:
            logits_BV = jnp.where(allowed_V, logits_BV, -jnp.inf)
        if temperature == 0:
            return jnp.argmax(logits_BV, axis=-1)
        # A key of each row's own: what a prompt gets does not hang on the size of its batch.
        key_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, t), row_B)
        logits_BV = logits_BV / temperature
        # To sort a vocabulary at every token, for nothing where all may be drawn, is most of a small model's time.
        return jax.vmap(jax.random.categorical)(key_B, logits_BV if top_p == 1 else keep_top_p(logits_BV, top_p))

    def write(carry):
        t, hidden_BM, cache, written_BT, done_B = carry
        token_B = jnp.where(done_B, pad, choose(t, hidden_BM))
        hidden_BM, cache = decode_token(params, config, token_B, id_rows_XM, cache)
        return t + 1, hidden_BM, cache, written_BT.at[:, t].set(token_B), done_B | (token_B == eos)

    params = lora.merge(params)
    hidden_BM, cache = prefill(params, config, tokens_BL, mask_BL, id_rows_XM, max_new=max_new)
    start = (0, hidden_BM, cache, jnp.full((len(row_B), max_new), pad, jnp.int32), jnp.zeros(len(row_B), bool))
    return jax.lax.while_loop(lambda carry: (carry[0] < max_new) & ~carry[4].all(), write, start)[3]


def prefill(
    params: Params, config: LMConfig, tokens_BL: Array, mask_BL: Array, id_rows_XM: Array | None, *, max_new: int
) -> tuple[Array, Cache]:
    """Reads prompts and makes the cache, with a slot for each token to come: (states (B, M) at the last tokens, it)."""
    length = tokens_BL.shape[1]
    check_length(config, length + max_new)
    mask_BL = mask_BL.astype(bool)
    hidden_BM, position_BL, kv = read_prefix(params, config, tokens_BL, mask_BL, id_rows_XM)
    room = ((0, 0), (0, max_new))
    k, v = (jnp.pad(x, ((0, 0), *room, (0, 0), (0, 0))) for x in kv)
    position_BS, mask_BS = jnp.pad(position_BL, room), jnp.pad(mask_BL, room)
    return hidden_BM, Cache(k, v, position_BS, mask_BS, next_B=mask_BL.sum(axis=1), slot=jnp.asarray(length))


def decode_token(
    params: Params, config: LMConfig, token_B: Array, id_rows_XM: Array | None, cache: Cache
) -> tuple[Array, Cache]:
    """Reads one more token of each row: (states (B, M), the cache with it). A full cache would overwrite its last."""
    position_B1 = cache.next_B[:, None]
    position_BS = cache.position_BS.at[:, cache.slot].set(cache.next_B)
    mask_BS = cache.mask_BS.at[:, cache.slot].set(True)
    masks = window_masks(config, mask_BS[:, None], position_B1, position_BS)
    token = (token_B[:, None], position_B1, (None, None), id_rows_XM)
    cached = {"prefix": (cache.k, cache.v), "prefix_masks": masks, "slot": cache.slot}
    hidden_B1M, (k, v) = Decoder(config, keep_kv=True).apply({"params": params}, *token, **cached)
    return hidden_B1M[:, 0], Cache(k, v, position_BS, mask_BS, cache.next_B + 1, cache.slot + 1)


def keep_top_p(logits: Array, top_p: float) -> Array:
    """Sets to -inf all but the fewest likeliest tokens whose probabilities reach `top_p`; equal ones stay together."""
    sorted_logits = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(sorted_logits, axis=-1)
    # A token stays while those before it have not reached the sum: the likeliest always does.
    kept = jnp.cumsum(probability, axis=-1) - probability < top_p
    least = jnp.where(kept, sorted_logits, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
