"""How the benchmarks tell time, and what they say of it."""

import functools
import os
import statistics
import time

import jax


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@functools.cache
def _alone() -> bool:
    return cores() == 1 and jax.default_backend() == "cpu"


def clock() -> float:
    """Seconds; of the processor alone where the process is bound to one core, which other work may share."""
    return time.process_time() if _alone() else time.perf_counter()


def unit() -> str:
    """What `clock` counts."""
    return "CPU seconds of one core" if _alone() else f"seconds on {cores()} cores"


def seconds(function) -> float:
    """Runs it once."""
    start = clock()
    function()
    return clock() - start


def spread(values: list[float], form: str = ".3g") -> str:
    """Median and range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"
