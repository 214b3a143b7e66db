import functools

import jax
import numpy as np
import pytest
import small_bdlm
from scipy.special import log_softmax
from small_bdlm import COLD, HISTORIES, LM_ALL, N_ITEMS, TITLES

from bdlm_jax.lm import prompts
from bdlm_jax.mutual import lm_step, sharing
from bdlm_jax.mutual.options import LMWeights

ARM, MEETING = small_bdlm.make_arm(), small_bdlm.make_meeting()
WARM_I = np.arange(N_ITEMS) != COLD


@pytest.fixture(scope="module")
def params():
    return small_bdlm.make_params(ARM, MEETING)


def test_every_term_of_the_lm_equals_the_prompts_taken_one_by_one(params):
    view, _ = small_bdlm.make_views(ARM, MEETING, params)
    user_UD, item_ID = (np.asarray(view[name], np.float64) for name in ("user", "item"))
    rows_IM = np.asarray(sharing.id_rows(params, meeting=MEETING, arm=ARM)[1], np.float64)
    embedding_VM, out = params["lm"]["embedding"], params["lm"]["bridge"]

    wanted = {name: np.zeros(2) for name in ("item", "text", "align_user", "align_item", "kl")}

    def add(name, value):
        wanted[name] += value, 1

    def read(prompt):
        """Adds what the prompt says of text; returns its states, and the last of them through the bridge out."""
        hidden = small_bdlm.hidden_alone(params, prompt, ARM, MEETING)
        for at in np.flatnonzero(prompt.text_targets >= 0):
            add("text", -log_softmax(hidden[at] @ embedding_VM.T)[prompt.text_targets[at]])
        return hidden, hidden[-1] @ out["out"] + out["out_bias"]

    for user, history in enumerate(HISTORIES):
        prompt = small_bdlm.history_prompt(user)
        hidden, z_user = read(prompt)
        for at in np.flatnonzero(prompt.item_targets >= 0):
            logits = np.where(WARM_I, hidden[at] @ rows_IM.T, -np.inf)
            add("item", -log_softmax(logits)[prompt.item_targets[at]])
        add("align_user", small_bdlm.align_mse(z_user, user_UD[user], user_UD))
        open_I = WARM_I & ~np.isin(np.arange(N_ITEMS), history)
        teacher, student = user_UD[user] @ item_ID.T, hidden[-1] @ rows_IM.T
        add("kl", small_bdlm.softened_kl(teacher[open_I], student[open_I], MEETING.temperature))
    for item, title in enumerate(TITLES):
        _, z_item = read(prompts.card_prompt(small_bdlm.make_vocabulary(), item, title))
        if item != COLD:
            add("align_item", small_bdlm.align_mse(z_item, item_ID[item], item_ID))

    terms_of = functools.partial(lm_step.lm_losses, arm=ARM, meeting=MEETING)
    inputs = params, small_bdlm.whole_batch(), view, small_bdlm.lm_constants()
    terms = jax.jit(functools.partial(terms_of, weights=LM_ALL))(*inputs)
    assert set(terms) == set(wanted)
    for name, (total, count) in terms.items():
        np.testing.assert_allclose(total, wanted[name][0], rtol=2e-4, err_msg=name)
        assert count == wanted[name][1], name
    assert list(jax.eval_shape(functools.partial(terms_of, weights=LMWeights(text=0.0)), *inputs)) == ["item"]


def test_a_teacher_is_heard_of_users_by_its_own_states_and_rows(params):
    rng = np.random.default_rng(0)
    state_UN, rows_IN = rng.normal(size=(len(HISTORIES), 5)), rng.normal(size=(N_ITEMS, 5))
    rows_IM = np.asarray(sharing.id_rows(params, meeting=MEETING, arm=ARM)[1], np.float64)
    wanted = 0.0
    for user, history in enumerate(HISTORIES):
        hidden = small_bdlm.hidden_alone(params, small_bdlm.history_prompt(user), ARM, MEETING)
        open_I = WARM_I & ~np.isin(np.arange(N_ITEMS), history)
        teacher, student = state_UN[user] @ rows_IN.T, hidden[-1] @ rows_IM.T
        wanted += small_bdlm.softened_kl(teacher[open_I], student[open_I], MEETING.temperature)
    terms_of = functools.partial(lm_step.lm_losses, arm=ARM, meeting=MEETING)
    view = {"state_user": state_UN.astype(np.float32), "rows_item": rows_IN.astype(np.float32)}
    inputs = params, small_bdlm.whole_batch(), view, small_bdlm.lm_constants()
    total, count = jax.jit(functools.partial(terms_of, weights=LMWeights(item=0.0, text=0.0, kl=1.0)))(*inputs)["kl"]
    np.testing.assert_allclose(total, wanted, rtol=2e-4)
    assert count == len(HISTORIES)


def test_the_step_reports_the_weighted_sum_and_draws_new_dropout(params):
    meeting = small_bdlm.make_meeting(reads="layer0", dropout=0.5)
    weights, optimizer = LMWeights(item=2.0, text=0.5), small_bdlm.make_optimizer(rate=0.0)
    step = jax.jit(small_bdlm.make_lm_step(ARM, meeting, weights=weights, optimizer=optimizer))
    batch = small_bdlm.make_rows().batch(0, batch_size=8, seed=0)
    state = small_bdlm.make_state(params, optimizer)
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch, {}, small_bdlm.lm_constants())
        np.testing.assert_allclose(metrics["loss"], 2.0 * metrics["item"] + 0.5 * metrics["text"], rtol=1e-6)
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3  # the params stand still (rate 0): only dropout differs
    assert state.step == 3
    _, again = step(small_bdlm.make_state(params, optimizer), batch, {}, small_bdlm.lm_constants())
    assert float(again["loss"]) == losses[0]


def test_a_drawn_softmax_is_the_whole_ones_where_all_are_drawn_and_is_drawn_anew_each_step(params):
    meeting = small_bdlm.make_meeting(reads="layer0")
    weights, optimizer = LMWeights(text=0.0), small_bdlm.make_optimizer(rate=0.0)
    batch = small_bdlm.make_rows().batch(0, batch_size=8, seed=0)
    constants = small_bdlm.lm_constants() | {"warm_item_W": np.flatnonzero(WARM_I)}

    def losses(softmax_items, steps=3):
        options = {"weights": weights, "optimizer": optimizer, "softmax_items": softmax_items}
        step, state = (
            jax.jit(small_bdlm.make_lm_step(ARM, meeting, **options)),
            small_bdlm.make_state(params, optimizer),
        )
        found = []
        for _ in range(steps):
            state, metrics = step(state, batch, {}, constants)
            found.append((float(metrics["item"]), float(metrics["gradient_norm"])))
        return np.array(found)

    np.testing.assert_allclose(losses(1000), losses(0), rtol=1e-5)
    few = losses(3, steps=40)
    assert len(set(few[:, 0])) > 3
    assert abs(few[:, 0].mean() - losses(0, steps=1)[0, 0]) < 0.05 * few[:, 0].mean()
