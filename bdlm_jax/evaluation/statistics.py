"""Comparing two models on the same cases, how far a mean can be trusted, and what a ranking at random reaches."""

import math
from typing import NamedTuple

import numpy as np

from bdlm_jax.evaluation.metrics import case_metric


class Margin(NamedTuple):
    """A relative margin with the bounds of its 95 % interval; `value` is None where the baseline is 0."""

    value: float | None
    low: float = math.nan
    high: float = math.nan

    @property
    def claims(self) -> bool:
        return self.value is not None and (self.low > 0 or self.high < 0)


def relative_margin(user_N: np.ndarray, ours_N: np.ndarray, theirs_N: np.ndarray) -> Margin:
    """Compares a metric of two models on the same cases, paired by user.

    r = Σ ours / Σ theirs, margin r - 1, s² = n/(n-1) · Σ_u (ours_u - r·theirs_u)² / (Σ theirs)² over users u, interval
    r - 1 ± 1.96 s. Source: the linearised variance of a ratio estimator with clusters (textbook).
    """
    _, index = np.unique(user_N, return_inverse=True)
    ours_U, theirs_U = np.bincount(index, ours_N), np.bincount(index, theirs_N)
    total, n = theirs_U.sum(), len(ours_U)
    if not total > 0:
        return Margin(None)
    ratio = ours_U.sum() / total
    error = math.sqrt(n / max(n - 1, 1) * float(((ours_U - ratio * theirs_U) ** 2).sum())) / total
    return Margin(ratio - 1, ratio - 1 - 1.96 * error, ratio - 1 + 1.96 * error)


def mean_half_width(values_N: np.ndarray) -> float:
    """Half the 95 % interval of a mean over two or more cases: 1.96 s/√n."""
    return 1.96 * float(np.std(values_N, ddof=1)) / math.sqrt(len(values_N))


def chance_level(metric: str, others_N: np.ndarray) -> float:
    """What a ranking at random (without ties) reaches on average among each case's others."""
    if metric == "auc":
        return 0.5
    values = []
    for others, times in zip(*np.unique(others_N, return_counts=True)):
        better = np.arange(others + 1)
        values.append(times * case_metric(metric, better, np.zeros_like(better), np.full_like(better, others)).mean())
    return float(sum(values) / max(len(others_N), 1))
