"""The domain arm's step and epoch: every term by its formula, what an epoch draws, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_bdlm
from small_bdlm import COLD, HISTORIES

from bdlm_jax.domain.arm import Inputs
from bdlm_jax.domain.models import make_arm
from bdlm_jax.mutual import domain_epoch
from bdlm_jax.mutual.options import DomainWeights
from bdlm_jax.types import InputError, TrainState

ARM, MEETING = small_bdlm.make_arm(), small_bdlm.make_meeting()
N_USERS, N_ITEMS, WIDTH = 20, 16, 8  # of the world of two blocks


def own_loss(shared, domain, user_B, item_B, weight_B, key):
    """A model's own loss that shows all it is given."""
    drawn_B = jax.random.normal(key, user_B.shape)
    return jnp.sum(weight_B * (shared["user"][user_B, 0] + shared["item"][item_B, 1] + drawn_B)), jnp.sum(weight_B)


def test_every_term_equals_its_formula():
    params, arm = small_bdlm.make_params(ARM, MEETING), ARM._replace(auxiliary=own_loss)
    _, view = small_bdlm.make_views(ARM, MEETING, params)
    user_UD, item_ID = (np.asarray(t, np.float64) for t in ARM.encode(params["shared"], params["domain"]))
    user, positive, negative = np.array([0, 1, 8, 0]), np.array([1, 4, 7, 2]), np.array([3, 0, 1, 6])
    weight, key = np.array([1.0, 1.0, 1.0, 0.0], np.float32), jax.random.key(5)
    batch = {
        "user": user, "positive": positive, "negative": negative, "weight": weight,
        "align_item": np.array([COLD, 0, 0]), "kl_user": np.array([4, 2]), "kl_item": np.array([1, 7, 0, COLD, 4]),
        "auxiliary": {"user_B": user, "item_B": positive, "weight_B": weight, "key": key},
    }  # fmt: skip

    margin = np.sum(user_UD[user] * (item_ID[positive] - item_ID[negative]), axis=1)
    shared = {name: np.asarray(table, np.float64) for name, table in params["shared"].items()}
    norms = sum(np.sum(t**2, 1) for t in (shared["user"][user], shared["item"][positive], shared["item"][negative]))
    degree_0 = sum(0 in history for history in HISTORIES)
    near = small_bdlm.align_mse(item_ID, np.asarray(view["z_item"]), item_ID)
    own = shared["user"][user, 0] + shared["item"][positive, 1] + np.asarray(jax.random.normal(key, (4,)))
    kl = 0.0
    for u in (4, 2):
        open_C = np.array([i for i in (1, 7, 0, COLD, 4) if i not in HISTORIES[u]])
        teacher = np.asarray(view["state_user"])[u] @ np.asarray(view["rows_item"])[open_C].T
        kl += small_bdlm.softened_kl(teacher, user_UD[u] @ item_ID[open_C].T, MEETING.temperature)
    wanted = {
        "bpr": (np.log1p(np.exp(-margin)) @ weight, 3),
        "regularisation": (0.5 * norms @ weight, 3),
        "auxiliary": (own @ weight, 3),
        "align_item": (near[COLD] / (1 + 0) + 2 * near[0] / (1 + degree_0), 1 + 2 / (1 + degree_0)),
        "align_user": (small_bdlm.align_mse(user_UD, np.asarray(view["z_user"]), user_UD)[[4, 2]].sum(), 2),
        "kl": (kl, 2),
    }
    terms_of = functools.partial(domain_epoch.domain_losses, arm=arm, meeting=MEETING)
    inputs = params, batch, view, small_bdlm.domain_constants()
    terms = jax.jit(functools.partial(terms_of, weights=small_bdlm.DOMAIN_ALL))(*inputs)
    assert set(terms) == set(wanted)
    for name, (total, count) in terms.items():
        np.testing.assert_allclose([total, count], wanted[name], rtol=1e-4, err_msg=name)
    lean = functools.partial(terms_of, weights=DomainWeights(auxiliary=0.0))
    assert set(jax.eval_shape(lean, *inputs)) == {"bpr", "regularisation"}


