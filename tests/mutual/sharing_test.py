import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_bdlm
from small_bdlm import COLD, N_ITEMS, N_USERS, D, M

from bdlm_jax.mutual import domain_epoch, lm_step, options, sharing
from bdlm_jax.mutual.optimizer import FROZEN
from bdlm_jax.mutual.options import LMWeights

ARM, LEAN_LM = small_bdlm.make_arm(), LMWeights(item=1.0, text=0.0)


def gradient_of(losses, params, batch, view, constants, **options):
    def objective(params):
        terms = losses(params, batch, view, constants, arm=ARM, **options)
        return sum(total for total, _ in terms.values())

    return jax.jit(jax.grad(objective))(params)


def lm_gradient(meeting, params, weights=small_bdlm.LM_ALL):
    view, _ = small_bdlm.make_views(ARM, meeting, params)
    inputs = small_bdlm.whole_batch(), view, small_bdlm.lm_constants()
    return gradient_of(lm_step.lm_losses, params, *inputs, meeting=meeting, weights=weights)


def domain_gradient(meeting, params):
    _, view = small_bdlm.make_views(ARM, meeting, params)
    user_E, item_E = small_bdlm.make_edges()
    batch = {
        "user": user_E, "positive": item_E, "negative": (item_E + 1) % COLD, "weight": np.ones(len(user_E), np.float32),
        "align_item": np.arange(N_ITEMS), "kl_user": np.arange(N_USERS),
    }  # fmt: skip
    inputs, weights = (batch, view, small_bdlm.domain_constants()), small_bdlm.DOMAIN_ALL
    return gradient_of(domain_epoch.domain_losses, params, *inputs, meeting=meeting, weights=weights)


@pytest.mark.parametrize("reads", sharing.READS)
def test_both_arms_send_their_gradient_into_the_same_leaves(reads):
    meeting = small_bdlm.make_meeting(reads=reads)
    params = small_bdlm.make_params(ARM, meeting)
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    assert shapes.count((N_USERS, D)) == shapes.count((N_ITEMS, D)) == 1  # a leaf a table
    of_lm, of_domain = lm_gradient(meeting, params), domain_gradient(meeting, params)
    for gradient in (of_lm, of_domain):
        for table in ("user", "item"):
            rows = np.abs(gradient["shared"][table]).max(axis=1)
            known = rows if table == "user" else np.delete(rows, COLD)
            assert known.min() > 0, (reads, table)
    # Nothing else gives the tables a way into the losses: with other tables the same other leaves give other numbers.
    assert all(np.any(leaf) for leaf in jax.tree.leaves(of_lm["lm"]))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_domain["lm"]))
    assert bool(np.any(of_lm["domain"]["layer_weights"])) == (reads == "propagated")
    assert np.any(of_domain["domain"]["layer_weights"])


def test_a_cold_item_gets_no_gradient_from_the_next_item_loss():
    meeting = small_bdlm.make_meeting(reads="propagated")
    params = small_bdlm.make_params(ARM, meeting)
    gradient = lm_gradient(meeting, params, LEAN_LM)
    assert not np.any(gradient["shared"]["item"][COLD])
    assert np.all(np.any(np.delete(gradient["shared"]["item"], COLD, axis=0), axis=1))


@pytest.mark.parametrize(
    ("which", "frozen", "moving"),
    [("lm", ("domain",), {"shared", "lm"}), ("domain", ("lm", "shared"), {"domain"})],
)
def test_a_step_moves_its_own_groups_and_nothing_else(which, frozen, moving):
    meeting = small_bdlm.make_meeting(reads="propagated")
    params = small_bdlm.make_params(ARM, meeting)
    optimizer = small_bdlm.make_optimizer(**dict.fromkeys(frozen, FROZEN))
    state = small_bdlm.make_state(params, optimizer)
    if which == "lm":
        step = small_bdlm.make_lm_step(ARM, meeting, weights=LEAN_LM, optimizer=optimizer)
        batch, constants = small_bdlm.whole_batch(), small_bdlm.lm_constants()
    else:
        weights = options.DomainWeights()
        step = small_bdlm.make_domain_epoch(ARM, meeting, weights=weights, optimizer=optimizer, kl_users=0)
        batch, constants = domain_epoch.make_slots(batch_size=16), small_bdlm.domain_constants()
    after, _ = jax.jit(step)(state, batch, {}, constants)
    for name, tree in params.items():
        same = jax.tree.leaves(jax.tree.map(np.array_equal, after.params[name], tree))
        assert all(same) == (name not in moving), name
    assert after.step > state.step


