"""Baselines without training: popularity, and EASE's item-item regression solved in one step."""

import numpy as np
import scipy.sparse

from bdlm_jax.types import Array, InputError


def item_pop_scores(degree_I: Array) -> np.ndarray:
    """Scores every item by its count of training interactions: (I,) -> (I,) float32, the same for every user."""
    return np.asarray(degree_I, np.float32)


def ease_weights(
    user_E: Array, item_E: Array, *, n_users: int, n_items: int, regularisation: float = 500.0
) -> np.ndarray:
    """Solves EASE: B = argmin ‖X - XB‖² + λ‖B‖² with diag(B) = 0, that is B_ij = -P_ij/P_jj with P = (XᵀX + λ)⁻¹.

    Args:
      user_E: (E,) users of the training interactions.
      item_E: (E,) items.
      n_users: U.
      n_items: I; memory is 8·I² bytes, time I³.
      regularisation: λ > 0, in interactions.

    Returns:
      (I, I) float32; score with `ease_scores`. Source: Steck 2019, equation 8.

    Raises:
      InputError: λ is not positive.
    """
    if not regularisation > 0:
        raise InputError(f"ease needs a positive regularisation, got {regularisation}: try 500.")
    seen_UI = _interaction_matrix(user_E, item_E, n_users, n_items)
    gram = (seen_UI.T @ seen_UI).toarray()
    gram[np.diag_indices(n_items)] += regularisation
    inverse = np.linalg.inv(gram)
    weights_II = -inverse / np.diag(inverse)
    weights_II[np.diag_indices(n_items)] = 0.0
    return weights_II.astype(np.float32)


def ease_scores(weights_II: Array, user_E: Array, item_E: Array, *, n_users: int) -> np.ndarray:
    """Scores the whole catalogue for each user from their own interactions: (U, I) float32 = X·B."""
    weights_II = np.asarray(weights_II, np.float32)
    return _interaction_matrix(user_E, item_E, n_users, weights_II.shape[0]).astype(np.float32) @ weights_II


def _interaction_matrix(user_E, item_E, n_users, n_items):
    matrix = scipy.sparse.csr_matrix((np.ones(len(user_E)), (user_E, item_E)), shape=(n_users, n_items))
    matrix.data[:] = 1.0
    return matrix
