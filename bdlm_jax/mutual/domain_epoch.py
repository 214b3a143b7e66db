"""The domain arm: its losses, its step, and a whole epoch of steps drawn on the device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from bdlm_jax.domain import negatives as sampling
from bdlm_jax.mutual.losses import NEVER, align_loss, bpr_loss, kl_loss, table_scale
from bdlm_jax.mutual.optimizer import update_state
from bdlm_jax.mutual.options import Bridge, DomainWeights
from bdlm_jax.types import Array, InputError, TrainState


def domain_losses(params, batch, view, constants, *, arm, bridge: Bridge | None, weights: DomainWeights, axis_name):
    """Computes every weighted term of the domain arm's loss as {name: (sum, count)}.

    L_D = bpr·BPR + regularisation·½‖E⁰ of the batch‖²/B + align_user·align(e_u, sg z_u) + align_item·align(e_i, sg z_i)
    + kl·T²KL(LM's scores ‖ domain's scores), the last over the unseen items of the catalogue (or of a drawn part).

    Representations are compared in units of the domain table's standard deviation. The term on items weighs each by
    1/(1 + degree): a prior from the text that interactions outvote (ours).
    """
    shared, domain = params["shared"], params["domain"]
    user_UD, item_ID = arm.encode(shared, domain)
    terms = {}
    if weights.bpr:
        u, i, j, w = batch["user"], batch["positive"], batch["negative"], batch["weight"]
        u_BD = arm.user_before(shared, domain, u, i) if arm.user_before else user_UD[u]
        terms["bpr"] = bpr_loss(arm.score_pairs(domain, u_BD, item_ID[i]), arm.score_pairs(domain, u_BD, item_ID[j]), w)
        norms_B = sum(
            jnp.sum(jnp.square(rows), axis=-1) for rows in (shared["user"][u], shared["item"][i], shared["item"][j])
        )
        terms["regularisation"] = 0.5 * jnp.sum(w * norms_B), jnp.sum(w)
    if arm.auxiliary and weights.auxiliary:
        terms["auxiliary"] = arm.auxiliary(shared, domain, **batch["auxiliary"])
    if weights.align_item:
        n = batch["align_item"]
        scale = table_scale(item_ID)
        terms["align_item"] = align_loss(
            item_ID[n] / scale, view["z_item"][n] / scale, constants["text_weight_I"][n],
            kind=bridge.align, axis_name=axis_name,
        )  # fmt: skip
    if weights.align_user or weights.kl:
        n = batch["kl_user"]
        ones_N = jnp.ones(n.shape)
        if weights.align_user:
            scale = table_scale(user_UD)
            terms["align_user"] = align_loss(
                user_UD[n] / scale, view["z_user"][n] / scale, ones_N, kind=bridge.align, axis_name=axis_name
            )
        if weights.kl:
            allowed_NC = ~constants["seen_UI"][n]
            rows_CM, item_CD = view["rows_item"], item_ID
            if "kl_item" in batch:
                pick_C = batch["kl_item"]
                allowed_NC, rows_CM, item_CD = allowed_NC[:, pick_C], rows_CM[pick_C], item_CD[pick_C]
            teacher_NC = jnp.where(allowed_NC, view["state_user"][n] @ rows_CM.T, NEVER)
            student_NC = jnp.where(allowed_NC, arm.score(domain, user_UD[n], item_CD), NEVER)
            terms["kl"] = kl_loss(student_NC, teacher_NC, ones_N, temperature=bridge.temperature)
    return terms


def make_domain_step(*, arm, bridge: Bridge | None, weights: DomainWeights, optimizer, rules=None):
    """Returns the pure step(state, batch, view, constants, *, axis_name=None) of the domain arm on a drawn batch.

    `view` is the LM arm at the start of the phase: state_user (U, M), rows_item (I, M), z_user (U, D), z_item (I, D);
    empty for an arm that trains alone. `rules` as in `make_lm_step`.
    """

    def domain_step(state: TrainState, batch, view, constants, *, axis_name=None):
        def losses(params, batch):
            return domain_losses(
                params, batch, view, constants, arm=arm, bridge=bridge, weights=weights, axis_name=axis_name
            )

        return update_state(state, losses, batch, dataclasses.asdict(weights), optimizer, axis_name, rules=rules)

    return domain_step


def make_domain_epoch(domain_step, *, batch_size: int, kl_users: int = 0, kl_items: int = 0):
    """Returns epoch(state, slots, view, constants, *, axis_name=None): one pass over all edges, drawn on the device.

    Every device draws the same whole batch and keeps the rows of its own `slots`, so that jit, pmap and mesh see the
    same numbers. `constants` comes from `make_epoch_constants`, with seen_UI (U, I) where the score-level term is on.

    Args:
      domain_step: from `make_domain_step`.
      batch_size: BPR triples a step.
      kl_users: users a step for the terms on users, 0 for none.
      kl_items: items drawn a step for the score-level term; 0 takes the whole catalogue.
    """

    def epoch(state: TrainState, slots, view, constants, *, axis_name=None):
        n_edges = constants["edge_user_E"].shape[0]
        n_users, n_items = (state.params["shared"][name].shape[0] for name in ("user", "item"))
        key, order_key, step_key = jax.random.split(state.key, 3)
        steps = -(-n_edges // batch_size)
        order = jnp.pad(
            sampling.random_order(order_key, n_edges), (0, steps * batch_size - n_edges), constant_values=-1
        )

        def body(state, inputs):
            edge_B, key = inputs
            keys = jax.random.split(key, 4)
            user_B, item_B = constants["edge_user_E"][edge_B], constants["edge_item_E"][edge_B]
            drawn = (keys[0], constants["seen"])
            if "popularity" in constants:
                negative_B = sampling.sample_popular_negatives(*drawn, constants["popularity"], user_B)
            else:
                negative_B = sampling.sample_negatives(*drawn, user_B)
            negative_B = constants["warm_item_W"][negative_B]
            weight_B, pick = (edge_B >= 0).astype(jnp.float32), slots["bpr"]
            batch = {
                "user": user_B[pick],
                "positive": item_B[pick],
                "negative": negative_B[pick],
                "weight": weight_B[pick],
                "align_item": jax.random.randint(keys[3], (batch_size,), 0, n_items)[pick],
            }
            # Whole on every device, which may compare its rows; the key is none of those above.
            auxiliary_key = jax.random.fold_in(key, len(keys))
            batch["auxiliary"] = {"user_B": user_B, "item_B": item_B, "weight_B": weight_B, "key": auxiliary_key}
            if kl_users:
                batch["kl_user"] = jax.random.randint(keys[1], (kl_users,), 0, n_users)[slots["kl"]]
            if kl_items:
                batch["kl_item"] = jax.random.randint(keys[2], (kl_items,), 0, n_items)
            return domain_step(state, batch, view, constants, axis_name=axis_name)

        inputs = order.reshape(steps, batch_size), jax.random.split(step_key, steps)
        state, metrics = jax.lax.scan(body, state._replace(key=key), inputs)
        return state, jax.tree.map(jnp.mean, metrics)

    return epoch


def make_epoch_constants(
    user_E: Array, item_E: Array, *, n_users: int, n_items: int, popularity: float | None = None
) -> dict:
    """Puts the training interactions on the device, for `make_domain_epoch`.

    Negatives come from the items with interactions: a cold item is not everybody's negative (ours).

    Args:
      user_E: (E,) users of the training interactions.
      item_E: (E,) items.
      n_users: U.
      n_items: I.
      popularity: draw a negative with probability ∝ degree^popularity; None draws uniformly.

    Returns:
      {"edge_user_E", "edge_item_E", "warm_item_W", "warm_I", "text_weight_I", "seen"[, "popularity"]}.

    Raises:
      InputError: no training interaction, or a user who has seen every item.
    """
    if not len(user_E):
        raise InputError("there is no training interaction, so the domain arm has nothing to learn: check the split.")
    degree_I = np.bincount(item_E, minlength=n_items)
    warm_W = np.flatnonzero(degree_I)
    rank_I = np.cumsum(degree_I > 0) - 1
    seen = sampling.make_seen(user_E, rank_I[item_E], n_users, len(warm_W))
    constants = {
        "edge_user_E": jnp.asarray(user_E),
        "edge_item_E": jnp.asarray(item_E),
        "warm_item_W": jnp.asarray(warm_W),
        "warm_I": jnp.asarray(degree_I > 0),
        "text_weight_I": jnp.asarray(1.0 / (1.0 + degree_I), jnp.float32),
        "seen": seen,
    }
    if popularity is not None:
        constants["popularity"] = sampling.make_popularity(seen, degree_I[warm_W], alpha=popularity)
    return constants


def make_slots(*, batch_size: int, kl_users: int = 0) -> dict:
    """Returns the index of every row of a domain batch, the "batch" that `runtime.parallel` splits over the devices."""
    slots = {"bpr": jnp.arange(batch_size)}
    if kl_users:
        slots["kl"] = jnp.arange(kl_users)
    return slots
