"""The heart: one LM step and one domain epoch of deep mutual learning, both pure.

Each arm trains its own loss plus a pull towards the other arm's latest representations and scores, which reach it as
constants (`view`). Both losses send their gradient into the same `params["shared"]` leaves.
Source: the scheme is the paper's (alternating deep mutual learning over shared embeddings); the loss forms are ours.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdlm_jax import optimizers, sharing
from bdlm_jax.domain import sampling
from bdlm_jax.domain.arm import DomainArm
from bdlm_jax.lm import causal_lm, lora
from bdlm_jax.lm.causal_lm import gather_positions
from bdlm_jax.lm.pretrain import text_cross_entropy
from bdlm_jax.losses import align_loss, bpr_loss, catalogue_loss, kl_loss
from bdlm_jax.types import Array, InputError, Params

TEXT_CHUNK = 1024  # text targets whose logits are held at a time
NEVER = -1e9  # the logit of an item that cannot be the answer


class TrainState(NamedTuple):
    """What a step carries and a checkpoint holds."""

    params: Params
    opt_state: Any
    step: Array
    key: Array


@dataclasses.dataclass(frozen=True)
class LMWeights:
    """Weights of the LM arm's losses; 0 leaves a term out of the compiled program."""

    item: float = 1.0
    text: float = 0.1
    align_user: float = 0.0
    align_item: float = 0.0
    kl: float = 0.0


@dataclasses.dataclass(frozen=True)
class DomainWeights:
    """Weights of the domain arm's losses; `regularisation` multiplies ½‖E⁰ of the batch‖²/B as LightGCN has it."""

    bpr: float = 1.0
    regularisation: float = 1e-4
    align_user: float = 0.0
    align_item: float = 0.0
    kl: float = 0.0


@dataclasses.dataclass(frozen=True)
class Bridge:
    """How the two arms meet: static facts of the model that every step needs.

    `reads` is "layer0" or "propagated" (see `sharing.read_tables`); `align` one of `losses.ALIGNMENTS`; `temperature`
    the T of the score-level term; capacities are those of the vocabulary.
    """

    lm: causal_lm.LMConfig
    user_capacity: int
    item_capacity: int
    reads: str = "layer0"
    align: str = "mse"
    temperature: float = 1.0


def id_rows(params: Params, *, bridge: Bridge, arm: DomainArm) -> tuple[Array, Array]:
    """Returns the LM's extended rows (X, M) and its output rows of the items (I, M), both from the shared tables."""
    user_UD, item_ID = sharing.read_tables(params["shared"], params["domain"], encode=arm.encode, reads=bridge.reads)
    maps = params["lm"]["bridge"]
    rows_XM = sharing.id_rows(
        maps, user_UD, item_ID, user_capacity=bridge.user_capacity, item_capacity=bridge.item_capacity
    )
    rows_IM = rows_XM[bridge.user_capacity : bridge.user_capacity + item_ID.shape[0]]
    # A tied head multiplies states with text rows as they are stored: item logits are on the same scale.
    return rows_XM, rows_IM * bridge.lm.width**-0.5 if bridge.lm.scale_embedding else rows_IM


def lm_losses(params, batch, view, constants, *, arm, bridge: Bridge, weights: LMWeights, keys_B, axis_name):
    """Computes every weighted term of the LM arm's loss as {name: (sum, count)}.

    L_M = item·CE(next item) + text·CE(text) + align_user·align(z_u, sg e_u) + align_item·align(z_i, sg e_i)
    + kl·T²KL(domain's scores ‖ LM's scores). Cold items take no part in the softmax of the next item: nothing is known
    of who wants them, so they must not be everybody's negatives (ours).
    """
    lm = lora.merge_tables(params["lm"])
    rows_XM, rows_IM = id_rows(params, bridge=bridge, arm=arm)
    hidden_BLM = causal_lm.lm_hidden(
        lm, bridge.lm, batch["tokens"], batch["positions"], batch["segments"], rows_XM, dropout_key_B=keys_B
    )
    terms = {}
    if weights.item:
        state_NM = _flat(gather_positions(hidden_BLM, batch["item_index"]))
        bias_I = jnp.where(constants["warm_I"], 0.0, NEVER)
        terms["item"] = catalogue_loss(state_NM, rows_IM, bias_I, batch["item_target"].reshape(-1))
    if weights.text:
        terms["text"] = text_cross_entropy(
            lm, bridge.lm, hidden_BLM, batch["text_index"], batch["text_target"], chunk=TEXT_CHUNK
        )
    if weights.align_item:
        z_ND = sharing.bridge_out(lm["bridge"], _flat(gather_positions(hidden_BLM, batch["card_index"])))
        item_N = batch["card_item"].reshape(-1)
        known_N = (item_N >= 0) & constants["warm_I"][jnp.maximum(item_N, 0)]
        scale = _scale(view["item"])
        terms["align_item"] = align_loss(
            z_ND / scale, view["item"][jnp.maximum(item_N, 0)] / scale, known_N.astype(z_ND.dtype),
            kind=bridge.align, axis_name=axis_name,
        )  # fmt: skip
    if weights.align_user or weights.kl:
        state_NM = _flat(gather_positions(hidden_BLM, batch["user_index"]))
        user_N = batch["user"].reshape(-1)
        known_N, user_N = (user_N >= 0).astype(state_NM.dtype), jnp.maximum(user_N, 0)
        e_ND = view["user"][user_N]
        if weights.align_user:
            z_ND = sharing.bridge_out(lm["bridge"], state_NM)
            scale = _scale(view["user"])
            terms["align_user"] = align_loss(
                z_ND / scale, e_ND / scale, known_N, kind=bridge.align, axis_name=axis_name
            )
        if weights.kl:
            allowed_NI = constants["warm_I"] & ~constants["seen_UI"][user_N]
            teacher_NI = jnp.where(allowed_NI, arm.score(view.get("domain", {}), e_ND, view["item"]), NEVER)
            student_NI = jnp.where(allowed_NI, state_NM @ rows_IM.T, NEVER)
            terms["kl"] = kl_loss(student_NI, teacher_NI, known_N, temperature=bridge.temperature)
    return terms


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
    if weights.align_item:
        n = batch["align_item"]
        scale = _scale(item_ID)
        terms["align_item"] = align_loss(
            item_ID[n] / scale, view["z_item"][n] / scale, constants["text_weight_I"][n],
            kind=bridge.align, axis_name=axis_name,
        )  # fmt: skip
    if weights.align_user or weights.kl:
        n = batch["kl_user"]
        ones_N = jnp.ones(n.shape)
        if weights.align_user:
            scale = _scale(user_UD)
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


