"""Comparing models on the same users, how far a claim can be trusted, and what a ranking at random reaches."""

import math
from typing import NamedTuple

import numpy as np

from bdlm_jax.evaluation.metrics import case_metric

RESAMPLES, FLIPS = 2_000, 60_000  # p can be 1/60,001, which Holm may multiply by hundreds of margins
_CHUNK = 250  # resamples at a time: a chunk holds so many rows of U floats


class Margin(NamedTuple):
    """How far a mean lies above another, as a share of it, with its 95 % interval and the p of no difference.

    `value` is None where the baseline is 0.
    """

    value: float | None
    low: float = math.nan
    high: float = math.nan
    p: float = 1.0


def paired_margins(ours_UM: np.ndarray, theirs_UM: np.ndarray, *, seed: int = 0) -> list[Margin]:
    """Compares M pairs of models on the same users; a user's values over seeds are averaged before.

    Margin Σ_u ours / Σ_u theirs - 1, its interval from a bootstrap over users, its p from a sign-flip test.
    """
    low_M, high_M = bootstrap_interval(ours_UM, theirs_UM, seed=seed)
    p_M, totals = sign_flip_p(ours_UM - theirs_UM, seed=seed), zip(ours_UM.sum(0), theirs_UM.sum(0))
    value_M = [float(ours / theirs - 1) if theirs > 0 else None for ours, theirs in totals]
    pairs = zip(value_M, low_M, high_M, p_M)
    return [Margin(value, float(low), float(high), float(p)) for value, low, high, p in pairs]


def bootstrap_interval(ours_UM, theirs_UM, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """The 2.5 % and 97.5 % quantiles (2, M) of Σ ours / Σ theirs - 1 over resampled users.

    Source: the percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
    """
    rng, (n, m) = np.random.default_rng(seed), ours_UM.shape
    both, sums = np.concatenate([ours_UM, theirs_UM], axis=1), []
    both = both[np.argsort(~both.any(axis=1), kind="stable")]  # who has zeros alone comes last and is drawn, not summed
    some = int(both.any(axis=1).sum())
    for start in range(0, resamples, _CHUNK):
        rows = min(_CHUNK, resamples - start)
        drawn = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        sums.append(np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)[:, :some] @ both[:some])
    total = np.concatenate(sums)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.quantile(total[:, :m] / total[:, m:] - 1, [0.025, 0.975], axis=0, method="inverted_cdf")


def sign_flip_p(difference_UM: np.ndarray, *, flips: int = FLIPS, seed: int = 0) -> np.ndarray:
    """Two-sided p (M,) that which of the two models is which does not matter: each user's difference may change sign.

    p = (1 + #{|Σ ±d| ≥ |Σ d|})/(1 + flips) over random signs; over all 2^U of them where they are no more than `flips`.
    Source: Fisher's randomisation test for pairs; Smucker, Allan and Carterette (CIKM 2007) for its use in retrieval.
    """
    difference_UM = difference_UM[difference_UM.any(axis=1)]  # the sign of a zero changes nothing
    n, m = difference_UM.shape
    sum_M, size_M = difference_UM.sum(0), np.abs(difference_UM).sum(0)
    exact = n < 60 and 2**n <= flips
    rng, extreme_M, times = np.random.default_rng(seed), np.zeros(m), 2**n if exact else flips
    for start in range(0, times, _CHUNK):
        rows = min(_CHUNK, times - start)
        if exact:
            keep = (start + np.arange(rows))[:, None] >> np.arange(n) & 1
        else:
            keep = np.unpackbits(np.frombuffer(rng.bytes(rows * -(-n // 8)), np.uint8).reshape(rows, -1), axis=1)[:, :n]
        flipped = 2 * (keep.astype(np.float64) @ difference_UM) - sum_M
        extreme_M += (np.abs(flipped) >= np.abs(sum_M) - 1e-9 * size_M).sum(0)  # equal but for the order of the sum
    return extreme_M / times if exact else (1 + extreme_M) / (1 + times)


def holm(p_M: np.ndarray) -> np.ndarray:
    """Adjusts the p of M claims made together: max_{j ≤ i} min(1, (M - j + 1)·p_(j)), p sorted. Source: Holm (1979)."""
    order = np.argsort(p_M, kind="stable")
    adjusted = np.empty(len(order))
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, (len(order) - np.arange(len(order))) * np.take(p_M, order)))
    return adjusted


def mean_half_width(values_N: np.ndarray) -> float:
    """Half the 95 % interval of a mean over two or more cases: 1.96 s/√n."""
    return 1.96 * float(np.std(values_N, ddof=1)) / math.sqrt(len(values_N))


def case_chance(metric: str, others_N: np.ndarray) -> np.ndarray:
    """What a ranking at random (without ties) reaches on average in each case, by the number of its others."""
    sizes, index_N = np.unique(others_N, return_inverse=True)
    if metric == "auc":
        return np.full(len(others_N), 0.5)
    levels = []
    for others in sizes:
        better = np.arange(others + 1)
        levels.append(case_metric(metric, better, np.zeros_like(better), np.full_like(better, others)).mean())
    return np.array(levels)[index_N] if levels else np.zeros(0)


def chance_level(metric: str, others_N: np.ndarray) -> float:
    """What a ranking at random reaches on average over the cases."""
    sizes, times = np.unique(others_N, return_counts=True)
    return float((times * case_chance(metric, sizes)).sum() / max(len(others_N), 1))


def beats(values_U: np.ndarray, level_U: np.ndarray) -> bool:
    """Whether the mean over users lies above the level that is expected of each, beyond its own 95 % interval."""
    above_U = values_U - level_U
    return len(above_U) > 1 and float(above_U.mean()) > mean_half_width(above_U)