@pytest.mark.parametrize("kl_items", [0, 5, small_bdlm.N_ITEMS + 3])
def test_an_epoch_shows_every_edge_once_with_unseen_warm_negatives(kl_items):
    """So does the whole batch for a model's own loss, with another key each step; no item is drawn twice for one."""
    n_users, n_items = small_bdlm.N_USERS, small_bdlm.N_ITEMS
    user_E, item_E = small_bdlm.make_edges()

    def counting_step(state, batch, view, constants, *, axis_name):
        u, w, whole, tables = batch["user"], batch["weight"], batch["auxiliary"], state.params["tables"]
        tables = {
            "positive": tables["positive"].at[u, batch["positive"]].add(w),
            "whole": tables["whole"].at[whole["user_B"], whole["item_B"]].add(whole["weight_B"]),
            "negative": tables["negative"].at[u, batch["negative"]].add(w),
            "align": tables["align"].at[batch["align_item"]].add(1),
            "kl": tables["kl"].at[batch["kl_user"]].add(1),
            "key": tables["key"].at[state.step].set(jax.random.key_data(whole["key"])),
        }
        metrics = {"w": w.sum()}
        if kl_items:
            metrics["often"] = jnp.zeros(n_items).at[batch["kl_item"]].add(1).max()
            metrics["drawn"] = 1.0 * batch["kl_item"].size
        return state._replace(params=state.params | {"tables": tables}, step=state.step + 1), metrics

    tables = {name: jnp.zeros((n_users, n_items)) for name in ("positive", "whole", "negative")}
    tables |= {"align": jnp.zeros(n_items), "kl": jnp.zeros(n_users), "key": jnp.zeros((9, 2), jnp.uint32)}
    shared = {"user": jnp.zeros((n_users, 1)), "item": jnp.zeros((n_items, 1))}
    state = TrainState({"shared": shared, "tables": tables}, (), jnp.int32(0), jax.random.key(0))
    # 10 a step do not divide the 27 edges.
    epoch = jax.jit(domain_epoch.make_domain_epoch(counting_step, batch_size=10, kl_users=4, kl_items=kl_items))
    slots = domain_epoch.make_slots(batch_size=10, kl_users=4)
    assert len(user_E) == 27
    for number in range(1, 4):
        state, metrics = epoch(state, slots, {}, small_bdlm.domain_constants())
        made = state.params["tables"]
        wanted = np.zeros((n_users, n_items))
        wanted[user_E, item_E] = number
        np.testing.assert_array_equal(made["positive"], wanted)
        np.testing.assert_array_equal(made["whole"], wanted)
        np.testing.assert_allclose(metrics["w"], 27 / 3)
        if kl_items:
            assert metrics["often"] == 1 and metrics["drawn"] == min(kl_items, n_items)
    assert state.step == len(np.unique(made["key"], axis=0)) == 3 * 3
    assert made["negative"].sum() == 3 * 27
    assert not np.any(made["negative"][user_E, item_E])
    assert not np.any(made["negative"][:, COLD])
    assert made["align"].sum() == 3 * 3 * 10 and made["kl"].sum() == 3 * 3 * 4
    assert made["align"][COLD] > 0 and np.count_nonzero(made["align"]) > 6


def blocks():
    """Even users take even items, odd users odd ones, each with some left out."""
    rng = np.random.default_rng(0)
    liked = (np.arange(N_USERS)[:, None] % 2 == np.arange(N_ITEMS)[None] % 2) & (rng.random((N_USERS, N_ITEMS)) < 0.6)
    liked[:, :2] |= np.arange(N_USERS)[:, None] % 2 == np.arange(2)[None]
    return np.nonzero(liked)


