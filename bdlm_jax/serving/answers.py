"""What a user does with a finished run: raw ids in, raw ids, titles and scores out."""

import os
from collections.abc import Sequence

from bdlm_jax.serving import artefact, scores
from bdlm_jax.serving.catalogue import Catalogue, find_item, find_items, find_user, one_line
from bdlm_jax.types import InputError

ARMS = ("domain", "lm")


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
    """Recommends k items, best first, to a known user or to a new one by history; what the user has had is left out.

    Rows are {"rank", "item", "title", "score"} and, explained, "words". `user` is a raw id, `history` raw item
    ids or titles, oldest first; as one string, separated by ; or ,. `explain` lets the LM arm write about each item,
    text generated behind the item's token, which may be wrong; `temperature`, `top_p` and `seed` are of that text, as
    in `lm.generate`. Scores compare within one answer, not between arms.
    """
    if (user is None) == (history is None):
        raise InputError("give either a user or a history, not both and not neither.")
    if arm not in ARMS:
        raise InputError(f"arm {arm!r} is not known: write one of {', '.join(ARMS)}.")
    if k < 1:
        raise InputError(f"k is {k}, but at least one item must be asked for.")
    if explain and arm == "domain":
        raise InputError("the domain arm has no words to explain with: ask the LM arm (--arm lm).")
    catalogue = artefact.load_catalogue(workdir)
    index = None if user is None else find_user(catalogue, user)
    items = find_items(catalogue, history) if index is None else catalogue.history(index)
    if arm == "domain":
        scores_I = scores.domain_scores(_load_domain_arm(workdir, catalogue), user=index, history=items)
    else:
        lm = artefact.load_lm_arm(workdir)
        scores_I = scores.lm_scores(lm, items, user=index)
    best = scores.top_items(scores_I, seen=items, k=k)
    rows = [_row(catalogue, rank, item, score=float(scores_I[item])) for rank, item in enumerate(best, 1)]
    if explain:
        words = scores.lm_words(lm, items, best, user=index, seed=seed, temperature=temperature, top_p=top_p)
        rows = [{**row, "words": text} for row, text in zip(rows, words)]
    return rows


def known_history(*, workdir: str | os.PathLike, user: str) -> list[dict]:
    """Returns what a known user has had, oldest first, as [{"rank", "item", "title"}]."""
    catalogue = artefact.load_catalogue(workdir)
    return [_row(catalogue, n, item) for n, item in enumerate(catalogue.history(find_user(catalogue, user)), 1)]


def same_titles(*, workdir: str | os.PathLike) -> list[list[str]]:
    """Returns the groups of raw item ids that share one title to the letter: no text can tell them apart."""
    catalogue, groups = artefact.load_catalogue(workdir), {}
    for raw, title in zip(catalogue.item_ids, catalogue.titles):
        groups.setdefault(title, []).append(raw)
    return [group for group in groups.values() if len(group) > 1]


def audience(*, workdir: str | os.PathLike, item: str, k: int = 10) -> list[dict]:
    """Returns the k users on whose list of the domain arm an item stands highest, among those who have not had it.

    [{"user", "rank"}]: the item's rank among what the user has not had, the best first.
    """
    catalogue = artefact.load_catalogue(workdir)
    arm = _load_domain_arm(workdir, catalogue)
    target, found = find_item(catalogue, item), []
    for user, raw in enumerate(catalogue.user_ids):
        seen = catalogue.history(user)
        if target not in seen:
            scores_I = scores.domain_scores(arm, user=user)
            better_I = scores_I > scores_I[target]
            found.append({"user": raw, "rank": 1 + int(better_I.sum() - better_I[seen].sum())})
    return sorted(found, key=lambda one: one["rank"])[:k]


def as_table(rows: list[dict]) -> str:
    width = max([4, *(len(row["item"]) for row in rows)])
    lines = [f"rank  {'item':<{width}}  {'score':>9}  title"]
    for row in rows:
        lines.append(f"{row['rank']:>4}  {row['item']:<{width}}  {row['score']:>9.4f}  {one_line(row['title'])}")
    return "\n".join(lines)


def as_words(rows: list[dict]) -> str:
    titled = [(f"{row['item']} {one_line(row['title'])}", one_line(row["words"])) for row in rows]
    lines = [f"recommended: {item} | in the LM's own words: {words}" for item, words in titled]
    return "\n".join([*lines, "(the LM's words are generated text, not facts looked up)"])


def _load_domain_arm(workdir: str | os.PathLike, catalogue: Catalogue) -> artefact.ServedDomain:
    arm = artefact.load_domain_arm(workdir)
    if (len(arm.user_UD), len(arm.item_ID)) != (len(catalogue.user_ids), len(catalogue.item_ids)):
        folder = os.path.join(workdir, "serving")
        raise InputError(f"{folder} is of two runs: its tables have other rows than its catalogue; delete it.")
    return arm


def _row(catalogue: Catalogue, rank: int, item: int, **more) -> dict:
    return {"rank": rank, "item": catalogue.item_ids[item], "title": catalogue.titles[item], **more}
