"""What texts add to the LM's scores: an item is the likelier, the more its text is like those that a history has.

    score(item) = h·row_item + last·cos(last item's text, its text) + mean·(mean over the history of such cosines)

Nothing here is trained: what is learnt with the rest is learnt on items that the LM knows by heart, for which it needs
no text. The two weights are chosen on validation, as those of a pool are (`run.teachers.weigh_texts`). Ours.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bdlm_jax.types import Array


class TextHead(NamedTuple):
    """Rows of length 1 that say what each item's text says (I, C), and the weights of the two terms."""

    content_IC: Array
    last: float = 0.0
    mean: float = 0.0

    def read(self, history: Array) -> np.ndarray:
        """Returns the (C,) of which the product with an item's row is what its text adds; zeros for no history."""
        content_IC, history = np.asarray(self.content_IC), np.asarray(history, np.int64)
        if not len(history):
            return np.zeros(content_IC.shape[1], np.float32)
        return self.last * content_IC[history[-1]] + self.mean * content_IC[history].mean(axis=0)

    def widen(self, state_UM: Array, rows_IM: Array, histories: Sequence[Array]) -> tuple[np.ndarray, np.ndarray]:
        """Returns (U, M+C) and (I, M+C), whose products are the states' with the rows and what the texts add."""
        said_UC = np.stack([self.read(history) for history in histories])
        pairs = (state_UM, said_UC), (rows_IM, self.content_IC)
        return tuple(np.concatenate(pair, axis=1, dtype=np.float32) for pair in pairs)
