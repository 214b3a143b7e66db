"""Amazon reviews as the McAuley lab publishes them: 2014, 2018 and 2023, JSON lines with the products' metadata.

The years name their fields differently, and 2014's metadata are Python literals; both are told from the records.
"""

import array
import html
import re
from pathlib import Path

import numpy as np
import pandas as pd

from bdlm_jax.data.files import clean_text, json_lines
from bdlm_jax.data.interactions import Interactions, build_interactions
from bdlm_jax.types import InputError

_TEXT_LIMIT = 2000


def read_amazon(
    path: str | Path,
    *,
    metadata: str | Path | None = None,
    duplicates: str = "first",
    keep_items_without_interactions: bool = False,
) -> Interactions:
    """Reads Amazon reviews of 2014, 2018 or 2023 (one JSON object a line, .gz or not) and the products' metadata.

    Args:
        path: the review file, or a folder that holds one review file and optionally its meta_… file.
        metadata: the metadata file.
        duplicates: as in `make_interactions`.
        keep_items_without_interactions: products that nobody reviewed join the catalogue.

    Returns:
        Interactions with rating, time (seconds; milliseconds in 2023) and item fields title, brand, categories and
        description (markup removed, at most 2,000 characters each).

    Raises:
        InputError: a file is missing, or a line lacks a field or is malformed.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(entry for entry in path.iterdir() if re.search(r"\.jsonl?(\.gz)?$", entry.name))
        reviews = [entry for entry in found if not entry.name.startswith("meta_")]
        described = [entry for entry in found if entry.name.startswith("meta_")]
        if len(reviews) != 1 or len(described) > 1:
            raise InputError(f"{path} must hold one review file and at most one meta_ file; name them instead.")
        path, metadata = reviews[0], metadata or (described[0] if described else None)
    ids = {"user": {}, "item": {}}
    codes = {"user": array.array("i"), "item": array.array("i")}
    times, ratings, lines = array.array("q"), array.array("d"), array.array("q")
    keys = None
    for line, record in json_lines(path):
        if keys is None:
            keys = _amazon_keys(record, f"{path}, line {line}")
        try:
            for kind in ("user", "item"):
                text = record[keys[kind]]
                if not isinstance(text, str) or not text:
                    raise KeyError(keys[kind])
                codes[kind].append(ids[kind].setdefault(text, len(ids[kind])))
            times.append(int(record[keys["time"]]))
            ratings.append(float(record[keys["rating"]]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"{path}, line {line}: a field is missing or unusable ({error}); correct the line."
            ) from None
        lines.append(line)
    if keys is None:
        raise InputError(f"{path} has no review; check the file.")
    encoded = {
        kind: pd.Categorical.from_codes(np.frombuffer(codes[kind], np.int32), categories=list(ids[kind]))
        for kind in ids
    }
    needed = None if keep_items_without_interactions else ids["item"]
    interactions, _ = build_interactions(
        encoded["user"], encoded["item"],
        time=np.frombuffer(times, np.int64), rating=np.frombuffer(ratings, np.float64),
        item_fields=_amazon_metadata(metadata, needed) if metadata else None, duplicates=duplicates,
        keep_items_without_interactions=keep_items_without_interactions, where=lambda row: f"{path}, line {lines[row]}",
    )  # fmt: skip
    return interactions


def _amazon_keys(record: dict, where: str) -> dict[str, str]:
    known = {
        "user": ("reviewerID", "user_id"),
        "item": ("parent_asin", "asin"),
        "time": ("unixReviewTime", "timestamp"),
        "rating": ("overall", "rating"),
    }
    keys = {role: next((name for name in names if name in record), None) for role, names in known.items()}
    missing = [role for role, name in keys.items() if name is None]
    if missing:
        raise InputError(
            f"{where}: no field for '{missing[0]}' ({' or '.join(known[missing[0]])}); is it a review file?"
        )
    return keys


def _amazon_metadata(path: str | Path, needed) -> dict[str, dict]:
    fields = {}
    for line, record in json_lines(path):
        key = record.get("parent_asin") or record.get("asin")
        if not isinstance(key, str):
            raise InputError(f"{path}, line {line}: no field asin or parent_asin; is it a metadata file?")
        if needed is not None and key not in needed:
            continue
        fields[key] = {
            "title": _plain_text(record.get("title")),
            "brand": _plain_text(record.get("brand") or record.get("store")),
            "categories": _plain_text(_last_path(record.get("categories") or record.get("category"))),
            "description": _plain_text(record.get("description")),
        }
    return fields


def _last_path(categories) -> str:
    """2014 nests paths of categories, later years have one path; both become "Beauty, Makeup, Face"."""
    if isinstance(categories, list) and categories and isinstance(categories[-1], list):
        categories = categories[-1]
    return ", ".join(map(str, categories)) if isinstance(categories, list) else str(categories or "")


def _plain_text(value) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value or "")
    if "getTime" in text:  # the page's script in place of the text, a known fault of 2018's metadata
        return ""
    text = clean_text(re.sub(r"<[^<>]{1,200}>", " ", html.unescape(text)))
    return text[:_TEXT_LIMIT].rstrip()
