import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from bdlm_jax.lm.config import LMConfig
from bdlm_jax.mutual import losses
from bdlm_jax.mutual.losses import (
    ALIGN,
    NEVER,
    align_loss,
    bpr_loss,
    catalogue_kl,
    catalogue_loss,
    kl_loss,
    sampled_loss,
    text_loss,
)

N, N_ITEMS, M = 7, 5, 3


def draw(number, *shape):
    return jax.random.normal(jax.random.key(number), shape)


def test_bpr_weighs_the_softplus_of_the_margin():
    total, weight = bpr_loss(jnp.array([2.0, 0.0, 9.0]), jnp.array([1.0, 3.0, 0.0]), jnp.array([1.0, 2.0, 0.0]))
    expected = -math.log(1 / (1 + math.exp(-(2.0 - 1.0)))) + 2 * -math.log(1 / (1 + math.exp(3.0)))
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert weight == 3.0


def full_cross_entropy(state_NM, rows_IM, bias_I, target_N):
    logits = state_NM @ rows_IM.T + bias_I
    rows = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(target_N, 0))
    return jnp.sum(jnp.where(target_N >= 0, rows, 0.0))


def tied_text_loss(state_NM, rows_VM, bias_V, target_N, *, chunk, skip=False):
    """The text's cross-entropy as the catalogue's: a decoder whose head is the rows; it has no bias."""
    config = LMConfig(vocab_size=N_ITEMS, width=M, n_layers=1, n_heads=1, n_kv_heads=1, mlp_width=M, head_width=2)
    total, count = text_loss({"embedding": rows_VM}, config, state_NM, target_N, chunk=chunk, skip=skip)
    return total + 0.0 * bias_V.sum(), count


def all_drawn(state_NM, rows_IM, bias_I, target_N):
    total, count = sampled_loss(state_NM, rows_IM, target_N, jnp.array([3, 0, 4, 1, 2]), among=N_ITEMS)
    return total + 0.0 * bias_I.sum(), count


# Logits at a time: all, two chunks of 4 rows for 7 states, one row, less than one row.
@pytest.mark.parametrize(
    ("loss", "bias"),
    [(partial(catalogue_loss, chunk_entries=n), draw(2, N_ITEMS)) for n in (1000, 4 * N_ITEMS, N_ITEMS, 1)]
    + [(partial(catalogue_loss, chunk_entries=n, skip=True), draw(2, N_ITEMS)) for n in (1000, 2 * N_ITEMS)]
    + [(all_drawn, jnp.zeros(N_ITEMS))]
    + [(partial(tied_text_loss, chunk=n), jnp.zeros(N_ITEMS)) for n in (None, 1000, 4, 1)]
    + [(partial(tied_text_loss, chunk=n, skip=True), jnp.zeros(N_ITEMS)) for n in (None, 4)],
)
def test_cross_entropy_and_its_gradient_equal_the_full_softmax(loss, bias):
    arrays, target = (draw(0, N, M), draw(1, N_ITEMS, M), bias), jnp.array([0, 4, -1, 2, 2, -1, 3])
    value, gradients = jax.jit(jax.value_and_grad(lambda *a: loss(*a, target)[0], argnums=(0, 1)))(*arrays)
    wanted, wanted_gradients = jax.jit(jax.value_and_grad(full_cross_entropy, argnums=(0, 1)))(*arrays, target)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    for actual, expected in zip(gradients, wanted_gradients):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    assert loss(*arrays, target)[1] == 5
    assert loss(*arrays, jnp.full(N, -1)) == (0, 0)


def test_drawn_items_stand_for_all_and_a_drawn_target_counts_once():
    state, rows, target, drawn = draw(0, N, M), draw(1, N_ITEMS, M), jnp.array([0, 4, -1, 2, 2, -1, 3]), [4, 1]
    logits = np.asarray(state @ rows.T, np.float64)
    wanted = 0.0
    for n, own in enumerate(target.tolist()):
        if own >= 0:
            others = sum(5 / 2 * np.exp(logits[n, item]) for item in drawn if item != own)
            wanted += np.log(np.exp(logits[n, own]) + others) - logits[n, own]
    total, count = sampled_loss(state, rows, target, jnp.array(drawn), among=N_ITEMS)
    np.testing.assert_allclose(total, wanted, rtol=1e-5)
    assert count == 5


def test_a_barred_item_takes_no_share_and_large_logits_do_not_overflow():
    state, rows, target = draw(0, N, M), draw(1, N_ITEMS, M), jnp.arange(N) % 4
    bias = jnp.array([0.0, 0.0, 0.0, 0.0, -1e9])
    value, gradient = jax.value_and_grad(lambda rows: catalogue_loss(state, rows, bias, target)[0])(rows)
    np.testing.assert_allclose(value, catalogue_loss(state, rows[:4], bias[:4], target)[0], rtol=1e-6)
    assert not gradient[4].any() and gradient[3].any()
    total, _ = catalogue_loss(jnp.array([[100.0]]), jnp.array([[1.0], [2.0]]), jnp.zeros(2), jnp.array([0]))
    np.testing.assert_allclose(total, 200.0 - 100.0, rtol=1e-6)


