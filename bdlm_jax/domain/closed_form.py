"""Item-to-item models in closed form: a user's scores are the sum of their items' rows in one matrix of similarities.

Nothing is trained by steps and there is no seed: these are the yardsticks that a learned model must pass.
"""

from collections.abc import Callable

import numpy as np
import scipy.linalg
from scipy.sparse import csr_matrix

from bdlm_jax.types import InputError

MOST_ITEMS = 50_000  # of EASE, whose dense (I, I) float32 matrix is inverted in place: 10 GB, about I³ operations
BLOCK_ENTRIES = 2**26  # similarities that ItemKNN holds before it keeps the nearest of each


def interaction_matrix(user_E: np.ndarray, item_E: np.ndarray, *, n_users: int, n_items: int) -> csr_matrix:
    """Returns the (U, I) float32 matrix of who had what; a repeated pair counts once."""
    pairs = np.sort(np.asarray(user_E, np.int64) * n_items + np.asarray(item_E, np.int64))
    pairs = pairs[np.diff(pairs, prepend=-1) > 0]  # as in `Split.pairs`
    ones = np.ones(len(pairs), np.float32)
    return csr_matrix((ones, (pairs // n_items, pairs % n_items)), shape=(n_users, n_items))


def item_knn(matrix_UI: csr_matrix, *, neighbours: int = 100, shrink: float = 0.0) -> csr_matrix:
    """Returns the (I, I) cosine similarities of items, s_ij = |U_i ∩ U_j| / (√(|U_i|·|U_j|) + shrink), of each item's
    nearest `neighbours` alone, itself left out; equal ones in catalogue order.

    Row i holds what item i says of others. Source: Sarwar et al. 2001, section 3.1; shrinkage as in Bell & Koren 2007.
    """
    n_items = matrix_UI.shape[1]
    size_I = np.sqrt(np.asarray(matrix_UI.sum(axis=0), np.float64).ravel())
    transposed_IU, rows, columns, values = matrix_UI.T.tocsr(), [], [], []
    block = max(1, BLOCK_ENTRIES // n_items)
    for start in range(0, n_items, block):
        counts_CI = (transposed_IU[start : start + block] @ matrix_UI).toarray()
        target_C = np.arange(start, start + len(counts_CI))
        similar_CI = counts_CI / np.maximum(size_I[target_C, None] * size_I[None] + shrink, 1e-12)
        similar_CI[np.arange(len(target_C)), target_C] = 0.0
        nearest_CK = np.argsort(-similar_CI, axis=1, kind="stable")[:, :neighbours]
        found_CK = np.take_along_axis(similar_CI, nearest_CK, axis=1)
        kept = found_CK > 0
        rows.append(nearest_CK[kept])
        columns.append(np.broadcast_to(target_C[:, None], nearest_CK.shape)[kept])
        values.append(found_CK[kept].astype(np.float32))
    entries = np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))
    return csr_matrix(entries, shape=(n_items, n_items))


def ease(matrix_UI: csr_matrix, *, l2: float = 100.0) -> np.ndarray:
    """Returns EASE's (I, I) weights: B = I - P·diag(P)^-1 with P = (XᵀX + l2·I)^-1, so that B's diagonal is 0.

    Source: Steck 2019 (Embarrassingly Shallow Autoencoders), equation 8.

    Raises:
      InputError: more than MOST_ITEMS items.
    """
    n_items = matrix_UI.shape[1]
    if n_items > MOST_ITEMS:
        raise InputError(
            f"ease inverts a dense matrix of items by items, and {n_items:,} items are more than the {MOST_ITEMS:,} it "
            "takes: leave ease out of config.models."
        )
    gram_II = (matrix_UI.T @ matrix_UI).toarray(order="F").astype(np.float32)
    gram_II[np.diag_indices(n_items)] += l2
    (factor,) = scipy.linalg.get_lapack_funcs(("potrf",), (gram_II,))
    (invert,) = scipy.linalg.get_lapack_funcs(("potri",), (gram_II,))
    upper_II, failed = factor(gram_II, lower=0, overwrite_a=1)
    if failed:
        raise InputError(f"ease cannot invert its matrix: raise l2, which is {l2:g}.")
    upper_II, _ = invert(upper_II, lower=0, overwrite_c=1)
    for start in range(0, n_items, 1024):  # the lower triangle, block by block: no second matrix
        stop = min(start + 1024, n_items)
        square = np.triu(upper_II[start:stop, start:stop])
        upper_II[start:stop, start:stop] = square + np.triu(square, 1).T
        upper_II[stop:, start:stop] = upper_II[start:stop, stop:].T
    upper_II /= -np.diag(upper_II).copy()[None]
    np.fill_diagonal(upper_II, 0.0)
    return upper_II


CLOSED_FORM: dict[str, Callable] = {"item_knn": item_knn, "ease": ease}  # (matrix_UI, **its section of the config)
