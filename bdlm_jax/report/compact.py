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

    In an item's place stands its kind, the slices that it is in: what a user had is others' data, and no number needs
    it. Users, kinds and others stand once for all, again for a protocol where they differ, and again for a model where
    they differ from its protocol's. Users stand as differences, which are small and all alike as a rule.
    """
    kinds_KS, kind_I = np.unique(np.stack(list(slices.values()), axis=1), axis=0, return_inverse=True)
    arrays, common = {f"slice/{name}": kinds_KS[:, s] for s, name in enumerate(slices)}, {}
    for model, protocols in counts.items():
        for protocol, c in protocols.items():
            for field, value_N in c._replace(target=kind_I.reshape(-1)[c.target])._asdict().items():
                place = f"{model}/{protocol}"
                if field in _SHARED:
                    if protocol_is_new := (protocol, field) not in common:
                        common[protocol, field] = value_N
                    if field not in common:
                        common[field], place = value_N, "*/*"
                    elif np.array_equal(value_N, common[field if protocol_is_new else (protocol, field)]):
                        place = None
                    elif protocol_is_new:
                        place = f"*/{protocol}"
                if place:
                    arrays[f"{place}/{field}"] = _smallest(np.diff(value_N, prepend=0) if field == "user" else value_N)
    save_arrays(path, arrays)


def _smallest(value_N: np.ndarray) -> np.ndarray:
    least, most = int(value_N.min(initial=0)), int(value_N.max(initial=0))
    return value_N.astype(np.result_type(np.min_scalar_type(least), np.min_scalar_type(most)))


def load_compact(path: str | os.PathLike) -> tuple[dict[str, dict[str, Counts]], dict[str, np.ndarray]]:
    """Reads what `save_compact` wrote: counts by model and protocol, whose targets are kinds, and the kinds' slices."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    slices = {name.removeprefix("slice/"): arrays.pop(name) for name in list(arrays) if name.startswith("slice/")}
    # Metrics subtract counts; unsigned numbers would wrap.
    arrays = {name: value.astype(np.int64) for name, value in arrays.items()}
    arrays |= {name: np.cumsum(value) for name, value in arrays.items() if name.endswith("/user")}
    counts: dict[str, dict[str, Counts]] = {}
    for model, protocol in dict.fromkeys(tuple(name.split("/")[:2]) for name in arrays if not name.startswith("*")):
        places = (f"{model}/{protocol}", f"*/{protocol}", "*/*")
        fields = {f: next(arrays[f"{p}/{f}"] for p in places if f"{p}/{f}" in arrays) for f in Counts._fields}
        counts.setdefault(model, {})[protocol] = Counts(**fields)
    return counts, slices
