"""Interactions and splits in one .npz without objects, so that a run directory stands on its own.

Text is kept as UTF-8 bytes with lengths: no pickle, no fixed width. A changed file is refused by its hash.
"""

import os
from pathlib import Path

import numpy as np

from bdlm_jax.data.interactions import Interactions, text_array
from bdlm_jax.data.splits import Split
from bdlm_jax.types import InputError


def save_interactions(path: str | os.PathLike, interactions: Interactions, **arrays: np.ndarray) -> None:
    """Writes the table (and more `arrays`, such as a split's parts) as one .npz without objects, atomically.

    Args:
        path: file to write; it appears complete or not at all.
        interactions: the table.
        arrays: further numeric arrays to keep in the same file.
    """
    columns = {"user_E": interactions.user_E, "item_E": interactions.item_E, "time_E": interactions.time_E}
    if interactions.rating_E is not None:
        columns["rating_E"] = interactions.rating_E
    texts = {"user_ids": interactions.user_ids, "item_ids": interactions.item_ids}
    texts |= {f"item_fields/{name}": values for name, values in interactions.item_fields.items()}
    texts |= {f"user_fields/{name}": values for name, values in interactions.user_fields.items()}
    for name, values in texts.items():
        encoded = [text.encode("utf-8", "surrogatepass") for text in values.tolist()]
        columns[f"bytes/{name}"] = np.frombuffer(b"".join(encoded), np.uint8)
        columns[f"lengths/{name}"] = np.array([len(text) for text in encoded], np.int64)
    columns |= {f"more/{name}": array for name, array in arrays.items()}
    columns["time_kind"] = np.array(interactions.time_kind)
    columns["sha256"] = np.array(interactions.fingerprint()["sha256"])
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        np.savez_compressed(file, **columns)
    os.replace(part, path)


def load_interactions(path: str | os.PathLike) -> tuple[Interactions, dict[str, np.ndarray]]:
    """Reads what `save_interactions` wrote.

    Returns:
        (Interactions, {name: further array}).

    Raises:
        InputError: the file is missing, broken, or no longer what was written.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {name: file[name] for name in file.files}
        texts = {}
        for name in [name.removeprefix("bytes/") for name in data if name.startswith("bytes/")]:
            ends = np.cumsum(data[f"lengths/{name}"]).tolist()
            blob = data[f"bytes/{name}"].tobytes()
            texts[name] = [blob[a:b].decode("utf-8", "surrogatepass") for a, b in zip([0, *ends[:-1]], ends)]
        fields = {
            kind: {name.split("/", 1)[1]: text_array(values) for name, values in texts.items() if name.startswith(kind)}
            for kind in ("item_fields/", "user_fields/")
        }
        interactions = Interactions(
            user_E=data["user_E"], item_E=data["item_E"], time_E=data["time_E"], rating_E=data.get("rating_E"),
            user_ids=np.array(texts["user_ids"], str), item_ids=np.array(texts["item_ids"], str),
            item_fields=fields["item_fields/"], user_fields=fields["user_fields/"], time_kind=str(data["time_kind"]),
        )  # fmt: skip
        intact = interactions.fingerprint()["sha256"] == str(data["sha256"])
    except Exception as error:
        raise InputError(f"{path} cannot be read as saved interactions ({error}); make it again.") from error
    if not intact:
        raise InputError(f"{path} is not what was written (its hash differs); make it again.")
    return interactions, {name.removeprefix("more/"): array for name, array in data.items() if name.startswith("more/")}


def save_split(path: str | os.PathLike, split: Split) -> None:
    """Writes interactions and parts as one .npz without objects, atomically."""
    save_interactions(path, split.interactions, part_E=split.part_E)


def load_split(path: str | os.PathLike) -> Split:
    """Reads what `save_split` wrote.

    Raises:
        InputError: the file is missing, broken, or holds no split.
    """
    interactions, arrays = load_interactions(path)
    if "part_E" not in arrays:
        raise InputError(f"{path} holds interactions without a split; write it with save_split.")
    return Split(interactions, arrays["part_E"])
