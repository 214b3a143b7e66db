"""One pure step, compiled for one device, for replicas or for a mesh: the only file that names devices.

The three ways give the same numbers, because a step sums its losses, counts and gradients over `axis_name` itself
(`all_sum`). Under "mesh" there is no axis name: the compiler sees the global batch and places the sums.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bdlm_jax.types import InputError

AXIS = "data"
Rules = Sequence[tuple[str, tuple[str | None, ...]]]


class Compiled(NamedTuple):
    """A compiled step with the two ways between host and devices.

    run: `(state, batch, *constants) -> (state, metrics)`; `state` is a placed one and, with `donate`, used up;
        `batch` is a pytree whose leaves all have the batch as leading dimension; `constants` (tables of the other arm,
        a graph) are the same for every row and every device; `metrics` are plain arrays without a device dimension.
    place_state: host pytree -> placed pytree, always a copy, so that donation never eats the caller's arrays.
    fetch_state: placed pytree (a state or any subtree of one) -> host pytree of NumPy arrays; typed keys stay keys.
    place_constants: pytree -> the same on every device; constants placed once are not sent again by every `run`.
    """

    run: Callable[..., tuple[Any, Any]]
    place_state: Callable[[Any], Any]
    fetch_state: Callable[[Any], Any]
    place_constants: Callable[[Any], Any]


def compile_step(
    step: Callable[..., tuple[Any, Any]],
    *,
    parallel: str,
    n_devices: int | None = None,
    donate: bool = True,
    rules: Rules = (),
) -> Compiled:
    """Compiles a pure step the way the config's one word says.

    Args:
        step: `step(state, batch, *constants, axis_name=None) -> (state, metrics)`; where `axis_name` is given it sums
            counts, metrics and gradients over that axis.
        parallel: "jit" (one device), "pmap" (the state replicated, the batch split by rows), "mesh" (jit with named
            shardings: the batch split by rows, the state replicated but for `rules`).
        n_devices: how many of the machine's devices; None: all ("jit" takes one).
        donate: the state's memory is reused for the new state.
        rules: "mesh" only; `(pattern, axes)` pairs, the first whose regular expression is found in a leaf's path
            ("params/shared/item") shards that leaf, `("data", None)` by rows, `(None, "data")` by columns.

    Returns:
        A `Compiled`.

    Raises:
        InputError: an unknown word, more devices than there are, rules without a mesh; later, from `run`, a batch that
            does not divide by the devices, and from `place_state`, a rule that fits no leaf or not its shape.
    """
    if parallel not in ("jit", "pmap", "mesh"):
        raise InputError(f"config.parallel is {parallel!r}; use 'jit', 'pmap' or 'mesh'.")
    if rules and parallel != "mesh":
        raise InputError(f"config.parallel is {parallel!r}, which shards no parameters; use 'mesh' or drop the rules.")
    n_here = jax.device_count()
    wanted = 1 if parallel == "jit" else n_devices or n_here
    if not 1 <= wanted <= n_here or (parallel == "jit" and n_devices not in (None, 1)):
        limit = 1 if parallel == "jit" else n_here
        raise InputError(f"{n_devices} devices were asked for, but parallel={parallel!r} can use 1 to {limit} here.")
    devices = jax.devices()[:wanted]
    if parallel == "jit":
        return _compile_jit(step, devices[0], donate)
    if parallel == "pmap":
        return _compile_pmap(step, devices, donate)
    return _compile_mesh(step, devices, donate, tuple(rules))


def all_sum(tree: Any, axis_name: str | None) -> Any:
    """Sums every leaf over the replicas, and returns the tree as it is where there are none."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def enable_compilation_cache(folder: str | Path) -> None:
    """Keeps compiled programs in `folder`, so that a second start does not compile again.

    Args:
        folder: made where it is missing; where JAX_COMPILATION_CACHE_DIR is set, that folder is used instead.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # A process that has compiled before has already settled on another folder, or on none.
        compilation_cache.reset_cache()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def device_count() -> int:
    """Returns how many devices `pmap` and `mesh` spread a batch over."""
    return jax.device_count()


def device_summary() -> str:
    """Names the devices and the JAX that a run uses, as in "2 x cpu (cpu), jax 0.10.2"."""
    first = jax.devices()[0]
    return f"{jax.device_count()} x {first.device_kind} ({first.platform}), jax {jax.__version__}"


def _compile_jit(step: Callable, device: jax.Device, donate: bool) -> Compiled:
    compiled = jax.jit(step, donate_argnums=(0,) if donate else ())

    def place_state(state):
        return jax.device_put(jax.tree.map(_fresh, state), device)

    return Compiled(compiled, place_state, _to_host, lambda constants: jax.device_put(constants, device))


def _compile_pmap(step: Callable, devices: list[jax.Device], donate: bool) -> Compiled:
    n = len(devices)
    replicated = NamedSharding(_mesh(devices), PartitionSpec())
    # The axis' name is part of an array's layout: another one here, and the second step compiles again.
    replicate = jax.pmap(lambda _, tree: tree, axis_name=AXIS, in_axes=(0, None), devices=devices)
    compiled_by_count: dict[int, Callable] = {}

    def compiled(n_constants: int) -> Callable:
        if n_constants not in compiled_by_count:
            compiled_by_count[n_constants] = jax.pmap(
                lambda state, batch, *constants: step(state, batch, *constants, axis_name=AXIS),
                axis_name=AXIS,
                in_axes=(0, 0) + (None,) * n_constants,
                out_axes=(0, None),
                devices=devices,
                donate_argnums=(0,) if donate else (),
            )
        return compiled_by_count[n_constants]

    def run(state, batch, *constants):
        _check_batch(batch, n)
        rows = jax.tree.map(lambda leaf: leaf.reshape((n, leaf.shape[0] // n) + leaf.shape[1:]), batch)
        return compiled(len(constants))(state, rows, *constants)

    def place_state(state):
        return replicate(np.arange(n), jax.tree.map(_fresh, state))

    def fetch_state(state):
        return _to_host(jax.tree.map(lambda leaf: leaf[0], state))

    return Compiled(run, place_state, fetch_state, lambda constants: jax.device_put(constants, replicated))


def _compile_mesh(step: Callable, devices: list[jax.Device], donate: bool, rules: tuple) -> Compiled:
    mesh = _mesh(devices)
    replicated, by_rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(AXIS))

    def sharded_step(state, batch, *constants):
        state, metrics = step(state, batch, *constants)
        # Without the constraint the compiler may choose another layout for the new state, and the next call recompiles.
        state = jax.lax.with_sharding_constraint(state, _state_shardings(state, mesh, rules))
        return state, jax.lax.with_sharding_constraint(metrics, jax.tree.map(lambda _: replicated, metrics))

    compiled = jax.jit(sharded_step, donate_argnums=(0,) if donate else ())

    def run(state, batch, *constants):
        _check_batch(batch, len(devices))
        return compiled(state, jax.device_put(batch, by_rows), *place_constants(constants))

    def place_state(state):
        fresh = jax.tree.map(_fresh, state)
        _check_rules(fresh, mesh, rules)
        return jax.device_put(fresh, _state_shardings(fresh, mesh, rules))

    def place_constants(constants):
        return jax.device_put(constants, replicated)

    return Compiled(run, place_state, _to_host, place_constants)


def _mesh(devices: list[jax.Device]) -> Mesh:
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def _state_shardings(state: Any, mesh: Mesh, rules: tuple) -> Any:
    def sharding(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = next((axes for pattern, axes in rules if re.search(pattern, name)), ())
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(sharding, state)


def _check_rules(state: Any, mesh: Mesh, rules: tuple) -> None:
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    taken = set()
    for pattern, axes in rules:
        names = [name for name in shapes if re.search(pattern, name)]
        if not names:
            raise InputError(
                f"The sharding rule {pattern!r} fits no parameter; paths look like {next(iter(shapes))!r}."
            )
        for name in names:
            if name in taken:
                continue
            taken.add(name)
            shape = shapes[name]
            if len(axes) > len(shape) or any(
                axis is not None and size % mesh.shape.get(axis, size + 1) for axis, size in zip(axes, shape)
            ):
                raise InputError(
                    f"The sharding rule {pattern!r} -> {tuple(axes)} does not fit {name} of shape {shape} on "
                    f"{mesh.size} devices (axis {AXIS!r}): each sharded size must be a multiple of the devices."
                )


def _check_batch(batch: Any, n_devices: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        shape = np.shape(leaf)
        if not shape or shape[0] % n_devices:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise InputError(
                f"The batch's {name or 'array'} of shape {shape} cannot be split over {n_devices} devices; "
                "make the batch size a multiple of them."
            )


def _fresh(leaf: Any) -> jax.Array:
    # Strong types: a weakly typed scalar would come back strong from the first step, and the second call recompile.
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.array(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
    return jnp.array(leaf, dtype=jnp.result_type(leaf))


def _to_host(tree: Any) -> Any:
    def host(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = np.asarray(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(leaf))
        return np.asarray(leaf)

    return jax.tree.map(host, tree)
