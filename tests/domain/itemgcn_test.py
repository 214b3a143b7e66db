"""ItemGCN against sums written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdlm_jax.domain.arm import Inputs
from bdlm_jax.domain.itemgcn import itemgcn_arm

N_ITEMS, WIDTH, LENGTH = 7, 4, 4
HISTORY = [[0, 1, 2, 3, 4], [5, 5, 0], [], [2, 0]]
USER_E, ITEM_E = np.repeat(np.arange(4), [len(row) for row in HISTORY]), np.concatenate(HISTORY).astype(int)
CONTENT_IC = np.zeros((N_ITEMS, 2), np.float32)
CONTENT_IC[[6, 3]] = [[1, 0], [0.8, 0.6]]  # item 6 has no interaction; its text is like that of item 3
INPUTS = Inputs(WIDTH, 4, N_ITEMS, USER_E, ITEM_E, CONTENT_IC)
PAIRS = [(0, 1), (1, 2), (2, 3), (3, 4), (0, 5), (0, 2)]


@pytest.fixture(scope="module")
def shared():
    rng = np.random.default_rng(0)
    return {"user": jnp.ones((4, WIDTH)), "item": jnp.asarray(rng.normal(size=(N_ITEMS, WIDTH)), jnp.float32)}


@pytest.fixture(scope="module")
def domain():
    rng = np.random.default_rng(1)
    return {
        "lag": jnp.asarray(rng.normal(size=LENGTH), jnp.float32),
        "map": jnp.asarray(rng.normal(size=(3, WIDTH, WIDTH)), jnp.float32),
        "scale": jnp.array(1.5),
        "start": jnp.asarray(rng.normal(size=WIDTH), jnp.float32),
    }


def propagated(shared, *, texts: bool) -> np.ndarray:
    adjacency = np.zeros((N_ITEMS, N_ITEMS))
    for left, right in PAIRS + [(3, 6)] * texts:
        adjacency[left, right] = adjacency[right, left] = 1.0
    if not texts:
        adjacency[6, 6] = 1.0  # alone, it keeps its own row
    degree = adjacency.sum(axis=1)
    matrix = adjacency / np.sqrt(np.outer(degree, degree))
    layer_0 = np.asarray(shared["item"], np.float64)
    return (layer_0 + matrix @ layer_0 + matrix @ matrix @ layer_0) / 3


def state(domain, item_ID, history) -> np.ndarray:
    """After a history: what the docstring of the model says, as a loop."""
    d = {name: np.asarray(value, np.float64) for name, value in domain.items()}
    recent = history[-LENGTH:]
    if not recent:
        return d["start"]
    weights = np.exp(d["lag"])[: len(recent)]
    terms = [a * item_ID[i] @ d["map"][min(lag, 2)] for lag, (a, i) in enumerate(zip(weights, recent[::-1]))]
    return d["scale"] * sum(terms) / np.sqrt(sum(weights**2))


@pytest.mark.parametrize("backend", ["gather", "segment", "auto"])
@pytest.mark.parametrize("k", [0, 3])
def test_items_are_propagated_over_what_follows_and_what_reads_alike(shared, domain, k, backend):
    arm = itemgcn_arm(INPUTS, length=LENGTH, text_neighbours=k, backend=backend)
    users, items = jax.jit(arm.encode)(shared, domain)
    np.testing.assert_allclose(items, propagated(shared, texts=k > 0), atol=1e-6)
    expected = [state(domain, np.asarray(items), row) for row in HISTORY]
    np.testing.assert_allclose(users, expected, rtol=1e-4, atol=1e-5)


def test_texts_join_nothing_where_there_are_none(shared, domain):
    arm = itemgcn_arm(INPUTS._replace(content_IC=None), length=LENGTH)
    np.testing.assert_allclose(arm.encode(shared, domain)[1], propagated(shared, texts=False), atol=1e-6)


def test_each_item_is_learned_from_those_before_it_alone(shared, domain):
    arm = itemgcn_arm(INPUTS, length=LENGTH, dropout=0.5)
    window = jnp.asarray(arm.windows(*INPUTS.histories))
    assert window.tolist() == [[0, 1, 2, 3, 4], [5, 5, 0, -1, -1], [2, 0, -1, -1, -1]]
    keys = jax.random.split(jax.random.key(0), len(window))
    still = itemgcn_arm(INPUTS, length=LENGTH).states_before(shared, domain, window, keys)
    items = propagated(shared, texts=True)
    for row, history in enumerate(window.tolist()):
        for place in range(history.index(-1) if -1 in history else len(history)):
            np.testing.assert_allclose(still[row, place], state(domain, items, history[:place]), rtol=1e-4, atol=1e-5)
    before = jax.jit(lambda window, keys: arm.states_before(shared, domain, window, keys))
    states = before(window, keys)
    np.testing.assert_allclose(before(window.at[:, 2:].set(6), keys)[:, :3], states[:, :3], atol=1e-6)
    np.testing.assert_allclose(before(window[1:], keys[1:]), states[1:], atol=1e-6)  # a row drops by its own key
    assert np.abs(before(window, keys[::-1]) - states).max() > 0.1


def test_a_new_history_is_read_as_a_known_one(shared, domain):
    users, items = itemgcn_arm(INPUTS, length=LENGTH).encode(shared, domain)
    served = itemgcn_arm(Inputs(WIDTH), length=LENGTH)  # a model that knows nobody
    for user in (0, 1, 3):
        np.testing.assert_allclose(served.read(domain, items, HISTORY[user]), users[user], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(served.read(domain, items, []), domain["start"])


def test_the_gradient_reaches_the_shared_rows_through_the_graph(shared, domain):
    arm = itemgcn_arm(INPUTS, length=LENGTH)
    gradient = jax.grad(lambda shared: jnp.sum(arm.encode(shared, domain)[1][6]))(shared)
    reached = np.abs(gradient["item"]).max(axis=1) > 0
    assert reached.tolist() == [False, False, True, True, True, False, True]  # two steps from item 6
    assert not np.any(gradient["user"])
