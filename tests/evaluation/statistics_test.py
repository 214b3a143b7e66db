import math

import numpy as np
import pytest

from bdlm_jax.evaluation.statistics import chance_level, relative_margin


def test_the_interval_agrees_with_a_paired_bootstrap():
    rng = np.random.default_rng(0)
    theirs = (rng.random(4000) < 0.3).astype(float)
    ours = np.where(rng.random(4000) < 0.8, theirs, rng.random(4000) < 0.5).astype(float)
    margin = relative_margin(np.arange(4000), ours, theirs)
    drawn = rng.integers(0, 4000, (1000, 4000))
    low, high = np.quantile(ours[drawn].sum(1) / theirs[drawn].sum(1) - 1, [0.025, 0.975])
    assert margin.value == pytest.approx(ours.sum() / theirs.sum() - 1)
    assert (margin.low, margin.high) == pytest.approx((low, high), abs=0.15 * (high - low))


def test_cases_of_one_user_count_as_one():
    ours, theirs = np.array([1.0, 0.0, 1.0, 1.0]), np.array([1.0, 0.0, 0.0, 1.0])
    alone = relative_margin(np.arange(4), ours, theirs)
    doubled = relative_margin(np.repeat(np.arange(4), 2), np.repeat(ours, 2), np.repeat(theirs, 2))
    assert doubled == pytest.approx(alone)
    assert relative_margin(np.arange(4), ours, np.zeros(4)).value is None


def test_chance_is_what_a_random_ranking_reaches():
    assert chance_level("hr@1", np.array([19, 19])) == pytest.approx(1 / 20)
    assert chance_level("hr@10", np.array([4, 19])) == pytest.approx((1 + 10 / 20) / 2)
    assert chance_level("mrr", np.array([2])) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert chance_level("ndcg@2", np.array([2])) == pytest.approx((1 + 1 / math.log2(3)) / 3)
    assert chance_level("auc", np.array([7])) == 0.5
