"""What every domain model is to the rest of the package: a tuple of pure functions on the shared tables."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdlm_jax.types import Array, Params


class Inputs(NamedTuple):
    """What any domain model may be built from: sizes, the interactions it may know (oldest first), vectors of texts.

    The defaults are a served model's, which scores and reads but knows nobody.
    """

    width: int
    n_users: int = 0
    n_items: int = 0
    user_E: Array = np.zeros(0, np.int64)
    item_E: Array = np.zeros(0, np.int64)
    content_IC: Array | None = None

    @property
    def histories(self) -> tuple[np.ndarray, np.ndarray]:
        """Every user's items in time order as rows: (indptr (U+1,), item (E,))."""
        user_E = np.asarray(self.user_E)
        indptr = np.concatenate([[0], np.cumsum(np.bincount(user_E, minlength=self.n_users))])
        return indptr, np.asarray(self.item_E)[np.argsort(user_E, kind="stable")]


def inner_products(left_BD: Array, right_CD: Array) -> Array:
    """Every pair, (B, D), (C, D) -> (B, C), in full float32: an accelerator's own TF32 or bfloat16 would move ranks."""
    return jnp.matmul(left_BD, right_CD.T, precision="highest")


def dot_score(domain: Params, user_BD: Array, item_CD: Array) -> Array:
    """The score of most models, the inner product; it has no parameters."""
    del domain
    return inner_products(user_BD, item_CD)


class DomainArm(NamedTuple):
    """A domain model.

    Attributes:
      init: key -> domain params, what the model owns beside the shared tables ({} for MF and LightGCN).
      encode: (shared, domain) -> (user_UD, item_ID), the representations that are scored and aligned.
      score: (domain, user_BD, item_CD) -> (B, C), every pair.
      windows: None, or (indptr, item) of histories in time order -> (W, L), the rows from which the model learns, -1
        after the end. Such a model learns all items of a row at once, by softmax over the catalogue, in BPR's place,
        and never reads shared["user"].
      states_before: None, or (shared, domain, window_BL, key_B) -> (B, L, D), the state before each item of such rows,
        whose inner product with an item's row is its logit; the keys are its dropout's, one a row.
      users: None, or (shared, domain, user_B) -> user_BD, rows of `encode` at the cost of these alone.
      auxiliary: None, or the model's own, already weighted loss (shared, domain, user_B, item_B, weight_B, key) ->
        (sum, count). It is given the whole batch of interactions and the same key on every device, so that rows may be
        compared with each other; weight 0 pads.
      read: None, or (domain, item_ID, history_n) -> user_D, a new user by history; None is serving's closed rule.
    """

    init: Callable[[Array], Params]
    encode: Callable[[Params, Params], tuple[Array, Array]]
    score: Callable[[Params, Array, Array], Array] = dot_score
    windows: Callable[[Array, Array], np.ndarray] | None = None
    states_before: Callable[[Params, Params, Array, Array], Array] | None = None
    users: Callable[[Params, Params, Array], Array] | None = None
    auxiliary: Callable[[Params, Params, Array, Array, Array, Array], tuple[Array, Array]] | None = None
    read: Callable[[Params, Array, Array], Array] | None = None

    @property
    def dot(self) -> bool:
        """Whether the score is the inner product, which needs neither parameters nor JAX."""
        return self.score is dot_score

    def score_pairs(self, domain: Params, user_BD: Array, item_BD: Array) -> Array:
        """Scores row b's user against row b's item: (B, D), (B, D) -> (B,)."""
        return jax.vmap(lambda user_D, item_D: self.score(domain, user_D[None], item_D[None])[0, 0])(user_BD, item_BD)
