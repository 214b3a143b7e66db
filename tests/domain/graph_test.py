"""Propagation: every backend against a dense float64 oracle, its gradient, jit, scan, vmap, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdlm_jax.domain.graph import BACKENDS, BLOCK_WIDTHS, choose_backend, make_graph, make_propagate
from bdlm_jax.types import InputError

N_USERS, N_ITEMS, WIDTH = 23, 17, 5
SIZES = {"n_users": N_USERS, "n_items": N_ITEMS}
EXACT = [backend for backend in BACKENDS if backend != "auto"]


def random_edges():
    """90 of them; the last two users and three items stay alone."""
    rng = np.random.default_rng(0)
    return rng.integers(0, N_USERS - 2, 90), rng.integers(0, N_ITEMS - 3, 90)


def oracle_matrix(user, item):
    """Â as a dense float64 matrix from its definition, self-loops for the nodes without edges."""
    adjacency = np.zeros((N_USERS + N_ITEMS, N_USERS + N_ITEMS))
    adjacency[user, N_USERS + item] = adjacency[N_USERS + item, user] = 1.0
    degree = adjacency.sum(axis=1)
    adjacency[degree == 0, degree == 0] = 1.0
    degree = np.maximum(degree, 1.0)
    return adjacency / np.sqrt(np.outer(degree, degree))


def random_rows():
    rng = np.random.default_rng(1)
    return rng.normal(size=(N_USERS, WIDTH)).astype(np.float32), rng.normal(size=(N_ITEMS, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module", params=EXACT)
def propagate(request):
    return make_propagate(make_graph(*random_edges(), **SIZES), **SIZES, backend=request.param)


def test_hand_computed_weights():
    graph = make_graph([0, 0, 1], [0, 1, 1], n_users=3, n_items=2)
    found = {(int(s), int(r)): float(w) for s, r, w in zip(graph.senders, graph.receivers, graph.edges)}
    expected = {(3, 0): 1 / np.sqrt(2 * 1), (4, 0): 1 / np.sqrt(2 * 2), (4, 1): 1 / np.sqrt(1 * 2)}
    expected |= {(r, s): w for (s, r), w in expected.items()} | {(2, 2): 1.0}
    assert found == pytest.approx(expected)
    assert np.all(np.diff(graph.receivers) >= 0)
    assert graph.n_node.tolist() == [5] and graph.n_edge.tolist() == [7]


def test_equals_the_dense_oracle(propagate):
    user, item = random_rows()
    expected = oracle_matrix(*random_edges()) @ np.concatenate([user, item]).astype(np.float64)
    for function in (propagate, jax.jit(propagate)):
        got = np.concatenate(function(user, item))
        np.testing.assert_allclose(got, expected, atol=2e-6)


def test_gradient_is_the_operator_itself(propagate):
    user, item = random_rows()
    weight = np.random.default_rng(2).normal(size=(N_USERS + N_ITEMS, WIDTH))

    def loss(user, item):
        return jnp.sum(jnp.concatenate(propagate(*propagate(user, item))) ** 2 * weight)

    matrix, rows = oracle_matrix(*random_edges()), np.concatenate([user, item]).astype(np.float64)
    expected = matrix.T @ matrix.T @ (2 * weight * (matrix @ matrix @ rows))
    got = np.concatenate(jax.jit(jax.grad(loss, argnums=(0, 1)))(user, item))
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_inside_scan_and_vmap(propagate):
    user, item = random_rows()
    matrix = oracle_matrix(*random_edges())

    @jax.jit
    def five_steps(user, item):
        return jax.lax.scan(lambda rows, _: (propagate(*rows), None), (user, item), None, length=5)[0]

    expected = np.linalg.matrix_power(matrix, 5) @ np.concatenate([user, item])
    np.testing.assert_allclose(np.concatenate(five_steps(user, item)), expected, atol=5e-6)

    users, items = jnp.stack([user, 2 * user]), jnp.stack([item, 2 * item])
    got_user, got_item = jax.vmap(propagate)(users, items)
    expected = matrix @ np.concatenate([user, item])
    np.testing.assert_allclose(np.concatenate([got_user[1], got_item[1]]), 2 * expected, atol=5e-6)


def test_keeps_the_dtype(propagate):
    user, item = (jnp.asarray(rows, jnp.bfloat16) for rows in random_rows())
    assert {rows.dtype for rows in propagate(user, item)} == {jnp.dtype(jnp.bfloat16)}


def test_repeated_pairs_count_once_and_order_is_irrelevant():
    user, item = random_edges()
    mixed = np.random.default_rng(3).permutation(np.repeat(np.arange(user.size), 2))
    jax.tree.map(
        np.testing.assert_array_equal, make_graph(user, item, **SIZES), make_graph(user[mixed], item[mixed], **SIZES)
    )


def test_a_graph_without_edges_is_the_identity():
    graph, (user, item) = make_graph([], [], **SIZES), random_rows()
    for backend in BACKENDS:
        got = make_propagate(graph, **SIZES, backend=backend)(user, item)
        np.testing.assert_array_equal(np.concatenate(got), np.concatenate([user, item]))


def test_gathers_of_a_node_with_more_neighbours_than_two_levels_of_blocks_hold():
    n_users = BLOCK_WIDTHS[-1] ** 2 + 3
    user, item = np.arange(n_users), np.repeat([0, 1], [n_users - 1, 1])
    sizes = dict(n_users=n_users, n_items=2)
    user_UD, item_ID = np.arange(n_users)[:, None] / n_users, np.array([[1.0], [2.0]])
    got_user, got_item = make_propagate(make_graph(user, item, **sizes), **sizes, backend="gather")(user_UD, item_ID)
    popular = np.sqrt(n_users - 1)
    np.testing.assert_allclose(got_item, [[user_UD[:-1].sum() / popular], user_UD[-1]], rtol=1e-6)
    np.testing.assert_allclose(got_user, np.append(np.full(n_users - 1, 1 / popular), 2.0)[:, None], rtol=1e-6)


def test_auto_weighs_the_matrix_against_the_edges():
    assert choose_backend(n_users=100, n_items=50, n_edges=300) == "dense"
    assert choose_backend(n_users=10**6, n_items=10**6, n_edges=10**7) in ("gather", "segment")
    if jax.default_backend() == "cpu":
        assert choose_backend(n_users=1000, n_items=1000, n_edges=10**5) == "dense"
        assert choose_backend(n_users=1000, n_items=1000, n_edges=10**3) == "gather"


def test_a_gpu_gets_no_large_matrix_in_its_programs(monkeypatch):
    monkeypatch.setattr("bdlm_jax.domain.graph.jax.default_backend", lambda: "gpu")
    assert choose_backend(n_users=6040, n_items=3706, n_edges=988_129) == "segment"  # MovieLens-1M
    assert choose_backend(n_users=300, n_items=200, n_edges=9000) == "dense"


@pytest.mark.parametrize(
    ("edges", "options", "words"),
    [
        (([0, 1], [0, 9]), {}, r"item_E\[1\] is 9"),
        (([-1], [0]), {}, r"user_E\[0\] is -1"),
        (([0.5], [0]), {}, "integers"),
        (([0, 1], [0]), {}, "2 rows"),
        (([0], [0]), {"backend": "sparse"}, "unknown: choose one of auto, segment"),
        (([0], [0]), {"n_items": 3}, "11 nodes"),
        (([0], [0]), {"backend": "gather"}, "weights of make_graph"),
    ],
)
def test_what_is_no_graph_or_cannot_be_compiled_is_named(edges, options, words):
    sizes = {"n_users": 2, "n_items": 9}
    with pytest.raises(InputError, match=words):
        graph = make_graph(*edges, **sizes)
        make_propagate(graph._replace(edges=2 * graph.edges), **sizes | options)
