import numpy as np

from bdlm_jax.data.text_vectors import nearest, text_vectors

TEXTS = ["Rose soap, red", "rose soap blue", "Lavender oil", "lavender oil large", "the only word", "rose oil", ""]


def test_texts_that_share_rare_words_lie_close_and_what_shares_none_lies_nowhere():
    rows_IC = text_vectors(TEXTS, width=16)
    assert rows_IC.shape == (7, 16)
    np.testing.assert_allclose(np.linalg.norm(rows_IC, axis=1), [1, 1, 1, 1, 0, 1, 0], atol=1e-6)
    cosine = rows_IC @ rows_IC.T
    assert cosine[0, 1] > 0.99
    assert cosine[2, 3] > 0.99
    assert abs(cosine[0, 2]) < 0.3
    assert cosine[0, 2] < cosine[0, 5] < cosine[0, 1]
    np.testing.assert_array_equal(rows_IC, text_vectors(TEXTS, width=16))


def test_with_all_axes_the_cosines_are_those_of_the_weighted_words():
    words, texts = ["a", "b", "c", "d"], ["a b", "b c", "c d d", "a d", "a b c"]
    counts = np.array([[text.split().count(word) for word in words] for text in texts], float)
    weights = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * (np.log(5 / (counts > 0).sum(0)) + 1)
    unit = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    left, size, _ = np.linalg.svd(unit, full_matrices=False)
    kept = (left * size)[:, :3]
    kept /= np.linalg.norm(kept, axis=1, keepdims=True)
    rows_IC = text_vectors(texts, width=3)
    np.testing.assert_allclose(rows_IC @ rows_IC.T, kept @ kept.T, atol=1e-5)


def test_a_catalogue_without_common_words_has_no_vectors():
    assert not text_vectors(["x", "y", "z"], width=4).any()


def test_each_text_has_its_nearest_others_whatever_the_chunk():
    rows_IC = text_vectors(TEXTS, width=16)
    cosine = rows_IC @ rows_IC.T - 2 * np.eye(len(TEXTS), dtype=np.float32)
    for k, chunk in ((1, 1024), (2, 3), (50, 1)):
        left, right = nearest(rows_IC, k, chunk=chunk)
        for item in range(len(TEXTS)):
            best = np.argsort(-cosine[item])[:k]
            assert set(right[left == item]) == set(best[cosine[item, best] > 0])
    assert not {4, 6} & {*left, *right}  # of the text with no common word, and of none, nothing is said
