"""A step on named weights and on tables whose rows divide by nothing; the same numbers however it is spread."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdlm_jax.runtime.parallel import compile_step
from bdlm_jax.types import TrainState, leaf_name

OPTIMIZER = optax.adam(0.05)
WIDTH, INNER = 4, 8
OFFSET = np.float32(0.25)


def make_state():
    keys = jax.random.split(jax.random.key(1), 3)
    mlp = {
        "gate_proj": {"kernel": jax.random.normal(keys[0], (1, WIDTH, INNER))},
        "down_proj": {"kernel": jax.random.normal(keys[1], (1, INNER, WIDTH))},
    }
    tables = {"item": jax.random.normal(keys[2], (10, WIDTH)), "user": jnp.ones((7, 3))}
    params = {"shared": tables, "lm": {"layers": {"mlp": mlp}}}
    return TrainState(params, OPTIMIZER.init(params), jnp.int32(0), jax.random.key(5))


def make_batch(number, size=16):
    generator = np.random.default_rng(number)
    return {
        "item": generator.integers(0, 10, size).astype(np.int32),
        "user": generator.integers(0, 7, size).astype(np.int32),
        "y": generator.normal(size=(size, WIDTH)).astype(np.float32),
        # Rows of weight zero are not spread evenly over the devices: a mean of means would show.
        "weight": (np.arange(size) < 5).astype(np.float32),
        "row": np.arange(size, dtype=np.int32),
    }


def step(state, batch, offset=OFFSET, *, axis_name=None):
    key = jax.random.fold_in(state.key, state.step)
    noise = jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(key, row), (WIDTH,)))(batch["row"])

    def rows_loss(params):
        mlp, tables = params["lm"]["layers"]["mlp"], params["shared"]
        hidden = jnp.tanh(tables["item"][batch["item"]] @ mlp["gate_proj"]["kernel"][0])
        out = hidden @ mlp["down_proj"]["kernel"][0] * tables["user"][batch["user"]].sum(-1, keepdims=True) + offset
        return (batch["weight"][:, None] * (out - batch["y"] - 0.1 * noise) ** 2).sum()

    def tables_loss(params):  # means over a table's own rows: rows of padding would show
        return jnp.var(params["shared"]["user"]) + jnp.mean(jnp.exp(params["shared"]["item"]))

    summed = *jax.value_and_grad(rows_loss)(state.params), batch["weight"].sum()
    loss, gradients, count = summed if axis_name is None else jax.lax.psum(summed, axis_name)
    more, own = jax.value_and_grad(tables_loss)(state.params)
    gradients = jax.tree.map(lambda g, o: g / count + o, gradients, own)
    updates, opt_state = OPTIMIZER.update(gradients, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, opt_state, state.step + 1, state.key), {"loss": loss / count + more}


def make(parallel="mesh", **mesh):
    """Compiles the step; a mesh takes as many devices as its sizes need."""
    options = {"mesh": mesh, "n_devices": int(np.prod(list(mesh.values())))} if mesh else {}
    return compile_step(step, parallel=parallel, **options)


def train(compiled, state, numbers):
    losses = []
    for number in numbers:
        state, metrics = compiled.run(state, make_batch(number))
        losses.append(float(metrics["loss"]))
    return state, losses


def assert_close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual._replace(key=0)), jax.tree.leaves(expected._replace(key=0))):
        assert np.shape(a) == np.shape(b)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


def leaves_named(state, end):
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state) if leaf_name(path).endswith(end)]
