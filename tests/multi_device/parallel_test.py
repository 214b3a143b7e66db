import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bdlm_jax.runtime.parallel import compile_step
from bdlm_jax.types import InputError

OPTIMIZER = optax.adam(0.05)
ROWS = (("shared/item$", ("data", None)),)


class State(NamedTuple):
    params: dict
    opt_state: tuple
    step: jax.Array
    key: jax.Array


def make_state():
    params = {"shared": {"item": jnp.arange(16.0 * 3).reshape(16, 3) / 48}, "bias": jnp.zeros(())}
    return State(params, OPTIMIZER.init(params), jnp.int32(0), jax.random.key(5))


def make_batch(step, size=16):
    generator = np.random.default_rng(step)
    return {
        "item": generator.integers(0, 16, size).astype(np.int32),
        "x": generator.normal(size=(size, 3)).astype(np.float32),
        "y": generator.normal(size=size).astype(np.float32),
        # Rows of weight zero are not spread evenly over the devices: a mean of means would show.
        "weight": (np.arange(size) < 5).astype(np.float32),
        "row": np.arange(size, dtype=np.int32),
    }


def regression_step(state, batch, offset, *, axis_name=None):
    key = jax.random.fold_in(state.key, state.step)
    noise = jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(key, row)))(batch["row"])

    def loss_sum(params):
        predicted = (params["shared"]["item"][batch["item"]] * batch["x"]).sum(-1) + params["bias"] + offset
        return (batch["weight"] * (predicted - batch["y"] - 0.1 * noise) ** 2).sum()

    total, gradients = jax.value_and_grad(loss_sum)(state.params)
    count = all_sum(batch["weight"].sum(), axis_name)
    gradients = jax.tree.map(lambda g: g / count, all_sum(gradients, axis_name))
    updates, opt_state = OPTIMIZER.update(gradients, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    return State(params, opt_state, state.step + 1, state.key), {"loss": all_sum(total, axis_name) / count}


def all_sum(tree, axis_name):
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


@functools.cache
def train(parallel, **options):
    compiled = compile_step(regression_step, parallel=parallel, **options)
    state, losses = compiled.place_state(make_state()), []
    offset = compiled.place_constants(np.float32(0.25))
    for step in range(4):
        state, metrics = compiled.run(state, make_batch(step), offset)
        losses.append(float(metrics["loss"]))
    return compiled, state, losses


@pytest.fixture(scope="module")
def expected():
    compiled, state, losses = train("jit")
    return compiled.fetch_state(state), losses


def test_there_are_eight_devices():
    assert jax.device_count() == 8


@pytest.mark.parametrize(
    ("parallel", "options"),
    [("pmap", {}), ("pmap", {"n_devices": 2}), ("mesh", {}), ("mesh", {"n_devices": 4}), ("mesh", {"rules": ROWS})],
)
def test_three_ways_give_the_same_numbers(expected, parallel, options):
    compiled, state, losses = train(parallel, **options)
    actual, (wanted, wanted_losses) = compiled.fetch_state(state), expected
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5)
    assert losses[0] != losses[1]
    np.testing.assert_array_equal(jax.random.key_data(actual.key), jax.random.key_data(wanted.key))
    assert actual.step == 4
    for a, w in zip(jax.tree.leaves(actual._replace(key=0)), jax.tree.leaves(wanted._replace(key=0))):
        assert np.shape(a) == np.shape(w)
        np.testing.assert_allclose(a, w, rtol=1e-5, atol=1e-6)


def test_rules_shard_the_table_and_its_moments_and_keep_them_so():
    _, state, _ = train("mesh", rules=ROWS)
    moments = state.opt_state[0]
    for table in (state.params["shared"]["item"], moments.mu["shared"]["item"], moments.nu["shared"]["item"]):
        assert {shard.data.shape for shard in table.addressable_shards} == {(16 // 8, 3)}
    assert state.params["bias"].sharding.is_fully_replicated


def test_replicas_hold_the_same_state():
    _, state, _ = train("pmap")
    table = np.asarray(state.params["shared"]["item"])
    assert table.shape == (8, 16, 3)
    assert (table == table[:1]).all()


@pytest.mark.parametrize("parallel", ["pmap", "mesh"])
def test_constants_may_come_from_the_host_or_be_placed_once(parallel):
    compiled = compile_step(regression_step, parallel=parallel)
    placed = compiled.place_constants(np.float32(0.25))
    assert placed.sharding.is_fully_replicated
    assert len(placed.sharding.device_set) == 8
    losses = []
    for offset in (placed, np.float32(0.25), np.float32(9.0)):
        _, metrics = compiled.run(compiled.place_state(make_state()), make_batch(0), offset)
        losses.append(float(metrics["loss"]))
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("parallel", ["pmap", "mesh"])
def test_one_compilation_serves_all_steps(parallel):
    traces = []

    def counting_step(state, batch, offset, *, axis_name=None):
        traces.append(axis_name)
        return regression_step(state, batch, offset, axis_name=axis_name)

    compiled = compile_step(counting_step, parallel=parallel)
    state = compiled.place_state(make_state())
    for step in range(3):
        state, _ = compiled.run(state, make_batch(step), jnp.float32(0.25))
    assert len(traces) == 1


@pytest.mark.parametrize("parallel", ["pmap", "mesh"])
def test_a_batch_that_does_not_divide_is_refused(parallel):
    compiled = compile_step(regression_step, parallel=parallel)
    state = compiled.place_state(make_state())
    with pytest.raises(InputError, match=r"of shape \(12,.*8 devices"):
        compiled.run(state, make_batch(0, size=12), jnp.float32(0.25))


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (
            (("shared/item$", (None, "data")),),
            r"params/shared/item of shape \(16, 3\) .* dimension 1 of 3 .* 8 by data",
        ),
        ((("bias", ("data",)),), "does not fit params/bias"),
        ((("shared/item$", ("model",)),), "does not fit params/shared/item"),
    ],
)
def test_rules_that_do_not_fit_are_refused(rules, words):
    with pytest.raises(InputError, match=words):
        compile_step(regression_step, parallel="mesh", rules=rules).place_state(make_state())
