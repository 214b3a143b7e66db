"""Propagation on a mesh: the numbers of one device, and on none of them the messages of all edges."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bdlm_jax.domain.arm import Inputs
from bdlm_jax.domain.lightgcn import lightgcn_arm
from bdlm_jax.mutual import domain_epoch
from bdlm_jax.mutual.options import DomainWeights
from bdlm_jax.mutual.sharing import init_shared
from bdlm_jax.run.plan import collective_bytes
from bdlm_jax.run.plan_graph import BOTH_WAYS, propagation_needs
from bdlm_jax.runtime import sharding
from bdlm_jax.runtime.parallel import compile_step
from bdlm_jax.types import TrainState
from experiments import tiny

SIZES = {"n_users": 27, "n_items": 13}  # which eight divides not
OPTIMIZER = optax.sgd(1.0)  # Adam would make a step of any gradient


def train(**how):
    """Two epochs of LightGCN; the state, the loss, and the shapes of the compiled program."""
    draw = np.random.default_rng(0)
    pairs = np.unique(np.stack([draw.integers(25, size=150), draw.integers(13, size=150)]), axis=1)  # two have nothing
    arm = lightgcn_arm(Inputs(4, **SIZES, user_E=pairs[0], item_E=pairs[1]), backend="gather")
    params = {"shared": init_shared(jax.random.key(0), **SIZES, width=4), "domain": {}}
    step = domain_epoch.make_domain_step(arm=arm, meeting=None, weights=DomainWeights(), optimizer=OPTIMIZER)
    compiled = compile_step(domain_epoch.make_domain_epoch(step, batch_size=64), **how)
    constants = compiled.place_constants(domain_epoch.make_epoch_constants(*pairs, **SIZES))
    state = TrainState(params, OPTIMIZER.init(params), jnp.int32(0), jax.random.key(1))
    slots = domain_epoch.make_slots(batch_size=64)
    text = compiled.lower(state, slots, {}, constants).compile().as_text() if compiled.lower else ""
    state = compiled.place_state(state)
    for _ in range(2):
        state, metrics = compiled.run(state, slots, {}, constants)
    return (
        jax.device_get(compiled.fetch_state(state).params["shared"]),
        float(metrics["loss"]),
        text,
        2 * pairs.shape[1],
    )


@pytest.fixture(scope="module")
def wanted():
    return train(parallel="jit")


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 4}])
def test_edges_cut_over_a_mesh_train_to_the_same_numbers(wanted, mesh):
    tables, loss, text, n_edges = train(parallel="mesh", mesh=mesh)
    jax.tree.map(lambda mine, one: np.testing.assert_allclose(mine, one, rtol=1e-4, atol=1e-6), tables, wanted[0])
    np.testing.assert_allclose(loss, wanted[1], rtol=1e-5)
    assert "all-gather" in text
    messages = {int(rows) for rows in re.findall(r"f32\[(\d+),4\]", text)}
    assert max(messages - {64}) < n_edges / 2, "a device holds what is sent along edges that are not its own"


def test_the_dry_run_counts_what_a_mesh_moves():
    config, draw = tiny.get_config(), np.random.default_rng(0)
    config.dry_run.update({**SIZES, "n_interactions": 100})
    config.shared.width = 4
    edges = {"user_E": draw.integers(27, size=100), "item_E": draw.integers(13, size=100)}
    arm = lightgcn_arm(Inputs(4, **SIZES, **edges), n_layers=config.domain.n_layers, backend="gather")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with sharding.traced_on(mesh):
        program = jax.jit(arm.encode).lower(init_shared(jax.random.key(0), **SIZES, width=4), {}).compile()
    moved, layers = propagation_needs(config, 8).moved, config.domain.n_layers
    # XLA tells of the whole that a device has in the end, the dry run of what it sends; here nothing goes backward.
    gathers = (layers + 1) / (BOTH_WAYS * layers + 1)
    assert collective_bytes(program.as_text()) == {"all-gather": moved * 8 / 7 * gathers}
