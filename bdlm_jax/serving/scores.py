"""Scores of the served arms: for known users or new ones by history, and without a run's data.

Inner-product models need NumPy alone, microseconds a user; what needs JAX is imported where it is used.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from bdlm_jax.serving.artefact import Arm, ServedDomain, ServedLM
from bdlm_jax.types import Array

LARGE, FEW = 200_000, 2  # items from which a sieve is worth its bytes, and users for whom it is faster than one product
LM_ROWS = 16  # packed rows that go through a language model at once


def arm_scores(arm: Arm, histories: Sequence[Array], *, users: Sequence[int] | None = None) -> np.ndarray:
    """Scores the catalogue (B, I) for known users with their histories, or for new ones by history alone.

    Histories are item indices, oldest first.
    """
    score = lm_scores if isinstance(arm, ServedLM) else domain_scores
    return score(arm, histories, users=users)


def best_items(
    arm: Arm, histories: Sequence[Array], *, users: Sequence[int] | None = None, k: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(items, scores) of the k best that each user has not had, best first, ties in catalogue order; of `arm_scores`.

    An arm with an index scores what its index finds, and may lack an item. Of a large catalogue a user or two are
    answered through its sieve: the answer is the same, after a reading of a quarter of the bytes.
    """
    if isinstance(arm, ServedDomain) and arm.search:
        return _best_found(arm, arm.search, histories, users=users, k=k)
    if isinstance(arm, ServedDomain) and arm.dot and len(arm.item_ID) >= LARGE and len(histories) <= FEW:
        return _best_found(arm, arm.sieve, histories, users=users, k=k)
    scores_BI = arm_scores(arm, histories, users=users)
    best = [top_items(scores_I, seen=had, k=k) for scores_I, had in zip(scores_BI, histories)]
    return [(items, scores_I[items]) for items, scores_I in zip(best, scores_BI)]


def domain_scores(
    arm: ServedDomain, histories: Sequence[Array] = (), *, users: Sequence[int] | None = None
) -> np.ndarray:
    """`arm_scores` of a domain model, which needs no history of a known user."""
    state_BD = domain_states(arm, histories, users=users)
    if arm.dot:
        return state_BD @ arm.items.T
    return np.asarray(arm.rebuilt.score(arm.domain, state_BD, arm.item_ID), np.float32)


def domain_states(
    arm: ServedDomain, histories: Sequence[Array] = (), *, users: Sequence[int] | None = None
) -> np.ndarray:
    """Rows (B, D) of known users, or of new ones by history.

    A new user stands where one propagation over the finished item table puts a new node:
        e_new = 1/√|h| · Σ_{i in h} e_i / √(deg_i + 1).
    That is LightGCN's rule (He et al. 2020, equation 3) for a node whose own layer-0 row is unknown and zero, with the
    new edges counted in the degrees; that the finished rows stand in for those of each layer, and the same rule for MF
    and NCF, is ours. A model that reads histories (SASRec) reads the new one, as it does for everybody.
    """
    if users is not None:
        return arm.user_UD[np.asarray(users, np.int64)]
    read = _read_history if arm.reads_history else _propagate_to
    return np.stack([read(arm, np.asarray(history, np.int64)) for history in histories])


def lm_scores(arm: ServedLM, histories: Sequence[Array], *, users: Sequence[int] | None = None) -> np.ndarray:
    """`arm_scores` by the LM's states after the histories: logits restricted to the item tokens.

    The <uid> and context of a known user are shown where the run reads them.
    """
    known = itertools.repeat(None) if users is None else users
    states_BM = _read_states(arm, [_history_prompt(arm, h, user=user) for h, user in zip(histories, known)])
    scores_BI = states_BM @ arm.items.T
    if arm.texts is None:
        return scores_BI
    return scores_BI + np.stack([arm.texts.read(h) for h in histories]) @ np.asarray(arm.texts.content_IC).T


def lm_words(
    arm: ServedLM, history: Array, items: Array, *, user: int | None = None, seed: int = 0, **sampling: float
) -> list[str]:
    """Lets the LM write a text behind each item's token, where its training has the item's text.

    Where prompts hold titles, what is read is the history and then <iid>; where they hold none, <bos> <iid>, the card
    on which such a run learns what an <iid> is called. No special token is written; the text ends at <eos> or with as
    many tokens as the longest title has. `sampling`: temperature and top_p, as in `lm.generate.generate`.
    """
    import jax

    from bdlm_jax.lm import generate

    (params, id_rows_XM), vocabulary = arm.placed, arm.vocabulary
    max_new = max([1, *map(len, arm.titles)])
    prefix = np.array([vocabulary.bos], np.int32)
    if arm.prompts.kind == "ids_titles":
        # An item never follows a user token that ends a prompt.
        before = {"user_token": "none"} if arm.prompts.user_token == "end" else {}
        prefix = _history_prompt(arm, history, user=user, room=1 + max_new, **before).tokens
    marks = vocabulary.item_token(np.asarray(items, np.int32))
    tokens = np.concatenate([np.tile(prefix, (len(marks), 1)), marks[:, None]], axis=1)
    specials = set(vocabulary.tokenizer.all_special_ids) | {vocabulary.unnamed_user, vocabulary.unnamed_item}
    allowed_V = np.arange(arm.config.vocab_size) < len(vocabulary.tokenizer)
    allowed_V[list(specials - {vocabulary.eos})] = False
    written = generate.generate(
        params, arm.config, tokens, np.ones_like(tokens, bool), max_new=max_new, eos=vocabulary.eos,
        pad=vocabulary.pad, key=jax.random.key(seed), allowed_V=allowed_V, id_rows_XM=id_rows_XM, **sampling,
    )  # fmt: skip
    texts = (itertools.takewhile(vocabulary.eos.__ne__, row) for row in np.asarray(written).tolist())
    return [vocabulary.decode(list(text)).strip() for text in texts]


