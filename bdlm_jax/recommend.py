"""python -m bdlm_jax.recommend --workdir DIR --user ID | --history "title or id; …" --arm domain|lm -k 10 [--explain].

What a user does with a finished run: raw ids in, raw ids, titles and scores out. The functions are what the command
line calls; with the domain arm neither needs JAX or the language model.
"""

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Sequence

import numpy as np

from bdlm_jax.serving import artefact as serving
from bdlm_jax.serving import scores as scoring
from bdlm_jax.serving.artefact import Catalogue
from bdlm_jax.types import InputError

ARMS = ("domain", "lm")
_SUGGESTIONS = 5


def recommend(
    *,
    workdir: str | os.PathLike,
    user: str | None = None,
    history: str | Sequence[str] | None = None,
    arm: str = "domain",
    k: int = 10,
    explain: bool = False,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[dict]:
    """Recommends items to a known user, or to a new one by history; what the user has had is left out.

    Args:
        workdir: the directory of a finished run.
        user: a raw user id, or
        history: raw item ids or titles, oldest first; as one string, separated by ; or ,.
        arm: "domain" or "lm".
        k: how many.
        explain: let the LM arm write about each item: text that it generates behind the item's token, which may be
            wrong; not for the domain arm.
        temperature: of that text; 0 takes the likeliest token at each place.
        top_p: see `lm.generate.generate`.
        seed: of what is drawn.

    Returns:
        [{"rank", "item", "title", "score"}] and, explained, "words"; best first. Scores compare within one answer, not
        between arms.

    Raises:
        InputError: a name that is not known, or names more than one thing; no finished run in `workdir`.
    """
    if (user is None) == (history is None):
        raise InputError("give either a user or a history, not both and not neither.")
    if arm not in ARMS:
        raise InputError(f"arm {arm!r} is not known: write one of {', '.join(ARMS)}.")
    if k < 1:
        raise InputError(f"k is {k}, but at least one item must be asked for.")
    if explain and arm == "domain":
        raise InputError("the domain arm has no words to explain with: ask the LM arm (--arm lm).")
    catalogue = serving.load_catalogue(workdir)
    index = None if user is None else find_user(catalogue, user)
    items = find_items(catalogue, history) if index is None else catalogue.history(index)
    served = serving.load_domain_arm(workdir) if arm == "domain" else serving.load_lm_arm(workdir)
    score = scoring.domain_scores if arm == "domain" else scoring.lm_scores
    scores_I = score(served, user=index, history=items)
    best = scoring.top_items(scores_I, seen=items, k=k)
    rows = [_row(catalogue, rank, item, score=float(scores_I[item])) for rank, item in enumerate(best, 1)]
    if explain:
        words = scoring.lm_words(
            served, items, best, user=index, temperature=temperature, top_p=top_p, seed=seed
        )  # fmt: skip
        rows = [{**row, "words": text} for row, text in zip(rows, words)]
    return rows


def known_history(*, workdir: str | os.PathLike, user: str) -> list[dict]:
    """Returns what a known user has had, oldest first, as [{"rank", "item", "title"}].

    Raises:
        InputError: see `recommend`.
    """
    catalogue = serving.load_catalogue(workdir)
    return [_row(catalogue, n, item) for n, item in enumerate(catalogue.history(find_user(catalogue, user)), 1)]


def same_titles(*, workdir: str | os.PathLike) -> list[list[str]]:
    """Returns the groups of raw item ids that share one title to the letter: no text can tell them apart."""
    catalogue, groups = serving.load_catalogue(workdir), {}
    for raw, title in zip(catalogue.item_ids, catalogue.titles):
        groups.setdefault(title, []).append(raw)
    return [group for group in groups.values() if len(group) > 1]


def audience(*, workdir: str | os.PathLike, item: str, k: int = 10) -> list[dict]:
    """Returns the users on whose list of the domain arm an item stands highest, among those who have not had it.

    Args:
        workdir: the directory of a finished run.
        item: a raw item id or a title.
        k: how many users.

    Returns:
        [{"user", "rank"}]: the item's rank among what the user has not had, the best first.

    Raises:
        InputError: see `recommend`.
    """
    catalogue, arm = serving.load_catalogue(workdir), serving.load_domain_arm(workdir)
    target, found = _find_item(catalogue, item), []
    for user, raw in enumerate(catalogue.user_ids):
        seen = catalogue.history(user)
        if target not in seen:
            scores_I = scoring.domain_scores(arm, user=user)
            better_I = scores_I > scores_I[target]
            found.append({"user": raw, "rank": 1 + int(better_I.sum() - better_I[seen].sum())})
    return sorted(found, key=lambda one: one["rank"])[:k]


def find_user(catalogue: Catalogue, user: str) -> int:
    """Returns the index of a raw user id.

    Raises:
        InputError: it is not known; the message names ids that look alike.
    """
    user = str(user).strip()
    if user not in catalogue.user_index:
        near = _near(user, catalogue.user_ids) or catalogue.user_ids[:_SUGGESTIONS]
        raise InputError(
            f"user {user!r} is none of the {len(catalogue.user_ids)} of this run (known are {', '.join(near)}, …): "
            "give a known id, or --history for a new user."
        )
    return catalogue.user_index[user]


def find_items(catalogue: Catalogue, history: str | Sequence[str]) -> np.ndarray:
    """Finds the items of a history given by raw ids and titles.

    A string is cut at ; and , but a title may hold either: from the left, the longest run of pieces that is an id or a
    title is taken, else the longest that is part of a title. Case does not matter in titles.

    Args:
        catalogue: of `serving.load_catalogue`.
        history: one string, or a sequence of single names.

    Returns:
        (n,) int64 item indices in the order given, each once.

    Raises:
        InputError: nothing given, or an entry that names no item or several.
    """
    if isinstance(history, str):
        found = _find_all(catalogue, history)
    else:
        found = [_find_item(catalogue, str(entry)) for entry in history]
    if not found:
        raise InputError("the history is empty: name at least one item by id or title.")
    return np.array(list(dict.fromkeys(found)), np.int64)


def _find_all(catalogue: Catalogue, text: str) -> list[int]:
    pieces = re.split("([;,])", text)  # names at even places, the separators between them
    found, start = [], 0
    while start < len(pieces):
        if not pieces[start].strip():
            start += 2
            continue
        runs = {stop: "".join(pieces[start:stop]) for stop in range(len(pieces), start, -2)}
        known = ((stop, name) for find in (_exact, _part) for stop, name in runs.items() if find(catalogue, name))
        stop, name = next(known, (start + 1, pieces[start]))
        found.append(_find_item(catalogue, name))
        start = stop + 1
    return found


def _find_item(catalogue: Catalogue, name: str) -> int:
    name = name.strip()
    items = _exact(catalogue, name) or _part(catalogue, name)
    if len(items) == 1:
        return items[0]
    if items:
        shown = ", ".join(f"{catalogue.item_ids[i]} ({_line(catalogue.titles[i])})" for i in items[:_SUGGESTIONS])
        raise InputError(f"{name!r} names {len(items)} items, such as {shown}: give the id of one.")
    items = [catalogue.title_index[near][0] for near in _near(name.casefold(), catalogue.title_index)]
    items += [catalogue.item_index[near] for near in _near(name, catalogue.item_index)]
    shown = "; ".join(f"{_line(catalogue.titles[i])} ({catalogue.item_ids[i]})" for i in items[:_SUGGESTIONS])
    hint = f"did you mean {shown}?" if shown else "give an id or a title of the run's catalogue."
    raise InputError(f"{name!r} is no item id and no part of a title: {hint}")


def _exact(catalogue: Catalogue, name: str) -> list[int]:
    name = name.strip()
    if name in catalogue.item_index:
        return [catalogue.item_index[name]]
    return catalogue.title_index.get(name.casefold(), [])


def _part(catalogue: Catalogue, name: str) -> list[int]:
    name = name.strip().casefold()
    return [i for title, items in catalogue.title_index.items() if name and name in title for i in items]


def _near(name: str, names) -> list[str]:
    return difflib.get_close_matches(name, names, _SUGGESTIONS, cutoff=0.5)


def _row(catalogue: Catalogue, rank: int, item: int, **more) -> dict:
    return {"rank": rank, "item": catalogue.item_ids[item], "title": catalogue.titles[item], **more}


def _line(text: str) -> str:
    """A title on one line, without what a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _table(rows: list[dict]) -> str:
    width = max([4, *(len(row["item"]) for row in rows)])
    lines = [f"rank  {'item':<{width}}  {'score':>9}  title"]
    lines += [f"{row['rank']:>4}  {row['item']:<{width}}  {row['score']:>9.4f}  {_line(row['title'])}" for row in rows]
    return "\n".join(lines)


def _explained(rows: list[dict]) -> str:
    lines = [
        f"recommended: {row['item']} {_line(row['title'])} | in the LM's own words: {_line(row['words'])}"
        for row in rows
    ]
    return "\n".join([*lines, "(the LM's words are generated text, not facts looked up)"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: those after the program's name; None: of this process.

    Returns:
        The exit code: 0, or 2 after a sentence on stderr.
    """
    parser = argparse.ArgumentParser(prog="python -m bdlm_jax.recommend", description="Recommends from a finished run.")
    parser.add_argument("--workdir", required=True, help="the run directory")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--user", help="a raw user id")
    who.add_argument("--history", help="a new user: item ids or titles, oldest first, separated by ; or ,")
    parser.add_argument("--arm", choices=ARMS, default="domain")
    parser.add_argument("-k", type=int, default=10, help="how many items (default 10)")
    parser.add_argument("--explain", action="store_true", help="the LM arm writes about each item (generated text)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of that text; 0 (default): the likeliest token")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw among the likeliest tokens of this probability")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    given = parser.parse_args(arguments)
    try:
        rows = recommend(
            workdir=given.workdir, user=given.user, history=given.history, arm=given.arm, k=given.k,
            explain=given.explain, temperature=given.temperature, top_p=given.top_p, seed=given.seed,
        )  # fmt: skip
    except InputError as error:
        print(f"bdlm_jax: {error}", file=sys.stderr)
        return 2
    as_text = _explained if given.explain else _table
    print(json.dumps(rows, indent=1) if given.format == "json" else as_text(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
