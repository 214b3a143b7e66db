"""What a user asks of a finished run: raw ids in, raw ids, titles and scores out, as plain rows."""

from collections.abc import Sequence

import numpy as np

from bdlm_jax.serving import scores
from bdlm_jax.serving.artefact import Arm, ServedLM
from bdlm_jax.serving.catalogue import Catalogue, find_item, find_items, find_user, one_line
from bdlm_jax.types import InputError

Row = dict  # {"rank", "item", "title"} and what more an answer has: plain, for JSON and for tables
AT_ONCE = 64  # users scored together


def recommend(
    catalogue: Catalogue,
    arm: Arm,
    *,
    users: Sequence[str] | None = None,
    histories: Sequence[str | Sequence[str]] | None = None,
    k: int = 10,
    explain: bool = False,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    exact: bool = False,
) -> list[list[Row]]:
    """Recommends k items, best first, to known users or to new ones by history; what a user has had is left out.

    For each user rows {"rank", "item", "title", "score"} and, explained, "words". `users` are raw ids, a history raw
    item ids or titles, oldest first; as one string, separated by ; or ,. `explain` lets a language model write about
    each item, text generated behind the item's token, which may be wrong; `temperature`, `top_p` and `seed` are of that
    text, as in `lm.generate`. With `exact` a name is a whole id or title, and what is unknown is looked for no further.
    Scores compare within one answer, not between users or arms.
    """
    if (users is None) == (histories is None):
        raise InputError("give either users or histories, not both and not neither.")
    _check_k(k)
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}, it must be at least 0 and below 2**32.")
    if explain and not isinstance(arm, ServedLM):
        raise InputError("a domain model has no words to explain with: ask a language model (--arm lm).")
    indices = None if users is None else [find_user(catalogue, user, exact=exact) for user in users]
    if users is None:
        seen = [find_items(catalogue, history, exact=exact) for history in histories]
    else:
        seen = [*map(catalogue.history, indices)]
    answers = []
    for start in range(0, len(seen), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        some = None if indices is None else indices[part]
        best = scores.best_items(arm, seen[part], users=some, k=k)
        answers += [_rows(catalogue, items, score=of_items.tolist()) for items, of_items in best]
        if explain:
            for n, (had, (items, _)) in enumerate(zip(seen[part], best)):
                how = {"user": some and some[n], "seed": seed, "temperature": temperature, "top_p": top_p}
                for row, words in zip(answers[start + n], scores.lm_words(arm, had, items, **how)):
                    row["words"] = words
    return answers


def history(catalogue: Catalogue, user: str) -> list[Row]:
    """Returns what a known user has had, oldest first."""
    return _rows(catalogue, catalogue.history(find_user(catalogue, user)))


def nearest(catalogue: Catalogue, arm: Arm, item: str, *, k: int = 10) -> list[Row]:
    """Returns the k items whose rows point most nearly where an item's does: "score" is the cosine of their angle."""
    _check_k(k)
    target, rows = find_item(catalogue, item), arm.items
    cosine_I = rows @ rows[target] / np.maximum(np.linalg.norm(rows, axis=1) * np.linalg.norm(rows[target]), 1e-12)
    best = scores.top_items(cosine_I, seen=[target], k=k)
    return _rows(catalogue, best, score=cosine_I[best].tolist())


def audience(catalogue: Catalogue, arm: Arm, item: str, *, k: int = 10) -> list[dict]:
    """Returns the k users on whose list an item stands highest, among those who have not had it.

    [{"user", "rank"}]: the item's rank among what the user has not had, the best first.
    """
    _check_k(k)
    target, found = find_item(catalogue, item), []
    open_to = [user for user in range(len(catalogue.user_ids)) if target not in catalogue.history(user)]
    for start in range(0, len(open_to), AT_ONCE):
        users = open_to[start : start + AT_ONCE]
        seen = [*map(catalogue.history, users)]
        for user, had, scores_I in zip(users, seen, scores.arm_scores(arm, seen, users=users)):
            better_I = scores_I > scores_I[target]
            found.append({"user": catalogue.user_ids[user], "rank": 1 + int(better_I.sum() - better_I[had].sum())})
    return sorted(found, key=lambda one: one["rank"])[:k]


def same_titles(catalogue: Catalogue) -> list[list[str]]:
    """Returns the groups of raw item ids that share one title to the letter: no text can tell them apart."""
    groups: dict[str, list[str]] = {}
    for raw, title in zip(catalogue.item_ids, catalogue.titles):
        groups.setdefault(title, []).append(raw)
    return [group for group in groups.values() if len(group) > 1]


def _check_k(k: int) -> None:
    if not isinstance(k, int | np.integer) or k < 1:
        raise InputError(f"k is {k}, but at least one item must be asked for, and a whole number of them.")


def as_table(rows: list[Row]) -> str:
    width = max([4, *(len(row["item"]) for row in rows)])
    lines = [f"rank  {'item':<{width}}  {'score':>9}  title"]
    for row in rows:
        lines.append(f"{row['rank']:>4}  {row['item']:<{width}}  {row['score']:>9.4f}  {one_line(row['title'])}")
    return "\n".join(lines)


def as_words(rows: list[Row]) -> str:
    titled = [(f"{row['item']} {one_line(row['title'])}", one_line(row["words"])) for row in rows]
    lines = [f"recommended: {item} | in the LM's own words: {words}" for item, words in titled]
    return "\n".join([*lines, "(the LM's words are generated text, not facts looked up)"])


def _rows(catalogue: Catalogue, items: np.ndarray, **columns: list) -> list[Row]:
    named = [(rank, catalogue.item_ids[item], catalogue.titles[item]) for rank, item in enumerate(items, 1)]
    values = zip(*columns.values()) if columns else [()] * len(named)
    return [dict(zip(("rank", "item", "title", *columns), (*name, *more))) for name, more in zip(named, values)]
