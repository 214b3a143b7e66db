"""Counts made small: those of all models of a run in one file, from which every row of its results.json follows."""

import os
from collections.abc import Mapping

import numpy as np

from bdlm_jax.evaluation.evaluate import Counts, save_arrays

_SHARED = ("user", "target", "others")  # the same for every model of a protocol, as a rule


def save_compact(
    path: str | os.PathLike, counts: Mapping[str, Mapping[str, Counts]], slices: Mapping[str, np.ndarray]
) -> None:
    """Writes {model: {protocol: Counts}} and the slices (I,) of items to one npz, in the smallest integers.

    Users, targets and others stand once for a protocol, and again for a model where they differ.
    """
    arrays, first = {f"slice/{name}": items_I for name, items_I in slices.items()}, {}
    for model, protocols in counts.items():
        for protocol, c in protocols.items():
            before = first.setdefault(protocol, c)
            for field, value_N in c._asdict().items():
                small_N = value_N.astype(np.min_scalar_type(int(value_N.max(initial=0))))
                if field not in _SHARED:
                    arrays[f"{model}/{protocol}/{field}"] = small_N
                elif before is c:
                    arrays[f"*/{protocol}/{field}"] = small_N
                elif not np.array_equal(value_N, getattr(before, field)):
                    arrays[f"{model}/{protocol}/{field}"] = small_N
    save_arrays(path, arrays)


def load_compact(path: str | os.PathLike) -> tuple[dict[str, dict[str, Counts]], dict[str, np.ndarray]]:
    """Reads what `save_compact` wrote: counts by model and protocol, and the slices."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    slices = {name.removeprefix("slice/"): arrays.pop(name) for name in list(arrays) if name.startswith("slice/")}
    counts: dict[str, dict[str, Counts]] = {}
    for model, protocol in dict.fromkeys(tuple(name.split("/")[:2]) for name in arrays if not name.startswith("*")):
        own, shared = f"{model}/{protocol}/", f"*/{protocol}/"
        fields = {field: arrays.get(own + field, arrays.get(shared + field)) for field in Counts._fields}
        # Metrics subtract counts; unsigned numbers would wrap.
        counts.setdefault(model, {})[protocol] = Counts(**{f: v.astype(np.int64) for f, v in fields.items()})
    return counts, slices
