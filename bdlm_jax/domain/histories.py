"""Histories as the rows that models of histories read: padded on the right, for a causal state never looks there."""

import jax
import jax.numpy as jnp
import numpy as np

from bdlm_jax.types import Array

PAD = -1


def recent_history(indptr: Array, item: Array, *, length: int) -> np.ndarray:
    """Keeps each user's last `length` items: rows in time order -> (U, length) int32, -1 after the end."""
    indptr = np.asarray(indptr)
    return _rows(item, np.maximum(indptr[:-1], indptr[1:] - length), indptr[1:], length)


def cut_histories(indptr: Array, item: Array, *, length: int) -> np.ndarray:
    """Cuts each user's items into windows of `length` from the end, the first one shorter -> (W, length) int32."""
    indptr = np.asarray(indptr)
    pieces_U = -(-np.diff(indptr) // length)
    nth_W = np.arange(pieces_U.sum()) - np.repeat(np.cumsum(pieces_U) - pieces_U, pieces_U)
    stop_W = np.repeat(indptr[1:], pieces_U) - nth_W * length
    return _rows(item, np.maximum(np.repeat(indptr[:-1], pieces_U), stop_W - length), stop_W, length)


def drop_entries(x_BLD: Array, key_B: Array, rate: float, site: int) -> Array:
    """Drops entries by a key a row, so that a batch drops the same on any number of devices."""

    def draw(key):  # 16 bits decide as well as a float's 32, at half the cost
        return jax.random.bits(jax.random.fold_in(key, site), x_BLD.shape[1:], jnp.uint16)

    return jnp.where(jax.vmap(draw)(key_B) < round(rate * 2**16), 0.0, x_BLD / (1.0 - rate))


def _rows(item: Array, start_N: np.ndarray, stop_N: np.ndarray, length: int) -> np.ndarray:
    item, at_NL = np.append(np.asarray(item, np.int32), PAD), start_N[:, None] + np.arange(length)
    return item[np.where(at_NL < stop_N[:, None], at_NL, -1)]
