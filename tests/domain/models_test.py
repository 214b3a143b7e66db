"""The domain models against hand-written oracles, and what every one of MODELS keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdlm_jax.domain.arm import Inputs
from bdlm_jax.domain.histories import cut_histories, drop_entries, recent_history
from bdlm_jax.domain.models import MODELS, check_options, make_arm
from bdlm_jax.domain.sasrec import States
from bdlm_jax.types import InputError

N_USERS, N_ITEMS, WIDTH, LENGTH = 6, 7, 4, 5
HISTORY = [[0, 1, 2, 3, 4], [5, 6], [], [2, 0, 6], [1], [3, 4, 5, 6, 0]]
USER_E, ITEM_E = np.repeat(np.arange(N_USERS), [len(row) for row in HISTORY]), np.concatenate(HISTORY).astype(int)
INPUTS = Inputs(WIDTH, N_USERS, N_ITEMS, USER_E, ITEM_E)
SETTINGS = {"n_layers": 2, "layer_weights": "uniform", "backend": "dense"}
OPTIONS = {
    "ncf": {"hidden": (6, 3)},
    "itemgcn": {"length": LENGTH, "dropout": 0.5, "chunk": 4},
    "sasrec": {"length": LENGTH, "n_blocks": 1, "n_heads": 2, "dropout": 0.5, "chunk": 4},
}


def made(name, **changes):
    return make_arm(name, INPUTS, SETTINGS | OPTIONS.get(name, {}) | changes)


@pytest.fixture(scope="module")
def shared():
    rng = np.random.default_rng(0)
    return {
        "user": jnp.asarray(rng.normal(size=(N_USERS, WIDTH)), jnp.float32),
        "item": jnp.asarray(rng.normal(size=(N_ITEMS, WIDTH)), jnp.float32),
    }


@pytest.mark.parametrize("name", MODELS)
def test_every_arm_keeps_the_contract(shared, name):
    arm = made(name)
    picked = jnp.array([4, 0, 6])

    @jax.jit
    def everything(shared, key):
        domain = arm.init(key)
        user, item = arm.encode(shared, domain)
        scores = arm.score(domain, user[:3], item)
        return user, item, scores, arm.score_pairs(domain, user[:3], item[picked])

    user, item, scores, pairs = everything(shared, jax.random.key(0))
    assert user.shape == (N_USERS, WIDTH) and item.shape == (N_ITEMS, WIDTH) and scores.shape == (3, N_ITEMS)
    assert arm.dot == np.allclose(scores, user[:3] @ item.T, atol=1e-5)
    np.testing.assert_allclose(pairs, scores[np.arange(3), picked], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("svd", {}, "'svd' is unknown: choose one of lightgcn, mf, ncf, sasrec, itemgcn"),
        ("ncf", {"hiden": (8,)}, "did you mean hidden"),
        ("mf", {"depth": 2}, "no option of the domain model mf; it has none"),
        ("ncf", {"hidden": ()}, "hidden"),
        ("sasrec", {"n_heads": 3}, "heads"),
        ("lightgcn", {"layer_weights": "softmax"}, "layer_weights"),
    ],
)
def test_what_no_model_can_be_is_refused(name, options, words):
    with pytest.raises(InputError, match=words):
        made(name, **options)


def test_a_setting_of_every_model_is_no_option():
    check_options("ncf", {"hidden": (8,)})
    with pytest.raises(InputError, match="n_layers is no option"):
        check_options("lightgcn", {"n_layers": 2})


def test_lightgcn_is_the_mean_of_the_powers(shared):
    adjacency = np.zeros((N_USERS + N_ITEMS, N_USERS + N_ITEMS))
    adjacency[USER_E, N_USERS + ITEM_E] = adjacency[N_USERS + ITEM_E, USER_E] = 1.0
    adjacency[2, 2] = 1.0  # user 2 has no interactions
    degree = adjacency.sum(axis=1)
    matrix = adjacency / np.sqrt(np.outer(degree, degree))
    layer_0 = np.concatenate([shared["user"], shared["item"]]).astype(np.float64)
    expected = (layer_0 + matrix @ layer_0 + matrix @ matrix @ layer_0) / 3
    np.testing.assert_allclose(np.concatenate(made("lightgcn").encode(shared, {})), expected, atol=1e-6)
    learned = made("lightgcn", layer_weights="learned")
    domain = learned.init(jax.random.key(0))
    np.testing.assert_allclose(np.concatenate(learned.encode(shared, domain)), expected, atol=1e-6)
    only_first = {"layer_weights": jnp.array([1.0, 0.0, 0.0])}
    np.testing.assert_allclose(learned.encode(shared, only_first)[0], shared["user"], atol=1e-7)


def test_ncf_equals_the_concatenated_form(shared):
    arm = made("ncf")
    domain = jax.tree.map(np.asarray, arm.init(jax.random.key(3))) | {"gmf": np.array([1.0, -2.0, 0.5, 3.0])}
    got = arm.score(domain, shared["user"], shared["item"])
    for user, item in ((0, 0), (4, 6)):
        u, v = np.asarray(shared["user"][user]), np.asarray(shared["item"][item])
        x = np.concatenate([u, v])
        for layer in domain["mlp"][:-1]:
            x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
        expected = np.sum(domain["gmf"] * u * v) + (x @ domain["mlp"][-1]["kernel"] + domain["mlp"][-1]["bias"])[0]
        assert float(got[user, item]) == pytest.approx(expected, rel=1e-5)


def test_histories_are_in_time_order_and_the_last_are_kept():
    user, item = np.array([2, 0, 0, 2, 0]), np.array([1, 4, 5, 2, 6])
    indptr, rows = Inputs(1, 3, 7, user, item).histories
    assert indptr.tolist() == [0, 3, 3, 5] and rows.tolist() == [4, 5, 6, 1, 2]
    assert recent_history(indptr, rows, length=2).tolist() == [[5, 6], [-1, -1], [1, 2]]
    assert recent_history([0, 1], [9], length=3).tolist() == [[9, -1, -1]]
    assert recent_history(*Inputs(1).histories, length=3).shape == (0, 3)
    windows = [[8, 9, 10], [5, 6, 7], [4, -1, -1], [1, 2, -1]]  # of the items 4…10, none, and 1 and 2
    assert cut_histories([0, 7, 7, 9], [*range(4, 11), 1, 2], length=3).tolist() == windows


@pytest.fixture(scope="module")
def sasrec(shared):
    """(arm, its params, the states of all histories)."""
    arm = made("sasrec")
    domain = jax.jit(arm.init)(jax.random.key(1))
    states = jax.jit(lambda item_ID, rows: States(1, 2).apply({"params": domain}, item_ID, rows))
    return arm, domain, states


def test_sasrec_states_are_causal(sasrec, shared):
    rows = jnp.asarray(recent_history(*INPUTS.histories, length=LENGTH))
    states, changed = (sasrec[2](shared["item"], r) for r in (rows, rows.at[0, 3:].set(6)))
    np.testing.assert_allclose(changed[0, :4], states[0, :4], atol=1e-6)
    assert np.abs(changed[0, 4:] - states[0, 4:]).max() > 1e-3


def test_sasrec_reads_the_state_after(sasrec, shared):
    arm, domain, states_of = sasrec
    states = np.asarray(states_of(shared["item"], recent_history(*INPUTS.histories, length=LENGTH)))
    users, _ = jax.jit(arm.encode)(shared, domain)
    np.testing.assert_allclose(users, states[np.arange(N_USERS), [len(row) for row in HISTORY]], atol=1e-6)
    served = make_arm("sasrec", Inputs(WIDTH), SETTINGS | OPTIONS["sasrec"])  # a model that knows nobody
    for user in (0, 2, 3):
        np.testing.assert_allclose(served.read(domain, shared["item"], HISTORY[user]), users[user], atol=1e-6)
    np.testing.assert_allclose(served.read(domain, shared["item"], [6, 6, *HISTORY[0]]), users[0], atol=1e-6)
    some = jnp.array([3, 0, 3, 2])
    np.testing.assert_allclose(arm.users(shared, domain, some), users[some], atol=1e-6)


def test_sasrec_learns_from_states_that_never_see_their_item_or_padding(sasrec, shared):
    arm, domain, states_of = sasrec
    rows = jnp.asarray(arm.windows(*INPUTS.histories))
    assert rows.tolist() == [row + [-1] * (LENGTH + 1 - len(row)) for row in HISTORY if row]
    keys = jax.random.split(jax.random.key(0), len(rows))
    before = jax.jit(lambda rows, keys: arm.states_before(shared, domain, rows, keys))
    states = before(rows, keys)
    for place in range(
        LENGTH + 1
    ):  # the item at a place, and what stands for padding behind it, moves no state up to it
        changed = before(rows.at[:, place:].set(6), keys)
        np.testing.assert_allclose(changed[:, : place + 1], states[:, : place + 1], atol=1e-6)
    np.testing.assert_allclose(before(rows[2:4], keys[2:4]), states[2:4], atol=1e-6)  # a row drops by its own key
    assert np.abs(before(rows, keys[::-1]) - states).max() > 0.1
    still = made("sasrec", dropout=0.0).states_before(shared, domain, rows, keys)
    np.testing.assert_allclose(still, states_of(shared["item"], rows[:, :-1]), atol=1e-6)


def test_sasrec_learns_at_every_place_that_it_is_read_at(sasrec, shared):
    arm, domain, _ = sasrec
    row, keys = jnp.arange(LENGTH + 1)[None], jax.random.split(jax.random.key(0), 1)

    def own_logits(domain):
        return jnp.sum(arm.states_before(shared, domain, row, keys) * shared["item"][row])

    assert np.abs(jax.grad(own_logits)(domain)["position"]).max(axis=1).all()


def test_sasrec_drops_its_share_and_keeps_the_mean():
    kept = np.asarray(drop_entries(jnp.ones((40, 50, 20)), jax.random.split(jax.random.key(0), 40), 0.3, 1))
    assert set(np.unique(kept)) == {0.0, np.float32(1 / 0.7)} and kept.mean() == pytest.approx(1.0, abs=0.02)
