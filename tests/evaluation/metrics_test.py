from math import log2

import jax.numpy as jnp
import numpy as np
import pytest
import rax

from bdlm_jax.evaluation.metrics import METRICS, case_metric, count_better

SCORES_NC = np.random.default_rng(0).normal(size=(50, 12)).astype(np.float32)  # untied; column 0 is the target


def counted(scores_NC, counts_NC=None):
    others = jnp.ones(np.shape(scores_NC[:, 1:]), bool) if counts_NC is None else counts_NC
    return tuple(map(np.asarray, count_better(scores_NC[:, 1:], scores_NC[:, :1], others)))


@pytest.mark.parametrize(
    ("name", "oracle", "cut"),
    [
        ("mrr", rax.mrr_metric, None),
        ("ndcg@5", rax.ndcg_metric, 5),
        ("ndcg@10", rax.ndcg_metric, 10),
        ("hr@1", rax.recall_metric, 1),
        ("hr@5", rax.recall_metric, 5),
    ],
)
def test_untied_scores_agree_with_rax(name, oracle, cut):
    labels = np.zeros(SCORES_NC.shape, np.float32)
    labels[:, 0] = 1
    wanted = [float(oracle(row, label, topn=cut)) for row, label in zip(SCORES_NC, labels)]
    values = case_metric(name, *counted(SCORES_NC), np.full(50, 11))
    np.testing.assert_allclose(values, wanted, rtol=1e-6)
    assert 0 < values.mean() < 1


def test_metrics_by_hand():
    # The second ties with two others: they count against the model, but half in the AUC.
    better, equal, others = np.array([0, 0, 4, 10]), np.array([0, 2, 0, 0]), np.array([11, 11, 11, 11])
    wanted = {
        "hr@1": [1, 0, 0, 0],
        "hr@5": [1, 1, 1, 0],
        "hr@10": [1, 1, 1, 0],
        "ndcg@5": [1, 1 / log2(3 + 1), 1 / log2(5 + 1), 0],
        "ndcg@10": [1, 1 / log2(3 + 1), 1 / log2(5 + 1), 0],
        "mrr": [1, 1 / 3, 1 / 5, 1 / 11],
        "auc": [1, (11 - 2 / 2) / 11, 7 / 11, 1 / 11],
    }
    assert set(wanted) == set(METRICS)
    for name, values in wanted.items():
        np.testing.assert_allclose(case_metric(name, better, equal, others), values, err_msg=name)
    assert case_metric("auc", np.array([0]), np.array([0]), np.array([0])) == 0  # no others, no case won
    with pytest.raises(ValueError, match="'map' is none of"):
        case_metric("map", better, equal, others)


def test_a_nan_loses_wherever_it_stands_and_what_takes_no_part_is_not_counted():
    nan = np.nan
    better, equal = counted(np.array([[nan, 0, 0], [nan, nan, nan], [1, nan, 0]], np.float32))
    assert better.tolist() == [2, 2, 1] and equal.tolist() == [0, 0, 0]
    scores = np.array([[1, 2, 1, 2, 0]], np.float32)
    assert counted(scores, np.array([[True, False, False, True]])) == (1, 0)
    assert counted(scores, np.array([[False, True, True, True]])) == (1, 1)
