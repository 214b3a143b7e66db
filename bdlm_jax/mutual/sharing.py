"""The information sharing module: one table of users and items that both arms read and both arms train.

`params["shared"] = {"user": (U, D), "item": (I, D)}` is one leaf per table. The domain arm starts from it (layer 0);
the LM reads it through the bridge as the rows of its `<uid>`/`<iid>` tokens. The bridge out maps the LM's top-layer
states back to the sharing width. Source: the module is the paper's; bridge and reading mode are ours.
"""

import jax
import jax.numpy as jnp

from bdlm_jax.types import Array, Params

READS = ("layer0", "propagated")


def init_shared(key: Array, *, n_users: int, n_items: int, width: int, std: float = 0.1) -> Params:
    """Draws the shared tables from a normal distribution.

    Args:
      key: a JAX key.
      n_users: U.
      n_items: I.
      width: D, the sharing width.
      std: standard deviation of the entries (LightGCN's published 0.1).

    Returns:
      {"user": (U, D), "item": (I, D)} float32.
    """
    user_key, item_key = jax.random.split(key)
    return {
        "user": std * jax.random.normal(user_key, (n_users, width)),
        "item": std * jax.random.normal(item_key, (n_items, width)),
    }


def init_bridge(key: Array, *, width: int, lm_width: int, gain: float = 1.0, out_std: float = 1.0) -> Params:
    """Makes the learned maps between the sharing width D and the LM's width M, both orthogonal at first.

    Args:
      key: a JAX key.
      width: D.
      lm_width: M.
      gain: what the bridge in multiplies a row's norm with (the norm of its part in M dimensions where D > M): the
        LM's rows have a scale of their own (ours).
      out_std: standard deviation of what the bridge out makes of normalised LM states.

    Returns:
      {"into": (D, M), "out": (M, D), "out_bias": (D,)} float32.
    """
    into_DM = jax.nn.initializers.orthogonal()(key, (width, lm_width))
    # With D > M a state of M dimensions is spread over D of them, and each would be smaller.
    out_std *= max(1.0, width / lm_width) ** 0.5
    return {"into": into_DM * gain, "out": into_DM.T * out_std, "out_bias": jnp.zeros((width,))}


def row_statistics(rows_RM: Array) -> dict[str, float]:
    """Measures rows of an embedding: {"std": of all entries, "norm": mean Euclidean norm of a row}."""
    rows_RM = jnp.asarray(rows_RM, jnp.float32)
    return {"std": float(jnp.std(rows_RM)), "norm": float(jnp.mean(jnp.linalg.norm(rows_RM, axis=1)))}


def read_tables(shared: Params, domain: Params, *, encode, reads: str) -> tuple[Array, Array]:
    """Returns the (user (U, D), item (I, D)) rows that the LM sees.

    "layer0": the shared tables themselves. "propagated": the domain arm's representations, computed from the tables
    by `encode`, so that the LM's gradient reaches the same leaves through the propagation (ours).
    """
    if reads == "propagated":
        return encode(shared, domain)
    return shared["user"], shared["item"]


def id_rows(bridge: Params, user_UD: Array, item_ID: Array) -> Array:
    """Computes the rows (X, M) of `<uid>` and `<iid>` in the LM's extended vocabulary, users first."""
    return jnp.concatenate([user_UD @ bridge["into"], item_ID @ bridge["into"]])


def item_rows(bridge: Params, item_ID: Array) -> Array:
    """Computes the output rows (I, M) of the item tokens: the same rows that the LM reads."""
    return item_ID @ bridge["into"]


def bridge_out(bridge: Params, state: Array) -> Array:
    """Maps the LM's top-layer states (..., M) to the sharing width (..., D): z = h·P_out + b."""
    return state @ bridge["out"] + bridge["out_bias"]


def write_back(shared: Params, z_item_ID: Array, cold_I: Array) -> Params:
    """Stores the LM's reading of an item's text as the shared row of every item without interactions.

    For such an item align(e_i, sg z_i) is the domain arm's whole loss and e_i is its own row, so e_i = z_i is that
    loss's exact minimum: the step is taken in closed form (ours).

    Args:
      shared: the shared tables.
      z_item_ID: (I, D) item states of the LM through the bridge out.
      cold_I: (I,) bool.

    Returns:
      The shared tables with those rows replaced.
    """
    return {**shared, "item": jnp.where(cold_I[:, None], z_item_ID, shared["item"])}
