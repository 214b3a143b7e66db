"""ItemGCN: LightGCN's propagation over a graph of items, and a user who is read from the last items of their history.

Two items are joined where one followed the other in a history, or where their texts are alike. A user costs a weighted
sum of rows, so a new click counts at once, and a cold item has the rows of its texts' neighbours. Ours.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from bdlm_jax.data.text_vectors import nearest
from bdlm_jax.domain.arm import DomainArm, Inputs
from bdlm_jax.domain.graph import make_item_graph, make_propagate
from bdlm_jax.domain.histories import PAD, cut_histories, drop_entries, recent_history

N_MAPS = 3  # of the last item, of the one before, of all earlier ones


def itemgcn_arm(
    inputs: Inputs,
    *,
    length: int = 50,
    n_layers: int = 2,
    text_neighbours: int = 5,
    dropout: float = 0.0,
    backend: str = "auto",
    chunk: int = 1024,
) -> DomainArm:
    """Makes ItemGCN: e_i = mean over k of (Âᵏ·S)_i, score = h·e_i of a history i_1 … i_n, the last `length` items:

        h = scale · Σ_t a_(n-t) · M_min(n-t, 2) · e_(i_t) / √(Σ_t a_(n-t)²)

    with learned weights a > 0 of each lag and three learned maps M. It learns as SASRec does, every item of windows of
    `length` + 1; shared["user"] takes no part. `dropout` is of the entries of the rows that a history reads.
    """
    indptr, item_E = inputs.histories
    pairs = [_pairs(indptr, item_E)]
    if text_neighbours and inputs.content_IC is not None:
        pairs.append(nearest(inputs.content_IC, text_neighbours))
    if inputs.n_items:  # a served model's rows are propagated already
        graph = make_item_graph(*map(np.concatenate, zip(*pairs)), n_items=inputs.n_items)
        propagate = make_propagate(graph, n_users=0, n_items=inputs.n_items, backend=backend)
    history_UL = jnp.asarray(recent_history(indptr, item_E, length=length))
    lag_LL = np.arange(length)[:, None] - np.arange(length)

    def init(key):
        del key
        return {
            "lag": -0.3 * jnp.arange(length),
            "map": jnp.tile(jnp.eye(inputs.width), (N_MAPS, 1, 1)),
            "scale": jnp.array(8.0),
            "start": jnp.zeros(inputs.width),
        }

    def items(shared):
        layer_ID = total_ID = jnp.asarray(shared["item"])
        for _ in range(n_layers):
            _, layer_ID = propagate(layer_ID[:0], layer_ID)
            total_ID = total_ID + layer_ID
        return total_ID / (n_layers + 1)

    def states(domain, item_ID, history_BL, key_B=None):
        """(B, L) histories -> (B, L, D): state t has read the items 0 … t."""
        read_BL = history_BL != PAD
        x_BLD = jnp.where(read_BL[..., None], item_ID[jnp.maximum(history_BL, 0)], 0.0)
        if key_B is not None and dropout:
            x_BLD = drop_entries(x_BLD, key_B, dropout, 0)
        weight_LL = jnp.where(lag_LL >= 0, jnp.exp(domain["lag"])[np.maximum(lag_LL, 0)], 0.0)
        state_BLD = 0.0
        for number in range(N_MAPS):
            of_map = lag_LL == number if number < N_MAPS - 1 else lag_LL >= number
            mapped_BLD = x_BLD @ domain["map"][number]
            state_BLD += jnp.einsum("ts,bsd->btd", jnp.where(of_map, weight_LL, 0.0), mapped_BLD)
        norm_BL = jnp.sqrt(jnp.einsum("ts,bs->bt", jnp.square(weight_LL), read_BL.astype(x_BLD.dtype)) + 1e-6)
        return domain["scale"] * state_BLD / norm_BL[..., None]

    def last_states(domain, item_ID, history_BL):
        last_B = jnp.maximum(jnp.sum(history_BL != PAD, axis=1) - 1, 0)
        state_BD = states(domain, item_ID, history_BL)[jnp.arange(len(history_BL)), last_B]
        return jnp.where((history_BL[:, 0] != PAD)[:, None], state_BD, domain["start"])

    def users(shared, domain, user_B):
        item_ID = items(shared)
        read = jax.checkpoint(lambda history_L: last_states(domain, item_ID, history_L[None])[0])
        return jax.lax.map(read, history_UL[user_B], batch_size=chunk)

    def encode(shared, domain):
        return users(shared, domain, slice(None)), items(shared)

    def states_before(shared, domain, window_BL, key_B):
        state_BLD = states(domain, items(shared), window_BL[:, :-1], key_B)
        start_B1D = jnp.broadcast_to(domain["start"], (len(window_BL), 1, inputs.width))
        return jnp.concatenate([start_B1D, state_BLD], axis=1)

    @jax.jit
    def read_row(domain, item_ID, history_1L):
        return last_states(domain, item_ID, history_1L)[0]

    def read(domain, item_ID, history_n):
        return read_row(domain, item_ID, recent_history([0, len(history_n)], history_n, length=length))

    windows = functools.partial(cut_histories, length=length + 1)
    return DomainArm(init, encode, windows=windows, states_before=states_before, users=users, read=read)


def _pairs(indptr: np.ndarray, item_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours in a history: (left, right)."""
    follows_E = np.ones(len(item_E), bool)
    follows_E[indptr[:-1][indptr[:-1] < len(item_E)]] = False
    at = np.flatnonzero(follows_E)
    return item_E[at - 1], item_E[at]
