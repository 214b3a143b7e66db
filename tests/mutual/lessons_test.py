"""What a teacher says at every place of a history, and what the LM's step makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_bdlm
from scipy.special import log_softmax
from small_bdlm import COLD, HISTORIES, N_ITEMS, N_TEXT, N_USERS

from bdlm_jax.lm.text_head import TextHead
from bdlm_jax.mutual import lessons, lm_step, sharing
from bdlm_jax.mutual.options import LMWeights

KL = LMWeights(item=0.0, text=0.0, kl=1.0)
TEXTS = TextHead(np.random.default_rng(5).normal(size=(N_ITEMS, 3)).astype(np.float32), 0.7, 1.3)


@pytest.fixture(scope="module")
def made():
    arm, meeting = small_bdlm.make_arm(), small_bdlm.make_meeting()
    params = small_bdlm.make_params(arm, meeting)
    other = small_bdlm.make_params(arm, meeting)
    other["shared"]["item"] = other["shared"]["item"] * 1.5 + 0.2
    return arm, meeting, params, other


def kl(made, teacher, batch):
    arm, meeting, params, _ = made
    view = {"teacher": teacher}
    terms = lm_step.lm_losses(params, batch, view, small_bdlm.lm_constants(), arm=arm, meeting=meeting, weights=KL)
    return {name: float(total) for name, (total, _) in terms.items()}, float(terms["kl"][1])


def by_hand(made, texts, *, reads_lm):
    """Each history in a row of its own, place by place, in float64."""
    arm, meeting, params, other = made
    total = count = 0
    for user, history in enumerate(HISTORIES):
        prompt = small_bdlm.history_prompt(user)
        student, teacher = (small_bdlm.hidden_alone(p, prompt, arm, meeting) for p in (params, other))
        rows = [np.asarray(sharing.id_rows(p, meeting=meeting, arm=arm)[1], np.float64) for p in (params, other)]
        batch = small_bdlm.packing.pack([prompt], 16)
        held = [int(t) - N_TEXT - N_USERS for t in batch.tokens[0] if t >= N_TEXT + N_USERS]
        may = np.setdiff1d(np.arange(N_ITEMS), [*held, COLD])
        for place, target in zip(batch.item_index[0], batch.item_target[0]):
            if target < 0:
                continue
            read = [t - N_TEXT - N_USERS for t in batch.tokens[0, : place + 1] if t >= N_TEXT + N_USERS]
            says = teacher[place] @ rows[1].T if reads_lm else 0.0
            if texts is not None:
                at = batch.tokens[0, place] - N_TEXT - N_USERS
                said = texts.mean * texts.content_IC[read].mean(axis=0) if read else 0.0
                said = said + (texts.last * texts.content_IC[at] if at >= 0 else 0.0)
                says = says + texts.content_IC @ np.broadcast_to(said, 3)
            t = meeting.temperature
            student_log, teacher_log = (log_softmax(x[may] / t) for x in (student[place] @ rows[0].T, says))
            total += t**2 * np.sum(np.exp(teacher_log) * (teacher_log - student_log))
            count += 1
        assert set(held) == set(history)
    return total, count


@pytest.mark.parametrize(("texts", "reads_lm"), [(None, True), (TEXTS, True), (TEXTS, False)])
def test_the_term_is_that_of_every_place_of_every_history_alone(made, texts, reads_lm):
    arm, meeting, _, other = made
    teacher = lessons.make_teacher(other, texts, arm=arm, meeting=meeting, reads_lm=reads_lm)
    wanted, count = by_hand(made, texts, reads_lm=reads_lm)
    rows = small_bdlm.packing.pack([small_bdlm.history_prompt(user) for user in range(N_USERS)], 16)
    found = total = 0
    for user in range(N_USERS):  # a row of its own: what a row holds is no candidate in it
        row = small_bdlm.packing.pack([small_bdlm.history_prompt(user)], 16)
        terms, counted = kl(made, teacher, row.rows([0]))
        found, total = found + terms["kl"], total + counted
    assert total == count and set(terms) == {"kl"}
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    if texts is None:  # several histories to a row: fewer candidates, as many places
        assert kl(made, teacher, rows.rows(np.arange(len(rows))))[1] == count


def test_what_it_says_of_the_items_of_a_row_is_not_heard(made):
    """The teacher has learnt by heart what comes next there, and it is what the LM's own loss has to learn."""
    arm, meeting, _, other = made
    teacher = lessons.make_teacher(other, None, arm=arm, meeting=meeting)
    batch = small_bdlm.packing.pack([small_bdlm.history_prompt(4)], 16).rows([0])

    def louder(items):
        return teacher | {"rows_IN": teacher["rows_IN"].at[items].multiply(9.0)}

    assert kl(made, louder(jnp.array(HISTORIES[4])), batch) == kl(made, teacher, batch)
    assert kl(made, louder(0), batch) != kl(made, teacher, batch)


def test_an_lm_that_says_what_its_teacher_says_has_nothing_to_learn(made):
    arm, meeting, params, _ = made
    teacher = lessons.make_teacher(params, None, arm=arm, meeting=meeting)

    def loss(params):
        constants, options = small_bdlm.lm_constants(), {"arm": arm, "meeting": meeting, "weights": KL}
        return lm_step.lm_losses(params, small_bdlm.whole_batch(), {"teacher": teacher}, constants, **options)["kl"][0]

    value, gradient = jax.value_and_grad(loss)(params)
    assert abs(value) < 1e-5 and max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) < 1e-5


def test_at_an_item_the_head_reads_what_its_own_history_has_had_so_far(made):
    arm, meeting, _, other = made
    batch, first = small_bdlm.whole_batch(), N_TEXT + N_USERS
    assert batch["segments"].max() > 2
    item_BL = np.where(batch["tokens"] >= first, batch["tokens"] - first, -1)
    teacher = lessons.make_teacher(other, TEXTS, arm=arm, meeting=meeting, reads_lm=False)
    every = np.broadcast_to(np.arange(item_BL.shape[1]), item_BL.shape)
    said, content_IC = lessons.teach(teacher, batch | {"item_index": every}, item_BL, meeting=meeting)
    np.testing.assert_array_equal(content_IC, TEXTS.content_IC)
    for row, place in zip(*np.nonzero(item_BL >= 0)):
        same = batch["segments"][row, : place + 1] == batch["segments"][row, place]
        had = item_BL[row, : place + 1][same & (item_BL[row, : place + 1] >= 0)]
        np.testing.assert_allclose(said[row, place], TEXTS.read(had), rtol=1e-5, atol=1e-6)
