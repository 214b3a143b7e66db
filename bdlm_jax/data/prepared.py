"""A table that was read once is kept, and found again by the hash of its files and of the reader's options.

Parsing twenty million rows takes minutes, reading arrays seconds. What is kept are plain arrays; texts lie as UTF-8 one
behind the other with their lengths.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from bdlm_jax.data import readers
from bdlm_jax.data.interactions import Interactions
from bdlm_jax.data.splits import Split
from bdlm_jax.runtime.files import replacing
from bdlm_jax.types import InputError

_LOG = logging.getLogger(__name__)
_VERSION = 1  # of what is kept, and of what readers make of a file: raise it when either changes
_COLUMNS = ("user_E", "item_E", "time_E", "rating_E")
_FIELDS = ("item_fields", "user_fields")


def load_prepared(folder: str | Path, kind: str, path: str | Path, **options: Any) -> Interactions | Split:
    """Reads as `readers.load_source` does, or takes what an earlier call kept in `folder` for the same bytes.

    A split that a publisher made is not kept. What is damaged is read anew.
    """
    kept = Path(folder) / f"{_digest(kind, Path(path), options)}.npz"
    if kept.exists():
        try:
            table = _load(kept)
            _LOG.info("%s was read before and is unchanged: taken from %s", path, kept)
            return table
        except Exception as error:  # whatever is wrong with it, the files are still there
            _LOG.warning("%s cannot be used (%s); %s is read anew", kept, error, path)
    table = readers.load_source(kind, path, **options)
    if isinstance(table, Interactions):
        kept.parent.mkdir(parents=True, exist_ok=True)
        _save(kept, table)
    return table


def _digest(kind: str, path: Path, options: dict) -> str:
    """sha256 of the reader's name and options, and of the names and bytes of all files that it may read."""
    digest = hashlib.sha256(json.dumps([_VERSION, kind, options], sort_keys=True, default=str).encode())
    named = [Path(value) for value in options.values() if isinstance(value, str)]
    beside = [path.parent / name for name in named if not name.is_absolute()]
    for root in (path, *named, *beside):
        files = sorted(entry for entry in root.rglob("*") if entry.is_file()) if root.is_dir() else [root]
        for file in filter(Path.is_file, files):
            digest.update(f"\x1d{file.relative_to(root) if root.is_dir() else file.name}\x1d".encode())
            try:
                with open(file, "rb") as data:
                    digest.update(hashlib.file_digest(data, "sha256").digest())
            except OSError as error:
                raise InputError(f"{file} cannot be read ({error}); check the path.") from error
    return digest.hexdigest()


def _save(path: Path, table: Interactions) -> None:
    arrays = {name: value for name in _COLUMNS if (value := getattr(table, name)) is not None}
    arrays |= {"user_ids": table.user_ids, "item_ids": table.item_ids, "time_kind": np.array(table.time_kind)}
    for section in _FIELDS:
        for name, texts in getattr(table, section).items():
            encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
            arrays[f"{section}/{name}/bytes"] = np.frombuffer(b"".join(encoded), np.uint8)
            arrays[f"{section}/{name}/lengths"] = np.fromiter(map(len, encoded), np.int32, len(encoded))
    arrays["sha256"] = np.array(table.fingerprint()["sha256"])
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)


def _load(path: Path) -> Interactions:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    fields = {section: {} for section in _FIELDS}
    for name in arrays:
        section, _, rest = name.partition("/")
        if rest.endswith("/bytes"):
            field = rest.removesuffix("/bytes")
            whole, ends = arrays[name].tobytes(), np.cumsum(arrays[f"{section}/{field}/lengths"]).tolist()
            cut = (whole[start:end].decode("utf-8", "surrogatepass") for start, end in zip([0, *ends], ends))
            fields[section][field] = np.array([*cut], object)
    columns = {name: arrays.get(name) for name in _COLUMNS}
    ids = {name: arrays[name] for name in ("user_ids", "item_ids")}
    table = Interactions(**columns, **ids, **fields, time_kind=str(arrays["time_kind"]))
    if table.fingerprint()["sha256"] != str(arrays["sha256"]):
        raise ValueError("its hash differs from what was kept")
    return table
