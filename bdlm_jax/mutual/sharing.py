"""The information sharing module: one table of users and items that both arms read and both arms train.

`params["shared"] = {"user": (U, D), "item": (I, D)}` is one leaf per table. The domain arm starts from it (layer 0);
the LM reads it through the bridge as the rows of its `<uid>`/`<iid>` tokens. The bridge out maps the LM's top-layer
states back to the sharing width. Source: the module is the paper's; bridge and reading mode are ours.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bdlm_jax.domain.arm import DomainArm
from bdlm_jax.mutual.options import Meeting
from bdlm_jax.types import Array, Params

READS = ("layer0", "propagated")


def init_shared(key: Array, *, n_users: int, n_items: int, width: int, std: float = 0.1) -> Params:
    """Draws the tables (U, D) and (I, D) from a normal distribution; 0.1 is LightGCN's published deviation."""
    user_key, item_key = jax.random.split(key)
    return {
        "user": std * jax.random.normal(user_key, (n_users, width)),
        "item": std * jax.random.normal(item_key, (n_items, width)),
    }


def init_bridge(key: Array, *, width: int, lm_width: int, gain: float = 1.0, out_std: float = 1.0) -> Params:
    """Makes the learned maps {"into": (D, M), "out": (M, D), "out_bias": (D,)}, both orthogonal at first.

    The bridge in multiplies a row's norm with `gain` (the norm of its part in M dimensions where D > M), for the LM's
    rows have a scale of their own; the bridge out makes entries of deviation `out_std` of normalised LM states (ours).
    """
    into_DM = jax.nn.initializers.orthogonal()(key, (width, lm_width))
    # With D > M a state of M dimensions is spread over D of them, and each would be smaller.
    out_std *= max(1.0, width / lm_width) ** 0.5
    return {"into": into_DM * gain, "out": into_DM.T * out_std, "out_bias": jnp.zeros((width,))}


def read_tables(shared: Params, domain: Params, *, encode, reads: str) -> tuple[Array, Array]:
    """Returns the (user (U, D), item (I, D)) rows that the LM sees.

    "layer0": the shared tables themselves. "propagated": the domain arm's representations, computed from the tables
    by `encode`, so that the LM's gradient reaches the same leaves through the propagation (ours).
    """
    if reads == "propagated":
        return encode(shared, domain)
    return shared["user"], shared["item"]


class ItemHead(NamedTuple):
    """What a state of the LM is compared with: its item logits are read(h)·rowsᵀ, as h·id_rows()[1]ᵀ is.

    Where the tables are narrower than the LM the bridge is laid on the states, not on the rows: with 64 dimensions of
    4,096 a logit costs a 64th, and no row of 4,096 is made of every item (ours).
    """

    rows_IN: Array
    narrow_MN: Array | None

    def read(self, state: Array) -> Array:
        """Maps states (..., M) to the width (..., N) of the rows."""
        return state if self.narrow_MN is None else state @ self.narrow_MN


def id_rows(params: Params, *, meeting: Meeting, arm: DomainArm) -> tuple[Array, Array]:
    """Returns the rows (X, M) of `<uid>` and `<iid>` that the LM reads, users first, and its output rows (I, M)."""
    rows_XM, head = id_rows_and_head(params, meeting=meeting, arm=arm)
    return rows_XM, rows_XM[-len(head.rows_IN) :] * _head_scale(meeting)


def id_rows_and_head(params: Params, *, meeting: Meeting, arm: DomainArm) -> tuple[Array, ItemHead]:
    """Returns the rows (X, M) that the LM reads, users first, and what its states are compared with."""
    tables = read_tables(params["shared"], params["domain"], encode=arm.encode, reads=meeting.reads)
    if not meeting.shows_users:
        tables = jnp.zeros_like(tables[0]), tables[1]
    into_DM = params["lm"]["bridge"]["into"]
    rows_XM = jnp.concatenate([table @ into_DM for table in tables])
    scale = _head_scale(meeting)
    if into_DM.shape[0] < into_DM.shape[1]:
        return rows_XM, ItemHead(tables[1], into_DM.T * scale)
    return rows_XM, ItemHead(rows_XM[len(tables[0]) :] * scale, None)


def _head_scale(meeting: Meeting) -> float:
    """A tied head multiplies states with text rows as they are stored: item logits are on the same scale."""
    return meeting.lm.width**-0.5 if meeting.lm.scale_embedding else 1.0


def bridge_out(bridge: Params, state: Array) -> Array:
    """Maps the LM's top-layer states (..., M) to the sharing width (..., D): z = h·P_out + b."""
    return state @ bridge["out"] + bridge["out_bias"]


def write_back(shared: Params, z_item_ID: Array, cold_I: Array) -> Params:
    """Stores the LM's reading of an item's text, through the bridge out, as the shared row of every cold item.

    For such an item align(e_i, sg z_i) is the domain arm's whole loss and e_i is its own row, so e_i = z_i is that
    loss's exact minimum: the step is taken in closed form (ours).
    """
    return {**shared, "item": jnp.where(cold_I[:, None], z_item_ID, shared["item"])}
