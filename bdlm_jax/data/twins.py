"""The twins world: a generator on which the method's claim can be shown, and its ceilings computed.

Twins share their text and differ in a hidden audience; cold items have text and no training interaction; knowledge
items are cold and described only in words that a small general-text corpus ties to the known ones. Whoever sees text
alone cannot tell twins, whoever sees interactions alone cannot rank cold items; the oracles say what is reachable.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bdlm_jax.data import twins_words
from bdlm_jax.data.candidates import Candidates, check_candidates, freeze_candidates, make_pool_candidates
from bdlm_jax.data.interactions import make_interactions
from bdlm_jax.data.splits import TEST, TRAIN, VALIDATION, Split, leave_one_out, seen_mask, within
from bdlm_jax.types import InputError

WARM, COLD, KNOWLEDGE = 0, 1, 2
ORACLES = ("text", "text_without_corpus", "interactions", "both")
_KNOWN = {VALIDATION: (TRAIN,), TEST: (TRAIN, VALIDATION)}
_DAY = 86400
_FIRST_TIME = 1_600_000_000
_LEAST = {
    "seed": 0, "n_users": 1, "n_categories": 2, "n_styles": 2, "n_materials": 2, "n_groups": 2, "n_twins": 1,
    "n_singles": 0, "n_cold": 2, "n_knowledge": 2, "n_synonyms": 2, "min_history": 3, "n_sentences": 0,
}  # fmt: skip


class Truth(NamedTuple):
    """What generated the world, and what no model is shown."""

    style_US: np.ndarray  # tastes: each row a probability over styles
    material_UM: np.ndarray
    group_UG: np.ndarray  # one row: `loyalty` at the user's own group, the rest over the others
    user_group_U: np.ndarray
    follow_KK: np.ndarray  # next category given the last one; the last row: given none
    category_I: np.ndarray
    style_I: np.ndarray
    material_I: np.ndarray
    group_I: np.ndarray  # -1: an item for every group
    kind_I: np.ndarray  # WARM, COLD, KNOWLEDGE
    part_I: np.ndarray  # the part in which the item is on offer: TRAIN means in all
    offer_I: np.ndarray  # how much more than a warm item it is offered, in its part
    words: twins_words.Words


@dataclass(frozen=True)
class World:
    """The generated data; `cold` and `knowledge` are disjoint, and both without any training interaction.

    A cold or knowledge item is a target of validation or of test, never of both, so that the items that test asks
    for stay cold when validation edges are used; the words of test's knowledge items occur in no other item at all.
    The slices hold the items of both parts.
    """

    split: Split
    item_slices: dict  # "warm", "twins", "cold", "knowledge" -> (I,) bool
    twin_of_I: np.ndarray  # int32, -1: none
    corpus: list
    truth: Truth


def make_world(
    *,
    seed,
    n_users=1500,
    n_categories=8,
    n_styles=5,
    n_materials=6,
    n_groups=2,
    n_twins=80,
    n_singles=20,
    n_cold=60,
    n_knowledge=60,
    n_synonyms=2,
    history=14,
    min_history=8,
    cold_share=0.2,
    knowledge_share=0.12,
    follow=0.7,
    taste=0.4,
    loyalty=0.92,
    n_sentences=5000,
) -> World:
    """Generates users, items, text and interactions (ours).

    The next item i of user u after an item of category k is drawn, among the items that u has not had and that are on
    offer, with
        P(i) ∝ pattern[k, category_i] · style[u, style_i] · material[u, material_i] · group[u, group_i] · offer_i,
    pattern = follow·[successor of k] + (1 - follow)/n_categories; tastes fall as taste^rank over a user's own order of
    the values. Text names category, style and material, never the group. Every text belongs to one pair of twins, of
    two groups, or to one item for every group (weight 1/n_groups). Cold texts are new combinations of known words. At
    validation and at test, new items come on offer: half of the cold and knowledge items each, offered so that about
    cold_share and knowledge_share of the targets are such items.

    Args:
        n_twins, n_singles: pairs of twins; warm items without a sibling.
        n_synonyms: words of every value that only knowledge items use; validation and test use different ones.
        history, min_history: mean and least number of a user's interactions, validation and test included.
        loyalty: the probability of the own group among otherwise equal items.
    """
    _check_sizes(locals())
    rng = np.random.default_rng(seed)
    values = {"n_categories": n_categories, "n_styles": n_styles, "n_materials": n_materials}
    words = twins_words.make_words(rng, **values, n_synonyms=n_synonyms)
    n_warm = 2 * n_twins + n_singles
    items, twin_of_I = _make_items(rng, [n_warm, n_cold, n_knowledge], n_twins=n_twins, n_groups=n_groups, **values)
    # The synonyms that test asks for occur in no validation item either.
    synonyms_I = np.where(items["part_I"] == TEST, twins_words.ODD_SYNONYMS, twins_words.EVEN_SYNONYMS)
    vocabulary_I = np.where(items["kind_I"] == KNOWLEDGE, synonyms_I, twins_words.KNOWN_WORDS)
    titles = twins_words.make_titles(rng, words, items, vocabulary_I)
    truth = Truth(
        **_make_users(rng, n_users, n_styles, n_materials, n_groups, taste=taste, loyalty=loyalty),
        **items,
        follow_KK=_make_pattern(n_categories, follow),
        offer_I=np.ones(len(titles)),
        words=words,
    )
    length_U = np.minimum(min_history + rng.poisson(history - min_history, size=n_users), n_warm - 1)
    trial = _draw_histories(np.random.default_rng([seed, 1]), truth, length_U)
    truth = truth._replace(offer_I=_balanced_offers(truth, trial, cold_share, knowledge_share))
    interactions = _name_rows(_draw_histories(rng, truth, length_U), length_U, titles)
    slices = {"warm": truth.kind_I == WARM, "twins": twin_of_I >= 0}
    slices |= {"cold": truth.kind_I == COLD, "knowledge": truth.kind_I == KNOWLEDGE}
    corpus = twins_words.make_corpus(rng, words, n_sentences=n_sentences)
    return World(leave_one_out(interactions), slices, twin_of_I, corpus, truth)


def _check_sizes(size: dict) -> None:
    for name, bound in (_LEAST | {"history": size["min_history"]}).items():
        if size[name] < bound:
            raise InputError(f"config.data.options: {name} is {size[name]}, but must be {bound} or more.")
    for name in ("follow", "taste", "loyalty"):
        if not 0 < size[name] < 1:
            raise InputError(
                f"config.data.options: {name} is {size[name]}, but must lie between 0 and 1, both excluded."
            )
    shares = size["cold_share"], size["knowledge_share"]
    if min(shares) <= 0 or sum(shares) >= 1:
        raise InputError("config.data.options: cold_share and knowledge_share must be above 0 and together below 1.")
    n_texts = sum(size[name] for name in ("n_twins", "n_singles", "n_cold", "n_knowledge"))
    n_possible = size["n_categories"] * size["n_styles"] * size["n_materials"]
    if n_texts > n_possible:
        few = f"categories × styles × materials give only {n_possible}: raise one of these or ask for fewer items"
        raise InputError(f"config.data.options: {n_texts} texts are needed, but {few}.")
    history, n_warm = size["history"], 2 * size["n_twins"] + size["n_singles"]
    if n_warm < 3 * history:
        raise InputError(
            f"config.data.options: a history of {history} needs {3 * history:g} warm items: raise n_twins."
        )


def _make_items(rng, n_of_kind, *, n_twins, n_groups, n_categories, n_styles, n_materials):
    """The item columns of Truth, and each item's twin (int32, -1: none)."""
    kind_I = np.repeat([WARM, COLD, KNOWLEDGE], n_of_kind)
    n_items, n_texts, n_pairs = len(kind_I), len(kind_I) - n_twins, n_categories * n_styles
    # Round after round over all (category, style) pairs, each time with another material: so each kind of item takes
    # the same share of every pair, and cold targets suit tastes and pattern just as warm ones do.
    pairs = rng.permutation(n_pairs)
    materials = np.stack([rng.permutation(n_materials) for _ in pairs])
    text_I = np.concatenate([np.repeat(np.arange(n_twins), 2), np.arange(n_twins, n_texts)])
    round_I, turn_I = np.divmod(text_I, n_pairs)
    category_I, style_I = np.divmod(pairs[turn_I], n_styles)
    # Within a kind, items of one pair take turns, so that each part offers about every pair.
    part_I = np.full(n_items, TRAIN)
    for kind in (COLD, KNOWLEDGE):
        members = np.flatnonzero(kind_I == kind)
        members = members[np.argsort(turn_I[members], kind="stable")]
        part_I[members] = np.where(np.arange(len(members)) % 2, VALIDATION, TEST)
    first_group = rng.integers(n_groups, size=n_twins)
    second_group = (first_group + rng.integers(1, n_groups, size=n_twins)) % n_groups
    group_I, twin_of_I = np.full(n_items, -1), np.full(n_items, -1)
    group_I[: 2 * n_twins] = np.stack([first_group, second_group], axis=1).ravel()
    twin_of_I[: 2 * n_twins] = np.arange(2 * n_twins) ^ 1
    items = {
        "category_I": category_I,
        "style_I": style_I,
        "material_I": materials[turn_I, round_I],
        "group_I": group_I,
        "kind_I": kind_I,
        "part_I": part_I,
    }
    order = rng.permutation(n_items)  # an item's number says nothing about its kind
    twin_of_I = twin_of_I[order]
    twin_of_I = np.where(twin_of_I >= 0, np.argsort(order)[twin_of_I], -1).astype(np.int32)
    return {name: values[order] for name, values in items.items()}, twin_of_I


