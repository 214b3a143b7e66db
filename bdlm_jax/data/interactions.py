"""The validated table of interactions that everything else is made from.

Raw ids become 0…U-1 and 0…I-1 by the natural order of the ids themselves (numbers by value when every id of the column
is a whole number, text order otherwise), so that the numbering does not depend on the order of the file's rows.
Rows are sorted by user, then time; equal times keep the order of the file.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from bdlm_jax.types import InputError

Fields = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Interactions:
    """Who met what, when, and the words that describe both.

    Args:
        user_E: (E,) int32 user of each row; rows are sorted by (user, time, order in the file).
        item_E: (E,) int32 item of each row.
        time_E: (E,) int64, in the source's unit (seconds, say) or as a rank within the user: see `time_kind`.
        rating_E: (E,) float32, or None where the source has no ratings.
        user_ids: (U,) raw user ids as str.
        item_ids: (I,) raw item ids as str.
        item_fields: {name: (I,) object array of str}; "title" is always there, "" where unknown.
        user_fields: {name: (U,) object array of str}.
        time_kind: "timestamp" (comparable between users) or "order" (a user's own order only).
    """

    user_E: np.ndarray
    item_E: np.ndarray
    time_E: np.ndarray
    rating_E: np.ndarray | None
    user_ids: np.ndarray
    item_ids: np.ndarray
    item_fields: Fields
    user_fields: Fields
    time_kind: str = "timestamp"

    def __post_init__(self):
        columns = [self.user_E, self.item_E, self.time_E, self.user_ids, self.item_ids]
        columns += [] if self.rating_E is None else [self.rating_E]
        for column in (*columns, *self.item_fields.values(), *self.user_fields.values()):
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
        """Counts and a hash that name this table exactly: rows, order, ids and text.

        Returns:
            {"users", "items", "interactions", "sha256"}; the hash is the same on every platform.
        """
        digest = hashlib.sha256()
        for array, kind in ((self.user_E, "<i4"), (self.item_E, "<i4"), (self.time_E, "<i8"), (self.rating_E, "<f4")):
            digest.update(b"none" if array is None else np.ascontiguousarray(array, kind).tobytes())
        texts = {"user_ids": self.user_ids, "item_ids": self.item_ids}
        texts |= {f"item {name}": values for name, values in sorted(self.item_fields.items())}
        texts |= {f"user {name}": values for name, values in sorted(self.user_fields.items())}
        for name, values in texts.items():
            digest.update(f"\x1d{name}\x1d".encode())
            digest.update("\x1e".join(values.tolist()).encode("utf-8", "surrogatepass"))
        return {
            "users": self.n_users,
            "items": self.n_items,
            "interactions": len(self),
            "sha256": digest.hexdigest(),
        }

    def item_text(self, fields: Sequence[str] = ("title",)) -> list[str]:
        """One line of words per item: its non-empty `fields`, joined by "; "."""
        return _joined(self.item_fields, fields, self.n_items, "item")

    def user_text(self, fields: Sequence[str]) -> list[str]:
        """One line of words per user: its non-empty `fields`, joined by "; "."""
        return _joined(self.user_fields, fields, self.n_users, "user")


def make_interactions(
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
) -> Interactions:
    """Checks raw columns and turns them into `Interactions`.

    Args:
        user: (rows,) raw user ids, numbers or text.
        item: (rows,) raw item ids, numbers or text.
        time: (rows,) whole numbers ≥ 0, comparable between users; equal times keep the order of the rows.
        order: instead of `time`: whole numbers ≥ 0 that order each user's own rows. Neither: the order of the rows.
        rating: (rows,) finite numbers, or None.
        item_fields: {raw item id: {field: text}}; items that are not named get "".
        user_fields: {raw user id: {field: text}}.
        duplicates: what happens to a user-item pair that repeats: "first" keeps the earliest (default), "last" the
            latest, "keep" all of them, "error" refuses.
        keep_items_without_interactions: items that only `item_fields` names join the catalogue (cold items).

    Returns:
        Interactions.

    Raises:
        InputError: a column is missing, empty, of another length, or holds a value that cannot be used.
    """
    interactions, _ = build_interactions(
        user, item, time=time, order=order, rating=rating, item_fields=item_fields, user_fields=user_fields,
        duplicates=duplicates, keep_items_without_interactions=keep_items_without_interactions,
    )  # fmt: skip
    return interactions


def build_interactions(
    user, item, *, time=None, order=None, rating=None, item_fields=None, user_fields=None, duplicates="first",
    keep_items_without_interactions=False, where: Callable[[int], str] = "row {}".format,
) -> tuple[Interactions, np.ndarray]:  # fmt: skip
    """Does the work of `make_interactions`, and also says which raw row each kept row came from.

    Args:
        where: names a raw row in an error message; readers pass "file, line".

    Returns:
        (Interactions, row_E): row_E (E,) int64 indexes the raw columns.

    Raises:
        InputError: as in `make_interactions`.
    """
    if time is not None and order is not None:
        raise InputError("fields 'time' and 'order' are both given; give the one that the split should follow.")
    if duplicates not in ("first", "last", "keep", "error"):
        raise InputError(f"duplicates is {duplicates!r}; use 'first', 'last', 'keep' or 'error'.")
    columns = {"user": user, "item": item}
    if any(column is None for column in columns.values()):
        raise InputError("the fields 'user' and 'item' are both needed; one is missing.")
    n_rows = len(user)
    if n_rows == 0:
        raise InputError("the table of interactions has no rows; check the path and the filters.")
    for name, column in {**columns, "time": time, "order": order, "rating": rating}.items():
        if column is not None and len(column) != n_rows:
            raise InputError(
                f"field '{name}' has {len(column)} rows where 'user' has {n_rows}; give one value per row."
            )

    user_E, user_ids = _encode_ids(user, "user", where)
    extra = item_fields if keep_items_without_interactions and item_fields else ()
    item_E, item_ids = _encode_ids(item, "item", where, extra=extra)
    if order is not None or time is None:
        time_kind, name, times = "order", "order", np.arange(n_rows) if order is None else order
    else:
        time_kind, name, times = "timestamp", "time", time
    time_E = _whole_numbers(times, name, where)
    rating_E = None if rating is None else _finite_numbers(rating, "rating", where)

    row_E = np.lexsort((time_E, user_E))  # stable, so equal times keep the order of the rows
    row_E = _without_duplicates(row_E, user_E, item_E, len(item_ids), duplicates, where)
    interactions = Interactions(
        user_E=user_E[row_E],
        item_E=item_E[row_E],
        time_E=time_E[row_E],
        rating_E=None if rating_E is None else rating_E[row_E],
        user_ids=user_ids,
        item_ids=item_ids,
        item_fields=_aligned_fields(item_fields or {}, item_ids, always=("title",)),
        user_fields=_aligned_fields(user_fields or {}, user_ids),
        time_kind=time_kind,
    )
    return interactions, row_E


def k_core(interactions: Interactions, *, user: int = 5, item: int = 5) -> Interactions:
    """Drops users and items with fewer than `user` and `item` interactions, until every one left has enough.

    Args:
        interactions: the table; ids and fields are renumbered with it.
        user: fewest interactions of a user that stays.
        item: fewest interactions of an item that stays; 0 also keeps items without interactions.

    Returns:
        The largest sub-table in which every user and every item has enough interactions (it is unique).

    Raises:
        InputError: nothing is left.
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
        raise InputError(f"no interaction is left in the {user}/{item}-core; lower k_core's 'user' or 'item'.")
    return _subset(interactions, keep_E, user_U, item_I)


def filter_rating(interactions: Interactions, *, minimum: float) -> Interactions:
    """Keeps the rows rated `minimum` or more, and drops users and items that lose their last row.

    Args:
        interactions: a table with ratings.
        minimum: lowest rating that counts as a sign of interest.

    Returns:
        The smaller table; items that had no interaction before (cold items) stay.

    Raises:
        InputError: the table has no ratings, or no row is left.
    """
    if interactions.rating_E is None:
        raise InputError(
            "filter_rating needs the field 'rating', which this source does not have; leave the filter out."
        )
    keep_E = interactions.rating_E >= minimum
    if not keep_E.any():
        raise InputError(f"no interaction has a rating of {minimum} or more; lower the minimum.")
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


def _encode_ids(values, name, where, extra=()) -> tuple[np.ndarray, np.ndarray]:
    """Raw ids -> (codes int32, sorted ids as str)."""
    if isinstance(values, pd.Categorical):
        code_E, raw = np.asarray(values.codes), list(values.categories)
    else:
        code_E, raw = pd.factorize(np.asarray(values) if _is_plain(values) else np.array(list(values), object))
    ids = [_id_text(value) for value in raw]
    bad = [code for code, text in enumerate(ids) if not text]
    bad_rows = (code_E < 0) | np.isin(code_E, bad)
    if bad_rows.any():
        raise InputError(
            f"{where(int(np.argmax(bad_rows)))}: field '{name}' is empty or not an id; give every row an id."
        )
    position = {}
    merged_C = np.array([position.setdefault(text, len(position)) for text in ids], np.int64)
    for value in extra:
        position.setdefault(_id_text(value) or str(value), len(position))
    unsorted = list(position)
    if all(text.lstrip("-").isdecimal() and str(int(text)) == text for text in unsorted):
        rank = sorted(range(len(unsorted)), key=lambda index: int(unsorted[index]))
    else:
        rank = sorted(range(len(unsorted)), key=unsorted.__getitem__)
    new_C = np.empty(len(rank), np.int32)
    new_C[rank] = np.arange(len(rank), dtype=np.int32)
    return new_C[merged_C][code_E], np.array([unsorted[index] for index in rank], str)


def _is_plain(values) -> bool:
    return isinstance(values, np.ndarray) and values.dtype != object


def _id_text(value) -> str:
    """An id as text; "" for what is no id (missing values, fractions, truth values)."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, (bool, np.bool_)) or value is None:
        return ""
    if isinstance(value, (float, np.floating)):  # pandas turns a column of whole numbers with a gap into floats
        return str(int(value)) if np.isfinite(value) and value == int(value) else ""
    return str(int(value)) if isinstance(value, (int, np.integer)) else ""


def _finite_numbers(values, name, where, dtype=np.float32) -> np.ndarray:
    try:
        number_E = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        for row, value in enumerate(values):
            try:
                float(value)
            except (TypeError, ValueError):
                raise InputError(f"{where(row)}: field '{name}' is {value!r}; give a number.") from None
        raise
    bad_E = ~np.isfinite(number_E)
    if bad_E.any():
        row = int(np.argmax(bad_E))
        raise InputError(f"{where(row)}: field '{name}' is {number_E[row]}; give a finite number.")
    return number_E.astype(dtype)


def _whole_numbers(values, name, where) -> np.ndarray:
    column = np.asarray(values)
    if column.dtype.kind not in "iu":
        number_E = _finite_numbers(values, name, where, np.float64)
        bad_E = number_E != np.floor(number_E)
        if bad_E.any():
            row = int(np.argmax(bad_E))
            raise InputError(f"{where(row)}: field '{name}' is {number_E[row]}; give whole numbers (seconds, say).")
        # text such as "1700000000123456789" would lose digits on the way through float
        column = np.array([int(v) for v in values]) if column.dtype.kind in "OUS" and _all_int(values) else number_E
    bad_E = (column < 0) | (column > np.iinfo(np.int64).max)
    if bad_E.any():
        row = int(np.argmax(bad_E))
        raise InputError(f"{where(row)}: field '{name}' is {column[row]}; give whole numbers of 0 or more.")
    return column.astype(np.int64)


def _all_int(values) -> bool:
    return all(isinstance(value, (int, np.integer)) or str(value).strip().isdecimal() for value in values)


def _without_duplicates(row_E, user_E, item_E, n_items, rule, where) -> np.ndarray:
    if rule == "keep":
        return row_E
    pair_E = user_E[row_E].astype(np.int64) * n_items + item_E[row_E]
    if rule == "last":
        _, first = np.unique(pair_E[::-1], return_index=True)
        kept = np.sort(len(pair_E) - 1 - first)
    else:
        _, first = np.unique(pair_E, return_index=True)
        kept = np.sort(first)
    if rule == "error" and len(kept) < len(pair_E):
        repeated = np.ones(len(pair_E), bool)
        repeated[kept] = False
        row = int(row_E[np.argmax(repeated)])
        raise InputError(f"{where(row)}: this user-item pair stands in the table before; drop it or set duplicates.")
    return row_E[kept]


def _aligned_fields(fields: Mapping, ids: np.ndarray, always: tuple = ()) -> dict[str, np.ndarray]:
    by_id = {_id_text(key) or str(key): value for key, value in fields.items()}
    names = dict.fromkeys(always)
    for value in by_id.values():
        names.update(dict.fromkeys(value))
    rows = [by_id.get(key, {}) for key in ids.tolist()]
    return {name: text_array([row.get(name, "") for row in rows]) for name in names}


def text_array(values) -> np.ndarray:
    """Object array of str: fixed-width str arrays would pay the longest title for every item."""
    array = np.empty(len(values), object)
    array[:] = ["" if value is None else str(value) for value in values]
    return array


def _joined(fields, names, n_rows, kind) -> list[str]:
    missing = [name for name in names if name not in fields]
    if missing:
        known = ", ".join(sorted(fields)) or "none"
        raise InputError(f"{kind} field '{missing[0]}' is not in this data; choose among: {known}.")
    columns = [fields[name].tolist() for name in names]
    return ["; ".join(part for part in parts if part) for parts in zip(*columns)] if columns else [""] * n_rows
