"""Our evaluator against a published number that anyone can compute: ItemPop on Gowalla's official split."""

import os

import numpy as np
import pytest

from bdlm_jax.data.readers import read_adjacency
from bdlm_jax.data.splits import TEST, TRAIN
from bdlm_jax.evaluation.evaluate import evaluate_full
from bdlm_jax.evaluation.metrics import case_metric
from bdlm_jax.evaluation.scorers import popularity_scorer

FOLDER = os.environ.get("BDLM_GOWALLA", "")


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="BDLM_GOWALLA names no folder with train.txt and test.txt")
def test_item_pop_on_gowalla_equals_the_benchmark():
    split = read_adjacency(FOLDER)
    assert split.counts()["train"] == 810_128 and split.counts()["test"] == 217_242
    counts = evaluate_full(popularity_scorer(split.degree(TRAIN)), *split.cases(TEST), split.histories(TRAIN))
    hit_N, gain_N = (case_metric(m, counts.better, counts.equal, counts.others) for m in ("hr@20", "ndcg@20"))
    # Several targets a user: the benchmark divides by their number, or by the gain of a list that begins with them.
    _, user_N = np.unique(counts.user, return_inverse=True)
    n_U, hit_U, gain_U = (np.bincount(user_N, weights) for weights in (None, hit_N, gain_N))
    best_U = np.cumsum(1 / np.log2(np.arange(20) + 2))[np.minimum(n_U, 20) - 1]
    found = {"recall@20": hit_U / n_U, "ndcg@20": gain_U / best_U, "hr@20": hit_U > 0}
    wanted = {"recall@20": 0.0416, "ndcg@20": 0.0317, "hr@20": 0.2038}  # BARS benchmark
    assert {name: round(float(np.mean(value)), 4) for name, value in found.items()} == wanted
