"""The validated table of interactions that everything else is made from.

Raw ids become 0…U-1 and 0…I-1 by the natural order of the ids themselves (numbers by value when every id of the column
is a whole number, text order otherwise), so that the numbering does not depend on the order of the file's rows.
Rows are sorted by user, then time; equal times keep the order of the file.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from bdlm_jax.types import InputError

_LOG = logging.getLogger(__name__)
# As pandas, Python and databases write a missing id into a CSV file.
_MISSING = {"nan", "NaN", "<NA>", "NaT", "None", "NULL", "null"}
_OR_DATES = ", or in every row a date as 2024-05-31 or 2024-05-31T18:30:00"
_DIGITS = 1000  # of an id that is taken as a number


@dataclasses.dataclass(frozen=True, eq=False)
class Interactions:
    """Who met what, when, and the words that describe both: object arrays of str, an item's "title" always there."""

    user_E: np.ndarray  # int32
    item_E: np.ndarray  # int32
    time_E: np.ndarray  # int64, in the source's unit (seconds, say) or as a rank within the user: see `time_kind`
    rating_E: np.ndarray | None  # float32; None where the source has no ratings
    user_ids: np.ndarray  # (U,) raw ids as str
    item_ids: np.ndarray  # (I,)
    item_fields: Mapping[str, np.ndarray]
    user_fields: Mapping[str, np.ndarray]
    time_kind: str = "timestamp"  # comparable between users; "order": a user's own order only

    def __post_init__(self):
        columns = [self.user_E, self.item_E, self.time_E, self.rating_E, self.user_ids, self.item_ids]
        for column in (*columns, *self.item_fields.values(), *self.user_fields.values()):
            if column is not None:
                column.setflags(write=False)

    def __len__(self) -> int:
        return len(self.user_E)

    @property
    def n_users(self) -> int:
        return len(self.user_ids)

    @property
    def n_items(self) -> int:
        return len(self.item_ids)

    def fingerprint(self) -> dict:
        """Counts, and a sha256 of rows, order, ids and text that is the same on every platform."""
        digest = hashlib.sha256()
        for array, kind in ((self.user_E, "<i4"), (self.item_E, "<i4"), (self.time_E, "<i8"), (self.rating_E, "<f4")):
            digest.update(b"none" if array is None else np.ascontiguousarray(array, kind).tobytes())
        texts = {"user_ids": self.user_ids, "item_ids": self.item_ids}
        texts |= {f"item {name}": values for name, values in sorted(self.item_fields.items())}
        texts |= {f"user {name}": values for name, values in sorted(self.user_fields.items())}
        for name, values in texts.items():
            digest.update(f"\x1d{name}\x1d".encode())
            digest.update("\x1e".join(values.tolist()).encode("utf-8", "surrogatepass"))
        counts = {"users": self.n_users, "items": self.n_items, "interactions": len(self)}
        return {**counts, "sha256": digest.hexdigest()}

    def item_text(self, fields: Sequence[str] = ("title",)) -> list[str]:
        """One line of words per item: its non-empty `fields`, joined by "; "."""
        return _joined(self.item_fields, fields, self.n_items, "item")

    def user_text(self, fields: Sequence[str]) -> list[str]:
        """One line of words per user: its non-empty `fields`, joined by "; "."""
        return _joined(self.user_fields, fields, self.n_users, "user")


def make_interactions(user: Sequence, item: Sequence, **options) -> Interactions:
    """Checks raw columns and turns them into `Interactions`: `build_interactions`, whose options it takes."""
    return build_interactions(user, item, **options)[0]


def build_interactions(
    user: Sequence,
    item: Sequence,
    *,
    time: Sequence | None = None,
    order: Sequence | None = None,
    rating: Sequence | None = None,
    item_fields: Mapping | None = None,
    user_fields: Mapping | None = None,
    duplicates: str = "first",
    keep_items_without_interactions: bool = False,
    where: Callable[[int], str] = "row {}".format,
) -> tuple[Interactions, np.ndarray]:
    """Does the work of `make_interactions`, and also says which raw row each kept row came from.

    Args:
        user, item: raw ids, numbers or text.
        time, order: whole numbers ≥ 0, comparable between users or not; neither: the rows stand in their order.
        item_fields, user_fields: {raw id: {field: text}}; "" for whatever is not named.
        duplicates: what happens to a user-item pair that repeats: "first" keeps the earliest (default), "last" the
            latest, "keep" all of them, "error" refuses.
        keep_items_without_interactions: items that only `item_fields` names join the catalogue (cold items).
        where: names a raw row in an error message; readers pass "file, line".
    """
    _check_columns({"user": user, "item": item, "time": time, "order": order, "rating": rating}, duplicates)
    user_E, user_ids = _encode_ids(user, "user", where)
    extra = item_fields if keep_items_without_interactions and item_fields else ()
    item_E, item_ids = _encode_ids(item, "item", where, extra=extra)
    if time is not None:
        time_E = _whole_numbers(time, "time", where)
    else:
        time_E = _whole_numbers(np.arange(len(user)) if order is None else order, "order", where)
    rating_E = None if rating is None else _finite_numbers(rating, "rating", where).astype(np.float32)

    row_E = np.lexsort((time_E, user_E))  # stable, so equal times keep the order of the rows
    row_E = _without_duplicates(row_E, user_E, item_E, len(item_ids), duplicates, where)
    _LOG.info("data: %d rows read, %d dropped as duplicates", len(user_E), len(user_E) - len(row_E))
    interactions = Interactions(
        user_E=user_E[row_E],
        item_E=item_E[row_E],
        time_E=time_E[row_E],
        rating_E=None if rating_E is None else rating_E[row_E],
        user_ids=user_ids,
        item_ids=item_ids,
        item_fields=_aligned_fields(item_fields or {}, item_ids, always=("title",)),
        user_fields=_aligned_fields(user_fields or {}, user_ids),
        time_kind="order" if time is None else "timestamp",
    )
    return interactions, row_E


