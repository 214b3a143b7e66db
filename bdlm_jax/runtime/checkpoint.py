"""Checkpoints that survive a kill at any moment: orbax writes, renames and rotates; here every leaf is named.

What one topology saves another restores, and what comes back is what it was, down to keys, numbers and words.
"""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdlm_jax.runtime import distributed
from bdlm_jax.runtime.files import damaged_file, flush_to_disk, write_checksums
from bdlm_jax.runtime.sharding import is_key, is_spread
from bdlm_jax.types import InputError, leaf_name

_OVERHEAD = 2**20  # bytes of a checkpoint beside its arrays, about


def save(folder: str | Path, step: int, tree: Any, *, keep: int | None = None) -> Path:
    """Writes `folder`/`step`; when it returns the checkpoint is on disk, and before that the last one still stands.

    An array that lies on several devices is written from where its parts are, never gathered. The tree holds arrays,
    typed keys, and Python bool, int, float or str; the newest `keep` steps stay, or all.
    """
    import orbax.checkpoint as ocp

    named = _named(tree)
    kinds = {name: _kind(leaf) for name, leaf in named.items()}
    for name, leaf in named.items():
        if not isinstance(leaf, _STORABLE) or kinds[name].startswith("object"):
            raise InputError(f"{name} is a {kinds[name]}, which no checkpoint can hold; use an array or a number.")
    folder = Path(folder).absolute()
    together = any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in named.values())
    if together or distributed.is_first():  # else every process holds the whole tree, and the first writes it
        folder.mkdir(parents=True, exist_ok=True)
        keys = {name: str(jax.random.key_impl(leaf)) for name, leaf in named.items() if is_key(leaf)}
        # Orbax refuses arrays without elements; their kind says everything.
        leaves = {name: _packed(leaf) for name, leaf in named.items() if np.size(leaf)}
        told = {"kinds": kinds, "keys": keys}
        _need_room(folder, sum(getattr(leaf, "nbytes", 8) for leaf in leaves.values()))
        try:
            with _manager(folder, together=together, max_to_keep=keep, cleanup_tmp_directories=True) as manager:
                manager.save(step, args=ocp.args.PyTreeSave(leaves), custom_metadata=told, force=True)
        except (OSError, ValueError, RuntimeError) as error:  # what tensorstore makes of a full disk
            told = " ".join(str(error).split())[:200]
            raise InputError(f"{folder / str(step)} cannot be written ({told}); make room there.") from error
        if distributed.is_first():
            write_checksums(folder / str(step))
            flush_to_disk(folder / str(step))
    return folder / str(step)


def _need_room(folder: Path, size: int) -> None:
    """Refuses a disk that is too full before orbax's threads meet its end, of which each would tell in its own way."""
    needed, free = _OVERHEAD + size // jax.process_count(), shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder} needs {needed:,} bytes for a checkpoint, and the disk has {free:,}; make room there."
        )


def steps(folder: str | Path) -> list[int]:
    """Lists the numbers of the complete checkpoints in `folder`, rising; none where the folder is missing."""
    folder = Path(folder)
    # Orbax gives a checkpoint its number by a rename, when it is complete.
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def latest(folder: str | Path) -> Path | None:
    found = steps(folder)
    return Path(folder).absolute() / str(found[-1]) if found else None