@pytest.mark.parametrize(("width", "lm_width"), [(6, 16), (16, 6), (8, 8)])
def test_the_bridge_keeps_the_size_of_rows_and_states_in_either_direction(width, lm_width):
    bridge = sharing.init_bridge(jax.random.key(0), width=width, lm_width=lm_width, gain=0.5, out_std=0.3)
    inner = min(width, lm_width)
    for name in ("into", "out"):
        values = np.linalg.svd(np.asarray(bridge[name]), compute_uv=False)
        np.testing.assert_allclose(values, values[0], rtol=1e-5)
        assert len(values) == inner
    into_DM, out_MD = (bridge[name] / jnp.std(bridge[name]) for name in ("into", "out"))
    np.testing.assert_allclose(out_MD, into_DM.T, rtol=1e-4, atol=1e-5)  # what goes in comes out, but for its size
    row_ND = jax.random.normal(jax.random.key(1), (4000, width))
    state_NM = jax.random.normal(jax.random.key(2), (4000, lm_width))
    norm = float(jnp.linalg.norm(row_ND @ bridge["into"], axis=1).mean())
    assert norm == pytest.approx(0.5 * inner**0.5, rel=0.1)
    assert float(sharing.bridge_out(bridge, state_NM).std()) == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize("scales", [False, True])
def test_id_rows_are_both_tables_through_the_bridge_users_first(scales):
    meeting = small_bdlm.make_meeting(reads="layer0")
    meeting = dataclasses.replace(meeting, lm=dataclasses.replace(meeting.lm, scale_embedding=scales))
    params = small_bdlm.make_params(ARM, meeting)
    rows_XM, rows_IM = sharing.id_rows(params, meeting=meeting, arm=ARM)
    tables = np.concatenate([params["shared"]["user"], params["shared"]["item"]])
    np.testing.assert_allclose(rows_XM, tables @ params["lm"]["bridge"]["into"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rows_IM, rows_XM[N_USERS:] * (M**-0.5 if scales else 1.0), rtol=1e-6)


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize(("width", "compared_in"), [(M // 2, M // 2), (M, M), (2 * M, M)])
def test_item_logits_are_computed_in_the_narrower_of_the_two_widths(width, compared_in, scales):
    meeting = small_bdlm.make_meeting(reads="layer0")
    meeting = dataclasses.replace(meeting, lm=dataclasses.replace(meeting.lm, scale_embedding=scales))
    shared = sharing.init_shared(jax.random.key(0), n_users=N_USERS, n_items=N_ITEMS, width=width)
    bridge = sharing.init_bridge(jax.random.key(1), width=width, lm_width=M, gain=2.0)
    params = {"shared": shared, "domain": {}, "lm": {"bridge": bridge}}
    rows_XM, head = sharing.id_rows_and_head(params, meeting=meeting, arm=ARM)
    same_XM, rows_IM = sharing.id_rows(params, meeting=meeting, arm=ARM)
    np.testing.assert_array_equal(rows_XM, same_XM)
    assert head.rows_IN.shape == (N_ITEMS, compared_in)
    state_BTM = jax.random.normal(jax.random.key(2), (3, 2, M))
    np.testing.assert_allclose(head.read(state_BTM) @ head.rows_IN.T, state_BTM @ rows_IM.T, rtol=1e-4, atol=1e-5)


def test_users_whom_no_prompt_shows_are_not_computed():
    meeting = small_bdlm.make_meeting(reads="propagated")
    params = small_bdlm.make_params(ARM, meeting)
    shown, rows_IM = sharing.id_rows(params, meeting=meeting, arm=ARM)
    hidden = dataclasses.replace(meeting, shows_users=False)
    rows_XM, same_IM = sharing.id_rows(params, meeting=hidden, arm=ARM)
    assert np.any(shown[:N_USERS]) and not np.any(rows_XM[:N_USERS])
    np.testing.assert_array_equal(rows_XM[N_USERS:], shown[N_USERS:])
    np.testing.assert_array_equal(same_IM, rows_IM)


def test_write_back_replaces_the_cold_rows_only():
    shared = {"user": jnp.ones((2, 1)), "item": jnp.array([[1.0], [2.0], [3.0]])}
    made = sharing.write_back(shared, jnp.array([[7.0], [8.0], [9.0]]), jnp.array([False, True, False]))
    assert made["item"].tolist() == [[1], [8], [3]] and made["user"] is shared["user"]


def test_tables_are_drawn_with_the_wanted_deviation_and_differ():
    shared = sharing.init_shared(jax.random.key(0), n_users=400, n_items=400, width=16, std=0.3)
    for table in shared.values():
        np.testing.assert_allclose(np.std(table), 0.3, rtol=0.03)
    assert not np.allclose(shared["user"], shared["item"])
