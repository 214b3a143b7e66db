"""Where every leaf of a state lies on a mesh, data x fsdp x tensor by patterns on its path, and its way there.

The layout of matrices is Megatron's over `tensor` (Shoeybi et al., arXiv 1909.08053) and ZeRO-3's over `fsdp`
(Rajbhandari et al., arXiv 1910.02054). Sizes and shapes are enough for a layout, so that a dry run and a refusal cost
nothing; on their way arrays move part by part, and nothing is whole where it does not have to be.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bdlm_jax.types import InputError, leaf_name

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # a batch is split over both: fsdp shards the rows as well as the weights
Rules = Sequence[tuple[str, tuple[str | tuple[str, ...] | None, ...]]]

_TRACED: contextvars.ContextVar["Traced | None"] = contextvars.ContextVar("traced", default=None)
_INTO, _OUT_OF = "(q|k|v|gate|up)_proj", "(o|down)_proj"
RULES: Rules = (
    # Layers are stacked, so that a kernel is (depth, in, out). A block's first matrices are split by columns over
    # tensor and its last by rows: one sum over tensor a block. The other axis is fsdp's.
    (rf"lora/.*{_INTO}/.*\ba$", (None, "fsdp", None)),
    (rf"lora/.*{_INTO}/.*\bb$", (None, None, "tensor")),
    (rf"lora/.*{_OUT_OF}/.*\ba$", (None, "tensor", None)),
    (rf"lora/.*{_OUT_OF}/.*\bb$", (None, None, "fsdp")),
    (rf"{_INTO}/kernel$", (None, "fsdp", "tensor")),
    (rf"{_OUT_OF}/kernel$", (None, "tensor", "fsdp")),
    (rf"{_INTO}/bias$", (None, "tensor")),
    # Tables go by rows: a lookup and a softmax over the vocabulary then need no row on two devices.
    (r"lm/(embedding|head)$", (("fsdp", "tensor"), None)),
    (r"shared/(user|item)$", (AXES, None)),
    # Norms, biases of the residual stream, learned positions, the bridge, the domain arm: replicated, they are small.
)
# Of a step's constants those with a row for each interaction, user or item lie by rows too.
LONG = re.compile(
    "(?:^|/)(edge_(?:user|item)_E|window_WL|unseen_below|(?:seen/|known/|state_|rows_|z_)?(?:user|item))$"
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """One leaf's place: its own shape, the mesh axes of each dimension, and the shape with rows added to divide."""

    shape: tuple[int, ...]
    spec: PartitionSpec
    padded: tuple[int, ...]

    def shard(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of the part that one device holds."""
        parts = [n_parts(axes, sizes) for axes in self.spec] + [1] * (len(self.padded) - len(self.spec))
        return tuple(size // n for size, n in zip(self.padded, parts))


def mesh_sizes(wanted: Mapping[str, int], n_devices: int) -> dict[str, int]:
    """Gives the size of every axis: a missing one is 1, and the one that is -1 takes the devices that are left."""
    unknown = sorted(set(wanted) - set(AXES))
    sizes = {axis: wanted.get(axis, 1) for axis in AXES}
    told = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    if unknown:
        raise InputError(f"config.mesh.{unknown[0]} is no axis of the mesh; it has {', '.join(AXES)}.")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise InputError(f"config.mesh is {told}; sizes are whole numbers from 1, and one of them may be -1.")
    product = math.prod(size for size in sizes.values() if size != -1)
    if n_devices % product or (not free and product != n_devices):
        need = f"a multiple of {product}" if free else f"{product}"
        raise InputError(
            f"config.mesh is {told}, which needs {need} devices, but there are {n_devices}; "
            "change an axis, or set one of them to -1."
        )
    return {axis: n_devices // product if size == -1 else size for axis, size in sizes.items()}


def state_layout(state: Any, sizes: Mapping[str, int], rules: Rules = RULES) -> Any:
    """Gives every leaf of a state, or of its shapes, a `Layout`; parameters lie below `params`.

    A leaf takes the axes of the first rule whose pattern is found in its path; without a rule it is replicated. What
    an optimiser keeps of a parameter lies as that does, and is known by the end of its path; where it has a dimension
    less (Adafactor's means over rows or columns), that dimension's axes are left out. Rows (dimension 0) are padded to
    a multiple of their parts; another dimension that does not divide is refused.
    """
    named = [(leaf_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]
    shapes = {name.removeprefix("params/"): np.shape(leaf) for name, leaf in named if name.startswith("params/")}

    def layout(path, leaf):
        name, shape = leaf_name(path), tuple(np.shape(leaf))
        pattern, axes = next(((p, axes) for p, axes in rules if re.search(p, name)), ("", ()))
        parts = name.split("/")
        owner = next((shapes[tail] for i in range(1, len(parts)) if (tail := "/".join(parts[i:])) in shapes), shape)
        if shape != owner:
            axes = _axes_of_reduced(shape, owner, axes)
        return _fit(name, shape, axes, sizes, pattern)

    return jax.tree_util.tree_map_with_path(layout, state)


def n_parts(entry: str | tuple[str, ...] | None, sizes: Mapping[str, int]) -> int:
    """Into how many parts a dimension with this entry of a spec is cut."""
    return math.prod(sizes[axis] for axis in _names(entry))


class Traced(NamedTuple):
    """What a step may ask of the mesh for which it is traced; `parts` are arguments of the program, as `asked` for."""

    mesh: Mesh
    asked: list[Any]
    parts: Sequence[Any]


@contextlib.contextmanager
def traced_on(mesh: Mesh, asked: list[Any] | None = None, parts: Sequence[Any] = ()) -> Iterator[None]:
    """Within it `traced_mesh`, `split_rows` and `own_part` know the mesh; around the trace of a step."""
    before = _TRACED.set(Traced(mesh, [] if asked is None else asked, parts))
    try:
        yield
    finally:
        _TRACED.reset(before)


def traced_mesh() -> Mesh | None:
    """The mesh for which a step is being traced."""
    traced = _TRACED.get()
    return traced and traced.mesh


def own_part(tree: Any) -> Any:
    """Large constants (n, ...) of a step that is traced on a mesh of n devices, of which each shall hold its part.

    What a step closes over is a part of its program, whole on every device. So a first trace only asks, for NumPy
    arrays; they are placed, and in the next trace this returns them as arguments of the program
    (`parallel.compile_step`).
    """
    traced = _TRACED.get()
    at = next((n for n, known in enumerate(traced.asked) if known is tree), len(traced.asked))
    if at == len(traced.asked):
        traced.asked.append(tree)
    return traced.parts[at] if at < len(traced.parts) else tree


def pad_rows(x: jax.Array) -> jax.Array:
    """Adds rows of zeros until they divide over the mesh for which a step is traced; the identity where none is."""
    n = mesh.size if (mesh := traced_mesh()) else 1
    return with_rows(x, (-(-len(x) // n) * n, *x.shape[1:]))


def split_rows(x: jax.Array) -> jax.Array:
    """Keeps activations split by the rows of the batch, and is the identity where no mesh is traced.

    Left alone, the compiler splits a residual stream by its width, as the weights lie, and then sums every product over
    the devices; told where the rows are, it gathers the weights instead, which are fewer.
    """
    mesh = traced_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))


def spread_rows(batch: Any, like: Any) -> Any:
    """Splits a batch by rows over the mesh on which an array lies; where that is none, or cannot be, it stays."""
    sharding = getattr(like, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not set(BATCH_AXES) <= set(sharding.mesh.axis_names):
        return batch
    n_rows = n_parts(BATCH_AXES, dict(sharding.mesh.shape))
    if any(leaf.shape[0] % n_rows for leaf in jax.tree.leaves(batch)):
        return batch
    return jax.tree.map(lambda leaf: spread(leaf, NamedSharding(sharding.mesh, PartitionSpec(BATCH_AXES))), batch)


def gather_spread(tree: Any) -> Any:
    """Brings what lies on several devices to the host; the rest stays where it is."""
    return jax.tree.map(lambda leaf: np.asarray(leaf) if is_spread(leaf) else leaf, tree)


def spread(leaf: Any, sharding: NamedSharding, shape: tuple | None = None, *, copy: bool = False) -> jax.Array:
    """Puts a leaf where the sharding says, each device's part by itself; `shape` adds rows of zeros."""
    if is_key(leaf):
        return through_key(lambda data: spread(data, sharding, copy=copy), leaf)
    shape = np.shape(leaf) if shape is None else shape
    if isinstance(leaf, jax.Array):
        if not copy and leaf.sharding.is_equivalent_to(sharding, leaf.ndim) and shape == leaf.shape:
            return leaf
        if len(leaf.sharding.device_set) > 1:  # it may be too large for any one place
            return moved(leaf, sharding, shape)
    host = np.asarray(leaf, dtype=jnp.result_type(leaf))

    def part(index):
        found = host[index]
        start, stop, _ = index[0].indices(shape[0]) if index else (0, 0, 1)
        # A copy: on the CPU the array may alias the NumPy buffer, and a later donation must not write into it.
        missing = stop - start - len(found) if index else 0
        return np.pad(found, [(0, missing)] + [(0, 0)] * (found.ndim - 1)) if missing else np.array(found)

    return jax.make_array_from_callback(shape, sharding, part)


def moved(leaf: jax.Array, sharding: NamedSharding, shape: tuple | None = None) -> jax.Array:
    """Copies between devices, with more or fewer rows by `shape`; compiled once for a sharding and a pair of shapes."""
    return _mover(sharding)(leaf, shape or leaf.shape)


@functools.cache
def _mover(sharding: NamedSharding) -> Callable:
    return jax.jit(lambda x, shape: with_rows(jnp.copy(x), shape), static_argnums=1, out_shardings=sharding)


def with_rows(x: Any, shape: tuple) -> Any:
    """Adds rows of zeros, or cuts rows off, until `shape` is reached."""
    if x.shape == shape:
        return x
    more = shape[0] - x.shape[0]
    return x[: shape[0]] if more < 0 else jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1))