def restore(checkpoint: str | Path, *, like: Any) -> Any:
    """Reads a checkpoint back into the shape of `like`, equal to the bit.

    Args:
        checkpoint: a folder that `save` or `latest` returned.
        like: pytree of the saved structure; a `jax.Array` leaf comes back as one on the same devices, a NumPy array
            as NumPy, a `jax.ShapeDtypeStruct` as an array with its sharding or on the default device, a Python number
            or string as itself. With a sharding over several devices, each device reads its own part.
    """
    import orbax.checkpoint as ocp

    checkpoint, named = Path(checkpoint).absolute(), _named(like)
    if not checkpoint.is_dir():
        raise InputError(f"{checkpoint} holds no checkpoint; give a folder that `latest` names.")
    if damaged := damaged_file(checkpoint):
        raise InputError(f"{damaged} is damaged, for its checksum differs. {_remedy(checkpoint)}")
    step = int(checkpoint.name)
    with _manager(checkpoint.parent, together=any(map(is_spread, named.values()))) as manager:
        told = manager.metadata(step).custom_metadata
        if not told or not {"kinds", "keys"} <= told.keys():
            raise InputError(f"{checkpoint} says nothing of what it holds. {_remedy(checkpoint)}")
        _check_same(checkpoint, told["kinds"], {name: _kind(leaf) for name, leaf in named.items()})
        form = {name: _form(leaf) for name, leaf in named.items() if np.size(leaf)}
        how = ocp.checkpoint_utils.construct_restore_args(form)
        leaves = manager.restore(step, args=ocp.args.PyTreeRestore(form, restore_args=how))
    back = [_unpacked(leaves.get(name), leaf, told["keys"].get(name)) for name, leaf in named.items()]
    return jax.tree.unflatten(jax.tree.structure(like), back)


def _remedy(checkpoint: Path) -> str:
    return f"Delete {checkpoint.parents[1]}, and the same command trains this stage again."


_STORABLE = (bool, int, float, str, np.ndarray, np.generic, jax.Array)


def _named(tree: Any) -> dict[str, Any]:
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype} {leaf.shape}" if hasattr(leaf, "dtype") else type(leaf).__name__


def _packed(leaf: Any) -> Any:
    """A leaf as orbax takes it: whole arrays, and keys, which are small, go through the host."""
    if is_key(leaf):
        return np.asarray(jax.random.key_data(leaf))
    return leaf if isinstance(leaf, bool | int | float | str) or is_spread(leaf) else np.asarray(leaf)


def _form(leaf: Any) -> Any:
    """What orbax shall make of a packed leaf."""
    if is_spread(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    if is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return np.empty(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf


def _unpacked(found: Any, like: Any, impl: str | None) -> Any:
    if not hasattr(like, "dtype") or (is_spread(like) and found is not None):
        return found
    found = np.empty(like.shape, like.dtype) if found is None else found
    if isinstance(like, np.ndarray | np.generic):
        return found if isinstance(like, np.ndarray) else like.dtype.type(found)
    # A copy: on the CPU an array may alias the NumPy buffer, and a later donation must not write into it.
    array = jnp.array(found)
    array = jax.random.wrap_key_data(array, impl=impl) if impl else array
    # What lies in other processes too stays in each of them: `place_state` spreads it.
    here = like.sharding is not None and like.sharding.is_fully_addressable
    return jax.device_put(array, like.sharding) if here else array


def _check_same(checkpoint: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    for name in sorted(saved.keys() | wanted.keys()):
        there, now = saved.get(name), wanted.get(name)
        if there != now:
            missing = "only in the checkpoint" if there else "missing in it"
            told = f"{there} there and {now} now" if there and now else missing
            raise InputError(
                f"{checkpoint} was saved by another configuration: {name!r} is {told}; "
                "resume with the same config or choose a new workdir."
            )


def _manager(folder: Path, *, together: bool = False, **options: Any) -> Any:
    # Imported late: orbax takes half a second, and a dry run or a report saves nothing.
    import orbax.checkpoint as ocp

    processes = ocp.options.MultiprocessingOptions()
    if not together and jax.process_count() > 1:
        mine = jax.process_index()
        processes = ocp.options.MultiprocessingOptions(
            primary_host=mine, active_processes={mine}, barrier_sync_key_prefix=f"process{mine}"
        )
    options |= {"create": False, "enable_async_checkpointing": False, "lightweight_initialize": True}
    return ocp.CheckpointManager(
        folder,
        item_handlers=ocp.PyTreeCheckpointHandler(multiprocessing_options=processes),
        options=ocp.CheckpointManagerOptions(multiprocessing_options=processes, **options),
    )
