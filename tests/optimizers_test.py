import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bdlm_jax.optimizers import FROZEN, describe_groups, label_params, make_optimizer
from bdlm_jax.types import InputError

PARAMS = {"shared": {"item": jnp.ones((3, 2))}, "lm": {"bridge": {"into": jnp.ones(2)}, "norm": jnp.ones(4)}}
RULES = [(r"shared/.*", FROZEN), (r"lm/bridge/.*", "bridge"), (r"lm/.*", "lm")]


def test_the_first_rule_that_matches_the_whole_path_wins():
    labels = label_params(PARAMS, RULES)
    assert labels == {"shared": {"item": FROZEN}, "lm": {"bridge": {"into": "bridge"}, "norm": "lm"}}
    with pytest.raises(InputError, match="'shared/item'"):
        label_params(PARAMS, [(r"shared", FROZEN), (r"lm/.*", "lm")])


def test_groups_move_at_their_own_rates_and_the_frozen_one_stands():
    groups = {"bridge": {"learning_rate": 0.5}, "lm": {"learning_rate": lambda step: 0.25 / (1 + step)}}
    optimizer = make_optimizer(rules=RULES, groups=groups)
    state, params = optimizer.init(PARAMS), PARAMS
    for _ in range(2):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    # With a constant gradient of 1 Adam takes steps of one learning rate.
    np.testing.assert_allclose(params["lm"]["bridge"]["into"], 1 - 0.5 - 0.5, atol=1e-5)
    np.testing.assert_allclose(params["lm"]["norm"], 1 - 0.25 - 0.125, atol=1e-5)
    np.testing.assert_array_equal(params["shared"]["item"], 1.0)
    assert not any(jnp.shape(leaf) == (3, 2) for leaf in jax.tree.leaves(state))


def test_weight_decay_is_decoupled_and_per_group():
    groups = {"bridge": {"learning_rate": 0.5, "weight_decay": 0.1}, "lm": {"learning_rate": 0.5}}
    optimizer = make_optimizer(rules=RULES, groups=groups)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, PARAMS), optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["lm"]["bridge"]["into"], -0.5 * 0.1, rtol=1e-6)
    np.testing.assert_array_equal(updates["lm"]["norm"], 0.0)


def test_clipping_measures_all_trained_leaves_and_no_frozen_one():
    # Adam forgets the gradient's size, so two gradients of different size show what was clipped: after a step on g and
    # one on h, the first moment is 0.1·(0.9·g + h), and only clipping makes h as small as g.
    rules, groups = RULES, {"bridge": {"learning_rate": 1.0}, "lm": {"learning_rate": 1.0}}
    optimizer = make_optimizer(rules=rules, groups=groups, clip_norm=1.0)
    gradient = {
        "shared": {"item": 1e6 * jnp.ones((3, 2))},
        "lm": {"bridge": {"into": 3.0 * jnp.ones(2)}, "norm": 2.0 * jnp.ones(4)},
    }
    norm = (2 * 3.0**2 + 4 * 2.0**2) ** 0.5
    _, state = optimizer.update(gradient, optimizer.init(PARAMS), PARAMS)
    moments = [leaf for leaf in jax.tree.leaves(state) if jnp.shape(leaf) == (2,)]
    np.testing.assert_allclose(moments[0], 0.1 * 3.0 / norm, rtol=1e-5)
    small = jax.tree.map(lambda g: 1e-3 * g, gradient)
    _, state = optimizer.update(small, optimizer.init(PARAMS), PARAMS)
    moments = [leaf for leaf in jax.tree.leaves(state) if jnp.shape(leaf) == (2,)]
    np.testing.assert_allclose(moments[0], 0.1 * 3e-3, rtol=1e-5)


def test_description_counts_what_trains():
    lines = describe_groups(PARAMS, label_params(PARAMS, RULES)).splitlines()
    assert [line.split() for line in lines] == [
        ["lm/bridge", "bridge", "2"],
        ["lm/norm", "lm", "4"],
        ["shared/item", FROZEN, "6"],
        ["6", "of", "12", "parameters", "train", "(50.00%)"],
    ]
