"""Our evaluator against a published number that anyone can compute: ItemPop on Gowalla's official split."""

import os

import numpy as np
import pytest

from bdlm_jax.data.sources import read_adjacency_folder
from bdlm_jax.data.splits import TEST, TRAIN
from bdlm_jax.evaluation.evaluate import evaluate_top_k
from bdlm_jax.evaluation.scorers import popularity_scorer

FOLDER = os.environ.get("BDLM_GOWALLA", "")


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="BDLM_GOWALLA names no folder with train.txt and test.txt")
def test_item_pop_on_gowalla_equals_the_benchmark():
    split = read_adjacency_folder(FOLDER)
    assert split.counts()["train"] == 810_128 and split.counts()["test"] == 217_242
    values = evaluate_top_k(popularity_scorer(split.degree(TRAIN)), split, TEST, TRAIN, k=20)
    wanted = {"recall@20": 0.0416, "ndcg@20": 0.0317, "hr@20": 0.2038}  # BARS benchmark
    assert {name: round(float(np.mean(value)), 4) for name, value in values.items()} == wanted