def test_mse_and_cosine_by_hand():
    student, teacher = jnp.array([[3.0, 4.0], [1.0, 0.0]]), jnp.array([[0.0, 2.0], [0.0, 5.0]])
    weight, table = jnp.array([2.0, 1.0]), jnp.array([[-4.0], [4.0]])  # of deviation 4
    total, count = align_loss(student, teacher, weight, kind="mse", table=table)
    np.testing.assert_allclose(total, (2 * (3**2 + 2**2) / 2 + (1**2 + 5**2) / 2) / 4**2, rtol=1e-6)
    assert count == 3.0
    total, _ = align_loss(student, teacher, weight, kind="cosine", table=table)
    np.testing.assert_allclose(total, 2 * (1 - (4 * 2) / (5 * 2)) + (1 - 0), rtol=1e-6)


def test_infonce_by_hand_and_rows_of_weight_zero_are_no_negatives():
    student = jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    teacher = jnp.array([[3.0, 0.0], [3.0, 3.0], [0.0, 1.0]])
    weight = jnp.array([1.0, 2.0, 0.0])
    t, half = 0.5, 1 / math.sqrt(2)
    # cosines of row 0 with teachers 0, 1: 1, 1/√2; of row 1: 0, 1/√2; teacher 2 has no weight.
    first = -math.log(math.exp(1 / t) / (math.exp(1 / t) + math.exp(half / t)))
    second = -math.log(math.exp(half / t) / (math.exp(0 / t) + math.exp(half / t)))
    rows = ALIGN["infonce"](student, teacher, weight_N=weight, temperature=t)
    np.testing.assert_allclose(rows[:2], [first, second], rtol=1e-5)


def test_infonce_of_a_large_batch_has_every_so_many_rows_as_negatives(monkeypatch):
    monkeypatch.setattr(losses, "MOST_NEGATIVES", 3)  # of 7 rows: 0, 3 and 6
    student, teacher = draw(0, 7, M), draw(1, 7, M)
    cosines = np.asarray(student) @ np.asarray(teacher).T
    cosines /= np.linalg.norm(student, axis=1)[:, None] * np.linalg.norm(teacher, axis=1)
    rows = ALIGN["infonce"](student, teacher, weight_N=jnp.ones(7), temperature=0.5)
    for n, row in enumerate(cosines / 0.5):
        of = sorted({0, 3, 6, n})
        np.testing.assert_allclose(rows[n], np.log(np.exp(row[of]).sum()) - row[n], rtol=1e-5)


def test_kl_by_hand():
    teacher, student, t = jnp.log(jnp.array([[0.75, 0.25]])), jnp.log(jnp.array([[0.5, 0.5]])), 3.0
    total, count = kl_loss(t * student, t * teacher, jnp.array([2.0]), temperature=t)
    nats = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    np.testing.assert_allclose(total, t**2 * 2 * nats, rtol=1e-5)
    assert count == 2.0


def test_kl_at_every_place_and_its_gradient_equal_the_full_softmax_over_the_candidates_of_the_row():
    batch, places, temperature = 3, 4, 1.7
    state, teacher = draw(1, batch, places, M), draw(2, batch, places, 2)
    rows, teacher_rows = draw(3, N_ITEMS, M), draw(4, N_ITEMS, 2)
    known = jnp.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]], jnp.float32)
    never = jnp.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]], bool)

    def ours(state, rows):
        options = {"temperature": temperature}
        return 3 * catalogue_kl(state, rows, teacher, teacher_rows, known, never, **options)[0]

    def plain(state, rows):
        hide = jnp.where(never[:, None], NEVER, 0.0)
        pair = (jax.nn.log_softmax((x + hide) / temperature) for x in (state @ rows.T, teacher @ teacher_rows.T))
        student, teaches = pair
        return 3 * temperature**2 * jnp.sum(known[..., None] * jnp.exp(teaches) * (teaches - student))

    assert catalogue_kl(state, rows, teacher, teacher_rows, known, never, temperature=1.0)[1] == known.sum()
    np.testing.assert_allclose(ours(state, rows), plain(state, rows), rtol=1e-5)
    for found, wanted in zip(*(jax.grad(loss, argnums=(0, 1))(state, rows) for loss in (ours, plain))):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_kl_is_zero_with_zero_gradient_at_equal_scores(temperature):
    scores, weight = draw(3, N, N_ITEMS), jnp.ones(N)
    value, gradient = jax.value_and_grad(lambda s: kl_loss(s, scores + 7.0, weight, temperature=temperature)[0])(scores)
    np.testing.assert_allclose(value, 0.0, atol=1e-5)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-5)


WEIGHT, UNEVEN = jnp.abs(draw(8, N)), jnp.array([1.0, 0.0, 2.0, 1.0, 1.0, 0.5, 1.0])
TEACHER, SCORES, TABLE = draw(7, N, M), draw(1, N, N_ITEMS), jnp.array([-0.5, 0.5])
LOSSES = {
    "bpr": (lambda p, n: bpr_loss(p, n, WEIGHT), (draw(0, N), draw(1, N))),
    "kl": (lambda s: kl_loss(s, SCORES, WEIGHT, temperature=2.0), (draw(0, N, N_ITEMS),)),
}
for kind in ALIGN:
    aligned = partial(align_loss, teacher_ND=TEACHER, weight_N=UNEVEN, kind=kind, table=TABLE)
    LOSSES[kind] = aligned, (0.2 * draw(6, N, M) + TEACHER,)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_by_finite_differences(name):
    loss, arrays = LOSSES[name]
    check_grads(jax.jit(lambda *a: loss(*a)[0]), arrays, order=1, modes=["rev"], atol=1e-2, rtol=1e-2)
