import numpy as np
import pytest

from bdlm_jax.domain import closed_form
from bdlm_jax.domain.closed_form import ease, interaction_matrix, item_knn
from bdlm_jax.types import InputError

#          a  b  c  d
HAD = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0]]


def matrix(dense=HAD):
    user_E, item_E = np.nonzero(dense)
    shape = np.shape(dense)
    return interaction_matrix(user_E, item_E, n_users=shape[0], n_items=shape[1])


def test_a_pair_counts_once():
    made = interaction_matrix(np.array([0, 0, 1]), np.array([2, 2, 0]), n_users=2, n_items=3)
    np.testing.assert_array_equal(made.toarray(), [[0, 0, 1], [1, 0, 0]])


@pytest.mark.parametrize("shrink", [0.0, 2.0])
@pytest.mark.parametrize("entries", [1, 8, 2**26])
def test_item_knn_is_the_cosine_written_out(monkeypatch, shrink, entries):
    monkeypatch.setattr(closed_form, "BLOCK_ENTRIES", entries)
    found = item_knn(matrix(), neighbours=3, shrink=shrink).toarray()
    ab, ac, bc = 2 / (np.sqrt(2 * 3) + shrink), 1 / (np.sqrt(2 * 2) + shrink), 2 / (np.sqrt(3 * 2) + shrink)
    expected = [[0, ab, ac, 0], [ab, 0, bc, 0], [ac, bc, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_each_item_hears_its_nearest_alone():
    found = item_knn(matrix(), neighbours=1).toarray()
    #     the nearest of a is b, of b is a (as near as c, and before it), of c is b: columns hear, rows say
    assert (found > 0).tolist() == [[0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("n_items", [4, 1500])
def test_ease_is_the_inverse_written_out(n_items):
    made = matrix(np.random.default_rng(0).random((60, n_items)) < 0.1) if n_items > 4 else matrix()
    dense = made.toarray().astype(np.float64)
    inverse = np.linalg.inv(dense.T @ dense + 5.0 * np.eye(n_items))
    expected = np.eye(n_items) - inverse / np.diag(inverse)[None]
    np.fill_diagonal(expected, 0.0)
    np.testing.assert_allclose(ease(made, l2=5.0), expected, atol=2e-5)


def test_ease_solves_its_problem():
    """B minimises ‖X - XB‖² + l2·‖B‖² among matrices of zero diagonal: no small step does better."""
    dense, l2 = matrix().toarray().astype(np.float64), 1.0
    weights = ease(matrix(), l2=l2).astype(np.float64)

    def loss(b):
        return ((dense - dense @ b) ** 2).sum() + l2 * (b**2).sum()

    rng = np.random.default_rng(1)
    for _ in range(20):
        step = rng.normal(size=weights.shape) * 1e-2
        np.fill_diagonal(step, 0.0)
        assert loss(weights + step) > loss(weights)


def test_too_many_items_are_refused():
    with pytest.raises(InputError, match="50,001 items are more"):
        ease(interaction_matrix(np.array([0]), np.array([0]), n_users=1, n_items=50_001))