def make_lm_step(*, arm, bridge: Bridge, weights: LMWeights, optimizer, rules=None, accumulate: int = 1):
    """Returns the pure step(state, batch, view, constants, *, axis_name=None) -> (state, metrics) of the LM arm.

    `view` is the domain arm as of the start of the phase: user (U, D), item (I, D), domain params. `constants` never
    change: warm_I, and seen_UI where the score-level term is on.

    Args:
      arm: the domain arm (its `encode` is used when the LM reads propagated rows).
      bridge: static facts of the model.
      weights: the loss weights.
      optimizer: optax transformation over the whole params; freezes what the LM phase must not touch.
      rules: the optimiser's rules, for a gradient of what trains alone; None takes it of every leaf.
      accumulate: parts in which a batch goes through the decoder, one after the other, for the memory of one: sums and
        counts run over all of them, so the step is that of the whole batch (but for infonce, whose negatives are the
        part's own).
    """

    def lm_step(state: TrainState, batch, view, constants, *, axis_name=None):
        key, dropout_key = jax.random.split(state.key)

        def losses(params, batch):
            rows_B = batch["row"]
            keys_B = jax.vmap(lambda row: jax.random.fold_in(dropout_key, row))(rows_B) if bridge.lm.dropout else None
            return lm_losses(
                params, batch, view, constants,
                arm=arm, bridge=bridge, weights=weights, keys_B=keys_B, axis_name=axis_name,
            )  # fmt: skip

        return _update(
            state._replace(key=key), losses, batch, dataclasses.asdict(weights), optimizer, axis_name,
            rules=rules, parts=accumulate,
        )  # fmt: skip

    return lm_step


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

        return _update(state, losses, batch, dataclasses.asdict(weights), optimizer, axis_name, rules=rules)

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
            user_B = constants["edge_user_E"][edge_B]
            drawn = (keys[0], constants["seen"])
            if "popularity" in constants:
                negative_B = sampling.sample_popular_negatives(*drawn, constants["popularity"], user_B)
            else:
                negative_B = sampling.sample_negatives(*drawn, user_B)
            negative_B = constants["warm_item_W"][negative_B]
            pick = slots["bpr"]
            batch = {
                "user": user_B[pick],
                "positive": constants["edge_item_E"][edge_B][pick],
                "negative": negative_B[pick],
                "weight": (edge_B >= 0).astype(jnp.float32)[pick],
                "align_item": jax.random.randint(keys[3], (batch_size,), 0, n_items)[pick],
            }
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


def _update(state: TrainState, losses, batch, weights: dict, optimizer, axis_name, *, rules=None, parts: int = 1):
    total = (lambda x: jax.lax.psum(x, axis_name)) if axis_name else (lambda x: x)
    trained, put = optimizers.split_trained(state.params, rules)

    def count(terms):
        return {name: jnp.maximum(total(jax.lax.stop_gradient(count)), 1e-9) for name, (_, count) in terms.items()}

    def objective(trained, batch, counts=None):
        terms = losses(put(trained, state.params), batch)
        counts = count(terms) if counts is None else counts
        shares = {name: value / counts[name] for name, (value, _) in terms.items()}
        return sum(weights[name] * share for name, share in shares.items()), shares

    gradient = jax.grad(objective, has_aux=True)
    if parts == 1:
        grads, shares = gradient(trained, batch)
    else:
        # The counts of all parts come first: a part's share of the loss is its sum over the whole batch's count. No
        # count depends on the decoder, so the compiler leaves its forward pass out of this.
        batches = jax.tree.map(lambda x: x.reshape(len(x) // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)
        each = jax.lax.map(lambda part: {k: (0.0, n) for k, (_, n) in losses(state.params, part).items()}, batches)
        counts = count(jax.tree.map(jnp.sum, each))

        def add(so_far, part):
            return jax.tree.map(lambda x, y: x + y.astype(x.dtype), so_far, gradient(trained, part, counts)), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained), dict.fromkeys(counts, jnp.zeros(()))
        (grads, shares), _ = jax.lax.scan(add, zeros, batches)
    grads, metrics = total(grads), total(shares)
    metrics["loss"] = sum(weights[name] * value for name, value in metrics.items())
    metrics["gradient_norm"] = optax.tree.norm(grads)
    if rules is not None:
        grads = put(grads, jax.tree.map(jnp.zeros_like, state.params))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state._replace(params=params, opt_state=opt_state, step=state.step + 1), metrics


def _scale(table: Array) -> Array:
    """The unit in which representations are compared, so that a weight means the same for every table (ours)."""
    return jax.lax.stop_gradient(jnp.std(table)) + 1e-6


def _flat(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])
