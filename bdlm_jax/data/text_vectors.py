"""Vectors of what items' texts say, without any training: words weighed by how rare they are, then the main axes.

Latent semantic analysis (Deerwester et al. 1990) over TF-IDF. Two items whose texts share rare words lie close.
"""

import collections
import re
from collections.abc import Sequence

import numpy as np
import scipy.sparse as sparse
from scipy.sparse.linalg import svds

_WORD = re.compile(r"\w+")


def text_vectors(texts: Sequence[str], *, width: int) -> np.ndarray:
    """Makes (I, width) float32 rows of length 1; a text without a word that another has too is a row of zeros.

    Where the texts span fewer axes than `width`, the last columns are zero.
    """
    counts = [collections.Counter(_WORD.findall(text.lower())) for text in texts]
    texts_with = collections.Counter(word for count in counts for word in count)
    column = {word: number for number, word in enumerate(sorted(w for w, n in texts_with.items() if n > 1))}
    vectors = np.zeros((len(texts), width), np.float32)
    rank = min(width, min(len(texts), len(column)) - 1)
    if rank < 1:
        return vectors
    at = [(row, column[w], 1 + np.log(n)) for row, count in enumerate(counts) for w, n in count.items() if w in column]
    rows, columns, values = (np.array(part) for part in zip(*at))
    rarity = np.log(len(texts) / np.bincount(columns, minlength=len(column))) + 1
    weights_IW = sparse.csr_matrix((values * rarity[columns], (rows, columns)), (len(texts), len(column)))
    length_I = sparse.linalg.norm(weights_IW, axis=1)
    weights_IW = sparse.diags(1 / np.maximum(length_I, 1e-12)) @ weights_IW
    start = np.random.default_rng(0).standard_normal(min(weights_IW.shape))
    left_IR, size_R, _ = svds(weights_IW, k=rank, v0=start)
    made = (left_IR * size_R)[:, ::-1]
    made *= np.sign(made[np.abs(made).argmax(axis=0), np.arange(rank)])  # an axis has no direction of its own
    vectors[:, :rank] = made / np.maximum(np.linalg.norm(made, axis=1, keepdims=True), 1e-6)
    vectors[length_I == 0] = 0
    return vectors
