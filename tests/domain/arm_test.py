"""The domain arms: LightGCN, MF, NCF, SASRec against hand-written oracles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdlm_jax.domain.arm import Inputs
from bdlm_jax.domain.lightgcn import lightgcn_arm
from bdlm_jax.domain.mf import mf_arm
from bdlm_jax.domain.ncf import ncf_arm
from bdlm_jax.domain.sasrec import States, recent_history, sasrec_arm
from bdlm_jax.types import InputError

N_USERS, N_ITEMS, WIDTH, LENGTH = 6, 7, 4, 5
HISTORY = [[0, 1, 2, 3, 4], [5, 6], [], [2, 0, 6], [1], [3, 4, 5, 6, 0]]


@pytest.fixture(scope="module")
def shared():
    rng = np.random.default_rng(0)
    return {
        "user": jnp.asarray(rng.normal(size=(N_USERS, WIDTH)), jnp.float32),
        "item": jnp.asarray(rng.normal(size=(N_ITEMS, WIDTH)), jnp.float32),
    }


def history_rows():
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in HISTORY])])
    return recent_history(indptr, np.concatenate(HISTORY).astype(int), length=LENGTH)


@pytest.fixture(scope="module")
def arms():
    user = np.repeat(np.arange(N_USERS), [len(row) for row in HISTORY])
    inputs = Inputs(WIDTH, N_USERS, N_ITEMS, user, np.concatenate(HISTORY).astype(int))
    return {
        "mf": mf_arm(inputs),
        "lightgcn": lightgcn_arm(inputs, n_layers=2, backend="dense"),
        "learned": lightgcn_arm(inputs, n_layers=2, layer_weights="learned"),
        "ncf": ncf_arm(inputs, hidden=(6, 3)),
        "sasrec": sasrec_arm(inputs, length=LENGTH, n_blocks=1, n_heads=2, chunk=4),
    }


@pytest.mark.parametrize("name", ["mf", "lightgcn", "learned", "ncf", "sasrec"])
def test_every_arm_keeps_the_contract(arms, shared, name):
    arm = arms[name]
    picked, rows = jnp.array([4, 0, 6]), jnp.array([[1, 2], [3, 3], [0, 5]])

    @jax.jit
    def everything(shared, key):
        domain = arm.init(key)
        user, item = arm.encode(shared, domain)
        scores = arm.score(domain, user[:3], item)
        pairs = arm.score_pairs(domain, user[:3], item[picked])
        return user, item, scores, pairs, arm.score_rows(domain, user[:3], item[rows])

    user, item, scores, pairs, of_rows = everything(shared, jax.random.key(0))
    assert user.shape == (N_USERS, WIDTH) and item.shape == (N_ITEMS, WIDTH) and scores.shape == (3, N_ITEMS)
    np.testing.assert_allclose(pairs, scores[np.arange(3), picked], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        of_rows, np.take_along_axis(np.asarray(scores), np.asarray(rows), axis=1), rtol=1e-5, atol=1e-6
    )


def test_lightgcn_is_the_mean_of_the_powers(arms, shared):
    adjacency = np.zeros((N_USERS + N_ITEMS, N_USERS + N_ITEMS))
    for user, items in enumerate(HISTORY):
        for item in items:
            adjacency[user, N_USERS + item] = adjacency[N_USERS + item, user] = 1.0
    adjacency[2, 2] = 1.0  # user 2 has no interactions
    degree = adjacency.sum(axis=1)
    matrix = adjacency / np.sqrt(np.outer(degree, degree))
    layer_0 = np.concatenate([shared["user"], shared["item"]]).astype(np.float64)
    expected = (layer_0 + matrix @ layer_0 + matrix @ matrix @ layer_0) / 3
    np.testing.assert_allclose(np.concatenate(arms["lightgcn"].encode(shared, {})), expected, atol=1e-6)
    domain = arms["learned"].init(jax.random.key(0))
    np.testing.assert_allclose(np.concatenate(arms["learned"].encode(shared, domain)), expected, atol=1e-6)
    only_first = {"layer_weights": jnp.array([1.0, 0.0, 0.0])}
    np.testing.assert_allclose(arms["learned"].encode(shared, only_first)[0], shared["user"], atol=1e-7)
    with pytest.raises(ValueError, match="layer_weights"):
        lightgcn_arm(Inputs(width=4), layer_weights="softmax")


def test_ncf_equals_the_concatenated_form(arms, shared):
    domain = arms["ncf"].init(jax.random.key(3))
    domain["gmf"] = jnp.array([1.0, -2.0, 0.5, 3.0])
    got = arms["ncf"].score(domain, shared["user"], shared["item"])
    for user, item in ((0, 0), (4, 6)):
        u, v = np.asarray(shared["user"][user]), np.asarray(shared["item"][item])
        x = np.concatenate([u, v])
        for layer in domain["mlp"][:-1]:
            x = np.maximum(x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"]), 0)
        last = domain["mlp"][-1]
        expected = (
            np.sum(np.asarray(domain["gmf"]) * u * v) + (x @ np.asarray(last["kernel"]) + np.asarray(last["bias"]))[0]
        )
        assert float(got[user, item]) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(InputError, match="hidden"):
        ncf_arm(Inputs(width=4), hidden=())


def test_recent_history_keeps_the_last_in_order():
    rows = recent_history(np.array([0, 3, 3, 5]), np.array([4, 5, 6, 1, 2]), length=2)
    assert rows.tolist() == [[5, 6], [-1, -1], [1, 2]]


@pytest.fixture(scope="module")
def sasrec(arms):
    domain = jax.jit(arms["sasrec"].init)(jax.random.key(1))
    states = jax.jit(lambda item_ID, rows: States(1, 2).apply({"params": domain}, item_ID, rows))
    before = jax.jit(lambda shared, user, positive: arms["sasrec"].user_before(shared, domain, user, positive))
    return domain, states, before


def test_sasrec_states_are_causal(sasrec, shared):
    _, states_of, _ = sasrec
    rows = jnp.asarray(history_rows())
    states, changed = states_of(shared["item"], rows), states_of(shared["item"], rows.at[0, 3:].set(6))
    np.testing.assert_allclose(changed[0, :4], states[0, :4], atol=1e-6)
    assert np.abs(changed[0, 4:] - states[0, 4:]).max() > 1e-3


def test_sasrec_reads_the_state_after_and_before(arms, sasrec, shared):
    domain, states_of, before_of = sasrec
    states = np.asarray(states_of(shared["item"], jnp.asarray(history_rows())))
    users, _ = jax.jit(arms["sasrec"].encode)(shared, domain)
    np.testing.assert_allclose(users, states[np.arange(N_USERS), [len(row) for row in HISTORY]], atol=1e-6)
    before = before_of(shared, jnp.array([0, 3, 5, 1]), jnp.array([2, 6, 3, 0]))
    expected = [states[0, 2], states[3, 2], states[5, 0], states[1, 0]]  # user 1 has no item 0: the empty history
    np.testing.assert_allclose(before, np.stack(expected), atol=1e-6)


def test_sasrec_before_never_sees_the_positive(sasrec, shared):
    _, _, before_of = sasrec
    gradient = jax.grad(lambda item: before_of(shared | {"item": item}, jnp.array([0]), jnp.array([2]))[0, 0])(
        shared["item"]
    )
    assert np.flatnonzero(np.abs(np.asarray(gradient)).sum(axis=1)).tolist() == [0, 1]


def test_sasrec_refuses_odd_heads():
    with pytest.raises(InputError, match="heads"):
        sasrec_arm(Inputs(width=5), length=3, n_heads=2)
