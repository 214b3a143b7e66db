"""Decoding with a cache of keys and values: static shapes, so that one compilation serves every step.

A prompt runs once (`prefill`), then each `decode_token` writes one slot of the cache. Positions are those of
`lm_hidden` on the row without its padding, whichever side that stands on.
"""

from typing import NamedTuple

import jax.numpy as jnp

from bdlm_jax.lm.causal_lm import segment_masks
from bdlm_jax.lm.config import LMConfig
from bdlm_jax.lm.decoder import Decoder, window_masks
from bdlm_jax.types import Array, InputError, Params


class Cache(NamedTuple):
    """Keys and values of S slots, and what stands in them.

    Args:
        k: (depth, B, S, key heads, K) rotated keys in the compute dtype.
        v: (depth, B, S, key heads, K) values.
        position_BS: positions of the tokens.
        mask_BS: bool, True where a token stands.
        next_B: position of each row's next token.
        slot: () slot of the next token, the same in every row.
    """

    k: Array
    v: Array
    position_BS: Array
    mask_BS: Array
    next_B: Array
    slot: Array


def prefill(
    params: Params,
    config: LMConfig,
    tokens_BL: Array,
    mask_BL: Array,
    *,
    length: int,
    id_rows_XM: Array | None = None,
) -> tuple[Array, Cache]:
    """Reads the prompts and makes the cache.

    Args:
        params: the tree of `init_lm`.
        config: the decoder's shape.
        tokens_BL: (B, L) tokens, padded on either side; every prompt has at least one.
        mask_BL: (B, L) bool, True at tokens.
        length: S, slots of the cache: L and one for each `decode_token`, static.
        id_rows_XM: (X, M) rows of the id tokens, or None.

    Returns:
        (states (B, M) at each prompt's last token, after the final norm; the cache).

    Raises:
        InputError: the cache is shorter than the prompts, or longer than the learned positions.
    """
    mask_BL = mask_BL.astype(bool)
    n_tokens = tokens_BL.shape[1]
    if length < n_tokens:
        raise InputError(f"a cache of {length} slots cannot hold prompts of {n_tokens} tokens: raise length.")
    if config.positions == "learned" and length > config.max_positions:
        raise InputError(
            f"a cache of {length} slots is longer than the {config.max_positions} learned positions of the language "
            "model: shorten the prompt or what is generated."
        )
    position_BL = jnp.maximum(jnp.cumsum(mask_BL, axis=1) - 1, 0)
    hidden_BLM, (k, v) = Decoder(config, keep_kv=True).apply(
        {"params": params}, tokens_BL, position_BL, segment_masks(config, position_BL, mask_BL), id_rows_XM
    )
    last_B = n_tokens - 1 - jnp.argmax(mask_BL[:, ::-1], axis=1)
    hidden_BM = jnp.take_along_axis(hidden_BLM, last_B[:, None, None], axis=1)[:, 0]
    spare = length - n_tokens
    pad = lambda x, axis: jnp.pad(x, [(0, spare if n == axis else 0) for n in range(x.ndim)])  # noqa: E731
    return hidden_BM, Cache(
        pad(k, 2), pad(v, 2), pad(position_BL, 1), pad(mask_BL, 1), mask_BL.sum(axis=1), jnp.asarray(n_tokens)
    )


def decode_token(
    params: Params, config: LMConfig, token_B: Array, cache: Cache, *, id_rows_XM: Array | None = None
) -> tuple[Array, Cache]:
    """Reads one more token of each row.

    Args:
        params: the tree of `init_lm`.
        config: the decoder's shape.
        token_B: (B,) tokens.
        cache: of `prefill` or of the step before; it must have a slot left (a full one overwrites its last).
        id_rows_XM: (X, M) rows of the id tokens, or None.

    Returns:
        (states (B, M) after the final norm, the cache with this token).
    """
    position_BS = cache.position_BS.at[:, cache.slot].set(cache.next_B)
    mask_BS = cache.mask_BS.at[:, cache.slot].set(True)
    masks = window_masks(config, mask_BS, lambda: cache.next_B[:, None] - position_BS)
    hidden_B1M, (k, v) = Decoder(config, keep_kv=True).apply(
        {"params": params},
        token_B[:, None],
        cache.next_B[:, None],
        None,
        id_rows_XM,
        prefix=(cache.k, cache.v),
        prefix_mask=masks,
        slot=cache.slot,
    )
    return hidden_B1M[:, 0], Cache(k, v, position_BS, mask_BS, cache.next_B + 1, cache.slot + 1)