def is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_spread(leaf: Any) -> bool:
    """Whether a leaf lies, or is to lie, on several devices; keys are small and count as not."""
    sharding = getattr(leaf, "sharding", None)
    return sharding is not None and not is_key(leaf) and len(sharding.device_set) > 1


def through_key(function: Callable[[Any], Any], leaf: Any) -> Any:
    """Applies a function of arrays; of a typed key to its data, and the result is a key again."""
    if not is_key(leaf):
        return function(leaf)
    return jax.random.wrap_key_data(jnp.asarray(function(jax.random.key_data(leaf))), impl=jax.random.key_impl(leaf))


def fresh(leaf: Any) -> jax.Array:
    """Copies a leaf, so that a donation never eats its caller's."""
    # Strong types: a weakly typed scalar would come back strong from the first step, and the second call recompile.
    return jnp.array(leaf, dtype=jnp.result_type(leaf))


def to_host(tree: Any) -> Any:
    """Makes NumPy arrays of a placed tree; typed keys stay keys."""
    return jax.tree.map(lambda leaf: through_key(np.asarray, leaf), tree)


def _axes_of_reduced(shape: tuple, owner: tuple, axes: tuple) -> tuple:
    axes = (*axes, *[None] * (len(owner) - len(axes)))
    for i in range(len(owner)):
        if shape == owner[:i] + owner[i + 1 :]:
            return axes[:i] + axes[i + 1 :]
    return ()


def _fit(name: str, shape: tuple, axes: tuple, sizes: Mapping[str, int], pattern: str) -> Layout:
    if len(axes) > len(shape) or any(axis not in sizes for entry in axes for axis in _names(entry)):
        raise InputError(
            f"The sharding rule {pattern!r} -> {axes} does not fit {name} of shape {shape} on a mesh of "
            f"{dict(sizes)}; change the rule."
        )
    padded = list(shape)
    for i, entry in enumerate(axes):
        n = n_parts(entry, sizes)
        if shape[i] % n and i == 0:
            padded[0] = -(-shape[0] // n) * n
        elif shape[i] % n:
            raise InputError(
                f"{name} of shape {shape} does not divide over the mesh: its dimension {i} of {shape[i]} is split into "
                f"{n} by {' x '.join(_names(entry))}; choose a divisor of {shape[i]} for that axis of config.mesh."
            )
    # An axis of one device shards nothing; left out, an unsharded state has the plain layout.
    spec = [entry if n_parts(entry, sizes) > 1 else None for entry in axes]
    while spec and spec[-1] is None:
        spec.pop()
    return Layout(shape, PartitionSpec(*spec), tuple(padded))


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
