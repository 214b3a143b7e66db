"""The domain epoch on a mesh: the numbers of one device, on none of which lie all edges, messages or rows."""

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
from bdlm_jax.run.plan_graph import propagation_needs
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
    program = compiled.lower(state, slots, {}, constants).compile() if compiled.lower else None
    state = compiled.place_state(state)
    for _ in range(2):
        state, metrics = compiled.run(state, slots, {}, constants)
    return jax.device_get(compiled.fetch_state(state).params["shared"]), float(metrics["loss"]), program, pairs.shape[1]


@pytest.fixture(scope="module")
def wanted():
    return train(parallel="jit")


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 4}])
def test_edges_cut_over_a_mesh_train_to_the_same_numbers(wanted, mesh):
    tables, loss, program, n_edges = train(parallel="mesh", mesh=mesh)
    jax.tree.map(lambda mine, one: np.testing.assert_allclose(mine, one, rtol=1e-4, atol=1e-6), tables, wanted[0])
    np.testing.assert_allclose(loss, wanted[1], rtol=1e-5)
    text, steps = program.as_text(), -(-n_edges // 64)
    messages = {int(rows) for rows in re.findall(r"f32\[(\d+),4\]", text)}
    assert max(messages - {64}) < n_edges, "a device holds what is sent along edges that are not its own"
    # What the program is given, and has by itself: an eighth of the rows, of the edges and of the interactions.
    rows = {int(n) for n in re.findall(r"\w+\[(\d+)(?:,\d+)*\]\S* (?:parameter|constant)\(", text.split("ENTRY")[1])}
    assert max(rows - {SIZES["n_users"] + 1}) < n_edges / 4, "a device holds all interactions"
    # The dry run foretells it; its kernel is given 64 pairs, of which the items are known by all devices.
    config = tiny.get_config()
    config.dry_run.update({**SIZES, "n_interactions": n_edges})
    config.shared.width, config.domain.n_layers = 4, 3
    foretold, moved = propagation_needs(config, 8), collective_bytes(program.as_text())
    assert moved["all-gather"] == steps * foretold.gathered * 8 / 7
    small = 5 * 64 * 4 + 6 * 4  # the batch's numbers, and sums of its terms
    assert moved["all-reduce"] == steps * (foretold.summed * 4 / 7 + small)
