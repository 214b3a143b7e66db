"""Train, validation and test parts, and the guards that keep what is held out from reaching a model.

A split is a label per interaction; everything a model may read is asked for by part, so that a test interaction cannot
slip into a graph or a prompt by an index that is off by one.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from bdlm_jax.data.interactions import Interactions, build_interactions
from bdlm_jax.types import InputError, LeakError

TRAIN, VALIDATION, TEST = 0, 1, 2
PART_NAMES = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Interactions with a part for each row."""

    interactions: Interactions
    part_E: np.ndarray  # int8: TRAIN, VALIDATION or TEST

    def __post_init__(self):
        part_E = np.asarray(self.part_E)
        if part_E.shape != self.interactions.user_E.shape or not np.isin(part_E, (TRAIN, VALIDATION, TEST)).all():
            raise InputError("part_E needs one part (0, 1 or 2) for each interaction; it has another shape or value.")
        part_E = part_E.astype(np.int8)
        part_E.setflags(write=False)
        object.__setattr__(self, "part_E", part_E)
        object.__setattr__(self, "_pairs", {})

    def edges(self, *parts: int) -> tuple[np.ndarray, np.ndarray]:
        """(user, item) int32 rows of these parts, sorted by (user, time)."""
        mask_E = self._mask(parts)
        return self.interactions.user_E[mask_E], self.interactions.item_E[mask_E]

    def histories(self, *parts: int) -> tuple[np.ndarray, np.ndarray]:
        """Every user's items of these parts in time order, as (indptr (U+1,) int64, item (rows,) int32)."""
        user, item = self.edges(*parts)
        indptr = np.zeros(self.interactions.n_users + 1, np.int64)
        np.cumsum(np.bincount(user, minlength=self.interactions.n_users), out=indptr[1:])
        return indptr, item

    def cases(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        """What is to be predicted in this part: (user_N, item_N), one row per held-out interaction."""
        return self.edges(part)

    def pairs(self, *parts: int) -> np.ndarray:
        """The different `user * n_items + item` (int64) of these parts, sorted."""
        parts = tuple(sorted(set(parts)))
        if parts not in self._pairs:  # every guard asks for some
            user, item = self.edges(*parts)
            pair = user.astype(np.int64) * self.interactions.n_items + item
            pair.sort()
            pair = pair[np.diff(pair, prepend=-1) > 0]  # np.unique hashes first, which is ten times slower here
            pair.setflags(write=False)
            self._pairs[parts] = pair
        return self._pairs[parts]

    def degree(self, *parts: int) -> np.ndarray:
        """(I,) int64 number of interactions of each item in these parts."""
        return np.bincount(self.edges(*parts)[1], minlength=self.interactions.n_items)

    def counts(self) -> dict[str, int]:
        """Rows per part, by name."""
        return {name: int(np.sum(self.part_E == part)) for part, name in enumerate(PART_NAMES)}

    def _mask(self, parts) -> np.ndarray:
        if not parts or any(part not in (TRAIN, VALIDATION, TEST) for part in parts):
            raise InputError(f"parts are {parts!r}; name at least one of TRAIN, VALIDATION and TEST.")
        return np.isin(self.part_E, parts)


def leave_one_out(interactions: Interactions, *, min_history: int = 1) -> Split:
    """Holds out each user's last interaction for the test and the one before it for validation.

    Users with fewer than min_history + 2 keep all in training.
    """
    if min_history < 0:
        raise InputError(f"min_history is {min_history}; give 0 or more.")
    part_E = np.zeros(len(interactions), np.int8)
    _hold_out_last(interactions, part_E, np.arange(len(interactions)), min_history)
    return Split(interactions, part_E)


def cold_items(interactions: Interactions, *, share: float, seed: int, min_history: int = 1) -> Split:
    """Takes a drawn `share` of the items out of training altogether, and leaves one out of the others.

    * Of the drawn items one half is cold at validation, the other (the larger by one, where odd) at test: every
      interaction with one is a case of its own in that part, so nothing is chosen on an item that is tested cold.
    * What a user had of the other items is split as by `leave_one_out`: the last tests, the one before it validates.
      So one model is asked for both: a report has the cases of each, "cold" and "warm".
    * At test a model may know what was asked at validation, of its cold items too. An item that is tested cold is in
      no history, graph or training row at all; its title may be read.
    * Time orders the warm cases alone: the history before a cold case holds what its user had later too.

    Source: ours (items held out as a whole are the usual item cold start).
    """
    part_I = draw_cold_items(interactions, share=share, seed=seed)
    part_E = part_I[interactions.item_E]
    _hold_out_last(interactions, part_E, np.flatnonzero(part_E == TRAIN), min_history)
    return Split(interactions, part_E)


def draw_cold_items(interactions: Interactions, *, share: float, seed: int) -> np.ndarray:
    """(I,) int8: the part in which an item is cold, VALIDATION or TEST, and TRAIN for all others.

    `share` is of the items that have an interaction; the same seed draws the same items on every platform.
    """
    known = np.flatnonzero(np.bincount(interactions.item_E, minlength=interactions.n_items))
    n_cold = int(_count(len(known), share))
    if n_cold < 2:
        raise InputError(f"a share of {share:g} of {len(known)} items makes no cold item for each part; raise it.")
    drawn = known[np.argsort(np.random.PCG64(seed).random_raw(len(known)), kind="stable")[:n_cold]]
    part_I = np.full(interactions.n_items, TRAIN, np.int8)
    part_I[drawn] = TEST
    part_I[drawn[: n_cold // 2]] = VALIDATION
    return part_I


def check_cold_items(split: Split, part_I: np.ndarray) -> None:
    """Raises LeakError if an item of `draw_cold_items` has an interaction in an earlier part than its own."""
    for part in (VALIDATION, TEST):
        early_I = (split.degree(*range(part)) > 0) & (part_I == part)
        if early_I.any():
            label = f"{int(early_I.sum())} items that are cold in the {PART_NAMES[part]} part"
            raise LeakError(f"{label} have interactions before it, the first is item {int(np.argmax(early_I))}.")


def global_time(interactions: Interactions, *, validation: float, test: float) -> Split:
    """Cuts the whole table at two moments: the past trains, the next fraction of rows validates, the last tests.

    Rows of the same moment never straddle a cut: they go to the later part. A held-out row's user may have no training
    row (a new user), which evaluation sees as an empty history.
    """
    _check_fractions(validation, test)
    if interactions.time_kind != "timestamp":
        raise InputError("global_time needs timestamps, and this source only orders each user's rows; leave one out.")
    sorted_E = np.sort(interactions.time_E)
    part_E = np.zeros(len(sorted_E), np.int8)
    n_test, n_validation = _count(len(sorted_E), test), _count(len(sorted_E), validation)
    for part, n_part, n_later in ((VALIDATION, n_validation, n_test), (TEST, n_test, 0)):
        if n_part:
            part_E[interactions.time_E >= sorted_E[-(n_part + n_later)]] = part
    if not np.any(part_E == TRAIN):
        raise InputError("all rows share the moments that are held out, and none is left to train on; split otherwise.")
    return Split(interactions, part_E)


def ratio(interactions: Interactions, *, validation: float, test: float, seed: int) -> Split:
    """Draws fractions of each user's interactions at random (rounded down: short histories stay in training).

    The same seed gives the same split on every platform.
    """
    _check_fractions(validation, test)
    # raw bits are the only output whose stream NumPy promises to keep
    draw_E = np.random.PCG64(seed).random_raw(len(interactions))
    length_U = np.bincount(interactions.user_E, minlength=interactions.n_users)
    shuffled = np.lexsort((draw_E, interactions.user_E))
    start_U = np.cumsum(length_U) - length_U
    rank_E = np.empty(len(interactions), np.int64)
    rank_E[shuffled] = np.arange(len(interactions)) - np.repeat(start_U, length_U)
    n_test_E = _count(length_U, test)[interactions.user_E]
    n_validation_E = _count(length_U, validation)[interactions.user_E]
    part_E = np.where(rank_E < n_test_E, TEST, np.where(rank_E < n_test_E + n_validation_E, VALIDATION, TRAIN))
    return Split(interactions, part_E)


def from_parts(
    train: Sequence,
    test: Sequence,
    *,
    validation: Sequence | None = None,
    where: Callable[[str, int], str] = "{} part, row {}".format,
) -> Split:
    """Takes a split as somebody published it, in columns (user, item) of raw ids.

    Each user's rows keep their order, training before validation before test. A pair that repeats in its part counts
    once. `where` names a row of a part in a message.
    """
    parts = {"train": train, "validation": validation, "test": test}
    parts = {name: list(map(np.asarray, columns)) for name, columns in parts.items() if columns is not None}
    lengths = [len(user) for user, _ in parts.values()]
    part = np.repeat(np.array([PART_NAMES.index(name) for name in parts], np.int8), lengths)
    row = np.concatenate([np.arange(length) for length in lengths])

    def where_merged(at: int) -> str:
        return where(PART_NAMES[part[at]], int(row[at]))

    user, item = map(np.concatenate, zip(*parts.values()))
    interactions, row_E = build_interactions(user, item, duplicates="keep", where=where_merged)
    part_E = part[row_E]
    pair_E = pd.Series(interactions.user_E.astype(np.int64) * interactions.n_items + interactions.item_E)
    again_E = (pair_E * len(PART_NAMES) + part_E).duplicated().to_numpy()
    crossing_E = pair_E.duplicated().to_numpy() & ~again_E
    if crossing_E.any():
        at = int(np.argmax(crossing_E))
        first = part_E[int(np.argmax(pair_E == pair_E[at]))]
        also = f"this user-item pair is also in the {PART_NAMES[first]} part"
        raise InputError(f"{where_merged(row_E[at])}: {also}; remove one of the two.")
    columns = {name: getattr(interactions, name)[~again_E] for name in ("user_E", "item_E", "time_E")}
    return Split(dataclasses.replace(interactions, **columns), part_E[~again_E])


def merge_validation(split: Split) -> Split:
    """The same interactions with the validation part in training; the test part stays held out."""
    return dataclasses.replace(split, part_E=np.where(split.part_E == VALIDATION, TRAIN, split.part_E))


def seen_mask(seen, user_B: np.ndarray, n_items: int) -> np.ndarray:
    """Returns the (B, I) bool mask of the items in the users' histories `seen` = (indptr, item)."""
    indptr, item = seen
    mask_BI = np.zeros((len(user_B), n_items), bool)
    lengths = indptr[user_B + 1] - indptr[user_B]
    row = np.repeat(np.arange(len(user_B)), lengths)
    offset = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    mask_BI[row, item[np.repeat(indptr[user_B], lengths) + offset]] = True
    return mask_BI


def check_training_edges(
    split: Split, user: np.ndarray, item: np.ndarray, *, allowed: Sequence[int] = (TRAIN,)
) -> None:
    """Raises LeakError if an edge belongs to a part that is not `allowed`, and to none that is."""
    forbidden = [part for part in (TRAIN, VALIDATION, TEST) if part not in allowed]
    if not forbidden:
        return
    user, item = np.asarray(user, np.int64).ravel(), np.asarray(item, np.int64).ravel()
    pair = user * split.interactions.n_items + item
    leaked = within(pair, split.pairs(*forbidden)) & ~within(pair, split.pairs(*allowed))
    if leaked.any():
        row = int(np.argmax(leaked))
        names = " or ".join(PART_NAMES[part] for part in forbidden)
        first = f"the first at row {row}: user {user[row]}, item {item[row]}"
        raise LeakError(f"{int(leaked.sum())} of {len(user)} edges are {names} interactions, {first}.")


def within(values: np.ndarray, sorted_values: np.ndarray) -> np.ndarray:
    """Which of `values` (whole numbers ≥ 0, any shape) are in `sorted_values`."""
    # np.isin hashes large arrays, which is many times slower than one sorted search
    return np.append(sorted_values, -1)[np.searchsorted(sorted_values, values)] == values


def _hold_out_last(interactions: Interactions, part_E: np.ndarray, row_R: np.ndarray, min_history: int) -> None:
    """Marks in `part_E`, among the rows `row_R`, each user's last as TEST and the one before it as VALIDATION."""
    length_U = np.bincount(interactions.user_E[row_R], minlength=interactions.n_users)
    end_U = np.cumsum(length_U)[length_U >= max(min_history + 2, 2)]
    if not len(end_U):
        raise InputError(
            f"no user has {min_history + 2} interactions; lower config.data.min_user or choose another data.split."
        )
    part_E[row_R[end_U - 1]] = TEST
    part_E[row_R[end_U - 2]] = VALIDATION


def _check_fractions(validation: float, test: float) -> None:
    if validation < 0 or test < 0 or not 0 < validation + test < 1:
        raise InputError(
            f"config.data.validation {validation} and data.test {test} must be fractions whose sum is between 0 and 1."
        )


def _count(n, fraction: float):
    """floor(n · fraction), where 10 · 0.1 is 1 and not 0."""
    return np.floor(np.asarray(n) * fraction + 1e-9).astype(np.int64)
