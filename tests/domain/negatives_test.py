"""Negative sampling: never a seen item, the exact distribution, every edge of the search."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bdlm_jax.domain.negatives import (
    make_popularity,
    make_seen,
    random_order,
    sample_negatives,
    sample_popular_negatives,
)
from bdlm_jax.types import InputError

N_ITEMS = 12
ROWS = {
    0: [],
    1: [0],
    2: [11],
    3: [0, 1, 2, 11],
    4: [1, 3, 5, 7, 9],
    5: list(range(11)),
    6: list(range(1, 12)),
    7: [5, 6],
}
N = 6000


@pytest.fixture(scope="module")
def seen():
    pairs = [(user, item) for user, items in ROWS.items() for item in items]
    pairs = [pairs[k] for k in np.random.default_rng(0).permutation(len(pairs))] + pairs[:3]  # unsorted, repeated
    return make_seen(*map(np.array, zip(*pairs)), len(ROWS), N_ITEMS)


def unseen(user):
    return np.setdiff1d(np.arange(N_ITEMS), ROWS[user])


def draws_by_user(sample):
    user_UN = jnp.repeat(jnp.arange(len(ROWS))[:, None], N, axis=1)
    return np.asarray(jax.jit(sample)(jax.random.key(7), user_UN))


def test_uniform_over_exactly_the_unseen(seen):
    draws = draws_by_user(lambda key, user: sample_negatives(key, seen, user))
    assert draws.dtype == np.int32
    for user in ROWS:
        count = np.bincount(draws[user], minlength=N_ITEMS)
        assert np.flatnonzero(count).tolist() == unseen(user).tolist()
        if len(unseen(user)) > 1:
            assert scipy.stats.chisquare(count[unseen(user)]).pvalue > 1e-4


def test_popular_is_proportional_among_the_unseen(seen):
    degree = np.array([40, 1, 2, 3, 30, 5, 6, 70, 8, 9, 1, 0])
    popularity = make_popularity(seen, degree, alpha=0.75)
    draws = draws_by_user(lambda key, user: sample_popular_negatives(key, seen, popularity, user))
    for user in ROWS:
        count = np.bincount(draws[user], minlength=N_ITEMS)
        assert np.flatnonzero(count).tolist() == unseen(user).tolist()
        if len(unseen(user)) > 1:
            weight = np.maximum(degree, 1)[unseen(user)] ** 0.75
            assert scipy.stats.chisquare(count[unseen(user)], N * weight / weight.sum()).pvalue > 1e-4


def test_popular_with_extreme_weights_never_collides():
    """One item holds nearly all the weight and is seen: what is left are weights of 1 in 2^30."""
    degree = np.ones(50)
    degree[20] = 1e12
    seen = make_seen(np.zeros(3, int), np.array([0, 20, 49]), 1, 50)
    popularity = make_popularity(seen, degree, alpha=1.0)
    draws = sample_popular_negatives(jax.random.key(0), seen, popularity, jnp.zeros(5000, jnp.int32))
    assert np.unique(draws).tolist() == np.setdiff1d(np.arange(50), [0, 20, 49]).tolist()


def test_a_large_row_is_searched_to_the_end():
    rng = np.random.default_rng(1)
    row = np.sort(rng.choice(5000, 4990, replace=False))
    seen = make_seen(np.zeros(row.size, int), row, 1, 5000)
    draws = sample_negatives(jax.random.key(1), seen, jnp.zeros(400, jnp.int32))
    assert np.unique(draws).tolist() == np.setdiff1d(np.arange(5000), row).tolist()


def test_a_user_who_has_seen_everything_is_refused():
    with pytest.raises(InputError, match="user 1 has seen all 3 items"):
        make_seen(np.array([1, 1, 1, 0]), np.array([0, 1, 2, 0]), 2, 3)
    with pytest.raises(InputError, match="outside"):
        make_seen(np.array([0]), np.array([3]), 2, 3)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 65, 1000])
def test_random_order_is_a_permutation(n):
    assert np.sort(random_order(jax.random.key(n), n)).tolist() == list(range(n))


def test_random_order_is_uniform_over_permutations():
    order = jax.jit(jax.vmap(lambda key: random_order(key, 4)))(jax.random.split(jax.random.key(0), 4800))
    _, count = np.unique(np.asarray(order), axis=0, return_counts=True)
    assert count.size == 24
    assert scipy.stats.chisquare(count).pvalue > 1e-4
