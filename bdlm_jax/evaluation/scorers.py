"""From trained parameters to scores: how each model of a run ranks items for users.

The LM arm reads every user once and scores the whole catalogue from that one state (restricted logits); the domain arm
encodes once and takes inner products; the text-only LM weighs candidates by the likelihood of their titles.
What is compiled stands here once, with the model as an argument: a later validation finds it compiled.
"""

from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import csr_matrix, issparse

from bdlm_jax.domain.arm import DomainArm, dot_score
from bdlm_jax.evaluation.evaluate import CandidateScorer, CatalogueScorer
from bdlm_jax.lm import causal_lm
from bdlm_jax.lm.packing import Packed
from bdlm_jax.mutual import sharing
from bdlm_jax.mutual.options import Meeting
from bdlm_jax.runtime import sharding
from bdlm_jax.runtime.log import progress
from bdlm_jax.types import Array, Params

# Neighbours in a ranking differ by less than an accelerator's default rounding (TF32, bfloat16).
_exact = jax.default_matmul_precision("highest")


def popularity_scorer(degree_I: np.ndarray) -> CatalogueScorer:
    """Scores every item by its number of interactions, the same for all users."""
    scores_I = jnp.asarray(degree_I, jnp.float32)
    return CatalogueScorer(lambda user_B: jnp.broadcast_to(scores_I, (len(user_B), len(scores_I))))


def closed_form_scorer(matrix_UI: csr_matrix, weights_II: np.ndarray | csr_matrix) -> CatalogueScorer:
    """Scores items by x_u·W, the rows in W of what a user is known to have had, summed; W of `domain.closed_form`."""

    def score(user_B: np.ndarray) -> Array:
        scores_BI = matrix_UI[user_B] @ weights_II
        return jnp.asarray(scores_BI.toarray() if issparse(scores_BI) else scores_BI, jnp.float32)

    return CatalogueScorer(score)


def domain_scorer(arm: DomainArm, params: Params) -> CatalogueScorer:
    """Scores items by the domain arm; the propagation runs once, here."""
    return _pair_scorer(domain_view(arm, params), arm.score)


def state_scorer(state_UM: Array, rows_IM: Array) -> CatalogueScorer:
    """Scores items by h_u · row_i, the LM's logits restricted to the item tokens."""
    return _pair_scorer({"user": jnp.asarray(state_UM), "item": jnp.asarray(rows_IM)}, dot_score)


def pool_scorer(first: CatalogueScorer, second: CatalogueScorer, weight: float) -> CatalogueScorer:
    """Scores items by z(first) + weight·z(second), z a user's scores less their mean over their deviation (ours)."""

    def standard(scores_BI):
        spread_B1 = jnp.std(scores_BI, axis=1, keepdims=True)
        return (scores_BI - jnp.mean(scores_BI, axis=1, keepdims=True)) / jnp.maximum(spread_B1, 1e-12)

    return CatalogueScorer(lambda user_B: standard(first.score(user_B)) + weight * standard(second.score(user_B)))


def text_scorer(
    params: Params,
    config: causal_lm.LMConfig,
    prefixes,
    continuations,
    *,
    users_at_once: int = 16,
    heed: Callable[[Iterable], Iterable] = iter,
) -> CandidateScorer:
    """Scores candidates by Σ log p(title tokens, <eos> | the user's last titles), InstructRec-like and without ids.

    Equal titles get the equal score to the bit: each row computes a title once and copies it. `params` has the adapters
    too; prefixes (U, P) and continuations (I, T) are tokens and mask; memory grows with `users_at_once`. `heed` goes
    along with the batches, and may raise.
    """
    (prefix_UP, prefix_mask_UP), (title_IT, title_mask_IT) = prefixes, continuations
    _, same_I = np.unique(np.where(title_mask_IT, title_IT, -1), axis=0, return_inverse=True)
    same_I = same_I.reshape(-1)

    def score(user_B: np.ndarray, items_BC: np.ndarray) -> Array:
        parts = []
        for start in heed(range(0, len(user_B), users_at_once)):
            rows = np.minimum(np.arange(start, start + users_at_once), len(user_B) - 1)
            users, items = user_B[rows], np.maximum(items_BC[rows], 0)
            arrays = prefix_UP[users], prefix_mask_UP[users], title_IT[items], title_mask_IT[items]
            title_BC = same_I[items]
            first_BC = np.argmax(title_BC[:, :, None] == title_BC[:, None, :], axis=2)
            parts.append(np.take_along_axis(np.asarray(_title_likelihood(params, config, *arrays)), first_BC, axis=1))
        return jnp.asarray(np.concatenate(parts)[: len(user_B)])

    return CandidateScorer(score)


