"""The LM arm learns: the next item, the items' texts, and what the domain arm says of users and items.

    L_M = item·CE(next item) + text·CE(text) + align_user·align(z_u, sg e_u) + align_item·align(z_i, sg e_i)
          + kl·T²·KL(sg domain's scores ‖ LM's scores)

z_u is the LM's state at the end of a history and z_i at the end of an item's card, both through the bridge out; e_u and
e_i are the domain arm's representations. Source: the two-way loss is the paper's; its terms' forms are ours.
"""

import functools

import jax
import jax.numpy as jnp

from bdlm_jax.domain import negatives
from bdlm_jax.domain.arm import inner_products
from bdlm_jax.lm import causal_lm, lora
from bdlm_jax.mutual import lessons, sharing
from bdlm_jax.mutual.losses import (
    NEVER,
    align_loss,
    catalogue_kl,
    catalogue_loss,
    kl_loss,
    sampled_loss,
    text_loss,
)
from bdlm_jax.mutual.optimizer import update_state
from bdlm_jax.mutual.options import LMWeights, Meeting
from bdlm_jax.types import Array, TrainState

TEXT_CHUNK = 1024  # text targets whose logits are held at a time
NO_ROW = 2**32 - 1  # no row of a batch has this number


def states_at(hidden_BLM: Array, index_BT: Array) -> Array:
    """Takes each row's states at its own positions: (B, L, M), (B, T) -> (B·T, M)."""
    return causal_lm.gather_positions(hidden_BLM, index_BT).reshape(-1, hidden_BLM.shape[-1])


def lm_losses(
    params,
    batch,
    view,
    constants,
    *,
    arm,
    meeting: Meeting,
    weights: LMWeights,
    keys_B=None,
    drawn_S=None,
    skip_text=False,
    axis_name=None,
):
    """Computes every weighted term of L_M as {name: (sum, count)}.

    Cold items take no part in the softmax of the next item: nothing is known of who wants them, so they must not be
    everybody's negatives (ours). It runs over all the others, or over the items `drawn_S` beside each target.
    """
    view = jax.lax.stop_gradient(view)  # wherever it comes from, no gradient crosses to the other arm
    lm = lora.merge_tables(params["lm"])
    rows_XM, head = sharing.id_rows_and_head(params, meeting=meeting, arm=arm)
    hidden_BLM = causal_lm.lm_hidden(
        lm, meeting.lm, batch["tokens"], batch["positions"], batch["segments"], rows_XM, dropout_key_B=keys_B
    )
    align = functools.partial(align_loss, kind=meeting.align, axis_name=axis_name)
    terms = {}
    if weights.item:
        state_ND, target_N = head.read(states_at(hidden_BLM, batch["item_index"])), batch["item_target"].reshape(-1)
        if drawn_S is None:
            bias_I = jnp.where(constants["warm_I"], 0.0, NEVER)
            terms["item"] = catalogue_loss(state_ND, head.rows_IN, bias_I, target_N)
        else:
            among = len(constants["warm_item_W"])
            terms["item"] = sampled_loss(state_ND, head.rows_IN, target_N, drawn_S, among=among)
    if weights.text:
        state_NM = states_at(hidden_BLM, batch["text_index"])
        target_N, options = batch["text_target"].reshape(-1), {"chunk": TEXT_CHUNK, "skip": skip_text}
        terms["text"] = text_loss(lm, meeting.lm, state_NM, target_N, **options)
    if weights.align_item:
        z_ND = sharing.bridge_out(lm["bridge"], states_at(hidden_BLM, batch["card_index"]))
        item_N = batch["card_item"].reshape(-1)
        known_N, item_N = item_N >= 0, jnp.maximum(item_N, 0)
        known_N = (known_N & constants["warm_I"][item_N]).astype(z_ND.dtype)
        terms["align_item"] = align(z_ND, view["item"][item_N], known_N, table=view["item"])
    if weights.kl and "teacher" in view:
        terms["kl"] = _lesson(view["teacher"], batch, constants, hidden_BLM, rows_XM, head, meeting=meeting)
    if weights.align_user or (weights.kl and "teacher" not in view):
        state_NM = states_at(hidden_BLM, batch["user_index"])
        user_N = batch["user"].reshape(-1)
        known_N, user_N = (user_N >= 0).astype(state_NM.dtype), jnp.maximum(user_N, 0)
        if weights.align_user:
            z_ND = sharing.bridge_out(lm["bridge"], state_NM)
            terms["align_user"] = align(z_ND, view["user"][user_N], known_N, table=view["user"])
        if weights.kl and "teacher" not in view:
            if "state_user" in view:  # of a teacher: what the domain arm hears too
                teacher_NI = inner_products(view["state_user"][user_N], view["rows_item"])
            else:
                teacher_NI = arm.score(view.get("domain", {}), view["user"][user_N], view["item"])
            allowed_NI = constants["warm_I"] & ~negatives.mark_seen(constants["known"], user_N)
            teacher_NI = jnp.where(allowed_NI, teacher_NI, NEVER)
            student_NI = jnp.where(allowed_NI, inner_products(head.read(state_NM), head.rows_IN), NEVER)
            terms["kl"] = kl_loss(student_NI, teacher_NI, known_N, temperature=meeting.temperature)
    return terms


