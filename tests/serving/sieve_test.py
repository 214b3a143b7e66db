"""A sieve loses nothing: the answers of a large catalogue are those of scoring all of it."""

import numpy as np
import pytest

from bdlm_jax.serving import scores
from bdlm_jax.serving.artefact import ServedDomain
from bdlm_jax.serving.sieve import BLOCK, make_sieve

N = 3 * BLOCK + 77  # the last block and its last row are not full


def whole(n, draw):
    """Small whole numbers: no product is rounded, and many scores are equal."""
    return draw.integers(-3, 4, (n, 8))


def unlike(n, draw):
    """Columns and rows of all sizes, two of them nothing."""
    table = draw.standard_normal((n, 8)) * 10.0 ** draw.uniform(-4, 1, 8) * np.exp(draw.standard_normal((n, 1)))
    table[:, 3], table[::7] = 0, 0
    return table


def below(n, draw):
    """Every score is negative: what fills a block would be better than all."""
    return draw.uniform(0.5, 1, (n, 8)) * (1 if n == N else -1)


@pytest.mark.parametrize("make", [whole, unlike, below])
def test_what_passes_the_sieve_holds_the_answer(monkeypatch, make):
    draw = np.random.default_rng(0)
    user_UD, item_ID = (make(n, draw).astype(np.float32) for n in (6, N))
    user_UD[5] = 0  # to whom all are equal
    arm, seen = (
        ServedDomain("mf", user_UD, item_ID, np.ones(N)),
        [draw.integers(N, size=n) for n in (0, 3, 9, 1, 20, 2)],
    )
    for k in (1, 10, N):
        wanted = [scores.best_items(arm, [seen[user]], users=[user], k=k)[0] for user in range(6)]
        with monkeypatch.context() as patch:
            patch.setattr(scores, "LARGE", 1)
            found = [scores.best_items(arm, [seen[user]], users=[user], k=k)[0] for user in range(6)]
        for (items, of_items), (others, of_others) in zip(found, wanted):
            np.testing.assert_allclose(of_items, of_others, rtol=1e-5, atol=1e-6 * np.abs(of_others).max())
            if make is whole or k < N:  # where two scores differ in their last bits alone, either may be first
                np.testing.assert_array_equal(items, others)


def test_few_pass_a_sieve():
    draw = np.random.default_rng(0)
    state_BD, item_ID = (draw.standard_normal((n, 32), np.float32) for n in (3, N))
    for items in make_sieve(item_ID)(state_BD, 10):
        assert 10 <= len(items) < 40
