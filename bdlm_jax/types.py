"""Shape letters and the two exceptions that the whole package speaks.

Suffixes of array names: B batch, L length, V text vocabulary, U users, I items, N nodes (U + I), E edges,
C candidates, D sharing width, M LM width, H heads, K head width, T targets, X id rows (users then items).
"""

from typing import Any

import numpy as np

Array = Any  # a jax.Array or a np.ndarray
Params = Any  # a pytree of arrays: nested dicts
IntArray = np.ndarray


class InputError(ValueError):
    """What the user gave cannot be used; the message is one sentence that says what, where and what to do."""


class LeakError(RuntimeError):
    """Held-out information was about to reach a model: a bug in the caller, never something to catch."""