def k_core(interactions: Interactions, *, user: int = 5, item: int = 5) -> Interactions:
    """The largest sub-table in which every user has `user` and every item `item` interactions or more.

    It is unique; `item` 0 also keeps items without interactions.
    """
    keep_E = np.ones(len(interactions), bool)
    while True:
        user_U = np.bincount(interactions.user_E[keep_E], minlength=interactions.n_users) >= user
        item_I = np.bincount(interactions.item_E[keep_E], minlength=interactions.n_items) >= item
        still_E = user_U[interactions.user_E] & item_I[interactions.item_E]
        if np.array_equal(still_E, keep_E):
            break
        keep_E = still_E
    if not keep_E.any():
        raise InputError(f"no interaction is left in the {user}/{item}-core; lower config.data.min_user or min_item.")
    return _subset(interactions, keep_E, user_U, item_I)


def filter_rating(interactions: Interactions, *, minimum: float) -> Interactions:
    """Keeps the rows rated `minimum` or more, and drops users and items that lose their last row; cold items stay."""
    if interactions.rating_E is None:
        raise InputError(
            "config.data.min_rating needs the field 'rating', which this source does not have; leave it 0."
        )
    keep_E = interactions.rating_E >= minimum
    if not keep_E.any():
        raise InputError(f"no interaction has a rating of {minimum} or more; lower config.data.min_rating.")
    cold_I = np.bincount(interactions.item_E, minlength=interactions.n_items) == 0
    user_U = np.bincount(interactions.user_E[keep_E], minlength=interactions.n_users) > 0
    item_I = np.bincount(interactions.item_E[keep_E], minlength=interactions.n_items) > 0
    return _subset(interactions, keep_E, user_U, item_I | cold_I)


def _subset(interactions, keep_E, user_U, item_I) -> Interactions:
    new_user_U = np.cumsum(user_U, dtype=np.int32) - 1
    new_item_I = np.cumsum(item_I, dtype=np.int32) - 1
    return dataclasses.replace(
        interactions,
        user_E=new_user_U[interactions.user_E[keep_E]],
        item_E=new_item_I[interactions.item_E[keep_E]],
        time_E=interactions.time_E[keep_E],
        rating_E=None if interactions.rating_E is None else interactions.rating_E[keep_E],
        user_ids=interactions.user_ids[user_U],
        item_ids=interactions.item_ids[item_I],
        item_fields={name: values[item_I] for name, values in interactions.item_fields.items()},
        user_fields={name: values[user_U] for name, values in interactions.user_fields.items()},
    )


def _check_columns(columns: dict, duplicates: str) -> None:
    if columns["time"] is not None and columns["order"] is not None:
        raise InputError("fields 'time' and 'order' are both given; give the one that the split should follow.")
    if duplicates not in ("first", "last", "keep", "error"):
        raise InputError(f"config.data.options.duplicates is {duplicates!r}; use 'first', 'last', 'keep' or 'error'.")
    if columns["user"] is None or columns["item"] is None:
        raise InputError("the fields 'user' and 'item' are both needed; one is missing.")
    n_rows = len(columns["user"])
    if n_rows == 0:
        raise InputError("the table of interactions has no rows; check the path and the filters.")
    for name, column in columns.items():
        if column is not None and len(column) != n_rows:
            raise InputError(f"field '{name}' has {len(column)} rows where 'user' has {n_rows}; give one value a row.")


