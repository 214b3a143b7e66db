"""An approximate index of a domain arm's items, of the extra `index` (faiss): one question reads a part of a catalogue.

The items are parted by k-means, and a question goes through the parts whose means score highest, in eight bits a number
(inverted file: Sivic and Zisserman 2003; scalar quantisation as in faiss). What is found is scored by its own row, so
that an answer may lack an item, but no score is wrong.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from bdlm_jax.serving import scores
from bdlm_jax.serving.artefact import Arm, ServedDomain
from bdlm_jax.types import Array, InputError

SEARCHED = 16  # of as many parts one is gone through, where nothing else is said
JUDGED = 200  # users on whom the recall is measured


def make_index(item_ID: np.ndarray, *, one_in: int = SEARCHED) -> Callable[[Array, int], np.ndarray]:
    """Parts the items and returns search(state_BD, n) -> (B, n) items of high inner product, -1 where it found fewer.

    There are about √I parts, of which `one_in` so many is gone through (ours).
    """
    try:
        import faiss
    except ModuleNotFoundError:
        raise InputError('faiss is missing: pip install "bdlm_jax[index]".') from None
    n_items, width = item_ID.shape
    n_parts = max(1, round(n_items**0.5))
    made = faiss.index_factory(width, f"IVF{n_parts},SQ8", faiss.METRIC_INNER_PRODUCT)
    made.cp.min_points_per_centroid = 1  # a small catalogue is no reason to warn
    rows_ID = np.ascontiguousarray(item_ID, np.float32)
    made.train(rows_ID)
    made.add(rows_ID)
    made.nprobe = -(-n_parts // one_in)
    return lambda state_BD, n: made.search(np.ascontiguousarray(state_BD, np.float32), min(n, n_items))[1]


def with_index(arm: Arm, *, one_in: int = SEARCHED) -> ServedDomain:
    """The same arm, which looks for its items by an index from now on.

    Raises:
      InputError: another kind of arm than a domain model with inner products, less than one part, no faiss.
    """
    if one_in < 1:
        raise InputError(f"--index is {one_in}; it goes through one of so many parts, which is at least 1.")
    if not isinstance(arm, ServedDomain) or not arm.dot:
        raise InputError("an index is of a domain model whose score is an inner product: ask one without --index.")
    return dataclasses.replace(arm, search=make_index(arm.items, one_in=one_in))


def measure_recall(arm: ServedDomain, *, k: int = 10) -> float:
    """The share of the k best items of some users that an arm with an index finds, what they have had included."""
    users = np.random.default_rng(0).permutation(len(arm.user_UD))[:JUDGED].tolist()
    nothing = [np.zeros(0, np.int64)] * len(users)
    exact = scores.best_items(dataclasses.replace(arm, search=None), nothing, users=users, k=k)
    found = scores.best_items(arm, nothing, users=users, k=k)
    return float(np.mean([np.isin(items, some).mean() for (items, _), (some, _) in zip(exact, found)]))


def describe_index(arm: ServedDomain) -> str:
    """One line for people."""
    return f"an approximate index of {len(arm.item_ID):,} items; of the 10 best it finds {measure_recall(arm):.1%}"
