"""The domain arm's step and epoch without a second arm: the loss by hand, padding, and epochs that learn and repeat."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bdlm_jax.domain.arm import Inputs
from bdlm_jax.domain.lightgcn import lightgcn_arm
from bdlm_jax.domain.mf import mf_arm
from bdlm_jax.domain.sasrec import sasrec_arm
from bdlm_jax.mutual import domain_epoch, options
from bdlm_jax.types import InputError, TrainState

N_USERS, N_ITEMS, WIDTH = 20, 16, 8
LOSS_WEIGHTS = options.DomainWeights(regularisation=0.1)


def blocks(seed=0):
    """Even users take even items, odd users odd ones, each with some left out."""
    rng = np.random.default_rng(seed)
    liked = (np.arange(N_USERS)[:, None] % 2 == np.arange(N_ITEMS)[None] % 2) & (rng.random((N_USERS, N_ITEMS)) < 0.6)
    liked[:, :2] |= np.arange(N_USERS)[:, None] % 2 == np.arange(2)[None]
    return np.nonzero(liked)


def start(arm, optimizer, seed=0):
    user_key, item_key, key = jax.random.split(jax.random.key(seed), 3)
    shared = {
        "user": 0.1 * jax.random.normal(user_key, (N_USERS, WIDTH)),
        "item": 0.1 * jax.random.normal(item_key, (N_ITEMS, WIDTH)),
    }
    params = {"shared": shared, "domain": arm.init(key)}
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), key)


def make_epoch(arm, optimizer, user, item, *, batch_size, regularisation=1e-4, popularity=None, n=(N_USERS, N_ITEMS)):
    weights = options.DomainWeights(regularisation=regularisation)
    step = domain_epoch.make_domain_step(arm=arm, bridge=None, weights=weights, optimizer=optimizer)
    epoch = jax.jit(domain_epoch.make_domain_epoch(step, batch_size=batch_size))
    constants = domain_epoch.make_epoch_constants(user, item, n_users=n[0], n_items=n[1], popularity=popularity)
    slots = domain_epoch.make_slots(batch_size=batch_size)
    return lambda state: epoch(state, slots, {}, constants)


def lightgcn(user, item):
    return lightgcn_arm(Inputs(WIDTH, N_USERS, N_ITEMS, user, item), n_layers=2)


def batch_terms(arm, params, u, i, j, weight, weights=LOSS_WEIGHTS):
    auxiliary = {"user_B": u, "item_B": i, "weight_B": weight, "key": jax.random.key(0)}
    batch = {"user": u, "positive": i, "negative": j, "weight": weight, "auxiliary": auxiliary}
    terms = domain_epoch.domain_losses(params, batch, {}, {}, arm=arm, bridge=None, weights=weights, axis_name=None)
    return {name: total / count for name, (total, count) in terms.items()}


def test_loss_by_hand():
    shared = {"user": jnp.array([[1.0, 2.0]]), "item": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
    one = jnp.array([0])
    terms = batch_terms(mf_arm(Inputs(WIDTH)), {"shared": shared, "domain": {}}, one, one, jnp.array([1]), jnp.ones(1))
    assert float(terms["bpr"]) == pytest.approx(np.log(1 + np.exp(-(3.0 - 2.0))), rel=1e-6)
    assert float(terms["regularisation"]) == pytest.approx(((1 + 4) + 9 + 1) / 2)


def test_a_models_own_loss_is_a_term_with_a_key_of_its_own():
    """The whole batch, the padding at weight 0, another key every step; nothing else is drawn otherwise."""
    (user, item), plain = blocks(), mf_arm(Inputs(WIDTH))
    drawn, optimizer = [], optax.sgd(0.0)

    def own_loss(shared, domain, user_B, item_B, weight_B, key):
        jax.debug.callback(lambda *arrays: drawn.append(arrays), user_B, item_B, weight_B, jax.random.key_data(key))
        return 3.0 * jnp.sum(weight_B * shared["user"][user_B, 0]), jnp.sum(weight_B)

    metrics = {}
    for arm in (plain, plain._replace(auxiliary=own_loss)):
        epoch = make_epoch(arm, optimizer, user, item, batch_size=32)
        state = start(arm, optimizer)
        metrics[arm] = jax.block_until_ready(epoch(state)[1])
    jax.effects_barrier()
    alone, with_own = metrics.values()
    users, items, weights, keys = (np.stack(rows) for rows in zip(*drawn))
    assert len(np.unique(keys, axis=0)) == len(keys) == -(-len(user) // 32)
    pairs = np.stack([users[weights > 0], items[weights > 0]], axis=1)
    np.testing.assert_array_equal(pairs[np.lexsort(pairs.T[::-1])], np.stack([user, item], axis=1))
    each = 3.0 * (weights * np.asarray(state.params["shared"]["user"])[users, 0]).sum(1) / weights.sum(1)
    np.testing.assert_allclose(with_own["auxiliary"], each.mean(), rtol=1e-4)
    np.testing.assert_allclose(with_own["loss"], alone["loss"] + with_own["auxiliary"], rtol=1e-5)
    assert all(with_own[name] == alone[name] for name in ("bpr", "regularisation"))
    off = options.DomainWeights(auxiliary=0.0)
    one, arm = jnp.array([0]), plain._replace(auxiliary=own_loss)
    assert "auxiliary" not in batch_terms(arm, state.params, one, one, one, jnp.ones(1), off)


@pytest.mark.parametrize("kl_items", [5, N_ITEMS, 40])
def test_no_item_is_drawn_twice_for_one_step(kl_items):
    user, item = blocks()

    def step(state, batch, view, constants, *, axis_name):
        return state, {"seen": jnp.zeros(N_ITEMS).at[batch["kl_item"]].add(1.0).max(), "n": batch["kl_item"].size * 1.0}

    epoch = jax.jit(domain_epoch.make_domain_epoch(step, batch_size=4, kl_items=kl_items))
    constants = domain_epoch.make_epoch_constants(user, item, n_users=N_USERS, n_items=N_ITEMS)
    state = start(mf_arm(Inputs(WIDTH)), optax.sgd(0.0))
    _, metrics = epoch(state, domain_epoch.make_slots(batch_size=4), {}, constants)
    assert metrics["seen"] == 1.0 and metrics["n"] == min(kl_items, N_ITEMS)


def test_padded_rows_change_nothing():
    user, item = blocks()
    arm = lightgcn(user, item)
    params = start(arm, optax.sgd(1.0)).params
    rows = [jnp.array([0, 1, 2]), jnp.array([2, 3, 4]), jnp.array([1, 0, 3])]
    padded = [jnp.concatenate([x, jnp.array([7, 7])]) for x in rows]

    def gradient(rows, weight):
        return jax.grad(lambda p: sum(batch_terms(arm, p, *rows, weight).values()))(params)

    plain, with_padding = gradient(rows, jnp.ones(3)), gradient(padded, jnp.array([1.0, 1.0, 1.0, 0.0, 0.0]))
    for left, right in zip(jax.tree.leaves(plain), jax.tree.leaves(with_padding)):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-7)


@functools.cache
def lightgcn_epoch(popularity):
    user, item = blocks()
    arm, optimizer = lightgcn(user, item), optax.adam(0.02)
    return arm, optimizer, make_epoch(arm, optimizer, user, item, batch_size=32, popularity=popularity)


@pytest.mark.parametrize("popularity", [None, 0.75])
def test_epochs_learn_to_put_unseen_items_of_the_block_first(popularity):
    user, item = blocks()
    arm, optimizer, epoch = lightgcn_epoch(popularity)
    state, losses = start(arm, optimizer), []
    for _ in range(25):
        state, metrics = epoch(state)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]
    scores = np.array(arm.score(state.params["domain"], *arm.encode(state.params["shared"], state.params["domain"])))
    scores[user, item] = -np.inf
    hit = np.arange(N_USERS) % 2 == scores.argmax(axis=1) % 2
    unseen_left = np.array([np.sum(item[user == u].size < N_ITEMS // 2) for u in range(N_USERS)]).astype(bool)
    assert hit[unseen_left].mean() > 0.9


def test_epoch_takes_every_edge_once_and_ignores_the_padding():
    """User rows of power-of-eight size: the regularisation, a sum over the epoch, tells how often each user came."""
    user, item = np.array([0, 0, 1, 2, 2, 2, 3]), np.array([0, 1, 2, 3, 4, 5, 6])
    table = np.zeros((4, WIDTH), np.float32)
    table[:, 0] = np.sqrt(8.0 ** np.arange(4))
    params = {"shared": {"user": jnp.asarray(table), "item": jnp.zeros((7, WIDTH))}, "domain": {}}
    optimizer = optax.sgd(0.0)
    epoch = make_epoch(mf_arm(Inputs(WIDTH)), optimizer, user, item, batch_size=10, n=(4, 7))
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), jax.random.key(0))
    _, metrics = epoch(state)
    assert float(metrics["regularisation"]) == pytest.approx((2 * 1 + 1 * 8 + 3 * 64 + 1 * 512) / 2 / 7, rel=1e-5)
    assert float(metrics["bpr"]) == pytest.approx(np.log(2), rel=1e-5)


def test_the_same_key_gives_the_same_bits():
    arm, optimizer, epoch = lightgcn_epoch(None)
    first, again, other = (epoch(start(arm, optimizer, seed))[0].params["shared"]["user"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_cold_items_are_nobodys_negative():
    user, item = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 2])
    constants = domain_epoch.make_epoch_constants(user, item, n_users=2, n_items=5)
    np.testing.assert_array_equal(constants["warm_item_W"], [0, 1, 2])
    assert constants["seen"].n_items == 3
    np.testing.assert_array_equal(constants["warm_I"], [True, True, True, False, False])


def test_sasrec_trains_through_the_state_before():
    user, item = blocks()
    arm = sasrec_arm(Inputs(WIDTH, N_USERS, N_ITEMS, user, item), length=8, n_blocks=1)
    optimizer = optax.adam(1e-2)
    epoch = make_epoch(arm, optimizer, user, item, batch_size=64)
    state, first = epoch(start(arm, optimizer))
    for _ in range(8):
        state, last = epoch(state)
    assert float(last["bpr"]) < 0.8 * float(first["bpr"])


def test_no_edges_is_refused():
    with pytest.raises(InputError, match="no training interaction"):
        domain_epoch.make_epoch_constants([], [], n_users=2, n_items=2)
