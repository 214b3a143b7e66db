"""How a door tells that it cannot serve what it was given: one sentence on standard error, and exit code 2."""

import contextlib
import sys
from collections.abc import Iterator

from bdlm_jax.runtime.files import explain_os
from bdlm_jax.types import InputError

REFUSED = (InputError, OSError)  # OSError: a path, its rights, or the disk


def refuse(error: Exception) -> int:
    """Prints why, on one line, and returns the exit code."""
    told = explain_os(error) if isinstance(error, OSError) else error
    print("bdlm_jax:", " ".join(str(told).split()), file=sys.stderr)
    return 2


@contextlib.contextmanager
def memory_explained(remedy: str) -> Iterator[None]:
    """Says in one sentence that the memory does not suffice, of this machine or of a device of it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # XLA's own is a RuntimeError
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        why = str(error).strip().split("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")
        raise InputError(f"the memory does not suffice ({why}); {remedy}.") from error
