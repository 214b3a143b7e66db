"""The guards against leaks: what a stage is really handed must have been known before the part that is predicted.

They look at edges, prompts and negatives as they go into a model, whatever was asked for, and raise LeakError.
"""

from collections.abc import Sequence

import jax
import numpy as np

from bdlm_jax.data.splits import TRAIN, Split, check_training_edges, within
from bdlm_jax.domain import negatives
from bdlm_jax.lm.prompts import Prompt
from bdlm_jax.lm.vocabulary import Vocabulary
from bdlm_jax.run.ranked import PARTS
from bdlm_jax.types import LeakError, Params

_DRAWN = 2**16  # negatives that are looked at before a stage


def check_known(split: Split, user: np.ndarray, item: np.ndarray, *, part: str) -> None:
    """Refuses user-item pairs that were no interaction before the part that is to be predicted."""
    pair = np.asarray(user, np.int64) * split.interactions.n_items + item
    strange = ~within(pair, split.pairs(*range(PARTS[part])))
    if strange.any():
        at = int(np.argmax(strange))
        first = f"the first item {item[at]} of user {user[at]}"
        raise LeakError(f"prompts hold {strange.sum()} items that are not known before {part}, {first}.")


def check_prompts(
    split: Split, vocabulary: Vocabulary, user_N: Sequence[int], prompts: Sequence[Prompt], *, part: str
) -> None:
    """Refuses prompts that show, or ask for, what their user has not had before the part that is to be predicted."""
    held = [np.append(vocabulary.items_of(p.tokens), p.item_targets[p.item_targets >= 0]) for p in prompts]
    check_known(split, np.repeat(user_N, [len(items) for items in held]), np.concatenate(held), part=part)


def check_epoch(split: Split, constants: Params) -> None:
    """Refuses what a domain epoch learns from, unless its pairs are training's and its negatives are not."""
    user_E, item_E = np.asarray(constants["edge_user_E"]), np.asarray(constants["edge_item_E"])
    check_training_edges(split, user_E, item_E)
    if "window_WL" in constants:
        window_WL = np.asarray(constants["window_WL"])
        degree_I = np.bincount(window_WL[window_WL >= 0], minlength=split.interactions.n_items)
        if (wrong := np.flatnonzero(degree_I != split.degree(TRAIN))).size:
            raise LeakError(
                f"the windows hold item {wrong[0]} more or less often than training, {wrong.size} items do."
            )
    seen, warm_W, n_items = constants["seen"], np.asarray(constants["warm_item_W"]), split.interactions.n_items
    known, indptr = split.pairs(TRAIN), np.asarray(seen.indptr, np.int64)
    table = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr)) * n_items + warm_W[seen.item]
    if not np.array_equal(table, known):
        wrong = len(np.setxor1d(table, known))
        raise LeakError(f"the table that negatives are drawn past differs from the training pairs in {wrong} of them.")
    # The table may be right and the way it is read wrong, so the very draw is looked at too.
    user_B = user_E[:: -(-len(user_E) // _DRAWN)]
    draw = jax.jit(negatives.sample_negatives)
    rank_B = draw(jax.random.key(0), seen, user_B, constants.get("popularity"))
    hits = within(user_B.astype(np.int64) * n_items + warm_W[rank_B], known)
    if hits.any():
        raise LeakError(f"{hits.sum()} of {len(hits)} drawn negatives are training interactions of their user.")
