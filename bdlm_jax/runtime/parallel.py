"""One pure step, compiled for one device, for replicas or for a mesh: the only file that names devices.

The three ways give the same numbers, because a step sums its losses, counts and gradients over `axis_name` itself.
Under "mesh" there is no axis name: the compiler sees the global batch and places the sums.
"""

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bdlm_jax.runtime import sharding
from bdlm_jax.runtime.sharding import Layout, spread
from bdlm_jax.types import InputError, leaf_name

AXIS = "data"


class Compiled(NamedTuple):
    """A compiled step with the ways between host and devices.

    run: `(state, batch, *constants) -> (state, metrics)`; `state` is a placed one and used up; every leaf of
        `batch` has its rows first; `constants` (the other arm's tables) are the same for every device.
    place_state: always a copy, so that donation never eats the caller's arrays; with `in_parts` also `copy=False`,
        for a state that the caller gives up: what lies right already is not copied.
    fetch_state: a placed state, or any subtree of one, as NumPy arrays; typed keys stay keys. With `in_parts` also
        `to_host=False`: on its devices, without added rows.
    place_constants, place_batch: what is placed once is not sent again by `run`, which takes both. On a mesh long
        constants (`sharding.LONG`) are cut by rows.
    in_parts: whether a state stays on its devices between phases ("mesh" of one process that cuts it into parts).
    abstract_state: pytree -> its shapes with shardings, to restore a checkpoint into ("mesh").
    lower: `(state, batch, *constants)` of shapes -> what XLA can compile and tell about without any array ("mesh").
    """

    run: Callable[..., tuple[Any, Any]]
    place_state: Callable[..., Any]
    fetch_state: Callable[..., Any]
    place_constants: Callable[[Any], Any]
    place_batch: Callable[[Any], Any]
    in_parts: bool = False
    abstract_state: Callable[[Any], Any] | None = None
    lower: Callable[..., Any] | None = None


def compile_step(
    step: Callable[..., tuple[Any, Any]],
    *,
    parallel: str,
    n_devices: int | None = None,
    mesh: Mapping[str, int] | None = None,
    rules: sharding.Rules = sharding.RULES,
) -> Compiled:
    """Compiles a pure step the way the config's one word says.

    Args:
        step: `step(state, batch, *constants, axis_name=None) -> (state, metrics)`; where `axis_name` is given it sums
            counts, metrics and gradients over that axis.
        parallel: "jit" (one device), "pmap" (the state replicated, the batch split by rows), "mesh" (jit with named
            shardings: the batch split by rows over data and fsdp, the state as `rules` say).
        n_devices: how many of the machine's devices; None: all ("jit" takes one).
        mesh: sizes of the axes, see `sharding.mesh_sizes`; None: all devices on "data".
    """
    if parallel not in ("jit", "pmap", "mesh"):
        raise InputError(f"config.parallel is {parallel!r}; use 'jit', 'pmap' or 'mesh'.")
    if parallel != "mesh" and jax.process_count() > 1:
        raise InputError(f"config.parallel is {parallel!r}, which one process runs alone; use 'mesh' with several.")
    limit = 1 if parallel == "jit" else jax.device_count()
    wanted = limit if n_devices is None else n_devices
    if not 1 <= wanted <= limit:
        raise InputError(f"{n_devices} devices were asked for, but parallel={parallel!r} can use 1 to {limit} here.")
    devices = jax.devices()[:wanted]
    if parallel == "jit":
        return _compile_jit(step, devices[0])
    if parallel == "pmap":
        return _compile_pmap(step, devices)
    return _compile_mesh(step, _make_mesh(mesh, devices), rules)


def params_shardings(shapes: Any, *, parallel: str, mesh: Mapping[str, int] | None = None) -> Any:
    """Says where every parameter lies between phases, so that a loader can put it there and nowhere else.

    `shapes` has the paths below a state's `params`. None where a state comes to the host between phases.
    """
    if parallel != "mesh":
        return None
    made = _make_mesh(mesh, jax.devices())
    if not _keeps_parts(made):
        return None
    layout = sharding.state_layout({"params": shapes}, dict(made.shape))["params"]
    return jax.tree.map(lambda leaf: _unpadded_sharding(made, leaf), layout)


