"""Files that are whole or not there: what is written stands beside its place and is renamed into it at the end.

What is read back can be told from what a disk made of it: tables carry a checksum of their content, and other files
have theirs in a SHA256SUMS beside them. Nothing here imports JAX, so that a served domain arm loads without it.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bdlm_jax.types import InputError

_POINTER = b"version https://git-lfs"
CHECKSUMS = "SHA256SUMS"  # as sha256sum writes them; `sha256sum -c SHA256SUMS` checks them too


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a path beside `path`; the file or folder that the block writes there then takes its place, on disk."""
    path = Path(path)
    if not path.name or path.name == "..":
        raise InputError(f"{path} names no file; give one.")
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    try:
        yield partial
        if path.is_dir() and not partial.is_dir():  # whose content would go
            raise InputError(f"{path} is a folder; name a file in it.")
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
    """Writes nested dicts and lists of arrays (NumPy or JAX, bfloat16 too) as one flat file with names "a/b/0".

    Its metadata hold a checksum of names, types, shapes and values.
    """
    flat: dict[str, np.ndarray] = {}
    _flatten(tree, "", flat)
    with replacing(path) as partial:
        write_tensors(partial, flat, metadata={"sha256": _digest(flat)})


def write_tensors(path: Path, tensors: dict[str, np.ndarray], *, metadata: dict[str, str]) -> None:
    """Writes a safetensors file that others may read as the umask lets them: the library shuts them out."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise InputError(f"{path.with_suffix('')} cannot be written ({error}); make room there.") from error
    path.chmod(mode)


def load_safetensors(path: str | os.PathLike) -> dict[str, Any]:
    """Reads what `save_safetensors` wrote, and refuses what is not that any more; a level named 0, 1, … is a list."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            told = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{path} cannot be read as a safetensors file: {error}.") from error
    if told and told != _digest(flat):
        raise InputError(f"{path} is damaged, for its checksum differs.")
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


def write_checksums(folder: str | os.PathLike, names: Iterable[str] | None = None, *, keep: bool = False) -> None:
    """Notes the sha256 of the named files of a folder (None: of all below it) in its SHA256SUMS.

    Args:
        keep: what is noted there of other files stays, and they are not read again.
    """
    folder = Path(folder)
    if names is None:
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    told = {name: file_sha256(folder / name) for name in {*names} - {CHECKSUMS}}
    told = (_read_checksums(folder) or {} if keep else {}) | told
    write_text(folder / CHECKSUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(told.items())))


def damaged_file(folder: str | os.PathLike, *names: str, but: str = "") -> Path | None:
    """The first file of a folder that its SHA256SUMS knows otherwise, or a missing one; None where all is well.

    Args:
        names: those that are looked at, all without any; what SHA256SUMS does not name is taken as it is.
        but: one that is not.
    """
    folder = Path(folder)
    if not (folder / CHECKSUMS).is_file():
        return None
    if (told := _read_checksums(folder)) is None:
        return folder / CHECKSUMS
    for name in names or told:
        file = folder / name
        if name in told and name != but and (not file.is_file() or file_sha256(file) != told[name]):
            return file
    return None


def read_json(path: str | os.PathLike, *, remedy: str) -> dict:
    """Reads a JSON object; `remedy` is what to do where the file is none any more."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be read ({why}); {remedy}.") from error
    return value


def explain_os(error: OSError) -> str:
    """What the system refused, in one sentence for people."""
    path = error.filename2 or error.filename
    what = f"{path} cannot be read or written" if path is not None else "a file cannot be read or written"
    return f"{what} ({error.strerror or error}); check the path, its rights and the room on the disk."


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, as sha256sum prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_checksums(folder: Path) -> dict[str, str] | None:
    """{name: sha256} of a folder's SHA256SUMS; None where there is none, or what stands there is something else."""
    path, told = folder / CHECKSUMS, {}
    if not path.is_file():
        return None
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, space, name = line.partition("  ")
        if len(digest) != 64 or not space or not name:
            return None
        told[name] = digest
    return told


def _digest(flat: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(flat.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\x1d".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


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
