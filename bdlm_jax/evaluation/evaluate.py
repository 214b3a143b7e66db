"""One evaluator for every model: scores → better/equal counts → metrics, chunked so that memory stays bounded.

A model is a function from user indices to scores, either of the whole catalogue or of given candidates. What is stored
per case are two integers, from which every metric follows. Ties count against the model; a NaN loses too.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdlm_jax.data.candidates import Candidates
from bdlm_jax.data.splits import seen_mask
from bdlm_jax.evaluation.metrics import case_metric, count_better, top_k_metrics
from bdlm_jax.types import Array

PROTOCOL_METRICS = ("hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr", "auc")


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
    scorer: CatalogueScorer | CandidateScorer, candidates: Candidates, *, chunk: int = 512, progress=lambda x, **_: x
) -> Counts:
    """Counts, for each case of a frozen candidate file, who beats the target (column 0).

    Args:
      scorer: the model.
      candidates: (N, C) item indices, -1 pads.
      chunk: cases scored at once; peak memory is about chunk × I floats.
      progress: wraps the list of chunks, e.g. `runtime.progress.progress`.

    Returns:
      Counts over the N cases.
    """
    better, equal = [], []
    for rows in progress(_chunks(len(candidates.user_N), chunk)):
        user_B, items_BC = candidates.user_N[rows], candidates.items_NC[rows]
        if isinstance(scorer, CatalogueScorer):
            scores_BC = jnp.take_along_axis(scorer.score(user_B), jnp.maximum(items_BC, 0), axis=1)
        else:
            scores_BC = scorer.score(user_B, items_BC)
        b, e = _count(scores_BC[:, 1:], scores_BC[:, :1], items_BC[:, 1:] >= 0)
        better.append(np.asarray(b))
        equal.append(np.asarray(e))
    others = np.sum(candidates.items_NC[:, 1:] >= 0, axis=1, dtype=np.int32)
    return _counts(candidates.user_N, candidates.items_NC[:, 0], better, equal, others, len(candidates.user_N))


def evaluate_full(
    scorer: CatalogueScorer,
    user_N: np.ndarray,
    target_N: np.ndarray,
    seen,
    *,
    chunk: int = 512,
    progress=lambda x, **_: x,
) -> Counts:
    """Counts who beats the target among the whole catalogue less what the user has seen.

    Args:
      scorer: the model.
      user_N: (N,) user of each case.
      target_N: (N,) its held-out item.
      seen: (indptr (U+1,), item) of the histories known at that time; a target among them is a leak.
      chunk: cases scored at once.
      progress: wraps the list of chunks.

    Returns:
      Counts over the N cases.
    """
    better, equal, others = [], [], []
    for rows in progress(_chunks(len(user_N), chunk)):
        scores_BI = scorer.score(user_N[rows])
        open_BI = ~seen_mask(seen, user_N[rows], scores_BI.shape[1])
        at = np.arange(len(open_BI)), target_N[rows]
        open_BI[at] = False
        b, e = _count(scores_BI, jnp.take_along_axis(scores_BI, target_N[rows][:, None], axis=1), open_BI)
        better.append(np.asarray(b))
        equal.append(np.asarray(e))
        others.append(open_BI.sum(1, dtype=np.int32))
    others = np.concatenate(others)[: len(user_N)] if len(user_N) else np.zeros(0, np.int32)
    return _counts(user_N, target_N, better, equal, others, len(user_N))


def evaluate_top_k(scorer: CatalogueScorer, split, part: int, *known_parts: int, k: int = 20, chunk: int = 512) -> dict:
    """Computes the LightGCN paper's full-ranking protocol: several targets a user, known items masked.

    Args:
      scorer: the model.
      split: a `data.splits.Split`.
      part: the held-out part.
      *known_parts: the parts whose items are masked.
      k: the cut.

    Returns:
      {"recall@k", "ndcg@k", "hr@k"}: (N,) values over the users that have held-out items.
    """
    indptr, item = split.histories(part)
    users = np.flatnonzero(np.diff(indptr))
    seen, tops = split.histories(*known_parts), []
    for rows in _chunks(len(users), chunk):
        scores_BI = scorer.score(users[rows])
        closed_BI = seen_mask(seen, users[rows], scores_BI.shape[1])
        tops.append(np.asarray(_top_k(scores_BI, closed_BI, k)))
    top_NK = np.concatenate(tops)[: len(users)]
    return top_k_metrics(top_NK, [item[indptr[u] : indptr[u + 1]] for u in users], k=k)


def result_rows(
    model: str, counts: Mapping[str, Counts], slices: Mapping[str, np.ndarray], metrics=PROTOCOL_METRICS
) -> list[dict]:
    """Turns counts into the rows of results.json.

    Args:
      model: its name.
      counts: {protocol: Counts}.
      slices: {slice: (I,) bool over target items}; a slice without a case gives no row.
      metrics: names that `metrics.case_metric` knows.

    Returns:
      [{"model", "slice", "metric": "hr@1/cand100", "value", "users"}].
    """
    rows = []
    for protocol, c in counts.items():
        for name, items_I in slices.items():
            where = items_I[c.target]
            if not where.any():
                continue
            for metric in metrics:
                values = case_metric(metric, c.better[where], c.equal[where], c.others[where])
                rows.append(
                    {
                        "model": model,
                        "slice": name,
                        "metric": f"{metric}/{protocol}",
                        "value": float(values.mean()),
                        "users": int(where.sum()),
                    }
                )
    return rows


def save_counts(path: str | os.PathLike, counts: Mapping[str, Counts]) -> None:
    """Writes the counts of every protocol to one npz; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        np.savez_compressed(
            file, **{f"{name}/{field}": value for name, c in counts.items() for field, value in c._asdict().items()}
        )
    os.replace(partial, path)


def load_counts(path: str | os.PathLike) -> dict[str, Counts]:
    """Reads what `save_counts` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        names = dict.fromkeys(name.split("/")[0] for name in arrays.files)
        return {name: Counts(**{field: arrays[f"{name}/{field}"] for field in Counts._fields}) for name in names}


def mean_metric(counts: Counts, metric: str) -> float:
    """Returns the mean of one metric over all cases."""
    return float(case_metric(metric, counts.better, counts.equal, counts.others).mean())


@jax.jit
def _count(scores_BC, target_B1, counts_BC):
    return count_better(scores_BC, target_B1, counts_BC)


@jax.jit
def _mask(scores_BI, closed_BI):
    return jnp.where(closed_BI, -jnp.inf, scores_BI)


def _top_k(scores_BI, closed_BI, k: int):
    return jax.lax.top_k(_mask(scores_BI, closed_BI), k)[1]


def _chunks(n: int, size: int) -> list[np.ndarray]:
    """Index chunks of one fixed size (one compilation); the last repeats its final case and is cut off afterwards."""
    size = min(size, max(n, 1))
    return [np.minimum(np.arange(start, start + size), n - 1) for start in range(0, n, size)]


def _counts(user, target, better, equal, others, n) -> Counts:
    join = lambda parts: np.concatenate(parts)[:n] if parts else np.zeros(0, np.int32)  # noqa: E731
    return Counts(np.asarray(user), np.asarray(target), join(better), join(equal), others)
