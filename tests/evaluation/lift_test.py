"""Rows of items that nobody has had, moved so that everybody's scores of them rise alike."""

import numpy as np

from bdlm_jax.evaluation.lift import Lift, make_lift


def test_scores_rise_alike_where_a_direction_is_everybodys():
    generator = np.random.default_rng(0)
    states = np.concatenate([generator.normal(size=(50, 3)), np.full((50, 1), 2.0)], axis=1)
    states[7] = 0  # of a user without a history: reads nothing, and says nothing of the others
    rows, cold_I = generator.normal(size=(20, 4)).astype(np.float32), np.arange(20) % 3 == 0
    lift = make_lift(states, rows, cold_I, amount=1.5)
    rise = states @ lift.move(rows).T - states @ rows.T
    had = np.arange(50) != 7
    spread = np.std(states[had] @ rows[~cold_I].astype(np.float64).T)  # dense, what the lift computes from moments
    assert np.array_equal(rise[:, ~cold_I], np.zeros_like(rise[:, ~cold_I]))
    np.testing.assert_allclose(rise[np.ix_(had, cold_I)], 1.5 * spread, rtol=5e-3)  # of the ridge


def test_it_is_the_best_single_direction_where_there_is_no_such():
    """By hand: states (1, 0) and (1, 1) twice as often as (0, 1); v solves AᵀA v = Aᵀ1."""
    states = np.array([[1.0, 0], [1, 1], [1, 1], [0, 1]])
    rows = np.array([[1.0, 0], [-1, 0], [0, 0]], np.float32)
    lift = make_lift(states, rows, np.array([False, False, True]), amount=1.0)
    spread = np.std(states @ rows[:2].T)
    # AᵀA = [[3, 2], [2, 3]], Aᵀ1 = [3, 3]: v = (.6, .6)
    np.testing.assert_allclose(lift.by_D, 0.6 * spread * np.ones(2), rtol=5e-3)
    assert lift.item_N.tolist() == [2]


def test_nothing_is_moved_in_place():
    rows = np.ones((3, 2), np.float32)
    moved = Lift(np.array([1]), np.array([1.0, -1.0])).move(rows)
    assert rows.tolist() == [[1, 1]] * 3 and moved.tolist() == [[1, 1], [2, 0], [1, 1]]