def _make_users(rng, n_users, n_styles, n_materials, n_groups, *, taste, loyalty) -> dict:
    """The user columns of Truth."""
    user_group_U = rng.integers(n_groups, size=n_users)
    group_UG = np.full((n_users, n_groups), (1 - loyalty) / (n_groups - 1))
    group_UG[np.arange(n_users), user_group_U] = loyalty

    def tastes(n_values):
        weight = taste ** np.argsort(rng.random((n_users, n_values)), axis=1)
        return weight / weight.sum(axis=1, keepdims=True)

    tasted = {"style_US": tastes(n_styles), "material_UM": tastes(n_materials)}
    return tasted | {"group_UG": group_UG, "user_group_U": user_group_U}


def _make_pattern(n_categories: int, follow: float) -> np.ndarray:
    follow_KK = np.full((n_categories + 1, n_categories), (1 - follow) / n_categories)
    follow_KK[np.arange(n_categories), (np.arange(n_categories) + 1) % n_categories] += follow
    follow_KK[-1] = 1 / n_categories
    return follow_KK


def _draw_histories(rng, truth: Truth, length_U: np.ndarray):
    """(user, item, step) of all histories, step by step, a block of users at a time so that memory stays bounded."""
    drawn = []
    for first in range(0, len(length_U), 2048):
        user_B = np.arange(first, min(first + 2048, len(length_U)))
        # A taken item's weight becomes 0, so that no item comes twice.
        weight_BI = _user_weights(truth, user_B)
        last_B = np.full(len(user_B), len(truth.follow_KK) - 1)
        for step in range(length_U[user_B].max()):
            left_B = length_U[user_B] - step
            active = np.flatnonzero(left_B > 0)
            part_B = np.select([left_B[active] == 1, left_B[active] == 2], [TEST, VALIDATION], TRAIN)
            offered_BI = (truth.part_I == TRAIN) | (truth.part_I == part_B[:, None])
            chance_BI = weight_BI[active] * truth.follow_KK[last_B[active]][:, truth.category_I]
            sum_BI = np.cumsum(chance_BI * np.where(offered_BI, truth.offer_I, 0), axis=1)
            mark_B = np.minimum(rng.random(len(active)) * sum_BI[:, -1], np.nextafter(sum_BI[:, -1], 0))
            item_B = (sum_BI <= mark_B[:, None]).sum(axis=1)
            weight_BI[active, item_B] = 0
            last_B[active] = truth.category_I[item_B]
            drawn.append((user_B[active], item_B, np.full(len(active), step)))
    return tuple(np.concatenate(column) for column in zip(*drawn))


