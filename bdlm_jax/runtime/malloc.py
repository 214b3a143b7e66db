"""glibc's malloc, told to keep what a training step frees (ours; Linux, CPU devices alone).

XLA asks malloc for the workspace of every step and frees it behind it. What is larger than 32 MB glibc takes from the
kernel each time and gives back, so that every page of it is cleared and mapped again in each step.
"""

import ctypes
import functools
import os

import jax

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # glibc's malloc.h
_SET_BY_THE_USER = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # variables: malloc is theirs, or another one


def one_arena() -> None:
    """Has the threads to come take memory where the main thread does; call it before JAX starts its own.

    Otherwise `keep_freed` brings next to nothing: an arena of another thread's takes no block of 64 MB.
    """
    _set(_ARENA_MAX, 1)


@functools.cache
def keep_freed() -> bool:
    """Has this process keep what it frees from now on, to use it again; returns whether it does.

    It does not with accelerators, whose steps need no memory of the host, without glibc, and where variables of the
    environment set malloc up. Memory that was used once is then the process' until it ends.
    """
    return jax.default_backend() == "cpu" and _set(_TRIM_THRESHOLD, -1) and _set(_MMAP_MAX, 0)


def _set(parameter: int, value: int) -> bool:
    if any(name.startswith(_SET_BY_THE_USER) for name in os.environ):
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  # of another C library mallopt may mean another thing, or nothing
    except (OSError, AttributeError, TypeError):  # TypeError: CDLL(None) on Windows
        return False
    return bool(libc.mallopt(parameter, value))
