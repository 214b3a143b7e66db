"""SASRec: a small causal transformer over the shared item rows; a user is the state after their history.

Rows are padded on the right: a causal state never looks at what stands after it, so padding needs no mask.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bdlm_jax.domain.arm import DomainArm, Inputs
from bdlm_jax.types import Array, InputError

PAD = -1
KERNEL = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
POSITION = nn.initializers.normal(0.02)


class States(nn.Module):
    """(I, D) item rows and (B, L) histories -> (B, L+1, D): state t has read t items, so it is what predicts item t."""

    n_blocks: int
    n_heads: int

    @nn.compact
    def __call__(self, item_ID, history_BL):
        (n_rows, length), width = history_BL.shape, item_ID.shape[1]
        # An item row of LightGCN's scale (0.1) would drown in the positions; √D is the transformer's own remedy.
        item_BLD = item_ID[jnp.maximum(history_BL, 0)] * width**0.5
        start_B1D = jnp.broadcast_to(self.param("start", POSITION, (width,)), (n_rows, 1, width))
        x = jnp.concatenate([start_B1D, item_BLD], axis=1) + self.param("position", POSITION, (length + 1, width))
        causal_11LL = nn.make_causal_mask(jnp.zeros((1, length + 1)))
        for _ in range(self.n_blocks):
            y = nn.LayerNorm()(x)
            x += nn.MultiHeadDotProductAttention(self.n_heads, kernel_init=KERNEL, use_bias=False)(y, mask=causal_11LL)
            y = nn.relu(nn.Dense(width, kernel_init=KERNEL)(nn.LayerNorm()(x)))
            x += nn.Dense(width, kernel_init=KERNEL)(y)
        return nn.LayerNorm()(x)


def sasrec_arm(inputs: Inputs, *, length: int, n_blocks: int = 2, n_heads: int = 2, chunk: int = 512) -> DomainArm:
    """Makes SASRec over the last `length` items of each history; score = state_u · shared item row.

    Its `encode` reads the whole history, so training triples take `user_before`: the state just before the positive's
    place in the history, or the empty history's where the positive is older than the window. shared["user"] takes no
    part. `chunk` users are encoded at a time. Source: Kang and McAuley 2018, section III, with pre-normalisation, a
    learned start token and without dropout (ours).
    """
    if inputs.width % n_heads:
        raise InputError(f"sasrec's width {inputs.width} is no multiple of its {n_heads} heads: change one of them.")
    history_UL = jnp.asarray(recent_history(*inputs.histories, length=length))
    states = States(n_blocks, n_heads)

    def init(key):
        return states.init(key, jnp.zeros((1, inputs.width)), jnp.full((1, length), PAD))["params"]

    @jax.jit
    def last_state(domain, item_ID, row_L):
        return states.apply({"params": domain}, item_ID, row_L[None])[0, jnp.sum(row_L != PAD)]

    def encode(shared, domain):
        item_ID = jnp.asarray(shared["item"])
        read_row = jax.checkpoint(lambda row_L: last_state(domain, item_ID, row_L))
        return jax.lax.map(read_row, history_UL, batch_size=chunk), item_ID

    def user_before(shared, domain, user_B, positive_B):
        history_BL = history_UL[user_B]
        here_BL = history_BL == positive_B[:, None]
        place_B = jnp.where(here_BL.any(axis=1), jnp.argmax(here_BL, axis=1), 0)
        states_BLD = states.apply({"params": domain}, shared["item"], history_BL)
        return jnp.take_along_axis(states_BLD, place_B[:, None, None], axis=1)[:, 0]

    def read(domain, item_ID, history_n):
        return last_state(domain, item_ID, recent_history([0, len(history_n)], history_n, length=length)[0])

    return DomainArm(init=init, encode=encode, user_before=user_before, read=read)


def recent_history(indptr: Array, item: Array, *, length: int) -> np.ndarray:
    """Keeps each user's last `length` items: rows in time order -> (U, length) int32, -1 after the end."""
    indptr, item = np.asarray(indptr), np.append(np.asarray(item, np.int32), PAD)
    count_U1 = np.minimum(np.diff(indptr), length)[:, None]
    place_L = np.arange(length)
    at_UL = np.where(place_L < count_U1, indptr[1:, None] - count_U1 + place_L, -1)
    return item[at_UL]
