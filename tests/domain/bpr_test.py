"""BPR: the loss by hand, padding, the gradient by differences, and epochs that learn and repeat."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bdlm_jax.domain.bpr import bpr_batch_loss, init_domain_state, make_domain_epoch
from bdlm_jax.domain.graph import make_graph, make_propagate
from bdlm_jax.domain.lightgcn import lightgcn_arm
from bdlm_jax.domain.mf import mf_arm
from bdlm_jax.domain.sampling import make_popularity, make_seen
from bdlm_jax.domain.sasrec import recent_history, sasrec_arm
from bdlm_jax.types import InputError

N_USERS, N_ITEMS, WIDTH = 20, 16, 8


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
    return init_domain_state({"shared": shared, "domain": arm.init(key)}, optimizer, key)


def lightgcn(user, item):
    return lightgcn_arm(
        make_propagate(make_graph(user, item, n_users=N_USERS, n_items=N_ITEMS), n_users=N_USERS, n_items=N_ITEMS),
        n_layers=2,
    )


def test_loss_by_hand():
    shared = {"user": jnp.array([[1.0, 2.0]]), "item": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
    loss, metrics = bpr_batch_loss(
        mf_arm(), {"shared": shared, "domain": {}}, jnp.array([0]), jnp.array([0]), jnp.array([1]), regularisation=0.1
    )
    bpr = np.log(1 + np.exp(-(3.0 - 2.0)))
    norm = ((1 + 4) + 9 + 1) / 2
    assert float(metrics["bpr"]) == pytest.approx(bpr, rel=1e-6)
    assert float(metrics["regularisation"]) == pytest.approx(norm)
    assert float(loss) == pytest.approx(bpr + 0.1 * norm, rel=1e-6)


def test_padded_rows_change_nothing():
    user, item = blocks()
    arm = lightgcn(user, item)
    params = start(arm, optax.sgd(1.0)).params
    u, i, j = jnp.array([0, 1, 2]), jnp.array([2, 3, 4]), jnp.array([1, 0, 3])
    plain = jax.jit(jax.value_and_grad(lambda p: bpr_batch_loss(arm, p, u, i, j)[0]))(params)
    padded = [jnp.concatenate([x, jnp.array([7, 7])]) for x in (u, i, j)]
    weight = jnp.array([1.0, 1.0, 1.0, 0.0, 0.0])
    with_padding = jax.jit(jax.value_and_grad(lambda p: bpr_batch_loss(arm, p, *padded, weight_B=weight)[0]))(params)
    for left, right in zip(jax.tree.leaves(plain), jax.tree.leaves(with_padding)):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-7)


def test_gradient_by_finite_differences():
    user, item = blocks()
    arm = lightgcn(user, item)
    params = start(arm, optax.sgd(1.0)).params
    u, i, j = jnp.array([0, 1, 2]), jnp.array([2, 3, 4]), jnp.array([1, 0, 3])
    loss = jax.jit(lambda p: bpr_batch_loss(arm, p, u, i, j, regularisation=0.5)[0])
    gradient = jax.jit(jax.grad(loss))(params)
    way = jax.tree.map(lambda x: jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    step = 1e-2
    forward, backward = (loss(jax.tree.map(lambda x, d: x + s * d, params, way)) for s in (step, -step))  # noqa: B023
    expected = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(way)))
    assert float((forward - backward) / (2 * step)) == pytest.approx(float(expected), rel=2e-2)


@functools.cache
def lightgcn_epoch(popular):
    user, item = blocks()
    arm, optimizer, seen = lightgcn(user, item), optax.adam(0.02), make_seen(user, item, N_USERS, N_ITEMS)
    popularity = make_popularity(seen, np.bincount(item, minlength=N_ITEMS)) if popular else None
    epoch = make_domain_epoch(arm, optimizer, seen, user_E=user, item_E=item, batch_size=32, popularity=popularity)
    return arm, optimizer, epoch


@pytest.mark.parametrize("popular", [False, True])
def test_epochs_learn_to_put_unseen_items_of_the_block_first(popular):
    user, item = blocks()
    arm, optimizer, epoch = lightgcn_epoch(popular)
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
    squares = 8.0 ** np.arange(4)
    table = np.zeros((4, WIDTH), np.float32)
    table[:, 0] = np.sqrt(squares)
    params = {"shared": {"user": jnp.asarray(table), "item": jnp.zeros((7, WIDTH))}, "domain": {}}
    epoch = make_domain_epoch(
        mf_arm(), optax.sgd(0.0), make_seen(user, item, 4, 7), user_E=user, item_E=item, batch_size=10
    )
    _, metrics = epoch(init_domain_state(params, optax.sgd(0.0), jax.random.key(0)))
    expected = (2 * 1 + 1 * 8 + 3 * 64 + 1 * 512) / 2 / 7
    assert float(metrics["regularisation"]) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["bpr"]) == pytest.approx(np.log(2), rel=1e-5)


def test_the_same_key_gives_the_same_bits():
    arm, optimizer, epoch = lightgcn_epoch(False)
    first, again, other = (
        epoch(start(arm, optimizer))[0],
        epoch(start(arm, optimizer))[0],
        epoch(start(arm, optimizer, 1))[0],
    )
    np.testing.assert_array_equal(first.params["shared"]["user"], again.params["shared"]["user"])
    assert not np.array_equal(first.params["shared"]["user"], other.params["shared"]["user"])


def test_sasrec_trains_through_the_state_before():
    user, item = blocks()
    indptr = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=N_USERS))])
    arm, optimizer = sasrec_arm(recent_history(indptr, item, length=8), width=WIDTH, n_layers=1), optax.adam(1e-2)
    epoch = make_domain_epoch(
        arm, optimizer, make_seen(user, item, N_USERS, N_ITEMS), user_E=user, item_E=item, batch_size=64
    )
    state, first = epoch(start(arm, optimizer))
    for _ in range(8):
        state, last = epoch(state)
    assert float(last["bpr"]) < 0.8 * float(first["bpr"])


def test_no_edges_is_refused():
    seen = make_seen(np.array([0]), np.array([0]), N_USERS, N_ITEMS)
    with pytest.raises(InputError, match="no training interaction"):
        make_domain_epoch(mf_arm(), optax.sgd(1.0), seen, user_E=[], item_E=[], batch_size=4)
