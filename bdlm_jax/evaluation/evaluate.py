"""One evaluator for every model: scores → better/equal counts → metrics, chunked so that memory stays bounded.

A model is a function from user indices to scores, either of the whole catalogue or of given candidates. What is stored
per case are two integers, from which every metric follows. Ties count against the model; a NaN loses too.
"""

import itertools
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from bdlm_jax.data.candidates import Candidates
from bdlm_jax.data.splits import seen_mask
from bdlm_jax.evaluation.metrics import METRICS, case_metric, count_better
from bdlm_jax.runtime.files import replacing
from bdlm_jax.types import Array, LeakError


class Counts(NamedTuple):
    """Per case (N,): the user, the target item, candidates above it, level with it, and all others there were."""

    user: np.ndarray
    target: np.ndarray
    better: np.ndarray
    equal: np.ndarray
    others: np.ndarray


class CatalogueScorer(NamedTuple):
    """Scores all items: score(user_B) -> (B, I)."""

    score: Callable[[np.ndarray], Array]


class CandidateScorer(NamedTuple):
    """Scores given items only: score(user_B, items_BC) -> (B, C); -1 in items is padding. It has no `full` protocol."""

    score: Callable[[np.ndarray, np.ndarray], Array]


def evaluate_candidates(
    scorer: CatalogueScorer | CandidateScorer, candidates: Candidates, *, chunk: int = 512, progress: Callable = iter
) -> Counts:
    """Counts, for each case of a frozen candidate file, who beats the target (column 0).

    Memory is about chunk × I floats; `progress` wraps the list of chunks.
    """

    def compare(rows):
        user_B, items_BC = candidates.user_N[rows], candidates.items_NC[rows]
        if isinstance(scorer, CatalogueScorer):
            scores_BC = jnp.take_along_axis(scorer.score(user_B), jnp.maximum(items_BC, 0), axis=1)
        else:
            scores_BC = scorer.score(user_B, items_BC)
        return scores_BC[:, 1:], scores_BC[:, :1], items_BC[:, 1:] >= 0

    return _count_cases(candidates.user_N, candidates.items_NC[:, 0], compare, chunk, progress)


def evaluate_full(
    scorer: CatalogueScorer, user_N: Array, target_N: Array, seen, *, chunk: int = 512, progress: Callable = iter
) -> Counts:
    """Counts who beats the target among the whole catalogue less what the user has seen.

    `seen` is (indptr (U+1,), item) of the histories known at that time; a target among them raises LeakError.
    """

    def compare(rows):
        user_B, target_B, case_B = user_N[rows], target_N[rows], np.arange(len(rows))
        scores_BI = scorer.score(user_B)
        closed_BI = seen_mask(seen, user_B, scores_BI.shape[1])
        if (leak_B := closed_BI[case_B, target_B]).any():
            user, item = user_B[leak_B][0], target_B[leak_B][0]
            raise LeakError(f"item {item} is to be found for user {user}, whose known history holds it already.")
        closed_BI[case_B, target_B] = True
        return scores_BI, jnp.take_along_axis(scores_BI, target_B[:, None], axis=1), ~closed_BI

    return _count_cases(user_N, target_N, compare, chunk, progress)


def result_rows(model: str, counts: Mapping[str, Counts], slices: Mapping[str, np.ndarray]) -> list[dict]:
    """Turns {protocol: Counts} into the rows of results.json; a slice (I,) of the targets without a case has none."""
    rows = []
    for (protocol, c), (name, items_I) in itertools.product(counts.items(), slices.items()):
        where = items_I[c.target]
        for metric in METRICS if where.any() else ():
            values = case_metric(metric, c.better[where], c.equal[where], c.others[where])
            row = {"metric": f"{metric}/{protocol}", "value": float(values.mean()), "users": int(where.sum())}
            rows.append({"model": model, "slice": name, **row})
    return rows


def mean_metric(counts: Counts, metric: str) -> float:
    return float(case_metric(metric, counts.better, counts.equal, counts.others).mean())


def save_counts(path: str | os.PathLike, counts: Mapping[str, Counts]) -> None:
    """Writes the counts of every protocol to one npz."""
    arrays = {f"{name}/{field}": value for name, c in counts.items() for field, value in c._asdict().items()}
    save_arrays(path, arrays)


def save_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes one compressed npz, whole or not at all."""
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, **arrays)


def load_counts(path: str | os.PathLike) -> dict[str, Counts]:
    """Reads what `save_counts` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        names = dict.fromkeys(name.split("/")[0] for name in arrays.files)
        return {name: Counts(**{field: arrays[f"{name}/{field}"] for field in Counts._fields}) for name in names}


def _count_cases(user_N, target_N, compare, chunk: int, progress: Callable) -> Counts:
    """Counts in chunks of cases; compare(rows) gives (scores_BC, target_B1, counts_BC)."""
    n = len(user_N)
    size = min(chunk, max(n, 1))
    # All chunks have one size, for one compilation: the last repeats its final case, which is cut off afterwards.
    chunks = [np.minimum(np.arange(start, start + size), n - 1) for start in range(0, n, size)]
    parts = [np.zeros((3, 0), np.int32)]
    for rows in progress(chunks):
        scores_BC, target_B1, counts_BC = compare(rows)
        better_B, equal_B = count_better(scores_BC, target_B1, counts_BC)
        parts.append(np.stack([better_B, equal_B, counts_BC.sum(1, dtype=np.int32)]))
    return Counts(user_N, target_N, *np.concatenate(parts, axis=1)[:, :n])
