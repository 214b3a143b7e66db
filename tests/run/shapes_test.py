"""A million users by a million items, by shape alone: no stage makes an array of users x items, or one near it."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdlm_jax.data.interactions import Interactions
from bdlm_jax.data.splits import leave_one_out
from bdlm_jax.domain.arm import dot_score
from bdlm_jax.domain.models import MODELS
from bdlm_jax.evaluation import evaluate, metrics
from bdlm_jax.mutual.options import DomainWeights, LMWeights
from bdlm_jax.run import build, plan, rates
from bdlm_jax.types import TrainState
from experiments import tiny

N = 10**6  # users, and items: a mask of bytes over both would take 10^12
WIDTH = 64
TABLES = 2 * N * WIDTH  # entries of both tables in one array, which the propagation has
BOUND = 2 * TABLES  # entries of any one array: a GB of float32


def largest(jaxpr) -> tuple[int, str]:
    """(entries, shape and primitive) of the largest array that a program makes anywhere, loops' bodies included."""
    found = (0, "")
    for equation in jaxpr.eqns:
        for out in equation.outvars:
            size = math.prod(getattr(out.aval, "shape", ()))
            found = max(found, (size, f"{getattr(out.aval, 'shape', ())} of {equation.primitive}"))
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found = max(found, largest(inner))
    return found


def check(function, *arguments) -> None:
    """Fails if the arguments of a function, or anything that it makes of them, are above the bound."""
    for leaf in jax.tree.leaves(arguments):
        assert math.prod(np.shape(leaf)) <= BOUND, np.shape(leaf)
    size, what = largest(jax.make_jaxpr(function)(*arguments).jaxpr)
    assert 0 < size <= BOUND, f"{what}: {size:,} entries, where {BOUND:,} are allowed"


@pytest.fixture(scope="module")
def run():
    """A run over a million users and items, of whom a few have interactions: what is long is the numbering."""
    config = tiny.get_config()
    config.shared.width = config.lm.width = WIDTH
    config.domain.backend = "auto"
    config.mutual.kl_users, config.mutual.kl_items = 256, 1024
    config.itemgcn.text_neighbours = 0  # which are found on the host, every pair being compared
    ids = np.arange(N).astype(str)
    user_E = np.repeat(np.arange(0, N, N // 8), 4).astype(np.int32)
    item_E = np.arange(len(user_E), dtype=np.int32) * (N // len(user_E))
    nothing = {"rating_E": None, "item_fields": {"title": np.full(N, "", object)}, "user_fields": {}}
    table = Interactions(user_E, item_E, np.arange(len(user_E)), user_ids=ids, item_ids=ids, **nothing)
    data = SimpleNamespace(split=leave_one_out(table), n_users=N, n_items=N)
    vocabulary = SimpleNamespace(n_text=304, user_tokens=None, unnamed_user=None)
    return build.Run(config, Path(), data, SimpleNamespace(vocabulary=vocabulary), None, jax.random.key(0), Path())


def views(run):
    """What the arms see of each other, as shapes."""
    by_user, by_item = (jax.ShapeDtypeStruct((N, WIDTH), jnp.float32) for _ in range(2))
    return {"user": by_user, "item": by_item}, {
        "state_user": by_user, "rows_item": by_item, "z_user": by_user, "z_item": by_item
    }  # fmt: skip


def state_of(run, model, arm, optimizer):
    def make():
        params = build.init_tables(run, model, arm)
        return TrainState(params, optimizer.init(params), jnp.int32(0), jax.random.key(0))

    return jax.eval_shape(make)


@pytest.mark.parametrize("model", MODELS)
def test_no_domain_epoch_makes_an_array_of_users_by_items(run, model):
    """Alone, and taught by the LM through drawn items."""
    arm = build.make_arm(run, model)
    alone = DomainWeights(regularisation=1e-4)
    taught = dataclasses.replace(alone, kl=1.0, align_item=1.0)
    meeting = build.make_meeting(run, reads="layer0")
    for weights in (alone, taught):
        made = build.make_domain_arm(run, model, arm, meeting, weights, rate=1e-3)
        check(
            made.compiled.run, state_of(run, model, arm, made.optimizer), made.batch(0), views(run)[1], made.constants
        )


def test_no_lm_step_makes_an_array_of_users_by_items(run):
    """Its score-level term looks at the whole catalogue, for the users of a batch alone."""
    arm, weights = build.make_arm(run, "lightgcn"), LMWeights(item=1.0, text=0.2, align_item=1.0, kl=0.1)
    meeting = build.make_meeting(run, reads="layer0")
    made = build.make_lm_arm(run, None, meeting, weights, rates.lm_rates(lambda step: 1e-3, shared=1.0), arm=arm)
    state = jax.eval_shape(lambda: plan.make_state(run, made))
    batch = plan.abstract_batch(run.config)
    check(made.compiled.run, state, batch, views(run)[0], made.constants)


def test_ranking_a_chunk_of_users_stays_within_bounds():
    """Full ranking takes fewer users at once where the catalogue is large."""
    chunk = evaluate.chunk_users(512, N)
    assert 1 <= chunk < 512 and chunk * N <= evaluate.MOST_AT_ONCE
    assert evaluate.chunk_users(512, 12_101) == 512
    scores_BI = jax.ShapeDtypeStruct((chunk, N), jnp.float32)
    closed_BI, item_BT = jax.ShapeDtypeStruct((chunk, N), bool), jax.ShapeDtypeStruct((chunk, 4), jnp.int32)
    check(metrics.count_catalogue, scores_BI, closed_BI, item_BT)
    view = {
        "user": jax.ShapeDtypeStruct((N, WIDTH), jnp.float32),
        "item": jax.ShapeDtypeStruct((N, WIDTH), jnp.float32),
    }
    check(
        lambda view, user_B: dot_score({}, view["user"][user_B], view["item"]),
        view,
        jax.ShapeDtypeStruct((chunk,), jnp.int32),
    )


def test_the_check_sees_an_array_inside_a_loop():
    def masks(user_U):
        return jax.lax.scan(lambda carry, _: (carry, jnp.zeros((N, N), bool).sum()), user_U, None, length=2)

    with pytest.raises(AssertionError, match="entries"):
        check(masks, jax.ShapeDtypeStruct((3,), jnp.int32))