def read_states(
    params: Params,
    packed: Packed,
    *,
    arm: DomainArm,
    meeting: Meeting,
    n_users: int,
    n_items: int,
    batch_rows: int = 64,
    heed: Callable[[Iterable], Iterable] = iter,
) -> dict[str, np.ndarray]:
    """Runs the LM over prompts and collects the states where users (U, M) and items (I, M) are read, else zero.

    `heed` goes along with the batches, and may raise.
    """
    params = _near(params)
    rows_XM, rows_IM = _id_rows(params, meeting=meeting, arm=arm)
    state_UM = np.zeros((n_users, meeting.lm.width), np.float32)
    state_IM = np.zeros((n_items, meeting.lm.width), np.float32)
    batch_rows = min(batch_rows, max(len(packed), 1))
    for start in heed(progress(range(0, len(packed), batch_rows), description="reading states")):
        batch = packed.rows(np.minimum(np.arange(start, start + batch_rows), len(packed) - 1))
        placed = sharding.spread_rows(batch, params["lm"]["embedding"])
        user_BTM, card_BTM = _read(params["lm"], placed, rows_XM, config=meeting.lm)
        for target, states, out in (("user", user_BTM, state_UM), ("card_item", card_BTM, state_IM)):
            where = batch[target] >= 0
            out[batch[target][where]] = np.asarray(states, np.float32)[where]
    return {"user": state_UM, "item": state_IM, "rows_item": np.asarray(rows_IM, np.float32)}


def lm_view(params: Params, states: dict[str, np.ndarray], cards: dict[str, np.ndarray] | None) -> Params:
    """What the domain arm learns from: the LM's user states and item rows, and both read in the sharing width."""
    bridge = params["lm"]["bridge"]
    view = {"state_user": states["user"], "rows_item": states["rows_item"]}
    view["z_user"] = sharing.bridge_out(bridge, states["user"])
    return view if cards is None else view | {"z_item": sharing.bridge_out(bridge, cards["item"])}


def domain_view(arm: DomainArm, params: Params) -> Params:
    """What the LM arm learns from: the domain arm's representations."""
    params = _near(params)
    user_UD, item_ID = _encode(params["shared"], params["domain"], arm=arm)
    view = {"user": user_UD, "item": item_ID}
    return view | ({"domain": params["domain"]} if params["domain"] else {})


def _near(params: Params) -> Params:
    """Tables that a mesh holds in parts, whole: they are small, and what scores with them runs on one device."""
    return params | sharding.gather_spread({name: params[name] for name in ("shared", "domain")})


def _pair_scorer(view: Params, score) -> CatalogueScorer:
    return CatalogueScorer(lambda user_B: _pair_scores(view, user_B, score=score))


@partial(jax.jit, static_argnames="score")
@_exact
def _pair_scores(view, user_B, *, score):
    return score(view.get("domain", {}), view["user"][user_B], view["item"])


@partial(jax.jit, static_argnames="arm")
@_exact
def _encode(shared, domain, *, arm: DomainArm):
    return arm.encode(shared, domain)


_id_rows = partial(jax.jit, static_argnames=("meeting", "arm"))(_exact(sharing.id_rows))
_title_likelihood = partial(jax.jit, static_argnums=1)(causal_lm.continuation_log_likelihood)


@partial(jax.jit, static_argnames="config")
def _read(lm, batch, rows_XM, *, config: causal_lm.LMConfig):
    hidden_BLM = causal_lm.lm_hidden(lm, config, batch["tokens"], batch["positions"], batch["segments"], rows_XM)
    return tuple(causal_lm.gather_positions(hidden_BLM, batch[name]) for name in ("user_index", "card_index"))