@functools.cache
def learner(model, popularity=0.0, auxiliary=None):
    """(arm, epoch, start(seed) -> state) of a model that trains alone, without a meeting."""
    # In no order of time that could be learnt instead.
    inputs = Inputs(WIDTH, N_USERS, N_ITEMS, *np.random.default_rng(1).permutation(blocks(), axis=1))
    settings = {"length": 8, "dropout": 0.3} if model == "sasrec" else {}
    arm = make_arm(model, inputs, {"n_layers": 2} | settings)
    arm, optimizer = arm._replace(auxiliary=auxiliary), optax.adam(0.02)
    step = domain_epoch.make_domain_step(arm=arm, meeting=None, weights=DomainWeights(), optimizer=optimizer)
    batch_size = 5 if arm.windows else 32  # windows, or edges
    epoch = jax.jit(domain_epoch.make_domain_epoch(step, batch_size=batch_size))
    constants = domain_epoch.make_epoch_constants(*blocks(), n_users=N_USERS, n_items=N_ITEMS, popularity=popularity)
    if arm.windows:
        constants["window_WL"] = jnp.asarray(arm.windows(*inputs.histories))
    slots = domain_epoch.make_slots(batch_size=batch_size)

    def start(seed):
        user_key, item_key, key = jax.random.split(jax.random.key(seed), 3)
        shared = {
            "user": 0.1 * jax.random.normal(user_key, (N_USERS, WIDTH)),
            "item": 0.1 * jax.random.normal(item_key, (N_ITEMS, WIDTH)),
        }
        params = {"shared": shared, "domain": arm.init(key)}
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), key)

    return arm, lambda state: epoch(state, slots, {}, constants), start


@pytest.mark.parametrize(
    ("model", "popularity", "falls_to"), [("lightgcn", 0.0, 0.7), ("lightgcn", 0.75, 0.7), ("sasrec", 0.0, 0.8)]
)
def test_epochs_learn_to_put_unseen_items_of_the_block_first(model, popularity, falls_to):
    """SASRec by the softmax over the catalogue, from the states before each item."""
    (user, item), (arm, epoch, start) = blocks(), learner(model, popularity)
    state, losses = start(0), []
    for _ in range(25):
        state, metrics = epoch(state)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < falls_to * losses[0]
    scores = np.array(arm.score(state.params["domain"], *arm.encode(state.params["shared"], state.params["domain"])))
    scores[user, item] = -np.inf
    hit = np.arange(N_USERS) % 2 == scores.argmax(axis=1) % 2
    unseen_left = np.bincount(user, minlength=N_USERS) < N_ITEMS // 2
    assert hit[unseen_left].mean() > 0.9


def test_the_same_key_gives_the_same_bits_with_and_without_a_loss_of_its_own():
    _, epoch, start = learner("lightgcn")
    (first, metrics), (again, _), (other, _) = (epoch(start(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.params["shared"]["user"], again.params["shared"]["user"])
    assert not np.array_equal(first.params["shared"]["user"], other.params["shared"]["user"])
    constant = learner("lightgcn", auxiliary=lambda *_, **__: (jnp.ones(()), jnp.ones(())))[1]
    with_own, its_metrics = constant(start(0))
    np.testing.assert_array_equal(first.params["shared"]["user"], with_own.params["shared"]["user"])
    np.testing.assert_allclose(its_metrics["loss"], metrics["loss"] + 1.0, rtol=1e-6)


def test_cold_items_are_nobodys_negative_and_an_arm_needs_interactions():
    constants = domain_epoch.make_epoch_constants([0, 0, 1, 1], np.array([0, 1, 1, 2]), n_users=2, n_items=5)
    np.testing.assert_array_equal(constants["warm_item_W"], [0, 1, 2])
    assert constants["seen"].n_items == 3
    np.testing.assert_array_equal(constants["warm_I"], [True, True, True, False, False])
    with pytest.raises(InputError, match="no training interaction"):
        domain_epoch.make_epoch_constants([], [], n_users=2, n_items=2)
