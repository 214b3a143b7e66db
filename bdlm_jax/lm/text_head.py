"""What likeness of items adds to the LM's scores: an item is the likelier, the more it is like those that one has had.

    score(item) = h·row_item + last·(content of the last item · its own) + mean·(mean over the history of such products)

The content is what an item's text says, a row of length 1 (a product is a cosine), or its row in the domain model
("graph"): who had it, read item by item, so that a history alone is enough, where that model has a row of each user.
Nothing here is trained: what is learnt with the rest is learnt on items that the LM knows by heart, for which it needs
no more. The two weights are chosen on validation, as those of a pool are (`run.teachers.weigh_texts`). Ours.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bdlm_jax.types import Array


class TextHead(NamedTuple):
    """What is known of each item beside the LM (I, C), and the weights of the two terms."""

    content_IC: Array
    last: float = 0.0
    mean: float = 0.0

    def read(self, history: Array) -> np.ndarray:
        """Returns the (C,) of which the product with an item's content is what is added; zeros for no history."""
        content_IC, history = np.asarray(self.content_IC), np.asarray(history, np.int64)
        if not len(history):
            return np.zeros(content_IC.shape[1], np.float32)
        return self.last * content_IC[history[-1]] + self.mean * content_IC[history].mean(axis=0)

    def widen(self, state_UM: Array, rows_IM: Array, histories: Sequence[Array]) -> tuple[np.ndarray, np.ndarray]:
        """Returns (U, M+C) and (I, M+C), whose products are the states' with the rows and what is added."""
        said_UC = np.stack([self.read(history) for history in histories])
        pairs = (state_UM, said_UC), (rows_IM, self.content_IC)
        return tuple(np.concatenate(pair, axis=1, dtype=np.float32) for pair in pairs)
