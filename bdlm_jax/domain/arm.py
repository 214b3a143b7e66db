"""What every domain model is to the rest of the package: a tuple of pure functions on the shared tables."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from bdlm_jax.types import Array, Params


class DomainArm(NamedTuple):
    """A domain model.

    Attributes:
      init: key -> domain params, what the model owns beside the shared tables ({} for MF and LightGCN).
      encode: (shared, domain) -> (user_UD, item_ID), the representations that are scored and aligned.
      score: (domain, user_BD, item_CD) -> (B, C), every pair.
      user_before: None, or (shared, domain, user_B, positive_B) -> user_BD, the users as they stood before that
        interaction. A model whose `encode` reads the history has seen the positive: train it with this instead.
    """

    init: Callable[[Array], Params]
    encode: Callable[[Params, Params], tuple[Array, Array]]
    score: Callable[[Params, Array, Array], Array]
    user_before: Callable[[Params, Params, Array, Array], Array] | None = None

    def score_pairs(self, domain: Params, user_BD: Array, item_BD: Array) -> Array:
        """Scores row b's user against row b's item: (B, D), (B, D) -> (B,)."""
        return jax.vmap(lambda user_D, item_D: self.score(domain, user_D[None], item_D[None])[0, 0])(user_BD, item_BD)

    def score_rows(self, domain: Params, user_BD: Array, item_BCD: Array) -> Array:
        """Scores row b's user against row b's own candidates: (B, D), (B, C, D) -> (B, C)."""
        return jax.vmap(lambda user_D, item_CD: self.score(domain, user_D[None], item_CD)[0])(user_BD, item_BCD)


def dot_score(domain: Params, user_BD: Array, item_CD: Array) -> Array:
    """Scores every pair by the inner product: (B, D), (C, D) -> (B, C)."""
    del domain
    return user_BD @ item_CD.T