def enable_compilation_cache(folder: str | Path) -> None:
    """Keeps compiled programs in `folder`, or where JAX_COMPILATION_CACHE_DIR says, for the next start."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # A process that has compiled before has already settled on another folder, or on none.
        compilation_cache.reset_cache()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def device_count() -> int:
    """How many devices `pmap` and `mesh` spread a batch over."""
    return jax.device_count()


def device_summary() -> str:
    """Names the devices and the JAX that a run uses, as in "2 x cpu (cpu), jax 0.10.2"."""
    first = jax.devices()[0]
    return f"{jax.device_count()} x {first.device_kind} ({first.platform}), jax {jax.__version__}"


def _compile_jit(step: Callable, device: jax.Device) -> Compiled:
    def place(tree):
        return jax.device_put(tree, device)

    def place_state(state):
        return place(jax.tree.map(sharding.fresh, state))

    return Compiled(jax.jit(step, donate_argnums=0), place_state, sharding.to_host, place, place)


def _compile_pmap(step: Callable, devices: list[jax.Device]) -> Compiled:
    n = len(devices)
    one_axis = jax.make_mesh((n,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    # The axis' name is part of an array's layout: another one here, and the second step compiles again.
    replicate = jax.pmap(lambda _, tree: tree, axis_name=AXIS, in_axes=(0, None), devices=devices)

    @functools.cache
    def compiled(n_constants: int) -> Callable:
        return jax.pmap(
            functools.partial(step, axis_name=AXIS),
            axis_name=AXIS,
            in_axes=(0, 0) + (None,) * n_constants,
            out_axes=(0, None),
            devices=devices,
            donate_argnums=0,
        )

    def place_batch(batch):
        _check_batch(batch, n)
        return batch

    def run(state, batch, *constants):
        rows = jax.tree.map(lambda leaf: leaf.reshape((n, leaf.shape[0] // n) + leaf.shape[1:]), place_batch(batch))
        return compiled(len(constants))(state, rows, *constants)

    def place_state(state):
        return replicate(np.arange(n), jax.tree.map(sharding.fresh, state))

    def fetch_state(state):
        return sharding.to_host(jax.tree.map(lambda leaf: leaf[0], state))

    def place_constants(constants):
        return jax.device_put(constants, NamedSharding(one_axis, PartitionSpec()))

    return Compiled(run, place_state, fetch_state, place_constants, place_batch)


def _compile_mesh(step: Callable, mesh: Mesh, rules: sharding.Rules) -> Compiled:
    sizes = dict(mesh.shape)
    replicated, by_rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES))
    by_all = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    layouts: dict[Any, Any] = {}  # by the placed state's structure and shapes
    asked: list[Any] = []  # by the step's first trace, of `sharding.own_part`
    parts: list[tuple] = []  # the same, placed
    lengths: dict[Any, int] = {}  # of long constants, by name and placed shape

    def place(to):
        return NamedSharding(mesh, to.spec)

    def lay_out(state):
        layout = sharding.state_layout(state, sizes, rules)
        seen = jax.tree.structure(state), tuple(leaf.padded for leaf in jax.tree.leaves(layout))
        if layouts.setdefault(seen, layout) != layout:
            raise ValueError("one compiled step was given two states of one padded shape; compile a step for each.")
        return layout

    def layout_of(placed):
        return layouts.get((jax.tree.structure(placed), tuple(leaf.shape for leaf in jax.tree.leaves(placed))))

    def sharded_step(given, state, batch, *constants):
        layout = layout_of(state) or lay_out(state)
        state = jax.tree.map(lambda leaf, to: sharding.with_rows(leaf, to.shape), state, layout)
        constants = jax.tree_util.tree_map_with_path(own_rows, constants)
        with sharding.traced_on(mesh, asked, given):
            state, metrics = step(state, batch, *constants)
        state = jax.tree.map(lambda leaf, to: sharding.with_rows(leaf, to.padded), state, layout)
        # Without the constraint the compiler may choose another layout for the new state, and the next call recompiles.
        places = jax.tree.map(place, layout)
        return jax.lax.with_sharding_constraint((state, metrics), (places, replicated))

    compiled = jax.jit(sharded_step, donate_argnums=1)

    def with_parts(*arguments):
        if not parts:
            compiled.trace((), *arguments)  # it asks; a step that asks for nothing is not traced again
            parts.append(tuple(jax.tree.map(lambda leaf: spread(leaf, by_all), tree) for tree in asked))
        return parts[0], *arguments

    def place_batch(batch):
        _check_batch(batch, sizes["data"] * sizes["fsdp"])
        return jax.tree.map(lambda leaf: spread(leaf, by_rows), batch)

    def constant(path, leaf):
        """Where a constant lies, and its shape there; what has been placed stays as it is."""
        word, shape = sharding.LONG.search(leaf_name(path)), np.shape(leaf)
        if not word or getattr(leaf, "sharding", None) == by_all:
            return by_all if word else replicated, shape
        padded = -(-shape[0] // mesh.size) * mesh.size, *shape[1:]
        if lengths.setdefault((word[1], padded), shape[0]) != shape[0]:
            raise ValueError(f"one compiled step was given two {word[1]} of one padded shape; compile a step for each.")
        return by_all, padded

    def own_rows(path, leaf):
        word = sharding.LONG.search(leaf_name(path))
        return sharding.with_rows(leaf, (lengths[word[1], leaf.shape], *leaf.shape[1:])) if word else leaf

    def place_constants(constants):
        return jax.tree_util.tree_map_with_path(lambda path, leaf: spread(leaf, *constant(path, leaf)), constants)

    def run(state, batch, *constants):
        return compiled(*with_parts(state, place_batch(batch), *place_constants(constants)))

    def place_state(state, *, copy=True):
        layout = lay_out(state)
        return jax.tree.map(lambda leaf, to: spread(leaf, place(to), to.padded, copy=copy), state, layout)

    def fetch_state(state, *, to_host=True):
        def fetch(leaf, to=None):
            padded = to is not None and to.shape != to.padded
            if not to_host:
                return sharding.moved(leaf, _unpadded_sharding(mesh, to), to.shape) if padded else leaf
            # Leaf by leaf: gathered all at once, a state would have to fit on every device.
            host = sharding.to_host(leaf if leaf.is_fully_addressable else sharding.moved(leaf, replicated))
            return host[: to.shape[0]] if padded else host

        layout = layout_of(state)
        return jax.tree.map(fetch, state, *([] if layout is None else [layout]))

    def abstract_state(state):
        return jax.tree.map(lambda leaf, to: _shaped(leaf, _unpadded_sharding(mesh, to)), state, lay_out(state))

    def lower(state, batch, *constants):
        _check_batch(batch, sizes["data"] * sizes["fsdp"])
        batch = jax.tree.map(lambda leaf: _shaped(leaf, by_rows), batch)
        constants = jax.tree_util.tree_map_with_path(lambda path, leaf: _shaped(leaf, *constant(path, leaf)), constants)
        state = jax.tree.map(lambda leaf, to: _shaped(leaf, place(to), to.padded), state, lay_out(state))
        return compiled.lower(*with_parts(state, batch, *constants))

    in_parts = _keeps_parts(mesh)
    return Compiled(run, place_state, fetch_state, place_constants, place_batch, in_parts, abstract_state, lower)


def _make_mesh(wanted: Mapping[str, int] | None, devices: list[jax.Device]) -> Mesh:
    sizes = sharding.mesh_sizes(wanted or {"data": -1}, len(devices))
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)


def _keeps_parts(mesh: Mesh) -> bool:
    """Whether a state stays on its devices between phases; several processes bring theirs to the host."""
    return mesh.shape["fsdp"] * mesh.shape["tensor"] > 1 and jax.process_count() == 1


def _unpadded_sharding(mesh: Mesh, layout: Layout) -> NamedSharding:
    # Rows that do not divide: by columns where these do, so that no device has to hold the whole table.
    if layout.shape == layout.padded:
        return NamedSharding(mesh, layout.spec)
    fits = len(layout.shape) > 1 and layout.shape[1] % sharding.n_parts(layout.spec[0], dict(mesh.shape)) == 0
    return NamedSharding(mesh, PartitionSpec(None, layout.spec[0]) if fits else PartitionSpec())


def _shaped(leaf: Any, where: Any, shape: tuple[int, ...] | None = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf) if shape is None else shape, jnp.result_type(leaf), sharding=where)


def _check_batch(batch: Any, n_devices: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        shape = np.shape(leaf)
        if not shape or shape[0] % n_devices:
            raise InputError(
                f"The batch's {leaf_name(path) or 'array'} of shape {shape} cannot be split over {n_devices} devices; "
                "make the batch size a multiple of them."
            )
