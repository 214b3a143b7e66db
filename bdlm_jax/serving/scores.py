"""Scores of the served arms: for a known user or a new one by history, one at a time and without a run's data.

Inner-product models need NumPy alone, microseconds a user; what needs JAX is imported where it is used.
"""

import dataclasses
import itertools

import numpy as np

from bdlm_jax.serving.artefact import ServedDomain, ServedLM
from bdlm_jax.types import Array


def domain_scores(arm: ServedDomain, *, user: int | None = None, history: Array | None = None) -> np.ndarray:
    """Scores the catalogue (I,) for a known user, or for a new one by history (item indices, oldest first).

    A new user stands where one propagation over the finished item table puts a new node:
        e_new = 1/√|h| · Σ_{i in h} e_i / √(deg_i + 1).
    That is LightGCN's rule (He et al. 2020, equation 3) for a node whose own layer-0 row is unknown and zero, with the
    new edges counted in the degrees; that the finished rows stand in for those of each layer, and the same rule for MF
    and NCF, is ours. A model that reads histories (SASRec) reads the new one, as it does for everybody.
    """
    if user is not None:
        state_D = arm.user_UD[user]
    else:
        history = np.asarray(history, np.int64)
        if arm.reads_history:
            state_D = np.asarray(arm.rebuilt.read(arm.domain, arm.item_ID, history), np.float32)
        else:
            weight_n = 1 / np.sqrt(np.maximum(len(history), 1) * (arm.degree_I[history] + 1.0))
            state_D = (weight_n.astype(np.float32)[:, None] * arm.item_ID[history]).sum(axis=0)
    if arm.dot:
        return arm.item_ID @ state_D
    return np.asarray(arm.rebuilt.score(arm.domain, state_D[None], arm.item_ID)[0], np.float32)


def lm_scores(arm: ServedLM, history: Array, *, user: int | None = None) -> np.ndarray:
    """Scores the catalogue (I,) by the LM's state after the history: logits restricted to the item tokens.

    The <uid> and context of a known user are shown where the run reads them.
    """
    import jax

    from bdlm_jax.lm import causal_lm, packing

    prompt = _history_prompt(arm, history, user=user)
    packed = packing.pack([prompt], arm.prompts.max_tokens, pad=arm.vocabulary.pad).rows(np.zeros(1, np.int64))
    rows = (packed["tokens"], packed["positions"], packed["segments"])
    hidden = jax.jit(causal_lm.lm_hidden, static_argnames="config")
    state_M = np.asarray(hidden(arm.params, arm.config, *rows, arm.id_rows_XM)[0, len(prompt) - 1], np.float32)
    first = arm.vocabulary.item_tokens.start - arm.vocabulary.n_text
    scores_I = arm.id_rows_XM[first : first + len(arm.titles)] @ state_M
    return scores_I if arm.texts is None else scores_I + arm.texts.content_IC @ arm.texts.read(history)


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

    vocabulary, max_new = arm.vocabulary, max([1, *map(len, arm.titles)])
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
        arm.params, arm.config, tokens, np.ones_like(tokens, bool), max_new=max_new, eos=vocabulary.eos,
        pad=vocabulary.pad, key=jax.random.key(seed), allowed_V=allowed_V, id_rows_XM=arm.id_rows_XM, **sampling,
    )  # fmt: skip
    texts = (itertools.takewhile(vocabulary.eos.__ne__, row) for row in np.asarray(written).tolist())
    return [vocabulary.decode(list(text)).strip() for text in texts]


def top_items(scores_I: np.ndarray, *, seen: Array, k: int) -> np.ndarray:
    """Returns the k best items outside `seen` (fewer where fewer are left), best first; ties in catalogue order."""
    scores_I = np.array(scores_I, np.float64)
    open_I = np.ones(len(scores_I), bool)
    open_I[np.asarray(seen, np.int64)] = False
    items = np.flatnonzero(open_I)
    if k < len(items):  # a partition is linear, and a catalogue large
        least = np.partition(scores_I[items], -k)[-k]
        items = items[scores_I[items] >= least]
    return items[np.argsort(-scores_I[items], kind="stable")][:k]


def _history_prompt(arm: ServedLM, history: Array, *, user: int | None, room: int = 0, **changes):
    """The prompt behind which a user's state is read, or one that leaves room for what follows on the history."""
    from bdlm_jax.lm import prompts

    context = arm.contexts[user] if arm.contexts and user is not None and arm.prompts.kind != "ids" else None
    max_tokens = arm.prompts.max_tokens
    options = dataclasses.replace(arm.prompts, max_tokens=max_tokens - min(room, max_tokens // 2), **changes)
    return prompts.history_prompt(
        arm.vocabulary, history, options, titles=arm.titles, user=user, context=context, read_user=True
    )
