"""One pure step, compiled for one device, for replicas or for a mesh: the only file that names devices.

The three ways give the same numbers, because a step sums its losses, counts and gradients over `axis_name` itself
(`all_sum`). Under "mesh" there is no axis name: the compiler sees the global batch and places the sums.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from bdlm_jax.runtime import sharding as mesh_lib
from bdlm_jax.runtime.placement import fresh, gathered, spread, to_host
from bdlm_jax.runtime.sharding import BATCH_AXES
from bdlm_jax.types import InputError, leaf_name

AXIS = "data"


class Compiled(NamedTuple):
    """A compiled step with the two ways between host and devices.

    run: `(state, batch, *constants) -> (state, metrics)`; `state` is a placed one and, with `donate`, used up;
        `batch` is a pytree whose leaves all have the batch as leading dimension; `constants` (tables of the other arm,
        a graph) are the same for every row and every device; `metrics` are plain arrays without a device dimension.
    place_state: host pytree -> placed pytree, always a copy, so that donation never eats the caller's arrays.
    fetch_state: placed pytree (a state or any subtree of one) -> host pytree of NumPy arrays; typed keys stay keys.
    place_constants: pytree -> the same on every device; constants placed once are not sent again by every `run`.
    place_batch: batch -> the batch on its devices, for a caller that sends it before it is needed; `run` takes both.
    abstract_state: pytree -> its shapes with shardings, to restore a checkpoint into ("jit" and "mesh").
    unpad_state: placed pytree -> the same arrays on their devices without added rows, to save ("jit" and "mesh").
    take_state: as `place_state`, for a state that the caller gives up: what lies right already is not copied; None
        where states come to the host between phases (all but a "mesh" of one process that cuts them into parts).
    lower: `(state, batch, *constants)` of shapes -> what XLA can compile and tell about without any array ("mesh").
    """

    run: Callable[..., tuple[Any, Any]]
    place_state: Callable[[Any], Any]
    fetch_state: Callable[[Any], Any]
    place_constants: Callable[[Any], Any]
    place_batch: Callable[[Any], Any] = lambda batch: batch
    abstract_state: Callable[[Any], Any] | None = None
    unpad_state: Callable[[Any], Any] | None = None
    take_state: Callable[[Any], Any] | None = None
    lower: Callable[..., Any] | None = None


def compile_step(
    step: Callable[..., tuple[Any, Any]],
    *,
    parallel: str,
    n_devices: int | None = None,
    donate: bool = True,
    mesh: Mapping[str, int] | None = None,
    rules: mesh_lib.Rules = mesh_lib.RULES,
) -> Compiled:
    """Compiles a pure step the way the config's one word says.

    Args:
        step: `step(state, batch, *constants, axis_name=None) -> (state, metrics)`; where `axis_name` is given it sums
            counts, metrics and gradients over that axis.
        parallel: "jit" (one device), "pmap" (the state replicated, the batch split by rows), "mesh" (jit with named
            shardings: the batch split by rows over data and fsdp, the state as `rules` say).
        n_devices: how many of the machine's devices; None: all ("jit" takes one).
        donate: the state's memory is reused for the new state.
        mesh: "mesh" only; sizes of the axes, see `mesh.mesh_sizes`; None: all devices on "data".
        rules: "mesh" only; see `mesh.state_layout`.

    Returns:
        A `Compiled`.

    Raises:
        InputError: an unknown word, more devices than there are, a mesh of another size; later, from `run`, a batch
            that does not divide by the devices, and from `place_state`, a leaf that does not divide.
    """
    if parallel not in ("jit", "pmap", "mesh"):
        raise InputError(f"config.parallel is {parallel!r}; use 'jit', 'pmap' or 'mesh'.")
    if parallel != "mesh" and jax.process_count() > 1:
        raise InputError(f"config.parallel is {parallel!r}, which one process runs alone; use 'mesh' with several.")
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
    return _compile_mesh(step, _make_mesh(mesh, devices), donate, tuple(rules))


def params_shardings(shapes: Any, *, parallel: str, mesh: Mapping[str, int] | None = None) -> Any:
    """Says where every parameter lies between phases, so that a loader can put it there and nowhere else.

    Args:
        shapes: pytree of shapes, with paths as below a state's `params`.
        parallel: as in `compile_step`.
        mesh: as in `compile_step`.

    Returns:
        A pytree of shardings; None where a state comes to the host between phases, and one device takes it whole.
    """
    if parallel != "mesh":
        return None
    made = _make_mesh(mesh, jax.devices())
    if not _keeps_parts(dict(made.shape)):
        return None
    layout = mesh_lib.state_layout({"params": shapes}, dict(made.shape))["params"]
    return jax.tree.map(lambda leaf: _unpadded_sharding(made, leaf), layout)


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
        return jax.device_put(jax.tree.map(fresh, state), device)

    def place(tree):
        return jax.device_put(tree, device)

    def abstract_state(state):
        return jax.tree.map(lambda leaf: _shaped(leaf, np.shape(leaf), SingleDeviceSharding(device)), state)

    return Compiled(compiled, place_state, to_host, place, place, abstract_state, lambda state: state)


def _compile_pmap(step: Callable, devices: list[jax.Device], donate: bool) -> Compiled:
    n = len(devices)
    one_axis = jax.make_mesh((n,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    replicated = NamedSharding(one_axis, PartitionSpec())
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

    def place_batch(batch):
        _check_batch(batch, n)
        return batch

    def run(state, batch, *constants):
        _check_batch(batch, n)
        rows = jax.tree.map(lambda leaf: leaf.reshape((n, leaf.shape[0] // n) + leaf.shape[1:]), batch)
        return compiled(len(constants))(state, rows, *constants)

    def place_state(state):
        return replicate(np.arange(n), jax.tree.map(fresh, state))

    def fetch_state(state):
        return to_host(jax.tree.map(lambda leaf: leaf[0], state))

    return Compiled(run, place_state, fetch_state, lambda constants: jax.device_put(constants, replicated), place_batch)


def _compile_mesh(step: Callable, mesh: Mesh, donate: bool, rules: mesh_lib.Rules) -> Compiled:
    sizes = dict(mesh.shape)
    replicated, by_rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    n_rows = sizes["data"] * sizes["fsdp"]
    layouts: dict[Any, Any] = {}  # by the placed state's structure and shapes

    def lay_out(state):
        layout = mesh_lib.state_layout(state, sizes, rules)
        seen = jax.tree.structure(state), tuple(leaf.padded for leaf in jax.tree.leaves(layout))
        if layouts.setdefault(seen, layout) != layout:
            raise ValueError("one compiled step was given two states of one padded shape; compile a step for each.")
        return layout

    def layout_of(placed):
        return layouts.get((jax.tree.structure(placed), tuple(leaf.shape for leaf in jax.tree.leaves(placed))))

    def sharded_step(state, batch, *constants):
        layout = layout_of(state) or lay_out(state)
        with mesh_lib.traced_on(mesh):
            state, metrics = step(_unpadded(state, layout), batch, *constants)
        # Without the constraint the compiler may choose another layout for the new state, and the next call recompiles.
        shardings = jax.tree.map(lambda leaf: NamedSharding(mesh, leaf.spec), layout)
        state = jax.lax.with_sharding_constraint(_padded(state, layout), shardings)
        return state, jax.lax.with_sharding_constraint(metrics, jax.tree.map(lambda _: replicated, metrics))

    compiled = jax.jit(sharded_step, donate_argnums=(0,) if donate else ())

    def place_batch(batch):
        _check_batch(batch, n_rows)
        return jax.tree.map(lambda leaf: spread(leaf, by_rows), batch)

    def run(state, batch, *constants):
        return compiled(state, place_batch(batch), *place_constants(constants))

    def place_state(state, *, copy=True):
        return jax.tree.map(
            lambda leaf, layout: spread(leaf, NamedSharding(mesh, layout.spec), layout.padded, copy=copy),
            state,
            lay_out(state),
        )

    def fetch_state(state):
        # Leaf by leaf: gathered all at once, a state would have to fit on every device.
        host = jax.tree.map(lambda leaf: to_host(gathered(leaf, replicated)), state)
        return _unpadded(host, layout_of(state))

    def place_constants(constants):
        return jax.tree.map(lambda leaf: spread(leaf, replicated), constants)

    def abstract_state(state):
        return jax.tree.map(
            lambda leaf, layout: _shaped(leaf, layout.shape, _unpadded_sharding(mesh, layout)), state, lay_out(state)
        )

    def unpad_state(state):
        def unpad(leaf, to):
            if to.shape == to.padded:
                return leaf
            return jax.jit(lambda x: x[: to.shape[0]], out_shardings=_unpadded_sharding(mesh, to))(leaf)

        return jax.tree.map(unpad, state, layout_of(state))

    def lower(state, batch, *constants):
        _check_batch(batch, n_rows)
        batch = jax.tree.map(lambda leaf: _shaped(leaf, leaf.shape, by_rows), batch)
        constants = jax.tree.map(lambda leaf: _shaped(leaf, leaf.shape, replicated), constants)
        shaped = jax.tree.map(
            lambda leaf, layout: _shaped(leaf, layout.padded, NamedSharding(mesh, layout.spec)), state, lay_out(state)
        )
        return compiled.lower(shaped, batch, *constants)

    take_state = partial(place_state, copy=False) if _keeps_parts(sizes) else None
    return Compiled(
        run, place_state, fetch_state, place_constants, place_batch, abstract_state, unpad_state, take_state, lower
    )


def _make_mesh(wanted: Mapping[str, int] | None, devices: list[jax.Device]) -> Mesh:
    sizes = mesh_lib.mesh_sizes(wanted or {"data": -1}, len(devices))
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)


def _keeps_parts(sizes: Mapping[str, int]) -> bool:
    """Whether a state stays on its devices between phases; several processes bring theirs to the host."""
    return sizes["fsdp"] * sizes["tensor"] > 1 and jax.process_count() == 1


def _unpadded_sharding(mesh: Mesh, layout: mesh_lib.Layout) -> NamedSharding:
    # Rows that do not divide: by columns where these do, so that no device has to hold the whole table.
    if layout.shape == layout.padded:
        return NamedSharding(mesh, layout.spec)
    fits = len(layout.shape) > 1 and layout.shape[1] % mesh_lib.n_parts(layout.spec[0], dict(mesh.shape)) == 0
    return NamedSharding(mesh, PartitionSpec(None, layout.spec[0]) if fits else PartitionSpec())


def _shaped(leaf: Any, shape: tuple[int, ...], sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.result_type(leaf), sharding=sharding)


def _padded(state: Any, layout: Any) -> Any:
    return jax.tree.map(lambda leaf, to: _with_rows(leaf, to.padded), state, layout)


def _with_rows(leaf: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return leaf if leaf.shape == shape else jnp.pad(leaf, [(0, n - m) for n, m in zip(shape, leaf.shape)])


def _unpadded(state: Any, layout: Any) -> Any:
    if layout is None:
        return state
    return jax.tree.map(lambda leaf, to: leaf if to.shape == to.padded else leaf[: to.shape[0]], state, layout)


def _check_batch(batch: Any, n_devices: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        shape = np.shape(leaf)
        if not shape or shape[0] % n_devices:
            name = leaf_name(path)
            raise InputError(
                f"The batch's {name or 'array'} of shape {shape} cannot be split over {n_devices} devices; "
                "make the batch size a multiple of them."
            )
