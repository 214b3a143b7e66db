"""How a door tells that it cannot serve what it was given: one sentence on standard error, and exit code 2."""

import sys

from bdlm_jax.runtime.files import explain_os
from bdlm_jax.types import InputError

REFUSED = (InputError, OSError)  # OSError: a path, its rights, or the disk


def refuse(error: Exception) -> int:
    """Prints why, on one line, and returns the exit code."""
    told = explain_os(error) if isinstance(error, OSError) else error
    print("bdlm_jax:", " ".join(str(told).split()), file=sys.stderr)
    return 2
