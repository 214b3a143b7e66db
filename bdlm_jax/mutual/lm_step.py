"""The LM arm: its losses and its pure step."""

import dataclasses

import jax
import jax.numpy as jnp

from bdlm_jax.domain.arm import DomainArm
from bdlm_jax.lm import causal_lm, lora
from bdlm_jax.lm.causal_lm import gather_positions
from bdlm_jax.mutual import sharing
from bdlm_jax.mutual.losses import NEVER, align_loss, catalogue_loss, kl_loss, table_scale, text_cross_entropy
from bdlm_jax.mutual.optimizer import update_state
from bdlm_jax.mutual.options import Bridge, LMWeights
from bdlm_jax.types import Array, Params, TrainState

TEXT_CHUNK = 1024  # text targets whose logits are held at a time


def id_rows(params: Params, *, bridge: Bridge, arm: DomainArm) -> tuple[Array, Array]:
    """Returns the LM's extended rows (X, M) and its output rows of the items (I, M), both from the shared tables."""
    user_UD, item_ID = sharing.read_tables(params["shared"], params["domain"], encode=arm.encode, reads=bridge.reads)
    maps = params["lm"]["bridge"]
    rows_XM = sharing.id_rows(maps, user_UD, item_ID)
    rows_IM = rows_XM[user_UD.shape[0] :]
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
        scale = table_scale(view["item"])
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
            scale = table_scale(view["user"])
            terms["align_user"] = align_loss(
                z_ND / scale, e_ND / scale, known_N, kind=bridge.align, axis_name=axis_name
            )
        if weights.kl:
            allowed_NI = constants["warm_I"] & ~constants["seen_UI"][user_N]
            teacher_NI = jnp.where(allowed_NI, arm.score(view.get("domain", {}), e_ND, view["item"]), NEVER)
            student_NI = jnp.where(allowed_NI, state_NM @ rows_IM.T, NEVER)
            terms["kl"] = kl_loss(student_NI, teacher_NI, known_N, temperature=bridge.temperature)
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

        return update_state(
            state._replace(key=key), losses, batch, dataclasses.asdict(weights), optimizer, axis_name,
            rules=rules, parts=accumulate,
        )  # fmt: skip

    return lm_step


def _flat(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])
