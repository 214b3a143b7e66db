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


def nearest(content_IC: np.ndarray, k: int, *, chunk: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (left, right) of every item with a text and the k others whose rows have the largest cosine with its own.

    Rows are of length 1, or zero where nothing is said: such an item has no pairs. Only cosines above 0 count.
    """
    left, right = [], []
    for start in range(0, len(content_IC), chunk):
        cosine_BI = content_IC[start : start + chunk] @ content_IC.T
        rows = np.arange(len(cosine_BI))
        cosine_BI[rows, start + rows] = 0.0
        best_Bk = np.argpartition(-cosine_BI, min(k, cosine_BI.shape[1] - 1), axis=1)[:, :k]
        row, column = np.nonzero(np.take_along_axis(cosine_BI, best_Bk, axis=1) > 0)
        left.append(start + row)
        right.append(best_Bk[row, column])
    return np.concatenate(left), np.concatenate(right)
