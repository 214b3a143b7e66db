"""Arrays on their way between the host and devices, part by part: nothing is whole where it does not have to be."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from bdlm_jax.runtime import sharding as mesh_lib
from bdlm_jax.runtime.sharding import BATCH_AXES


def place_as(tree: Any, shapes: Any) -> Any:
    """Copies every array of a tree to where the shape beside it says, part by part.

    Args:
        tree: pytree of arrays.
        shapes: the same of `jax.ShapeDtypeStruct` with shardings, as `Compiled.abstract_state` gives them.

    Returns:
        The arrays on their devices; none shares memory with an argument.
    """
    return jax.tree.map(lambda leaf, to: spread(leaf, to.sharding, copy=True), tree, shapes)


def spread_rows(batch: Any, like: Any) -> Any:
    """Splits a batch by rows over the mesh on which an array lies; where there is none, or no split, it stays as it is.

    Args:
        batch: pytree of arrays with the batch as leading dimension.
        like: an array.

    Returns:
        The batch.
    """
    sharding = getattr(like, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not set(BATCH_AXES) <= set(sharding.mesh.axis_names):
        return batch
    n_rows = mesh_lib.n_parts(BATCH_AXES, dict(sharding.mesh.shape))
    if any(leaf.shape[0] % n_rows for leaf in jax.tree.leaves(batch)):
        return batch
    return jax.tree.map(lambda leaf: spread(leaf, NamedSharding(sharding.mesh, PartitionSpec(BATCH_AXES))), batch)


def gather_spread(tree: Any) -> Any:
    """Brings what lies on several devices to the host; the rest stays where it is."""
    return jax.tree.map(
        lambda leaf: np.asarray(leaf) if isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1 else leaf,
        tree,
    )


def spread(leaf: Any, sharding: NamedSharding, shape: tuple | None = None, *, copy: bool = False) -> jax.Array:
    """Puts a leaf where the sharding says, each device's part by itself; `shape` adds rows of zeros."""
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = spread(jax.random.key_data(leaf), sharding, copy=copy)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        if not copy and leaf.sharding.is_equivalent_to(sharding, leaf.ndim) and shape in (None, leaf.shape):
            return leaf
        if len(leaf.sharding.device_set) > 1:  # it may be too large for any one place
            pad = [(0, n - m) for n, m in zip(shape or leaf.shape, leaf.shape)]
            return jax.jit(lambda x: jnp.pad(x, pad) if any(map(any, pad)) else jnp.copy(x), out_shardings=sharding)(
                leaf
            )
    host = np.asarray(leaf, dtype=jnp.result_type(leaf))
    shape = host.shape if shape is None else shape

    def part(index):
        found = host[index]
        rows = index[0].indices(shape[0]) if index else (0, 0, 1)
        missing = rows[1] - rows[0] - len(found) if index else 0
        # A copy: on the CPU the array may alias the NumPy buffer, and a later donation must not write into it.
        return np.array(found) if not missing else np.pad(found, [(0, missing)] + [(0, 0)] * (found.ndim - 1))

    return jax.make_array_from_callback(shape, sharding, part)


def gathered(tree: Any, replicated: NamedSharding) -> Any:
    """Brings what other processes hold here; what this process can read stays as it is."""
    return jax.tree.map(
        lambda leaf: leaf if leaf.is_fully_addressable else jax.jit(lambda x: x, out_shardings=replicated)(leaf), tree
    )


def fresh(leaf: Any) -> jax.Array:
    """Copies a leaf, so that a donation never eats its caller's."""
    # Strong types: a weakly typed scalar would come back strong from the first step, and the second call recompile.
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.array(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
    return jnp.array(leaf, dtype=jnp.result_type(leaf))


def to_host(tree: Any) -> Any:
    """Makes NumPy arrays of a placed tree; typed keys stay keys."""

    def host(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = np.asarray(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(leaf))
        return np.asarray(leaf)

    return jax.tree.map(host, tree)
