"""Shape letters, what a step carries, and the two exceptions that the whole package speaks.

Suffixes of array names: B batch, L length, V text vocabulary, U users, I items, N nodes (U + I) or any rows, E edges,
C candidates or a chunk of rows, D sharing width, M LM width, H heads, K head width or the best k, T targets or a text's
tokens, X id rows (users then items), W items with interactions, P tokens of a prefix, S slots of a cache or rows of a
chunk, R packed rows, G groups of the twins world; 1 is 1.
"""

from typing import Any, NamedTuple

import numpy as np

Array = Any  # a jax.Array or a np.ndarray
Params = Any  # a pytree of arrays: nested dicts
IntArray = np.ndarray


class TrainState(NamedTuple):
    """What a step carries and a checkpoint holds."""

    params: Params
    opt_state: Any
    step: Array
    key: Array


class InputError(ValueError):
    """What the user gave cannot be used; the message is one sentence that says what, where and what to do."""


class LeakError(RuntimeError):
    """Held-out information was about to reach a model: a bug in the caller, never something to catch."""


def leaf_name(path: Any) -> str:
    """Joins a JAX key path into "params/lm/embedding"."""
    import jax  # here: a served domain arm needs no JAX

    return jax.tree_util.keystr(path, simple=True, separator="/")
