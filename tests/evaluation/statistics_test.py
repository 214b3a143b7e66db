import itertools
import math

import numpy as np
import pytest
import scipy.stats

from bdlm_jax.evaluation.statistics import (
    beats,
    bootstrap_interval,
    case_chance,
    chance_level,
    holm,
    paired_margins,
    sign_flip_p,
)


def metric_of_two(n, seed=0):
    rng = np.random.default_rng(seed)
    theirs = (rng.random(n) < 0.3).astype(float)
    return np.where(rng.random(n) < 0.8, theirs, rng.random(n) < 0.5).astype(float), theirs


def test_the_bootstrap_agrees_with_scipy_and_with_the_linearised_variance_of_a_ratio():
    ours, theirs = metric_of_two(2000)
    (low,), (high,) = bootstrap_interval(ours[:, None], theirs[:, None])
    wide = high - low
    drawn = scipy.stats.bootstrap(
        (ours, theirs), lambda a, b, axis: a.sum(axis) / b.sum(axis) - 1, paired=True, vectorized=True,
        n_resamples=2000, batch=200, method="percentile", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert (low, high) == pytest.approx((drawn.low, drawn.high), abs=0.1 * wide)
    ratio = ours.sum() / theirs.sum()
    error = math.sqrt(2000 / 1999 * ((ours - ratio * theirs) ** 2).sum()) / theirs.sum()
    assert (low, high) == pytest.approx((ratio - 1 - 1.96 * error, ratio - 1 + 1.96 * error), abs=0.15 * wide)


def test_signs_are_flipped_in_all_ways_where_they_are_few():
    difference = np.array([0.5, 0.25, -0.125, 0.0])  # Σ = .625
    signs = itertools.product((1, -1), repeat=4)
    as_far = [abs(np.dot(flip, difference)) >= 0.625 for flip in signs]
    (p,) = sign_flip_p(difference[:, None])
    assert p == sum(as_far) / 2**4 == 8 / 16  # +++, ++- and their opposites, twice each for the 0
    assert sign_flip_p(np.zeros((20, 1)))[0] == 1.0


def test_random_flips_agree_with_the_binomial_and_with_scipy():
    ours, theirs = metric_of_two(300)
    counted = ours - theirs  # of n that differ, all by 1, k are above: a sign test
    n, k = (counted != 0).sum(), (counted > 0).sum()
    measured = np.random.default_rng(0).normal(0.1, 1, 300)
    p = sign_flip_p(np.stack([counted, measured], axis=1), flips=50_000)
    assert p[0] == pytest.approx(2 * scipy.stats.binom.sf(max(k, n - k) - 1, n, 0.5), rel=0.2)
    oracle = scipy.stats.permutation_test(
        (measured, np.zeros(300)), lambda a, b, axis: (a - b).sum(axis), permutation_type="samples",
        vectorized=True, n_resamples=10_000, batch=1000, rng=np.random.default_rng(1),
    )  # fmt: skip
    assert 0.01 < oracle.pvalue < 0.5 and p[1] == pytest.approx(oracle.pvalue, rel=0.15)


def test_a_p_is_never_0_and_margins_are_those_of_each_column():
    ours = np.ones((100, 2)) * [0.5, 0.25]
    sure, none = paired_margins(ours, np.ones((100, 2)) * [0.25, 0.0])
    assert (sure.value, sure.low, sure.high, sure.p) == (1.0, 1.0, 1.0, 1 / 60_001)
    assert none.value is None and none.p == 1 / 60_001


def test_holm_steps_down():
    # Sorted .01 .02 .03 .04: 4 × .01, 3 × .02, then 2 × .03 and 1 × .04 may not fall below what came before.
    assert holm(np.array([0.04, 0.01, 0.03, 0.02])) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm(np.array([0.9, 0.001])) == pytest.approx([0.9, 0.002])
    assert holm(np.array([0.7, 0.8])) == pytest.approx([1.0, 1.0])
    assert len(holm(np.zeros(0))) == 0


def test_what_beats_chance_does_so_beyond_its_interval():
    level = case_chance("hr@1", np.array([19, 99] * 100))
    assert level[:2] == pytest.approx([1 / 20, 1 / 100])
    lucky = np.zeros(200)
    lucky[:10] = 1  # .05 where .03 is expected: 1.96 × .22 / √200 = .03
    assert not beats(lucky, level)
    lucky[:16] = 1  # .08, ± .038
    assert beats(lucky, level)


def test_chance_is_what_a_random_ranking_reaches():
    assert chance_level("hr@1", np.array([19, 19])) == pytest.approx(1 / 20)
    assert chance_level("hr@10", np.array([4, 19])) == pytest.approx((1 + 10 / 20) / 2)
    assert chance_level("mrr", np.array([2])) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert chance_level("ndcg@2", np.array([2])) == pytest.approx((1 + 1 / math.log2(3)) / 3)
    assert chance_level("auc", np.array([7])) == 0.5
