"""One evaluator for every model: scores → better/equal counts → metrics, chunked so that memory stays bounded.

A model is a function from user indices to scores, either of the whole catalogue or of given candidates. What is stored
per case are two integers, from which every metric follows. Ties count against the model; a NaN loses too.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from bdlm_jax.data import twins
from bdlm_jax.data.candidates import Candidates
from bdlm_jax.data.splits import seen_mask
from bdlm_jax.evaluation.metrics import METRICS, case_metric, count_better, count_catalogue
from bdlm_jax.runtime.files import replacing
from bdlm_jax.types import Array, InputError, LeakError

MOST_AT_ONCE = 2**26  # scores that lie in memory together: a chunk has fewer users where the catalogue is large


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

    counted_3N = np.zeros((3, len(candidates)), np.int32)
    for rows in progress(_chunks(np.arange(len(candidates)), chunk)):
        user_B, items_BC = candidates.user_N[rows], candidates.items_NC[rows]
        if isinstance(scorer, CatalogueScorer):
            scores_BC = jnp.take_along_axis(scorer.score(user_B), jnp.maximum(items_BC, 0), axis=1)
        else:
            scores_BC = scorer.score(user_B, items_BC)
        counts_BC = items_BC[:, 1:] >= 0
        counted_3N[:2, rows] = np.stack(count_better(scores_BC[:, 1:], scores_BC[:, :1], counts_BC))
        counted_3N[2, rows] = counts_BC.sum(1)
    return Counts(candidates.user_N, candidates.items_NC[:, 0], *counted_3N)


def evaluate_full(
    scorer: CatalogueScorer, user_N: Array, target_N: Array, seen, *, chunk: int = 512, progress: Callable = iter
) -> Counts:
    """Counts who beats the target among the whole catalogue less what the user has seen.

    Each user is scored once, for all of their cases; memory is about chunk × I floats, whatever the number of users.
    `seen` is (indptr (U+1,), item) of the histories known at that time; a target among them raises LeakError.
    """
    user_N, target_N = np.asarray(user_N), np.asarray(target_N)
    order_N = np.argsort(user_N, kind="stable")
    user_S, n_S = np.unique(user_N, return_counts=True)
    first_S = np.cumsum(n_S) - n_S
    counted_3N = np.zeros((3, len(user_N)), np.int32)
    by_cases_S = np.argsort(n_S, kind="stable")  # those of a chunk have about as many
    for rows in progress(_chunks(by_cases_S, chunk)):
        # A power of two, for few compilations; a user with fewer cases repeats the last.
        width = 1 << int(n_S[rows].max() - 1).bit_length()
        case_BT = order_N[first_S[rows, None] + np.minimum(np.arange(width), n_S[rows, None] - 1)]
        scores_BI, item_BT = scorer.score(user_S[rows]), target_N[case_BT]
        closed_BI = seen_mask(seen, user_S[rows], scores_BI.shape[1])
        if (leak_BT := np.take_along_axis(closed_BI, item_BT, axis=1)).any():
            case = case_BT[leak_BT].min()
            known = "whose known history holds it already"
            raise LeakError(f"item {target_N[case]} is to be found for user {user_N[case]}, {known}.")
        counted_3N[:, case_BT] = np.stack(count_catalogue(scores_BI, closed_BI, item_BT))
    return Counts(user_N, target_N, *counted_3N)


def chunk_users(most: int, n_items: int) -> int:
    """How many users are scored at once: `most`, or fewer so that their scores stay below `MOST_AT_ONCE`."""
    return min(most, max(1, MOST_AT_ONCE // n_items))


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


def ceilings(world: twins.World, part: int, candidates: Iterable[Candidates]) -> list[dict]:
    """Evaluates every oracle of the twins world on candidate sets of a part, by slice."""
    slices, rows = {"all": np.ones(len(world.twin_of_I), bool), **world.item_slices}, []
    for sees, one in itertools.product(twins.ORACLES, candidates):
        c = evaluate_candidates(_oracle_scorer(world, part, sees), one)
        for name, items_I in slices.items():
            if (where := items_I[c.target]).any():
                row = {"oracle": sees, "slice": name, "protocol": one.name, "users": int(where.sum())}
                counts = c.better[where], c.equal[where], c.others[where]
                rows.append(row | {metric: float(case_metric(metric, *counts).mean()) for metric in ("hr@1", "auc")})
    return rows


def _oracle_scorer(world: twins.World, part: int, sees: str) -> CandidateScorer:
    (user_N, _), scores_NI = world.split.cases(part), twins.oracle_scores(world, part, sees)
    row_of_U = np.zeros(world.split.interactions.n_users, np.int64)
    row_of_U[user_N] = np.arange(len(user_N))
    return CandidateScorer(lambda user_B, items_BC: scores_NI[row_of_U[user_B][:, None], items_BC])


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
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = dict.fromkeys(name.split("/")[0] for name in arrays.files)
            return {name: Counts(**{field: arrays[f"{name}/{field}"] for field in Counts._fields}) for name in names}
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen kinds
        why = " ".join(str(error).split())
        raise InputError(f"{path} is damaged ({why}); the same command of bdlm_jax.main counts anew.") from error


def _chunks(rows_N: np.ndarray, size: int) -> list[np.ndarray]:
    """Cuts rows into chunks of one size, for one compilation: the last repeats its final row."""
    n = len(rows_N)
    size = min(size, max(n, 1))
    return [rows_N[np.minimum(np.arange(start, start + size), n - 1)] for start in range(0, n, size)]
