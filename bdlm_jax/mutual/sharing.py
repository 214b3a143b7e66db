"""The information sharing module: one table of users and items that both arms read and both arms train.

`params["shared"] = {"user": (U, D), "item": (I, D)}` is one leaf per table. The domain arm starts from it (layer 0);
the LM reads it through the bridge as the rows of its `<uid>`/`<iid>` tokens. The bridge out maps the LM's top-layer
states back to the sharing width. With `content` (I, C), what the items' texts say, and the learned `reading` (C, D) an
item's row is item_i + content_i·reading: its own part learns what the text cannot say. Source: the module is the
paper's; bridge, reading mode and content are ours.
"""

import jax
import jax.numpy as jnp

from bdlm_jax.domain.arm import DomainArm
from bdlm_jax.mutual.options import Meeting
from bdlm_jax.types import Array, Params

READS = ("layer0", "propagated")
HEAD_RATE = 8.0  # the head's weight is this times its parameter, which moves as slowly as a matrix entry


def init_shared(key: Array, *, n_users: int, n_items: int, width: int, std: float = 0.1) -> Params:
    """Draws the tables (U, D) and (I, D) from a normal distribution; 0.1 is LightGCN's published deviation."""
    user_key, item_key = jax.random.split(key)
    return {
        "user": std * jax.random.normal(user_key, (n_users, width)),
        "item": std * jax.random.normal(item_key, (n_items, width)),
    }


def add_content(shared: Params, content_IC: Array, warm_I: Array, *, ridge: float = 10.0) -> Params:
    """Parts the item table into what a ridge regression reads from the texts of warm items, and what is left.

    The rows of warm items stay as they are; a cold item, whose own part becomes zero, stands where its text says.
    """
    warm_IC = jnp.where(warm_I[:, None], content_IC, 0.0)
    gram_CC = warm_IC.T @ warm_IC + ridge * jnp.eye(content_IC.shape[1])
    reading_CD = jnp.linalg.solve(gram_CC, warm_IC.T @ shared["item"])
    own_ID = jnp.where(warm_I[:, None], shared["item"] - content_IC @ reading_CD, 0.0)
    return {**shared, "item": own_ID, "content": content_IC, "reading": reading_CD}


def whole(shared: Params) -> Params:
    """Returns the tables {"user", "item"} as both arms read them, with what the texts say."""
    if "content" not in shared:
        return shared
    return {"user": shared["user"], "item": shared["item"] + shared["content"] @ shared["reading"]}


def init_bridge(
    key: Array, *, width: int, lm_width: int, gain: float = 1.0, out_std: float = 1.0, text_head: bool = False
) -> Params:
    """Makes the learned maps {"into": (D, M), "out": (M, D), "out_bias": (D,)}, both orthogonal at first.

    With `text_head` also "text" (1,), the weight of `item_queries`, 0 at first.

    The bridge in multiplies a row's norm with `gain` (the norm of its part in M dimensions where D > M), for the LM's
    rows have a scale of their own; the bridge out makes entries of deviation `out_std` of normalised LM states (ours).
    """
    into_DM = jax.nn.initializers.orthogonal()(key, (width, lm_width))
    # With D > M a state of M dimensions is spread over D of them, and each would be smaller.
    out_std *= max(1.0, width / lm_width) ** 0.5
    bridge = {"into": into_DM * gain, "out": into_DM.T * out_std, "out_bias": jnp.zeros((width,))}
    return bridge | ({"text": jnp.zeros((1,))} if text_head else {})


def read_tables(shared: Params, domain: Params, *, encode, reads: str) -> tuple[Array, Array]:
    """Returns the (user (U, D), item (I, D)) rows that the LM sees.

    "layer0": the shared tables themselves. "propagated": the domain arm's representations, computed from the tables
    by `encode`, so that the LM's gradient reaches the same leaves through the propagation (ours).
    """
    shared = whole(shared)
    if reads == "propagated":
        return encode(shared, domain)
    return shared["user"], shared["item"]


def id_rows(params: Params, *, meeting: Meeting, arm: DomainArm) -> tuple[Array, Array]:
    """Returns the rows (X, M) of `<uid>` and `<iid>` that the LM reads, users first, and its output rows (I, M)."""
    tables = read_tables(params["shared"], params["domain"], encode=arm.encode, reads=meeting.reads)
    rows_XM = jnp.concatenate([table @ params["lm"]["bridge"]["into"] for table in tables])
    rows_IM = rows_XM[len(tables[0]) :]
    # A tied head multiplies states with text rows as they are stored: item logits are on the same scale.
    return rows_XM, rows_IM * meeting.lm.width**-0.5 if meeting.lm.scale_embedding else rows_IM


def item_keys(params: Params, rows_IM: Array) -> Array:
    """Returns what `item_queries` are multiplied with: the LM's output rows, and with a head for texts the content."""
    if "text" not in params["lm"]["bridge"]:
        return rows_IM
    return jnp.concatenate([rows_IM, params["shared"]["content"].astype(rows_IM.dtype)], axis=1)


def item_queries(bridge: Params, content_IC: Array | None, state_NM: Array, last_N: Array) -> Array:
    """Returns states whose products with `item_keys` are the next item's logits: h·row_i + β·cos(text_last, text_i).

    last_N is the last item that each state has read, -1 for none. Ours.
    """
    if "text" not in bridge:
        return state_NM
    said_NC = jnp.where(last_N[:, None] >= 0, content_IC[jnp.maximum(last_N, 0)], 0.0)
    return jnp.concatenate([state_NM, HEAD_RATE * bridge["text"] * said_NC.astype(state_NM.dtype)], axis=1)


def last_items(tokens_BL: Array, segments_BL: Array, index_BT: Array, *, first: int, n_items: int) -> Array:
    """Returns the last item at or before some positions of packed rows, within their segments: (B·T,), -1 for none.

    Items are the tokens from `first` on.
    """
    item_BL = tokens_BL - first
    at_BL = jnp.where((item_BL >= 0) & (item_BL < n_items), jnp.arange(tokens_BL.shape[1]), -1)
    last_BT = jnp.take_along_axis(jax.lax.cummax(at_BL, axis=1), index_BT, axis=1)
    there_BT = jnp.maximum(last_BT, 0)
    same_BT = jnp.take_along_axis(segments_BL, there_BT, axis=1) == jnp.take_along_axis(segments_BL, index_BT, axis=1)
    found_BT = jnp.take_along_axis(item_BL, there_BT, axis=1)
    return jnp.where((last_BT >= 0) & same_BT, found_BT, -1).reshape(-1)


def bridge_out(bridge: Params, state: Array) -> Array:
    """Maps the LM's top-layer states (..., M) to the sharing width (..., D): z = h·P_out + b."""
    return state @ bridge["out"] + bridge["out_bias"]


def write_back(shared: Params, z_item_ID: Array, cold_I: Array) -> Params:
    """Stores the LM's reading of an item's text, through the bridge out, as the shared row of every cold item.

    For such an item align(e_i, sg z_i) is the domain arm's whole loss and e_i is its own row, so e_i = z_i is that
    loss's exact minimum: the step is taken in closed form (ours).
    """
    return {**shared, "item": jnp.where(cold_I[:, None], z_item_ID, shared["item"])}