def _lesson(teacher, batch, constants, hidden_BLM, rows_XM, head: sharing.ItemHead, *, meeting: Meeting):
    """The score-level term at every place: a teacher of `lessons`, over the items that the row does not hold."""
    n_items = len(head.rows_IN)
    item_BL = batch["tokens"] - (meeting.lm.vocab_size + len(rows_XM) - n_items)
    item_BL = jnp.where(item_BL >= 0, item_BL, -1)
    teacher_BTN, teacher_IN = jax.lax.stop_gradient(lessons.teach(teacher, batch, item_BL, meeting=meeting))
    hold = jax.vmap(lambda item_L: jnp.zeros(n_items + 1, bool).at[item_L].set(True)[:-1])
    never_BI = hold(item_BL) | ~constants["warm_I"]  # -1 is the last place, which is cut off
    state_BTM = causal_lm.gather_positions(hidden_BLM, batch["item_index"])
    return catalogue_kl(
        head.read(state_BTM), head.rows_IN, teacher_BTN, teacher_IN,
        (batch["item_target"] >= 0).astype(jnp.float32), never_BI, temperature=meeting.temperature,
    )  # fmt: skip


def make_lm_step(
    *,
    arm,
    meeting: Meeting,
    weights: LMWeights,
    optimizer,
    rules=None,
    accumulate: int = 1,
    softmax_items: int = 0,
    skip_text: bool = False,
):
    """Returns the pure step(state, batch, view, constants, *, axis_name=None) -> (state, metrics) of the LM arm.

    `view` is the domain arm as of the start of the phase: user (U, D), item (I, D), domain params; or a teacher's, for
    the score-level term alone: state_user (U, N), rows_item (I, N). `constants` never change: warm_I, known (a `Seen`)
    where that term is on, and warm_item_W where `softmax_items` of them are drawn anew for each step's softmax (0: it
    runs over all). With the optimiser's `rules` the gradient is taken of what trains alone. A batch goes through the
    decoder in `accumulate` parts, one after the other, for the memory of one:
    the step is that of the whole batch (but for alignments of `WHOLE_BATCH`, whose negatives are the part's own).
    `skip_text` is for batches of which few rows hold text, on a device that has them whole: the others cost no logits.
    """

    def lm_step(state: TrainState, batch, view, constants, *, axis_name=None):
        key, dropout_key = jax.random.split(state.key)
        drawn_S = None
        if softmax_items:
            warm_W = constants["warm_item_W"]
            draw_key = jax.random.fold_in(dropout_key, NO_ROW)
            drawn_S = warm_W[negatives.random_order(draw_key, len(warm_W), first=min(softmax_items, len(warm_W)))]

        def losses(params, batch):
            # A key a row: no number depends on how a batch is split over devices or parts.
            fold = jax.vmap(functools.partial(jax.random.fold_in, dropout_key))
            keys_B = fold(batch["row"]) if meeting.lm.dropout else None
            options = {"arm": arm, "meeting": meeting, "weights": weights, "keys_B": keys_B, "axis_name": axis_name}
            return lm_losses(params, batch, view, constants, drawn_S=drawn_S, skip_text=skip_text, **options)

        return update_state(
            state._replace(key=key), losses, batch, weights, optimizer, axis_name, rules=rules, parts=accumulate
        )

    return lm_step
