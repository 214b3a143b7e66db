"""The domain arm learns: who had what, and what the LM says of users and items; a whole epoch runs on the device.

    L_D = bpr·BPR + regularisation·½‖E⁰ of the batch‖²/B + auxiliary·(the model's own loss)
          + align_user·align(e_u, sg z_u) + align_item·align(e_i, sg z_i) + kl·T²·KL(sg LM's scores ‖ domain's scores)

A model of histories (SASRec) has -log softmax of each item of a window, over the catalogue, in place of the first two.
The letters are those of `lm_step`. Source: the two-way loss is the paper's; its terms' forms are ours.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from bdlm_jax.domain import negatives
from bdlm_jax.domain.arm import inner_products
from bdlm_jax.mutual.losses import NEVER, align_loss, bpr_loss, catalogue_loss, kl_loss, sampled_loss
from bdlm_jax.mutual.optimizer import update_state
from bdlm_jax.mutual.options import DomainWeights, Meeting
from bdlm_jax.types import Array, InputError, TrainState


def domain_losses(params, batch, view, constants, *, arm, meeting, weights: DomainWeights, axis_name=None):
    """Computes every weighted term of L_D as {name: (sum, count)}.

    The term on items weighs each by 1/(1 + degree): a prior from the text that interactions outvote; KL runs over the
    user's unseen items of the catalogue, or of a drawn part of it (ours).
    """
    view = jax.lax.stop_gradient(view)  # wherever it comes from, no gradient crosses to the other arm
    shared, domain = params["shared"], params["domain"]
    user_UD, item_ID = arm.encode(shared, domain)
    terms = {}
    if weights.bpr and arm.states_before:
        window_BL = batch["window"]
        state_ND = arm.states_before(shared, domain, window_BL, batch["key"]).reshape(-1, item_ID.shape[1])
        if "softmax_item" in batch:
            drawn = {"drawn_S": batch["softmax_item"], "among": len(constants["warm_item_W"])}
            terms["softmax"] = sampled_loss(state_ND, item_ID, window_BL.reshape(-1), **drawn)
        else:
            bias_I = jnp.where(constants["warm_I"], 0.0, NEVER)
            terms["softmax"] = catalogue_loss(state_ND, item_ID, bias_I, window_BL.reshape(-1), skip=True)
    elif weights.bpr:
        u, i, j, w = batch["user"], batch["positive"], batch["negative"], batch["weight"]
        terms["bpr"] = bpr_loss(*(arm.score_pairs(domain, user_UD[u], item_ID[items]) for items in (i, j)), w)
        norms_B = sum(
            jnp.sum(jnp.square(rows), axis=-1) for rows in (shared["user"][u], shared["item"][i], shared["item"][j])
        )
        terms["regularisation"] = 0.5 * jnp.sum(w * norms_B), jnp.sum(w)
    if arm.auxiliary and weights.auxiliary:
        terms["auxiliary"] = arm.auxiliary(shared, domain, **batch["auxiliary"])
    if weights.align_item or weights.align_user:
        align = functools.partial(align_loss, kind=meeting.align, axis_name=axis_name)
    if weights.align_item:
        n = batch["align_item"]
        terms["align_item"] = align(item_ID[n], view["z_item"][n], constants["text_weight_I"][n], table=item_ID)
    if weights.align_user or weights.kl:
        n = batch["kl_user"]
        user_ND = arm.users(shared, domain, n) if arm.users else user_UD[n]
        user_UD = user_ND if arm.users else user_UD
    if weights.align_user:
        terms["align_user"] = align(user_ND, view["z_user"][n], jnp.ones(n.shape), table=user_UD)
    if weights.kl:
        pick_C, rows_CM, item_CD = batch.get("kl_item"), view["rows_item"], item_ID
        if pick_C is not None:
            rows_CM, item_CD = rows_CM[pick_C], item_CD[pick_C]
        allowed_NC = ~negatives.mark_seen(constants["known"], n, pick_C)
        teacher_NC = jnp.where(allowed_NC, inner_products(view["state_user"][n], rows_CM), NEVER)
        student_NC = jnp.where(allowed_NC, arm.score(domain, user_ND, item_CD), NEVER)
        terms["kl"] = kl_loss(student_NC, teacher_NC, jnp.ones(n.shape), temperature=meeting.temperature)
    return terms


def make_domain_step(*, arm, meeting: Meeting | None, weights: DomainWeights, optimizer, rules=None):
    """Returns the pure step(state, batch, view, constants, *, axis_name=None) of the domain arm on a drawn batch.

    `view` is the LM arm at the start of the phase: state_user (U, M), rows_item (I, M), z_user (U, D), z_item (I, D);
    empty, with no meeting, for an arm that trains alone. `rules` as in `make_lm_step`.
    """

    def domain_step(state: TrainState, batch, view, constants, *, axis_name=None):
        def losses(params, batch):
            options = {"arm": arm, "meeting": meeting, "weights": weights, "axis_name": axis_name}
            return domain_losses(params, batch, view, constants, **options)

        return update_state(state, losses, batch, weights, optimizer, axis_name, rules=rules)

    return domain_step


def make_domain_epoch(domain_step, *, batch_size: int, kl_users: int = 0, kl_items: int = 0, softmax_items: int = 0):
    """Returns epoch(state, slots, view, constants, *, axis_name=None): one pass over all edges, drawn on the device.

    Over all windows instead, where the constants have window_WL; `softmax_items` other items than the target are drawn
    for a batch's softmax, 0 takes all.

    Every device draws the same whole batch and keeps the rows of its own `slots`, so that jit, pmap and mesh see the
    same numbers. `constants` comes from `make_epoch_constants`, with known, a `Seen`, where the score-level term is on:
    it compares kl_users users a step on kl_items items, none of them twice; 0 takes the whole catalogue.
    """

    def epoch(state: TrainState, slots, view, constants, *, axis_name=None):
        n_rows = len(constants["window_WL" if "window_WL" in constants else "edge_user_E"])
        n_users, n_items = (len(state.params["shared"][name]) for name in ("user", "item"))
        key, order_key, step_key = jax.random.split(state.key, 3)
        steps = -(-n_rows // batch_size)
        pad = 0, steps * batch_size - n_rows
        order = jnp.pad(negatives.random_order(order_key, n_rows), pad, constant_values=-1)

        def windows(row_B, key):
            draw_key, drop_key = jax.random.split(key)
            window_BL = jnp.where(row_B[:, None] >= 0, constants["window_WL"][row_B], -1)
            rows = {"window": window_BL, "key": jax.random.split(drop_key, batch_size)}
            batch = {name: rows_B[slots["bpr"]] for name, rows_B in rows.items()}
            if softmax_items:
                warm_W = constants["warm_item_W"]
                first = min(softmax_items, len(warm_W))
                batch["softmax_item"] = warm_W[negatives.random_order(draw_key, len(warm_W), first=first)]
            return batch

        def triples(edge_B, key, negative_key):
            user_B, positive_B = constants["edge_user_E"][edge_B], constants["edge_item_E"][edge_B]
            rank_B = negatives.sample_negatives(negative_key, constants["seen"], user_B, constants.get("popularity"))
            drawn = {
                "user": user_B,
                "positive": positive_B,
                "negative": constants["warm_item_W"][rank_B],
                "weight": (edge_B >= 0).astype(jnp.float32),
            }
            batch = {name: rows_B[slots["bpr"]] for name, rows_B in drawn.items()}
            # Whole on every device, for its rows may be compared; the key is none of those above.
            own = {"user_B": user_B, "item_B": positive_B, "weight_B": drawn["weight"]}
            return batch | {"auxiliary": own | {"key": key}}

        def body(state, inputs):
            row_B, key = inputs
            keys = jax.random.split(key, 4)
            own_key = jax.random.fold_in(key, len(keys))
            batch = windows(row_B, own_key) if "window_WL" in constants else triples(row_B, own_key, keys[0])
            batch["align_item"] = jax.random.randint(keys[3], (batch_size,), 0, n_items)[slots["bpr"]]
            if kl_users:
                batch["kl_user"] = jax.random.randint(keys[1], (kl_users,), 0, n_users)[slots["kl"]]
            if kl_items:
                batch["kl_item"] = negatives.random_order(keys[2], n_items, first=min(kl_items, n_items))
            return domain_step(state, batch, view, constants, axis_name=axis_name)

        inputs = order.reshape(steps, batch_size), jax.random.split(step_key, steps)
        state, metrics = jax.lax.scan(body, state._replace(key=key), inputs)
        return state, jax.tree.map(jnp.mean, metrics)

    return epoch


def make_epoch_constants(user_E: Array, item_E: Array, *, n_users: int, n_items: int, popularity: float = 0.0) -> dict:
    """Puts the training interactions on the device, for `make_domain_epoch`.

    Negatives come from the items with interactions: a cold item is not everybody's negative (ours). They are drawn
    with probability ∝ degree^popularity.
    """
    if not len(user_E):
        raise InputError("there is no training interaction, so the domain arm has nothing to learn: check the split.")
    degree_I = np.bincount(item_E, minlength=n_items)
    warm_W = np.flatnonzero(degree_I)
    rank_I = np.cumsum(degree_I > 0) - 1
    seen = negatives.make_seen(user_E, rank_I[item_E], n_users, len(warm_W))
    constants = {
        "edge_user_E": jnp.asarray(user_E),
        "edge_item_E": jnp.asarray(item_E),
        "warm_item_W": jnp.asarray(warm_W),
        "warm_I": jnp.asarray(degree_I > 0),
        "text_weight_I": jnp.asarray(1.0 / (1.0 + degree_I), jnp.float32),
        "seen": seen,
    }
    if popularity:
        constants["popularity"] = negatives.make_popularity(seen, degree_I[warm_W], alpha=popularity)
    return constants


def make_slots(*, batch_size: int, kl_users: int = 0) -> dict:
    """Returns the index of every row of a domain batch, the "batch" that `runtime.parallel` splits over the devices."""
    slots = {"bpr": jnp.arange(batch_size)}
    return slots | {"kl": jnp.arange(kl_users)} if kl_users else slots