def _user_weights(truth: Truth, user_N: np.ndarray, *, sees_group: bool = True) -> np.ndarray:
    n_groups = truth.group_UG.shape[1]
    # The last column serves items for every group, and stands for the group where it is not seen.
    group_NG = np.concatenate([truth.group_UG[user_N], np.full((len(user_N), 1), 1 / n_groups)], axis=1)
    group_I = truth.group_I if sees_group else np.full_like(truth.group_I, -1)
    taste_NI = truth.style_US[user_N][:, truth.style_I] * truth.material_UM[user_N][:, truth.material_I]
    return taste_NI * group_NG[:, group_I]


def _balanced_offers(truth: Truth, trial, cold_share: float, knowledge_share: float) -> np.ndarray:
    """How much more or less than in a trial run, with every item offered alike, new items need for their shares."""
    n_trials = 2 * len(truth.user_group_U)
    drawn = {kind: max((truth.kind_I[trial[1]] == kind).sum(), 1) / n_trials for kind in (COLD, KNOWLEDGE)}
    warm_odds = max(1 - sum(drawn.values()), 1 / n_trials) / (1 - cold_share - knowledge_share)
    offer_I = np.ones(len(truth.kind_I))
    for kind, share in ((COLD, cold_share), (KNOWLEDGE, knowledge_share)):
        offer_I[truth.kind_I == kind] = share / drawn[kind] * warm_odds
    return offer_I


