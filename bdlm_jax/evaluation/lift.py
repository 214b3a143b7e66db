"""What an item that nobody has had lacks in a ranking: not a taste, which its text gives it, but a prior.

A softmax over items makes rows long whose items are often the answer, and an item that never is stays short whatever
its text says: it is ranked well among its like, and behind all others. Its row is moved in the one direction that means
the same to everybody, v with state·v ≈ 1, so that all scores of such items rise alike; how far is chosen on validation
(`run.lifts`). A row stays a row: what is served and exported is an inner product as before. Ours.
"""

from typing import NamedTuple

import numpy as np

from bdlm_jax.types import Array

RIDGE = 1e-3  # of the mean squared state, so that v stays finite where states lie in a plane


class Lift(NamedTuple):
    """The items (N,) whose rows are moved, and by what (D,)."""

    item_N: Array
    by_D: Array

    def move(self, item_ID: Array) -> np.ndarray:
        """Returns a copy of the rows (I, D) in which those of the items are moved."""
        moved_ID = np.array(item_ID, np.float32)
        moved_ID[np.asarray(self.item_N)] += np.asarray(self.by_D, np.float32)
        return moved_ID


def make_lift(state_UD: Array, item_ID: Array, cold_I: Array, *, amount: float) -> Lift:
    """Lifts the scores of `cold_I`'s items by `amount` standard deviations of all users' scores of the other items.

    v is the least-squares solution of state·v = 1 over the users (rows of zeros, of users who have none, are left
    out). The deviation is over every pair of a user and an item.
    """
    states = np.asarray(state_UD, np.float64)
    states, others = states[np.any(states != 0, axis=1)], np.asarray(item_ID, np.float64)[~np.asarray(cold_I)]
    square_DD, mean_D = states.T @ states / len(states), states.mean(axis=0)
    ridge = RIDGE * np.trace(square_DD) / len(square_DD)
    v_D = np.linalg.solve(square_DD + ridge * np.eye(len(square_DD)), mean_D)
    variance = np.sum(square_DD * (others.T @ others / len(others))) - (mean_D @ others.mean(axis=0)) ** 2
    by_D = amount * np.sqrt(max(variance, 0.0)) * v_D
    return Lift(np.flatnonzero(cold_I).astype(np.int32), by_D.astype(np.float32))
