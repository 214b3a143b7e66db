import numpy as np

from bdlm_jax.lm.text_head import TextHead

CONTENT_IC = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], np.float32)


def test_what_texts_add_is_the_last_items_likeness_and_the_mean_of_all():
    head = TextHead(CONTENT_IC, last=2.0, mean=0.5)
    wanted = [2.0 * CONTENT_IC[1] @ row + 0.5 * (CONTENT_IC[0] @ row + CONTENT_IC[1] @ row) / 2 for row in CONTENT_IC]
    np.testing.assert_allclose(CONTENT_IC @ head.read([0, 1]), wanted, rtol=1e-6)
    assert not head.read([]).any()


def test_a_row_of_a_domain_model_needs_no_length_of_one():
    content_IC = 3.0 * CONTENT_IC  # products, and no cosines
    head = TextHead(content_IC, last=1.0, mean=0.0)
    assert np.allclose(content_IC @ head.read([2, 0]), content_IC @ content_IC[0])


def test_widened_products_are_the_scores_and_what_texts_add():
    head, generator = TextHead(CONTENT_IC, last=1.0, mean=3.0), np.random.default_rng(0)
    state_UM, rows_IM = generator.normal(size=(2, 4)), generator.normal(size=(3, 4))
    histories = [[2, 0], [1]]
    query, key = head.widen(state_UM, rows_IM, histories)
    added = np.stack([CONTENT_IC @ head.read(history) for history in histories])
    np.testing.assert_allclose(query @ key.T, state_UM @ rows_IM.T + added, rtol=1e-5)
