"""Negative sampling: never a seen item, the exact distribution, every edge of the search."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bdlm_jax.domain import negatives
from bdlm_jax.domain.negatives import make_popularity, make_seen, mark_seen, random_order, sample_negatives
from bdlm_jax.types import InputError

N_ITEMS, N = 12, 6000
ROWS = [[], [0], [11], [0, 1, 2, 11], [1, 3, 5, 7, 9], list(range(11)), list(range(1, 12)), [5, 6]]
DEGREE = np.array([40, 1, 2, 3, 30, 5, 6, 70, 8, 9, 1, 0])


@pytest.mark.parametrize("alpha", [None, 0.75])
def test_draws_are_proportional_among_exactly_the_unseen(alpha):
    pairs = [(user, item) for user, items in enumerate(ROWS) for item in items]
    pairs = [pairs[k] for k in np.random.default_rng(0).permutation(len(pairs))] + pairs[:3]  # unsorted, repeated
    seen = make_seen(*map(np.array, zip(*pairs)), len(ROWS), N_ITEMS)
    popularity = None if alpha is None else make_popularity(seen, DEGREE, alpha=alpha)
    user_UN = jnp.repeat(jnp.arange(len(ROWS))[:, None], N, axis=1)
    draws = jax.jit(lambda key: sample_negatives(key, seen, user_UN, popularity))(jax.random.key(7))
    assert draws.dtype == jnp.int32
    for drawn, row in zip(np.asarray(draws), ROWS):
        count, unseen = np.bincount(drawn, minlength=N_ITEMS), np.setdiff1d(np.arange(N_ITEMS), row)
        assert np.flatnonzero(count).tolist() == unseen.tolist()
        weight = np.maximum(DEGREE, 1)[unseen] ** (alpha or 0.0)
        if len(unseen) > 1:
            assert scipy.stats.chisquare(count[unseen], N * weight / weight.sum()).pvalue > 1e-4


# One item holds nearly all the weight and is seen: what is left are weights of 1 in 2^30. And a very long row.
@pytest.mark.parametrize(
    ("n_items", "row", "degree"),
    [
        (50, [0, 20, 49], np.where(np.arange(50) == 20, 1e12, 1.0)),
        (5000, np.random.default_rng(1).choice(5000, 4990, replace=False), None),
    ],
)
def test_hard_searches_reach_every_unseen_item_and_no_other(n_items, row, degree):
    seen = make_seen(np.zeros(len(row), int), row, 1, n_items)
    popularity = None if degree is None else make_popularity(seen, degree, alpha=1.0)
    draws = sample_negatives(jax.random.key(0), seen, jnp.zeros(5000, jnp.int32), popularity)
    assert np.unique(draws).tolist() == np.setdiff1d(np.arange(n_items), row).tolist()


def test_few_levels_of_a_search_reach_the_compiler_as_one():
    """Fused whole, JAX 0.12 compiles it longer by a factor for each level: an epoch had not compiled in ten minutes."""
    seen = make_seen(np.zeros(5000, int), np.arange(5000), 2, 6000)
    assert seen.depth == 13
    traced = jax.make_jaxpr(lambda key: sample_negatives(key, seen, jnp.zeros(8, jnp.int32)))(jax.random.key(0))
    levels, fused = 0, []
    for equation in traced.eqns:
        levels += equation.primitive.name == "gather"
        if equation.primitive.name == "optimization_barrier":
            fused, levels = [*fused, levels], 0
    # The first part also reads where the row begins and ends.
    assert len(fused) == 5 and max(fused[1:]) <= negatives.FUSED_LEVELS and not levels, (fused, levels)


@pytest.mark.parametrize(
    ("user", "item", "words"), [([1, 1, 1, 0], [0, 1, 2, 0], "user 1 has seen all 3 items"), ([0], [3], "outside")]
)
def test_a_full_row_and_an_unknown_item_are_refused(user, item, words):
    with pytest.raises(InputError, match=words):
        make_seen(user, item, 2, 3)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 65, 1000])
def test_random_order_is_a_permutation_and_begins_as_its_first_entries(n):
    order, first = random_order(jax.random.key(n), n), random_order(jax.random.key(n), n, first=(n + 1) // 2)
    assert np.sort(order).tolist() == list(range(n))
    np.testing.assert_array_equal(first, order[: (n + 1) // 2])


def test_random_order_is_uniform_over_permutations():
    order = jax.jit(jax.vmap(lambda key: random_order(key, 4)))(jax.random.split(jax.random.key(0), 4800))
    _, count = np.unique(np.asarray(order), axis=0, return_counts=True)
    assert count.size == 24
    assert scipy.stats.chisquare(count).pvalue > 1e-4


@pytest.mark.parametrize("marked", [3, 2**16])  # parts that cut rows, and one for all
def test_what_is_seen_is_marked_over_all_items_or_over_those_picked(marked, monkeypatch):
    monkeypatch.setattr("bdlm_jax.domain.negatives.MARKED", marked)
    rows = [*ROWS, list(range(N_ITEMS)), []]
    seen_UI = np.array([np.isin(np.arange(N_ITEMS), row) for row in rows])
    seen = make_seen(*np.nonzero(seen_UI), len(rows), N_ITEMS, negatives=False)
    user_N, pick_C = np.array([3, 0, 8, 8, 9, 4, 1]), np.array([11, 0, 4, 7])
    np.testing.assert_array_equal(jax.jit(mark_seen)(seen, user_N), seen_UI[user_N])
    np.testing.assert_array_equal(jax.jit(mark_seen)(seen, user_N, pick_C), seen_UI[user_N][:, pick_C])
    assert not jax.jit(mark_seen)(seen, np.array([0, 9])).any()
