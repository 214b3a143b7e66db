"""Files that are whole or not there: what is written stands beside its place and is renamed into it at the end.

Nothing here imports JAX, so that a served domain arm loads without it.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bdlm_jax.types import InputError

_POINTER = b"version https://git-lfs"


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a path beside `path`; the file or folder that the block writes there then takes its place, on disk."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    try:
        yield partial
        flush_to_disk(partial)
    except BaseException:
        _remove(partial)
        raise
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(partial, path)


def write_text(path: str | os.PathLike, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def save_safetensors(path: str | os.PathLike, tree: Any) -> None:
    """Writes nested dicts and lists of arrays (NumPy or JAX, bfloat16 too) as one flat file with names "a/b/0"."""
    from safetensors.numpy import save_file

    flat: dict[str, np.ndarray] = {}
    _flatten(tree, "", flat)
    with replacing(path) as partial:
        save_file(flat, partial)


def load_safetensors(path: str | os.PathLike) -> dict[str, Any]:
    """Reads what `save_safetensors` wrote; a level named 0, 1, … is a list."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        flat = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read as a safetensors file: {error}.") from error
    tree: dict[str, Any] = {}
    for name, array in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    return _lists(tree)


def refuse_pointer(path: str | os.PathLike) -> None:
    """Refuses what a clone without Git LFS holds in a large file's place: a few lines that name it."""
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise InputError(
                f"{path} is a Git-LFS pointer, not the file itself: fetch it with git lfs pull, or from the hub."
            )


def _flatten(tree: Any, prefix: str, flat: dict[str, np.ndarray]) -> None:
    for name, value in tree.items():
        if "/" in name:
            raise InputError(f"The name {name!r} holds a slash, which separates the levels; rename that entry.")
        if isinstance(value, list | tuple):
            value = {str(i): element for i, element in enumerate(value)}
        if isinstance(value, dict):
            _flatten(value, prefix + name + "/", flat)
        else:
            flat[prefix + name] = np.ascontiguousarray(value) if np.ndim(value) else np.asarray(value)


def _lists(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    tree = {name: _lists(value) for name, value in tree.items()}
    numbers = [str(i) for i in range(len(tree))]
    return [tree[i] for i in numbers] if tree and set(tree) == set(numbers) else tree


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    for each in [*(path.rglob("*") if path.is_dir() else []), path]:
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
