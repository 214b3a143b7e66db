"""Checkpoints that survive a kill at any moment: orbax writes the arrays, one rename makes them count.

A checkpoint is a folder `00000120/` with orbax's `arrays/` and a `tree.json` that names every leaf in order, so that
typed keys, Python numbers and strings come back as what they were. Serving artefacts are flat safetensors files.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdlm_jax.runtime import distributed
from bdlm_jax.types import InputError, leaf_name

_PARTIAL, _REPLACED = ".partial", ".replaced"


def save(folder: str | Path, step: int, tree: Any, *, keep: int | None = None) -> Path:
    """Writes one checkpoint; when it returns the checkpoint is on disk, and before that the last one still stands.

    An array that lies on several devices is written from where its parts are, never gathered. What is written does not
    depend on how it lay: any other topology restores it.

    Args:
        folder: holds the checkpoints of one series; made where it is missing.
        step: the number that orders them; a checkpoint of the same number is replaced.
        tree: pytree of arrays, typed keys, and Python bool, int, float or str.
        keep: how many of the newest stay; None: all.

    Returns:
        The folder of the checkpoint.

    Raises:
        InputError: a leaf of another type.
    """
    final = Path(folder).absolute() / f"{step:08d}"
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    spread = any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for _, leaf in leaves)
    if not (spread or distributed.is_first()):
        return final  # every process holds the whole tree: the first writes it
    partial = final.with_name(final.name + _PARTIAL)
    if distributed.is_first():
        _finish_replacement(final)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    if spread:
        distributed.wait_for_all(f"{partial.name} made")
    entries, arrays = [], {}
    for i, (path, leaf) in enumerate(leaves):
        entry, array = _pack(leaf_name(path), leaf)
        entries.append(entry)
        if array is not None:
            arrays[f"{i:05d}"] = array
    if arrays:
        with _checkpointer(together=spread) as checkpointer:
            checkpointer.save(partial / "arrays", arrays)
    if distributed.is_first():
        (partial / "tree.json").write_text(json.dumps({"format": 1, "leaves": entries}), encoding="utf-8")
        _flush_to_disk(partial)
        replaced = final.with_name(final.name + _REPLACED)
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        _flush_to_disk(final.parent, recursive=False)
        shutil.rmtree(replaced, ignore_errors=True)
        if keep is not None:
            for old in steps(folder)[:-keep]:
                shutil.rmtree(final.with_name(f"{old:08d}"))
    if spread:
        distributed.wait_for_all(f"{final.name} written")
    return final


def steps(folder: str | Path) -> list[int]:
    """Lists the numbers of the complete checkpoints in `folder`, rising; none where the folder is missing."""
    folder = Path(folder).absolute()
    if not folder.is_dir():
        return []
    for replaced in folder.glob("*" + _REPLACED):
        _finish_replacement(replaced.with_name(replaced.name.removesuffix(_REPLACED)))
    return sorted(int(path.name) for path in folder.iterdir() if re.fullmatch(r"\d{8,}", path.name))


def latest(folder: str | Path) -> Path | None:
    """Finds the newest complete checkpoint of `folder`; None where there is none."""
    found = steps(folder)
    return Path(folder).absolute() / f"{found[-1]:08d}" if found else None


def restore(checkpoint: str | Path, *, like: Any) -> Any:
    """Reads a checkpoint back into the shape of `like`, equal to the bit.

    Args:
        checkpoint: a folder that `save` or `latest` returned.
        like: pytree of the saved structure; a `jax.Array` leaf comes back as one on the same devices, a NumPy array
            as NumPy, a `jax.ShapeDtypeStruct` as an array with its sharding or on the default device, a Python number
            or string as itself. With a sharding over several devices, each device reads its own part.

    Returns:
        The pytree.

    Raises:
        InputError: no such checkpoint, or a leaf whose path, shape or dtype is not that of `like`.
    """
    checkpoint = Path(checkpoint).absolute()
    if not (checkpoint / "tree.json").is_file():
        raise InputError(f"{checkpoint} holds no checkpoint; give a folder that `latest` names.")
    entries = json.loads((checkpoint / "tree.json").read_text(encoding="utf-8"))["leaves"]
    wanted = [(leaf_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(like)]
    saved_names, wanted_names = [entry["path"] for entry in entries], [name for name, _ in wanted]
    if saved_names != wanted_names:
        odd = sorted(set(saved_names) ^ set(wanted_names)) or saved_names
        side = "only in the checkpoint" if odd[0] in saved_names else "missing in it"
        raise InputError(
            f"{checkpoint} was saved by another configuration: {odd[0]!r} is {side}; "
            "resume with the same config or choose a new workdir."
        )
    arrays = {}
    if (checkpoint / "arrays").exists():
        template = {}
        for i, (entry, (_, leaf)) in enumerate(zip(entries, wanted)):
            if "dtype" not in entry:
                continue
            if _is_spread(leaf):
                _check_same(checkpoint, entry, entry["dtype"], entry["shape"], leaf)
                template[f"{i:05d}"] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            else:
                template[f"{i:05d}"] = np.empty(entry["shape"], np.dtype(entry["dtype"]))
        with _checkpointer(together=any(_is_spread(leaf) for _, leaf in wanted)) as checkpointer:
            arrays = checkpointer.restore(checkpoint / "arrays", template)
    leaves = [
        _unpack(checkpoint, entry, arrays.get(f"{i:05d}"), leaf)
        for i, (entry, (_, leaf)) in enumerate(zip(entries, wanted))
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _pack(path: str, leaf: Any) -> tuple[dict[str, Any], np.ndarray | None]:
    if isinstance(leaf, bool | int | float | str) and not isinstance(leaf, np.generic):
        return {"path": path, "kind": "python", "value": leaf}, None
    kind = {"kind": "array"}
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        kind = {"kind": "key", "impl": str(jax.random.key_impl(leaf))}
        leaf = jax.random.key_data(leaf)
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic) or leaf.dtype == object:
        raise InputError(f"{path} is a {type(leaf).__name__}, which no checkpoint can hold; use an array or a number.")
    array = leaf if _is_spread(leaf) else np.asarray(leaf)
    entry = {"path": path, **kind, "shape": list(array.shape)}
    # Orbax refuses arrays without elements; their shape says everything.
    return entry | ({"dtype": array.dtype.name} if array.size else {"empty": array.dtype.name}), (
        array if array.size else None
    )


def _unpack(checkpoint: Path, entry: dict[str, Any], array: np.ndarray | None, like: Any) -> Any:
    if entry["kind"] == "python":
        if type(like) is not type(entry["value"]):
            raise _mismatch(checkpoint, entry, type(entry["value"]).__name__, type(like).__name__)
        return entry["value"]
    if array is None:
        array = np.empty(entry["shape"], np.dtype(entry["empty"]))
    if _is_spread(like) and array.size:
        return array
    array = np.asarray(array)
    if entry["kind"] == "key":
        key = jax.random.wrap_key_data(jnp.asarray(array), impl=entry["impl"])
        found, wanted = f"{key.dtype} {key.shape}", f"{getattr(like, 'dtype', type(like))} {np.shape(like)}"
        if found != wanted:
            raise _mismatch(checkpoint, entry, found, wanted)
        sharding = getattr(like, "sharding", None)
        # A key of several processes stays in each of them: `place_state` spreads it.
        return jax.device_put(key, sharding) if sharding is not None and sharding.is_fully_addressable else key
    _check_same(checkpoint, entry, array.dtype, array.shape, like)
    if isinstance(like, np.generic):
        return array[()]
    if isinstance(like, np.ndarray):
        return array
    # A copy: on the CPU device_put may alias the NumPy buffer, and a later donation must not write into it.
    return (
        jnp.array(array) if getattr(like, "sharding", None) is None else jax.device_put(jnp.array(array), like.sharding)
    )


def _is_spread(leaf: Any) -> bool:
    """Whether a leaf lies, or is to lie, on several devices. Keys are small and go through the host."""
    sharding = getattr(leaf, "sharding", None)
    is_key = sharding is not None and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return sharding is not None and not is_key and len(sharding.device_set) > 1


def _checkpointer(*, together: bool) -> Any:
    # Imported here: orbax takes a second to import, and a serving process only reads safetensors.
    import orbax.checkpoint as ocp

    if together or jax.process_count() == 1:
        return ocp.StandardCheckpointer()
    mine = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=mine, active_processes={mine}, barrier_sync_key_prefix=f"process{mine}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=alone)


def _check_same(checkpoint: Path, entry: dict[str, Any], dtype: Any, shape: Any, like: Any) -> None:
    found, wanted = f"{dtype} {tuple(shape)}", f"{getattr(like, 'dtype', type(like))} {np.shape(like)}"
    if found != wanted:
        raise _mismatch(checkpoint, entry, found, wanted)


def _mismatch(checkpoint: Path, entry: dict[str, Any], found: str, wanted: str) -> InputError:
    return InputError(
        f"{checkpoint} was saved by another configuration: {entry['path']!r} is {found} there and {wanted} now; "
        "resume with the same config or choose a new workdir."
    )


def _finish_replacement(final: Path) -> None:
    replaced = final.with_name(final.name + _REPLACED)
    if replaced.exists():
        if final.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(final)


def _flush_to_disk(path: Path, *, recursive: bool = True) -> None:
    below = [p for p in path.rglob("*")] if recursive and path.is_dir() else []
    for each in [*below, path]:
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
