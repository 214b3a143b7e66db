"""Several processes that train one model: who joins, who writes, and what all of them must decide alike.

Every process runs the same story on the same data and feeds its own rows to its own devices. Only the first writes the
run directory: the others work in a temporary copy of it, so that they read what it read.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from bdlm_jax.types import InputError


def join(*, coordinator: str, processes: int, process: int) -> None:
    """Makes this process number `process` of several; call it before anything touches a device.

    `coordinator` is "host:port" of process 0; "auto" lets JAX ask the cluster (Slurm, a TPU pod); "" is one process.
    """
    if not coordinator:
        if processes != 1 or process != 0:
            raise InputError(
                f"config.distributed asks for process {process} of {processes} without a coordinator; "
                "give config.distributed.coordinator host:port of process 0, or auto."
            )
        return
    given = {}
    if coordinator != "auto":
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise InputError(
                f"config.distributed.coordinator is {coordinator!r}; give host:port of process 0, or auto."
            )
        if not 0 <= process < processes:
            raise InputError(f"config.distributed.process is {process}; it must be from 0 to {processes - 1}.")
        given = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    # XLA's CPU devices talk to each other through gloo only; elsewhere the word is not read.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(**given)
    except (RuntimeError, ValueError) as error:
        told = f"the processes do not find each other at {coordinator}: {' '.join(str(error).split())}"
        raise InputError(f"config.distributed: {told}") from error


def is_first() -> bool:
    """Says whether this process is the one that writes."""
    return jax.process_index() == 0


def agree(*flags: bool, now: bool = True) -> tuple[bool, ...]:
    """Returns the first process' flags in every process; with one process, the flags themselves at no cost.

    What a clock or a signal decides must be decided alike, or the processes wait for each other for ever. Where several
    are not to ask `now`, for that waits for the devices, all flags are False.
    """
    if jax.process_count() == 1:
        return flags
    if not now:
        return (False,) * len(flags)
    return tuple(bool(flag) for flag in multihost_utils.broadcast_one_to_all(np.asarray(flags)))


def wait_for_all(what: str) -> None:
    """Returns when every process has come here; `what` names the place, alike in all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def run_folder(workdir: str | Path) -> Iterator[str]:
    """Gives the folder that this process may write: the run directory itself, or a copy that goes away."""
    if is_first():
        wait_for_all("run directory copied")
        yield str(workdir)
        return
    with tempfile.TemporaryDirectory(prefix="bdlm_jax_") as folder:
        if Path(workdir).is_dir():
            shutil.copytree(workdir, folder, dirs_exist_ok=True)
        wait_for_all("run directory copied")
        yield folder
