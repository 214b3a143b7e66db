"""Weights, moments and tables spread over data x fsdp x tensor; `mutual_steps_test` trains both arms that way."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bdlm_jax.runtime import checkpoint
from bdlm_jax.runtime.parallel import compile_step
from bdlm_jax.types import InputError, leaf_name

OPTIMIZER = optax.adam(0.05)
WIDTH, INNER = 4, 8


class State(NamedTuple):
    params: dict
    opt_state: tuple
    step: jax.Array
    key: jax.Array


def make_state():
    keys = jax.random.split(jax.random.key(1), 3)
    mlp = {
        "gate_proj": {"kernel": jax.random.normal(keys[0], (1, WIDTH, INNER))},
        "down_proj": {"kernel": jax.random.normal(keys[1], (1, INNER, WIDTH))},
    }
    tables = {"item": jax.random.normal(keys[2], (10, WIDTH)), "user": jnp.ones((7, 3))}
    params = {"shared": tables, "lm": {"layers": {"mlp": mlp}}}
    return State(params, OPTIMIZER.init(params), jnp.int32(0), jax.random.key(5))


def make_batch(step):
    generator = np.random.default_rng(step)
    x = {name: generator.integers(0, n, 8).astype(np.int32) for name, n in (("item", 10), ("user", 7))}
    return x | {"y": generator.normal(size=(8, WIDTH)).astype(np.float32)}


def mlp_step(state, batch):
    def loss(params):
        mlp, tables = params["lm"]["layers"]["mlp"], params["shared"]
        hidden = jnp.tanh(tables["item"][batch["item"]] @ mlp["gate_proj"]["kernel"][0])
        out = hidden @ mlp["down_proj"]["kernel"][0] * tables["user"][batch["user"]].sum(-1, keepdims=True)
        # The mean over a table's own rows: rows of padding would show.
        return jnp.mean((out - batch["y"]) ** 2) + jnp.var(tables["user"]) + jnp.mean(jnp.exp(tables["item"]))

    value, gradients = jax.value_and_grad(loss)(state.params)
    updates, opt_state = OPTIMIZER.update(gradients, state.opt_state)
    return State(optax.apply_updates(state.params, updates), opt_state, state.step + 1, state.key), {"loss": value}


def make(sizes):
    if sizes is None:
        return compile_step(mlp_step, parallel="jit")
    return compile_step(mlp_step, parallel="mesh", mesh=sizes, n_devices=int(np.prod(list(sizes.values()))))


def train(compiled, state, steps):
    losses = []
    for step in steps:
        state, metrics = compiled.run(state, make_batch(step))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def expected():
    compiled = make(None)
    state, losses = train(compiled, compiled.place_state(make_state()), range(4))
    return compiled.fetch_state(state), losses


def assert_close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual._replace(key=0)), jax.tree.leaves(expected._replace(key=0))):
        assert np.shape(a) == np.shape(b)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


def leaves_named(state, end):
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state) if leaf_name(path).endswith(end)]


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 4, 1), (1, 1, 8), (2, 2, 1)])
def test_every_mesh_trains_to_the_numbers_of_one_device(expected, sizes):
    data, fsdp, tensor = sizes
    compiled = make({"data": data, "fsdp": fsdp, "tensor": tensor})
    state = compiled.place_state(make_state())
    (item, *_), n_rows = leaves_named(state, "shared/item"), -(-10 // fsdp) * fsdp
    assert item.shape == (n_rows, WIDTH)
    state, losses = train(compiled, state, range(4))
    np.testing.assert_allclose(losses, expected[1], rtol=1e-4)
    assert_close(compiled.fetch_state(state), expected[0])
    for end, shape in (
        ("gate_proj/kernel", (1, WIDTH // fsdp, INNER // tensor)),
        ("down_proj/kernel", (1, INNER // tensor, WIDTH // fsdp)),
        ("shared/item", (n_rows // fsdp, WIDTH)),
    ):
        weight_and_moments = leaves_named(state, end)
        assert len(weight_and_moments) == 3
        assert {shard.data.shape for leaf in weight_and_moments for shard in leaf.addressable_shards} == {shape}


def test_what_one_topology_saves_another_restores(tmp_path, expected):
    losses = []
    for step, sizes in enumerate([{"data": 2, "fsdp": 2}, None, {"tensor": 4}, {"fsdp": 4}]):
        compiled = make(sizes)
        like = compiled.abstract_state(make_state())
        start = checkpoint.restore(checkpoint.latest(tmp_path), like=like) if step else make_state()
        if step and sizes:
            kernel = start.params["lm"]["layers"]["mlp"]["gate_proj"]["kernel"]
            assert kernel.addressable_shards[0].data.size == kernel.size // 4  # each device has read its own part
        state, loss = train(compiled, compiled.place_state(start), [step])
        losses += loss
        kept = compiled.fetch_state(state, to_host=False) if compiled.in_parts else compiled.fetch_state(state)
        checkpoint.save(tmp_path, step, kept, keep=1)
    np.testing.assert_allclose(losses, expected[1], rtol=1e-4)
    assert_close(compiled.fetch_state(state), expected[0])
    # The same checkpoint is one of host arrays too, without a row of padding.
    host = checkpoint.restore(checkpoint.latest(tmp_path), like=compiled.fetch_state(state))
    assert_close(host, compiled.fetch_state(state))
    assert isinstance(host.params["shared"]["item"], np.ndarray)


def test_a_sharded_checkpoint_of_another_shape_is_refused(tmp_path):
    compiled = make({"fsdp": 2})
    path = checkpoint.save(tmp_path, 0, compiled.fetch_state(compiled.place_state(make_state()), to_host=False))
    like = make_state()
    like.params["shared"]["item"] = jnp.zeros((12, WIDTH))
    with pytest.raises(InputError, match=r"params/shared/item' is float32 \(10, 4\) there and float32 \(12, 4\) now"):
        checkpoint.restore(path, like=compiled.abstract_state(like))


def test_a_leaf_that_does_not_divide_is_named_before_anything_is_placed():
    with pytest.raises(InputError, match=r"down_proj/kernel of shape \(1, 8, 4\) .* 8 by fsdp"):
        make({"fsdp": 8}).place_state(make_state())


def test_one_step_is_compiled_once_for_a_padded_state():
    traces = []

    def counting_step(state, batch):
        traces.append(state.params["shared"]["user"].shape)
        return mlp_step(state, batch)

    compiled = compile_step(counting_step, parallel="mesh", mesh={"fsdp": 4}, n_devices=4)
    state = compiled.place_state(make_state())
    for step in range(3):
        state, _ = compiled.run(state, compiled.place_batch(make_batch(step)))
    assert traces == [(7, 3)]
    assert state.params["shared"]["user"].shape == (8, 3)
