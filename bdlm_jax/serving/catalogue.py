"""Who and what a run knows, and how people name it: raw ids, titles, parts of titles."""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import numpy as np

from bdlm_jax.types import InputError

_SUGGESTIONS = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Catalogue:
    """Raw ids, titles, and every known interaction in time order, of training, validation and test together."""

    user_ids: list[str]
    item_ids: list[str]
    titles: list[str]
    indptr: np.ndarray  # (U+1,) where each user's items begin
    item: np.ndarray
    dropped: dict[str, str] = dataclasses.field(default_factory=dict)  # users that the data had: why they are none here

    @property
    def names(self) -> dict[str, list[str]]:
        return {"user_ids": self.user_ids, "item_ids": self.item_ids, "titles": self.titles}

    @cached_property
    def user_index(self) -> dict[str, int]:
        return {raw: index for index, raw in enumerate(self.user_ids)}

    @cached_property
    def item_index(self) -> dict[str, int]:
        return {raw: index for index, raw in enumerate(self.item_ids)}

    @cached_property
    def title_index(self) -> dict[str, list[int]]:
        """The items of every title, in lower case."""
        made: dict[str, list[int]] = {}
        for index, title in enumerate(self.titles):
            made.setdefault(title.strip().casefold(), []).append(index)
        return made

    def history(self, user: int) -> np.ndarray:
        """All items of a user, oldest first."""
        return self.item[self.indptr[user] : self.indptr[user + 1]]


def find_user(catalogue: Catalogue, user: str, *, exact: bool = False) -> int:
    """Finds a raw user id; InputError names ids that look alike, but where `exact`."""
    user = str(user).strip()
    if user in catalogue.dropped:
        raise InputError(
            f"user {user!r} is left out of this run, for {catalogue.dropped[user]}: give --history instead."
        )
    if user not in catalogue.user_index:
        known = ""
        if not exact:  # a server tells nobody who its users are
            near = _near(user, catalogue.user_ids) or catalogue.user_ids[:_SUGGESTIONS]
            known = f" (known are {', '.join(near)}, …)"
        raise InputError(
            f"user {user!r} is none of the {len(catalogue.user_ids)} of this run{known}: "
            "give a known id, or a history for a new user."
        )
    return catalogue.user_index[user]


def find_item(catalogue: Catalogue, name: str, *, exact: bool = False) -> int:
    """Finds the one item that a raw id, a title or (unless `exact`) part of a title names; case counts in ids alone."""
    name = name.strip()
    items = _exact(catalogue, name) or ([] if exact else _part(catalogue, name))
    if len(items) == 1:
        return items[0]
    if items:
        shown = ", ".join(f"{catalogue.item_ids[i]} ({one_line(catalogue.titles[i])})" for i in items[:_SUGGESTIONS])
        raise InputError(f"{name!r} names {len(items)} items, such as {shown}: give the id of one.")
    if exact:
        raise InputError(f"{name!r} is no item id and no title of this run: give one as the run's catalogue has it.")
    items = [catalogue.title_index[near][0] for near in _near(name.casefold(), catalogue.title_index)]
    items += [catalogue.item_index[near] for near in _near(name, catalogue.item_index)]
    shown = "; ".join(f"{one_line(catalogue.titles[i])} ({catalogue.item_ids[i]})" for i in items[:_SUGGESTIONS])
    hint = f"did you mean {shown}?" if shown else "give an id or a title of the run's catalogue."
    raise InputError(f"{name!r} is no item id and no part of a title: {hint}")


def find_items(catalogue: Catalogue, history: str | Sequence[str], *, exact: bool = False) -> np.ndarray:
    """Finds the items of a history, in the order given, each once.

    A sequence holds single names. A string is cut at ; and , but a title may hold either: from the left, the longest
    run of pieces that is an id or a title is taken, else the longest that is part of a title.
    """
    names = _names(catalogue, history) if isinstance(history, str) else map(str, history)
    found = dict.fromkeys(find_item(catalogue, name, exact=exact) for name in names)
    if not found:
        raise InputError("the history is empty: name at least one item by id or title.")
    return np.array(list(found), np.int64)


def one_line(text: str) -> str:
    """A title on one line, without what a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _names(catalogue: Catalogue, text: str) -> Iterator[str]:
    pieces = re.split("([;,])", text)  # names at even places, the separators between them
    while pieces:
        taken = 1
        if pieces[0].strip():
            runs = {n: "".join(pieces[:n]) for n in range(len(pieces), 0, -2)}
            known = (n for find in (_exact, _part) for n, name in runs.items() if find(catalogue, name.strip()))
            taken = next(known, 1)
            yield runs[taken]
        pieces = pieces[taken + 1 :]


def _exact(catalogue: Catalogue, name: str) -> list[int]:
    if name in catalogue.item_index:
        return [catalogue.item_index[name]]
    return catalogue.title_index.get(name.casefold(), [])


def _part(catalogue: Catalogue, name: str) -> list[int]:
    name = name.casefold()
    return [i for title, items in catalogue.title_index.items() if name and name in title for i in items]


def _near(name: str, names: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, names, _SUGGESTIONS, cutoff=0.5)
