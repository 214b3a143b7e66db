"""The run directory: held by one process at a time, and bound to one config once something in it is trained.

A run that is refused before any work leaves nothing that stands in the way of the corrected one.
"""

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import filelock
import ml_collections

from bdlm_jax import __version__
from bdlm_jax.runtime import parallel
from bdlm_jax.runtime.files import CHECKSUMS, damaged_file, read_json, write_checksums, write_json
from bdlm_jax.types import InputError

_OTHER = "choose another --workdir"
_DELETE = f"delete it if the settings are the old ones, or {_OTHER}"
_FREE = ("name", "tuned_on", "runtime.", "data.titles")  # settings that change no number
_STAGES = ("*", "*/*", "*/*/*")
_TRAINED = ("per_user/*.npz", *(f"{at}/{what}" for at in _STAGES for what in ("done.json", "checkpoints")))
_PREPARED = ("data/fingerprint.json", "data/validation_*.npz", "data/test_*.npz", "data/slices.npz")
_DRAWN = ("data/samples.safetensors",)  # of an own model, which another config may not be of
_NUMBERS = ("results.json", "text_head.json", "pool*.json", "per_user/*.npz")
_READ_BACK = (*_PREPARED, "config.json", "environment.json", *_NUMBERS)


@contextlib.contextmanager
def hold(workdir: str | os.PathLike, *, flag: str = "--workdir") -> Iterator[Path]:
    """Makes a run directory and holds it against other processes; the system lets go of one whose holder dies."""
    folder = Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(folder / "lock").acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(f"another run is at work in {folder}; wait for it, or choose another {flag}.") from None
    except (OSError, ValueError, NotImplementedError) as error:  # ValueError: a path with a null byte
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{folder} cannot be a run directory ({why}); choose another {flag}.") from error
    with held:
        yield folder


def begin(folder: Path, config: ml_collections.ConfigDict) -> None:
    """Refuses to go on with a run of other settings; what a start of other settings only prepared goes."""
    refuse_other_config(folder, config)
    path, fingerprint = folder / "config.json", folder / "data" / "fingerprint.json"
    if path.exists() and not fingerprint.exists() and "mutual" not in read_json(path, remedy=_OTHER):
        raise InputError(f"{path} is not of a run, which would write its own; {_OTHER}.")
    if fingerprint.exists() and not is_trained(folder) and (not path.exists() or _difference(path, config)):
        _forget(folder, (*_PREPARED, *_DRAWN))
        if (folder / "tokenizer" / CHECKSUMS).exists():  # else it is not of a run
            _forget(folder / "tokenizer", ("*",))


def is_trained(folder: Path) -> bool:
    """Tells whether an earlier start of a run has trained or tested anything."""
    return any(next(folder.glob(pattern), None) for pattern in _TRAINED)


def record(folder: Path, config: ml_collections.ConfigDict) -> None:
    """Keeps the resolved config, the versions and the revision."""
    (folder / CHECKSUMS).unlink(missing_ok=True)  # `finish` writes it, of what stands then
    write_json(folder / "config.json", json.loads(config.to_json_best_effort()))
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "jraph", "numpy")
    facts = {"python": sys.version.split()[0], "devices": parallel.device_summary(), "cores": os.cpu_count()}
    versions = {"bdlm_jax": __version__, **{name: importlib.metadata.version(name) for name in names}}
    write_json(folder / "environment.json", {**facts, **versions, "git": _revision()})


def finish(folder: Path) -> None:
    """Notes the checksums of what reports read."""
    found = [path for pattern in _READ_BACK for path in folder.glob(pattern)]
    write_checksums(folder, [path.relative_to(folder).as_posix() for path in found])


def refuse_other_config(folder: Path, config: ml_collections.ConfigDict) -> None:
    """Refuses to go on with what a run of other settings has trained."""
    path = folder / "config.json"
    if path.exists() and damaged_file(folder, path.name):
        raise InputError(f"{path} is damaged, for its checksum differs; {_DELETE}.")
    if path.exists() and is_trained(folder) and (found := _difference(path, config)):
        key, before, after = found
        raise InputError(
            f"{path} was written with another config.{key}: {before!r}, and now it is {after!r}; "
            "choose a new --workdir, or the old settings."
        )


def _difference(path: Path, config: ml_collections.ConfigDict) -> tuple | None:
    """The first setting that differs from those of a config.json: its key, and both values."""
    written = read_json(path, remedy=_DELETE)
    before, after = (dict(_flat(tree)) for tree in (written, json.loads(config.to_json_best_effort())))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key) and not key.startswith(_FREE):
            return key, before.get(key), after.get(key)
    return None


def _forget(folder: Path, patterns: tuple[str, ...]) -> None:
    for path in [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]:
        path.unlink()


def _flat(tree: dict, prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _revision() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
