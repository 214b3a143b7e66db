import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bdlm_jax.mutual.optimizer import (
    FROZEN,
    SCHEDULES,
    describe_groups,
    label_params,
    make_optimizer,
    make_schedule,
    split_trained,
)
from bdlm_jax.types import InputError

PARAMS = {"shared": {"item": jnp.ones((3, 2))}, "lm": {"bridge": {"into": jnp.ones(2)}, "norm": jnp.ones(4)}}
RULES = [(r"shared/.*", FROZEN), (r"lm/bridge/.*", "bridge"), (r"lm/.*", "lm")]


def test_the_first_rule_that_matches_the_whole_path_wins():
    labels = label_params(PARAMS, RULES)
    assert labels == {"shared": {"item": FROZEN}, "lm": {"bridge": {"into": "bridge"}, "norm": "lm"}}
    with pytest.raises(InputError, match="'shared/item'"):
        label_params(PARAMS, [(r"shared", FROZEN), (r"lm/.*", "lm")])


def test_groups_move_and_decay_at_their_own_rates_and_the_frozen_one_stands():
    decaying, slowing = {"learning_rate": 0.5, "weight_decay": 0.1}, {"learning_rate": lambda step: 0.25 / (1 + step)}
    optimizer = make_optimizer(rules=RULES, groups={"bridge": decaying, "lm": slowing})
    state, params = optimizer.init(PARAMS), PARAMS
    for _ in range(2):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    # With a constant gradient of 1 Adam takes steps of one learning rate, whatever the decay adds to them.
    once = 1 - 0.5 - 0.5 * 0.1 * 1
    np.testing.assert_allclose(params["lm"]["bridge"]["into"], once - 0.5 - 0.5 * 0.1 * once, atol=1e-5)
    np.testing.assert_allclose(params["lm"]["norm"], 1 - 0.25 - 0.125, atol=1e-5)
    np.testing.assert_array_equal(params["shared"]["item"], 1.0)
    assert not any(jnp.shape(leaf) == (3, 2) for leaf in jax.tree.leaves(state))


def test_clipping_measures_all_trained_leaves_and_no_frozen_one():
    groups = {"bridge": {"learning_rate": 1.0}, "lm": {"learning_rate": 1.0}}
    optimizer = make_optimizer(rules=RULES, groups=groups, clip_norm=1.0)
    gradient = {
        "shared": {"item": 1e6 * jnp.ones((3, 2))},
        "lm": {"bridge": {"into": 3.0 * jnp.ones(2)}, "norm": 2.0 * jnp.ones(4)},
    }
    norm = (2 * 3.0**2 + 4 * 2.0**2) ** 0.5
    for size, clipped in ((1.0, 3.0 / norm), (1e-3, 3e-3)):
        _, state = optimizer.update(optax.tree.scale(size, gradient), optimizer.init(PARAMS), PARAMS)
        # Adam's step forgets the gradient's size; its first moment, a tenth of the gradient, does not.
        moment = next(leaf for leaf in jax.tree.leaves(state) if jnp.shape(leaf) == (2,))
        np.testing.assert_allclose(moment, 0.1 * clipped, rtol=1e-5)


def test_description_counts_what_trains():
    told = describe_groups(PARAMS, label_params(PARAMS, RULES))
    assert told == "6 of 12 parameters train: bridge 2, lm 4"
    frozen = label_params(PARAMS, [(".*", FROZEN)])
    assert describe_groups(PARAMS, frozen) == "0 of 12 parameters train"


def test_master_weights_keep_steps_below_the_spacing_of_bfloat16():
    # Between 1 and 2 bfloat16 has a spacing of 1/128; twenty steps of 1/1024 are lost one by one, but not together.
    params = {"lm": {"w": jnp.ones(3, jnp.bfloat16)}}
    ends = {}
    for keep in (True, False):
        groups = {"lm": {"learning_rate": 1 / 1024, "master": keep}}
        optimizer = make_optimizer(rules=[(".*", "lm")], groups=groups)
        state, weights = optimizer.init(params), params
        for _ in range(20):
            gradient = jax.tree.map(lambda w: -jnp.ones_like(w), weights)
            updates, state = optimizer.update(gradient, state, weights)
            weights = optax.apply_updates(weights, updates)
        assert weights["lm"]["w"].dtype == jnp.bfloat16
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state) if leaf.ndim)
        ends[keep] = weights["lm"]["w"], [leaf for leaf in jax.tree.leaves(state) if jnp.shape(leaf) == (3,)]
    np.testing.assert_array_equal(ends[False][0], 1.0)
    np.testing.assert_allclose(ends[True][1][0], 1 + 20 / 1024, rtol=1e-5)
    np.testing.assert_array_equal(ends[True][0], jnp.asarray(1 + 20 / 1024, jnp.bfloat16))
    assert len(ends[True][1]) == 3 and len(ends[False][1]) == 2  # master, two moments


def test_adafactor_is_the_papers_step_with_our_rate_and_decay():
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(128, 160)), jnp.float32)}
    gradient = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(128, 160)), jnp.float32)}
    groups = {"lm": {"learning_rate": 0.1, "weight_decay": 0.01, "kind": "adafactor"}}
    optimizer = make_optimizer(rules=[(".*", "lm")], groups=groups)
    updates, state = optimizer.update(gradient, optimizer.init(params), params)
    square = np.asarray(gradient["w"], np.float64) ** 2 + 1e-30
    factored = square.mean(1, keepdims=True) * square.mean(0, keepdims=True) / square.mean()
    step = np.asarray(gradient["w"]) / np.sqrt(factored)
    step /= max(1.0, np.sqrt((step**2).mean()))
    np.testing.assert_allclose(updates["w"], -0.1 * (step + 0.01 * np.asarray(params["w"])), rtol=1e-3, atol=1e-5)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 128 + 160 + 20  # and no moment of every entry


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_warm_up_and_end_where_they_say(kind):
    rate = make_schedule(kind, 0.5, warmup=4, steps=24)
    np.testing.assert_allclose([rate(0), rate(2), rate(4)], [0.0, 0.25, 0.5], atol=1e-6)
    middle = {"cosine": 0.275, "linear": 0.275, "constant": 0.5}[kind]
    np.testing.assert_allclose([rate(14), rate(24)], [middle, 0.5 if kind == "constant" else 0.05], atol=1e-6)
    assert rate(9) > middle or kind == "constant"
    np.testing.assert_allclose(make_schedule(kind, 0.5, warmup=0, steps=10)(0), 0.5, rtol=1e-6)
    np.testing.assert_allclose(make_schedule(kind, 0.5, warmup=1, steps=1)(0), 0.5, rtol=1e-6)


def test_trained_leaves_are_taken_out_and_put_back():
    trained, put = split_trained(PARAMS, RULES)
    assert [leaf.shape for leaf in trained] == [(2,), (4,)]
    back = put([leaf + 1 for leaf in trained], PARAMS)
    np.testing.assert_array_equal(back["lm"]["norm"], 2.0)
    np.testing.assert_array_equal(back["shared"]["item"], 1.0)
    same, put = split_trained(PARAMS, None)
    assert same is PARAMS and put("leaves", PARAMS) == "leaves"