def _name_rows(rows, length_U: np.ndarray, titles: list[str]):
    """The table; names stand in the order of the numbers, so that its users and items are numbered as ours."""

    def names(letter, n):
        return np.array([f"{letter}{k:0{len(str(max(n - 1, 1)))}d}" for k in range(n)])

    user_E, item_E, step_E = rows
    user_ids, item_ids = names("u", len(length_U)), names("i", len(titles))
    return make_interactions(
        user_ids[user_E],
        item_ids[item_E],
        # Counted from the end: everyone's validation happens on one day and everyone's test on the next.
        time=_FIRST_TIME + _DAY * (length_U.max() - length_U[user_E] + step_E),
        item_fields={name: {"title": title} for name, title in zip(item_ids.tolist(), titles)},
        keep_items_without_interactions=True,
    )


def oracle_scores(world: World, part: int, sees: str = "both") -> np.ndarray:
    """Scores all items for the cases of a part by log P(next item | what the oracle sees), from the true parameters.

    All oracles know the user's tastes and group, the pattern, and what the user had before.
    "both" knows every item; "text" does not know groups, so twins tie exactly; "text_without_corpus" knows in addition
    nothing of knowledge items, which tie at one value; "interactions" knows nothing of cold and knowledge items, which
    tie at one value. None knows which new items are on offer in which part: each counts with one half of its offer.
    The rows are those of `world.split.cases(part)`; items that the user already had score -inf.
    """
    if sees not in ORACLES:
        raise InputError(f"oracle_scores: sees is {sees!r}, but must be one of {', '.join(ORACLES)}.")
    if part not in _KNOWN:
        raise InputError(f"The oracles score the parts VALIDATION ({VALIDATION}) and TEST ({TEST}), not {part!r}.")
    truth = world.truth
    user_N, _ = world.split.cases(part)
    indptr, item_H = world.split.histories(*_KNOWN[part])
    unknown = {"text_without_corpus": (KNOWLEDGE,), "interactions": (COLD, KNOWLEDGE)}.get(sees, ())
    unknown_I = np.isin(truth.kind_I, unknown)
    # An unknown item in the last place says nothing about the category that comes next.
    last_N = item_H[indptr[user_N + 1] - 1]
    category_N = np.where(unknown_I[last_N], len(truth.follow_KK) - 1, truth.category_I[last_N])
    weight_NI = _user_weights(truth, user_N, sees_group=not sees.startswith("text"))
    weight_NI *= truth.follow_KK[category_N][:, truth.category_I]
    weight_NI *= np.where(truth.kind_I == WARM, 1.0, truth.offer_I / 2)
    if unknown_I.any():
        weight_NI[:, unknown_I] = weight_NI[:, unknown_I].mean(axis=1, keepdims=True)
    weight_NI[seen_mask((indptr, item_H), user_N, len(truth.kind_I))] = 0
    with np.errstate(divide="ignore"):
        return np.log(weight_NI / weight_NI.sum(axis=1, keepdims=True)).astype(np.float32)


def slice_candidates(world: World, part: int, seed: int) -> dict[str, Candidates]:
    """Makes the candidate sets on which each slice's chance level is exact.

    "pair" is a twin and its sibling, where the user never had the sibling (chance 1/2); "cold20" a cold item and 19
    other cold items of the same part, padded with -1 (chance 1/20 for whom they are alike); "knowledge20" likewise.
    """
    truth = world.truth
    user_N, item_N = world.split.cases(part)
    sibling_N = world.twin_of_I[item_N]
    had = world.split.pairs(TRAIN, VALIDATION, TEST)
    fresh_N = (sibling_N >= 0) & ~within(user_N.astype(np.int64) * len(world.twin_of_I) + sibling_N, had)
    made = {"pair": freeze_candidates("pair", user_N[fresh_N], np.stack([item_N, sibling_N], axis=1)[fresh_N])}
    for name, kind in (("cold20", COLD), ("knowledge20", KNOWLEDGE)):
        pool = np.flatnonzero((truth.kind_I == kind) & (truth.part_I == part))
        made[name] = make_pool_candidates(world.split, part, pool=pool, n_negatives=19, seed=seed, name=name)
    for candidates in made.values():
        check_candidates(world.split, candidates)
    return made
