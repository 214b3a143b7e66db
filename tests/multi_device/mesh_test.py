"""Weights, moments and tables spread over data x fsdp x tensor train to the numbers of one device."""

import jax
import numpy as np
import pytest
import small_bdlm

from bdlm_jax import optimizers
from bdlm_jax.runtime import checkpoint
from bdlm_jax.runtime.parallel import compile_step

ARM = small_bdlm.make_arm()
BRIDGE = small_bdlm.make_bridge(dropout=0.2)
OPTIMIZER = small_bdlm.make_optimizer(domain=optimizers.FROZEN)
STEP = small_bdlm.make_lm_step(ARM, BRIDGE, optimizer=OPTIMIZER)


@pytest.fixture(scope="module")
def params():
    return small_bdlm.make_params(ARM, BRIDGE)


def make(sizes):
    if sizes is None:
        return compile_step(STEP, parallel="jit")
    return compile_step(STEP, parallel="mesh", mesh=sizes, n_devices=int(np.prod(list(sizes.values()))))


def train(compiled, state, params, steps):
    constants = small_bdlm.make_views(ARM, BRIDGE, params)[0], small_bdlm.lm_constants()
    losses = []
    for step in steps:
        batch = small_bdlm.make_rows().batch(step, batch_size=8, seed=0)
        state, metrics = compiled.run(state, batch, *constants)
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def expected(params):
    compiled = make(None)
    state, losses = train(compiled, compiled.place_state(small_bdlm.make_state(params, OPTIMIZER)), params, range(4))
    return compiled.fetch_state(state), losses


def assert_close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual._replace(key=0)), jax.tree.leaves(expected._replace(key=0))):
        assert np.shape(a) == np.shape(b)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


def test_a_mesh_of_three_axes_trains_to_the_same_numbers(params, expected):
    compiled = make({"data": 2, "fsdp": 2, "tensor": 2})
    state = compiled.place_state(small_bdlm.make_state(params, OPTIMIZER))
    user = state.params["shared"]["user"]
    assert user.shape == (small_bdlm.N_USERS + 1, small_bdlm.D)  # 9 rows on 2 parts
    state, losses = train(compiled, state, params, range(4))
    np.testing.assert_allclose(losses, expected[1], rtol=1e-4)
    assert_close(compiled.fetch_state(state), expected[0])
    kernels = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith("mlp/gate_proj/kernel")
    ]
    assert len(kernels) == 3  # the weight and its two moments, sharded before and after the steps
    assert {shard.data.shape for leaf in kernels for shard in leaf.addressable_shards} == {(1, 8 // 2, 12 // 2)}


def test_what_one_topology_saves_another_restores(tmp_path, params, expected):
    state, losses = small_bdlm.make_state(params, OPTIMIZER), []
    for step, sizes in enumerate([{"data": 2, "fsdp": 2}, None, {"tensor": 4}, {"fsdp": 4}]):
        compiled = make(sizes)
        like = small_bdlm.make_state(params, OPTIMIZER)
        if step:
            saved = checkpoint.latest(tmp_path)
            placed = checkpoint.restore(saved, like=compiled.abstract_state(like) if sizes else like)
            placed = placed if sizes else compiled.place_state(placed)
        else:
            placed = compiled.place_state(state)
        placed, loss = train(compiled, placed, params, [step])
        losses += loss
        checkpoint.save(tmp_path, step, placed)
    np.testing.assert_allclose(losses, expected[1], rtol=1e-4)
    assert_close(compiled.fetch_state(placed), expected[0])