def _encode_ids(values, name, where, extra=()) -> tuple[np.ndarray, np.ndarray]:
    """Raw ids -> (codes int32, sorted ids as str); ids of `extra` are numbered too."""
    if isinstance(values, pd.Categorical):
        code_E, raw = np.asarray(values.codes), list(values.categories)
    else:
        # "10" and 10 are one id, and NumPy would turn a mixed list into text such as "9.0"
        plain = isinstance(values, np.ndarray) and values.dtype != object
        code_E, raw = pd.factorize(values if plain else np.array(list(values), object))
    ids = [_id_text(value) for value in raw]
    if missing := _MISSING.intersection(ids):
        row = int(np.argmax(code_E == ids.index(min(missing))))
        raise InputError(f"{where(row)}: field '{name}' is {min(missing)!r}, a missing id; give every row an id.")
    bad_E = (code_E < 0) | np.isin(code_E, [code for code, text in enumerate(ids) if not text])
    if bad_E.any():
        raise InputError(f"{where(int(np.argmax(bad_E)))}: field '{name}' is empty or not an id; give every row an id.")
    unsorted = list(dict.fromkeys([*ids, *(_id_text(value) or str(value) for value in extra)]))
    numeric = all(len(text) <= _DIGITS and text.removeprefix("-").isdecimal() for text in unsorted)
    numeric = numeric and all(str(int(text)) == text for text in unsorted)
    ranked = sorted(unsorted, key=int if numeric else None)
    rank = {text: n for n, text in enumerate(ranked)}
    return np.array([rank[text] for text in ids], np.int32)[code_E], np.array(ranked, str)


def _id_text(value) -> str:
    """An id as text; "" for what is no id (missing values, fractions, truth values)."""
    if isinstance(value, str):
        return str(value) if value.strip() else ""
    if isinstance(value, (bool, np.bool_)) or value is None:
        return ""
    if isinstance(value, (float, np.floating)):  # pandas turns a column of whole numbers with a gap into floats
        return str(int(value)) if np.isfinite(value) and value == int(value) else ""
    return str(int(value)) if isinstance(value, (int, np.integer)) else ""


def _finite_numbers(values, name, where) -> np.ndarray:
    """int64 or float64; text too, where all of it is numbers."""
    number_E = pd.to_numeric(pd.Series(values), errors="coerce").to_numpy()
    if number_E.dtype.kind not in "iuf":  # whole numbers past 64 bits, or truth values
        number_E = number_E.astype(np.float64)
    _refuse(~np.isfinite(number_E), values, name, where, "a finite number" + (_OR_DATES if name == "time" else ""))
    return number_E


def _whole_numbers(values, name, where) -> np.ndarray:
    number_E = _dates(values) if name == "time" else None
    number_E = _finite_numbers(values, name, where) if number_E is None else number_E
    dates = f" (seconds, say){_OR_DATES}" if name == "time" else ""
    bad_E = (number_E < 0) | (number_E > np.iinfo(np.int64).max) | (number_E % 1 != 0)
    _refuse(bad_E, number_E, name, where, f"a whole number of 0 or more{dates}")
    return number_E.astype(np.int64)


def _dates(values) -> np.ndarray | None:
    """Milliseconds since 1970 of ISO 8601 dates; None where they are numbers, or no dates."""
    text = pd.Series(values)
    if text.dtype.kind in "iufb" or not text.astype(str).str.match(r"\d{4}-\d\d-\d\d").all():  # pandas knows "now"
        return None
    date = pd.to_datetime(text, format="ISO8601", utc=True, errors="coerce")
    if date.isna().any():
        return None
    return ((date - pd.Timestamp(0, tz="UTC")) // pd.Timedelta("1ms")).to_numpy()


def _refuse(bad_E, values, name, where, wanted: str) -> None:
    if bad_E.any():
        row = int(np.argmax(bad_E))
        value = list(values)[row]
        shown = repr(value[:60]) if isinstance(value, str) else value
        raise InputError(f"{where(row)}: field '{name}' is {shown}; give {wanted}.")


def _without_duplicates(row_E, user_E, item_E, n_items, rule, where) -> np.ndarray:
    if rule == "keep":
        return row_E
    pair_E = user_E[row_E].astype(np.int64) * n_items + item_E[row_E]
    again_E = pd.Series(pair_E).duplicated("last" if rule == "last" else "first").to_numpy()
    if rule == "error" and again_E.any():
        row = int(row_E[np.argmax(again_E)])
        raise InputError(
            f"{where(row)}: this user-item pair stands in the table before; drop it, or set "
            "config.data.options.duplicates."
        )
    return row_E[~again_E]


def _aligned_fields(fields: Mapping, ids: np.ndarray, always: tuple = ()) -> dict[str, np.ndarray]:
    """{field: object array of str}: fixed-width str arrays would pay the longest title for every item."""
    by_id = {_id_text(key) or str(key): value for key, value in fields.items()}
    names = dict.fromkeys([*always, *(name for value in by_id.values() for name in value)])
    rows = [by_id.get(key, {}) for key in ids.tolist()]
    columns = {name: [row.get(name) for row in rows] for name in names}
    return {name: np.array(["" if v is None else str(v) for v in values], object) for name, values in columns.items()}


def _joined(fields, names, n_rows, kind) -> list[str]:
    missing = [name for name in names if name not in fields]
    if missing:
        known = ", ".join(sorted(fields)) or "none"
        raise InputError(f"{kind} field '{missing[0]}' is not in this data; choose among: {known}.")
    columns = [fields[name].tolist() for name in names]
    return ["; ".join(filter(None, parts)) for parts in zip(*columns)] if columns else [""] * n_rows
