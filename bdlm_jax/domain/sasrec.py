"""SASRec: a small causal transformer over the shared item rows; a user is the state after their history.

Rows are padded on the right: a causal state never looks at what stands after it, so padding needs no mask.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdlm_jax.domain.arm import DomainArm, Inputs
from bdlm_jax.domain.histories import PAD, cut_histories, drop_entries, recent_history
from bdlm_jax.types import InputError

KERNEL = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
POSITION = nn.initializers.normal(0.02)


class States(nn.Module):
    """(I, D) item rows and (B, L) histories -> (B, L+1, D): state t has read t items, so it is what predicts item t."""

    n_blocks: int
    n_heads: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, item_ID, history_BL, key_B=None):
        (n_rows, length), width = history_BL.shape, item_ID.shape[1]
        sites = iter(range(1 + 2 * self.n_blocks))

        def drop(x_BLD):
            return x_BLD if key_B is None or not self.dropout else drop_entries(x_BLD, key_B, self.dropout, next(sites))

        # An item row of LightGCN's scale (0.1) would drown in the positions; √D is the transformer's own remedy.
        item_BLD = item_ID[jnp.maximum(history_BL, 0)] * width**0.5
        start_B1D = jnp.broadcast_to(self.param("start", POSITION, (width,)), (n_rows, 1, width))
        x = jnp.concatenate([start_B1D, item_BLD], axis=1) + self.param("position", POSITION, (length + 1, width))
        causal_11LL = nn.make_causal_mask(jnp.zeros((1, length + 1)))
        x = drop(x)
        for _ in range(self.n_blocks):
            attention = nn.MultiHeadDotProductAttention(self.n_heads, kernel_init=KERNEL, use_bias=False)
            x += drop(attention(nn.LayerNorm()(x), mask=causal_11LL))
            y = nn.relu(nn.Dense(width, kernel_init=KERNEL)(nn.LayerNorm()(x)))
            x += drop(nn.Dense(width, kernel_init=KERNEL)(y))
        return nn.LayerNorm()(x)


def sasrec_arm(
    inputs: Inputs, *, length: int = 50, n_blocks: int = 2, n_heads: int = 2, dropout: float = 0.0, chunk: int = 512
) -> DomainArm:
    """Makes SASRec over the last `length` items of each history; score = state_u · shared item row.

    It learns from windows of `length` + 1 items, into which whole histories are cut from their end. shared["user"]
    takes no part. `chunk` users are encoded at a time. Source: Kang and McAuley 2018, section III, with
    pre-normalisation, a learned start token and dropout only of what enters the sum over layers (ours); the softmax in
    place of their binary loss is Klenitskiy and Vasilev 2023's.
    """
    if inputs.width % n_heads:
        raise InputError(f"sasrec's width {inputs.width} is no multiple of its {n_heads} heads: change one of them.")
    history_UL = jnp.asarray(recent_history(*inputs.histories, length=length))
    states = States(n_blocks, n_heads, dropout)

    def init(key):
        return states.init(key, jnp.zeros((1, inputs.width)), jnp.full((1, length), PAD))["params"]

    @jax.jit
    def last_state(domain, item_ID, row_L):
        return states.apply({"params": domain}, item_ID, row_L[None])[0, jnp.sum(row_L != PAD)]

    def users(shared, domain, user_B):
        read_row = jax.checkpoint(lambda row_L: last_state(domain, shared["item"], row_L))
        return jax.lax.map(read_row, history_UL[user_B], batch_size=chunk)

    def encode(shared, domain):
        return users(shared, domain, slice(None)), jnp.asarray(shared["item"])

    def states_before(shared, domain, window_BL, key_B):
        return states.apply({"params": domain}, shared["item"], window_BL[:, :-1], key_B)

    def read(domain, item_ID, history_n):
        return last_state(domain, item_ID, recent_history([0, len(history_n)], history_n, length=length)[0])

    # One item more than is read, so that the state after a full history, which serves, has learned an item too.
    windows = functools.partial(cut_histories, length=length + 1)
    return DomainArm(init, encode, windows=windows, states_before=states_before, users=users, read=read)