def top_items(scores_I: np.ndarray, *, seen: Array, k: int) -> np.ndarray:
    """Returns the k best items outside `seen` (fewer where fewer are left), best first; ties in catalogue order."""
    scores_I, seen = np.array(scores_I), np.unique(np.asarray(seen, np.int64))
    scores_I[seen] = -np.inf  # in place: of a large catalogue every copy costs as much as the choice
    k = min(k, len(scores_I) - len(seen))
    if k <= 0:
        return np.zeros(0, np.int64)
    least = np.partition(scores_I, -k)[-k]
    items = np.flatnonzero(scores_I >= least)
    if least == -np.inf:  # some that are open have no better score than the seen
        items = np.setdiff1d(items, seen)
    return items[np.argsort(-scores_I[items], kind="stable")][:k]


def _best_found(arm, search, histories, *, users, k):
    state_BD, had = domain_states(arm, histories, users=users), [np.unique(history) for history in histories]
    best = []
    for state_D, found, seen in zip(state_BD, search(state_BD, k + max(map(len, had))), had):
        items = np.setdiff1d(found, [*seen, -1])  # sorted: ties stay in catalogue order
        scores_n = arm.items[items] @ state_D
        first = np.argsort(-scores_n, kind="stable")[:k]
        best.append((items[first], scores_n[first]))
    return best


def _propagate_to(arm: ServedDomain, history: np.ndarray) -> np.ndarray:
    weight_n = 1 / np.sqrt(np.maximum(len(history), 1) * (arm.degree_I[history] + 1.0))
    return (weight_n.astype(np.float32)[:, None] * arm.item_ID[history]).sum(axis=0)


def _read_history(arm: ServedDomain, history: np.ndarray) -> np.ndarray:
    return np.asarray(arm.rebuilt.read(arm.domain, arm.item_ID, history), np.float32)


def _read_states(arm: ServedLM, prompts: list) -> np.ndarray:
    """The LM's states (B, M) at the last tokens of prompts, several of which share a row where they fit.

    Rows, their length and their places are padded to powers of two, so that few shapes are ever compiled.
    """
    from bdlm_jax.lm import packing

    ends = [dataclasses.replace(prompt, user=n, user_at=len(prompt) - 1) for n, prompt in enumerate(prompts)]
    length = min(arm.prompts.max_tokens, _power_of_two(max(map(len, prompts))))
    packed = packing.pack(ends, length, pad=arm.vocabulary.pad)
    state_BM, (params, id_rows_XM) = np.zeros((len(prompts), arm.config.width), np.float32), arm.placed
    for start in range(0, len(packed), LM_ROWS):
        block = packed.rows(np.arange(start, min(start + LM_ROWS, len(packed))))
        n_rows, n_places = block["user"].shape
        more = _power_of_two(n_rows) - n_rows, _power_of_two(n_places) - n_places
        rows = [np.pad(block[name], ((0, more[0]), (0, 0))) for name in ("tokens", "positions", "segments")]
        index_RT = np.pad(block["user_index"], ((0, more[0]), (0, more[1])))
        read_RTM = np.asarray(_reader()(params, arm.config, *rows, index_RT, id_rows_XM), np.float32)
        row, place = np.nonzero(block["user"] >= 0)
        state_BM[block["user"][row, place]] = read_RTM[row, place]
    return state_BM


@functools.cache
def _reader() -> Callable[..., Array]:
    """(params, config, tokens, positions, segments, places (R, T), id rows) -> states (R, T, M), compiled."""
    import jax

    from bdlm_jax.lm import causal_lm

    @functools.partial(jax.jit, static_argnames="config")
    def read(params, config, tokens_RL, positions_RL, segments_RL, index_RT, id_rows_XM):
        hidden_RLM = causal_lm.lm_hidden(params, config, tokens_RL, positions_RL, segments_RL, id_rows_XM)
        return causal_lm.gather_positions(hidden_RLM, index_RT)

    return read


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _history_prompt(arm: ServedLM, history: Array, *, user: int | None, room: int = 0, **changes):
    """The prompt behind which a user's state is read, or one that leaves room for what follows on the history."""
    from bdlm_jax.lm import prompts

    context = arm.contexts[user] if arm.contexts and user is not None and arm.prompts.kind != "ids" else None
    max_tokens = arm.prompts.max_tokens
    options = dataclasses.replace(arm.prompts, max_tokens=max_tokens - min(room, max_tokens // 2), **changes)
    return prompts.history_prompt(
        arm.vocabulary, history, options, titles=arm.titles, user=user, context=context, read_user=True
    )
