from math import log2

import jax.numpy as jnp
import numpy as np
import pytest
import rax

from bdlm_jax.evaluation.metrics import METRICS, case_metric, count_better, top_k_metrics

SCORES_NC = np.random.default_rng(0).normal(size=(50, 12)).astype(np.float32)  # untied; column 0 is the target


def counted(scores_NC, counts_NC=None):
    others = jnp.ones(np.shape(scores_NC[:, 1:]), bool) if counts_NC is None else counts_NC
    return tuple(map(np.asarray, count_better(scores_NC[:, 1:], scores_NC[:, :1], others)))


@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("mrr", lambda s, y: rax.mrr_metric(s, y)),
        ("ndcg@5", lambda s, y: rax.ndcg_metric(s, y, topn=5)),
        ("ndcg@10", lambda s, y: rax.ndcg_metric(s, y, topn=10)),
        ("hr@1", lambda s, y: rax.recall_metric(s, y, topn=1)),
        ("hr@5", lambda s, y: rax.recall_metric(s, y, topn=5)),
    ],
)
def test_untied_scores_agree_with_rax(name, oracle):
    labels = np.zeros(SCORES_NC.shape, np.float32)
    labels[:, 0] = 1
    wanted = [float(oracle(row, label)) for row, label in zip(SCORES_NC, labels)]
    values = case_metric(name, *counted(SCORES_NC), np.full(50, 11))
    np.testing.assert_allclose(values, wanted, rtol=1e-6)
    assert 0 < values.mean() < 1


def test_metrics_by_hand():
    better, equal, others = np.array([0, 1, 4, 10]), np.array([0, 1, 0, 0]), np.array([11, 11, 11, 11])
    values = {name: case_metric(name, better, equal, others).tolist() for name in METRICS}
    assert values["hr@1"] == [1, 0, 0, 0]
    assert values["hr@5"] == [1, 1, 1, 0]
    assert values["hr@10"] == [1, 1, 1, 0]
    np.testing.assert_allclose(values["ndcg@5"], [1, 1 / log2(3 + 1), 1 / log2(5 + 1), 0])
    np.testing.assert_allclose(values["ndcg@10"], [1, 1 / log2(3 + 1), 1 / log2(5 + 1), 0])
    np.testing.assert_allclose(values["mrr"], [1, 1 / 3, 1 / 5, 1 / 11])
    np.testing.assert_allclose(values["auc"], [1, (11 - 1 - 1 / 2) / 11, 7 / 11, 1 / 11])


def test_ties_count_against_the_model_but_half_in_the_auc():
    better, equal = counted(np.zeros((1, 5), np.float32))
    assert (better, equal) == (0, 4)
    assert case_metric("hr@1", better, equal, np.array([4])) == 0
    assert case_metric("mrr", better, equal, np.array([4])) == 1 / 5
    assert case_metric("auc", better, equal, np.array([4])) == 1 / 2


def test_a_nan_loses_wherever_it_stands():
    nan = np.nan
    better, equal = counted(np.array([[nan, 0, 0], [nan, nan, nan], [1, nan, 0]], np.float32))
    assert better.tolist() == [2, 2, 1]
    assert equal.tolist() == [0, 0, 0]


def test_what_does_not_take_part_is_not_counted():
    better, equal = counted(np.array([[1, 2, 1, 2, 0]], np.float32), np.array([[True, False, False, True]]))
    assert (better, equal) == (1, 0)
    better, equal = counted(np.array([[1, 2, 1, 2, 0]], np.float32), np.array([[False, True, True, True]]))
    assert (better, equal) == (1, 1)


def test_auc_of_a_case_without_others_is_zero():
    assert case_metric("auc", np.array([0]), np.array([0]), np.array([0])) == 0


def test_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="'map' is none of"):
        case_metric("map", np.array([0]), np.array([0]), np.array([1]))


def test_top_k_by_hand():
    top = np.array([[4, 7, 1, 9], [0, 1, 2, 3], [5, 6, 7, 8]])
    relevant = [np.array([7, 1, 8]), np.array([9]), np.array([5, 6, 7, 8, 9])]
    values = top_k_metrics(top, relevant, k=3)
    np.testing.assert_allclose(values["recall@3"], [2 / 3, 0, 3 / 5])
    ideal = 1 / log2(2) + 1 / log2(3) + 1 / log2(4)
    np.testing.assert_allclose(values["ndcg@3"], [(1 / log2(3) + 1 / log2(4)) / ideal, 0, 1])
    assert values["hr@3"].tolist() == [1, 0, 1]


def test_top_k_ideal_is_short_where_few_items_are_relevant():
    values = top_k_metrics(np.array([[2, 0, 1]]), [np.array([0])], k=3)
    np.testing.assert_allclose(values["ndcg@3"], (1 / log2(3)) / (1 / log2(2)))
    assert values["recall@3"] == 1
