"""Training a domain arm alone with BPR: the batch loss, and a whole epoch as one compiled loop on the device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdlm_jax.domain.arm import DomainArm
from bdlm_jax.domain.sampling import Popularity, Seen, random_order, sample_negatives, sample_popular_negatives
from bdlm_jax.losses import bpr_loss
from bdlm_jax.types import Array, InputError, Params


class DomainState(NamedTuple):
    """What an epoch carries: params {"shared", "domain"}, the optimiser's state and a JAX key."""

    params: Params
    opt_state: Any
    key: Array


def bpr_batch_loss(
    arm: DomainArm,
    params: Params,
    user_B: Array,
    positive_B: Array,
    negative_B: Array,
    *,
    weight_B: Array | None = None,
    regularisation: float = 1e-4,
) -> tuple[Array, dict[str, Array]]:
    """Returns L = Σ_b w_b·(softplus(s⁻_b - s⁺_b) + λ/2·‖E⁰_b‖²) / Σ_b w_b of one batch of triples.

    ‖E⁰_b‖² sums the squares of the shared rows of the triple's user, positive and negative, before any propagation.

    Args:
      arm: the domain arm; it encodes the whole graph once, and the gradient goes through that.
      params: {"shared", "domain"}.
      user_B: (B,) users.
      positive_B: (B,) items that they interacted with.
      negative_B: (B,) items that they did not.
      weight_B: (B,) row weights, 0 for padding; None is all ones.
      regularisation: λ.

    Returns:
      (loss, {"bpr", "regularisation"}) scalars, the second without λ.
      Source: He et al. 2020 (LightGCN), equation 15, batched as in its public PyTorch code.
    """
    shared, domain = params["shared"], params["domain"]
    weight_B = jnp.ones(user_B.shape, jnp.float32) if weight_B is None else weight_B
    user_UD, item_ID = arm.encode(shared, domain)
    user_BD = user_UD[user_B]
    if arm.user_before is not None:
        user_BD = arm.user_before(shared, domain, user_B, positive_B)
    positive = arm.score_pairs(domain, user_BD, item_ID[positive_B])
    negative = arm.score_pairs(domain, user_BD, item_ID[negative_B])
    total, count = bpr_loss(positive, negative, weight_B)
    rows = shared["user"][user_B], shared["item"][positive_B], shared["item"][negative_B]
    squares_B = sum(jnp.sum(jnp.square(row_BD), axis=-1) for row_BD in rows)
    bpr, norm = total / count, 0.5 * jnp.sum(weight_B * squares_B) / count
    return bpr + regularisation * norm, {"bpr": bpr, "regularisation": norm}


def init_domain_state(params: Params, optimizer: optax.GradientTransformation, key: Array) -> DomainState:
    """Returns the state before the first epoch."""
    return DomainState(params, optimizer.init(params), key)


def make_domain_epoch(
    arm: DomainArm,
    optimizer: optax.GradientTransformation,
    seen: Seen,
    *,
    user_E: Array,
    item_E: Array,
    batch_size: int,
    regularisation: float = 1e-4,
    popularity: Popularity | None = None,
) -> Callable[[DomainState], tuple[DomainState, dict[str, Array]]]:
    """Compiles one epoch: every training edge once, in a fresh order, each with a fresh negative, all on the device.

    Args:
      arm: the domain arm.
      optimizer: any optax transformation over {"shared", "domain"}.
      seen: from `sampling.make_seen`; what no negative may be.
      user_E: (E,) users of the training edges.
      item_E: (E,) items of the training edges.
      batch_size: B; the last batch is padded with rows of weight 0.
      regularisation: λ of `bpr_batch_loss`.
      popularity: draw negatives by popularity (`sampling.make_popularity`); None draws them uniformly.

    Returns:
      epoch(state) -> (state, {"loss", "bpr", "regularisation"}), means over the steps. The state's buffers are donated.

    Raises:
      InputError: no training edge.
    """
    n_edges = int(np.size(user_E))
    if n_edges == 0:
        raise InputError("there is no training interaction, so the domain arm has nothing to learn: check the split.")
    edge_2E = jnp.asarray(np.stack([user_E, item_E]), jnp.int32)
    steps = -(-n_edges // batch_size)

    def draw(key, seen, popularity, user_B):
        if popularity is None:
            return sample_negatives(key, seen, user_B)
        return sample_popular_negatives(key, seen, popularity, user_B)

    def epoch(state, edge_2E, seen, popularity):
        key, order_key, negative_key = jax.random.split(state.key, 3)
        order = random_order(order_key, n_edges)
        order = jnp.pad(order, (0, steps * batch_size - n_edges), constant_values=-1).reshape(steps, batch_size)

        def step(carry, inputs):
            params, opt_state = carry
            row_B, key = inputs
            user_B, positive_B = edge_2E[:, row_B]
            negative_B = draw(key, seen, popularity, user_B)

            def loss_of(params):
                weight_B = (row_B >= 0).astype(jnp.float32)
                return bpr_batch_loss(
                    arm, params, user_B, positive_B, negative_B, weight_B=weight_B, regularisation=regularisation
                )

            (loss, metrics), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), {"loss": loss, **metrics}

        inputs = order, jax.random.split(negative_key, steps)
        (params, opt_state), metrics = jax.lax.scan(step, (state.params, state.opt_state), inputs)
        return DomainState(params, opt_state, key), jax.tree.map(jnp.mean, metrics)

    # The edges are arguments, not constants of the program: XLA would spend its time folding them.
    compiled = jax.jit(epoch, donate_argnums=0)
    return lambda state: compiled(state, edge_2E, seen, popularity)
