"""The twins world: a generator on which the method's claim can be shown, and its ceilings computed.

Twins share their text and differ in a hidden audience; cold items have text and no training interaction; knowledge
items are cold and described only in words that a small general-text corpus ties to the known ones. Whoever sees text
alone cannot tell twins, whoever sees interactions alone cannot rank cold items; the oracles say what is reachable.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bdlm_jax.data import twins_words as synthetic_words
from bdlm_jax.data.candidates import Candidates, _sha256, check_candidates, make_candidates
from bdlm_jax.data.interactions import make_interactions
from bdlm_jax.data.splits import TEST, TRAIN, VALIDATION, Split, leave_one_out
from bdlm_jax.types import InputError

WARM, COLD, KNOWLEDGE = 0, 1, 2
ORACLES = ("text", "text_without_corpus", "interactions", "both")
_DAY = 86400
_FIRST_TIME = 1_600_000_000


class Truth(NamedTuple):
    """What generated the world, and what no model is shown; rows follow the Interactions' users and items."""

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
    words: synthetic_words.Words


@dataclass(frozen=True)
class World:
    """The generated data; `cold` and `knowledge` are disjoint, and both without any training interaction.

    A cold or knowledge item is a target of validation or of test, never of both, so that the items that test asks
    for stay cold when validation edges are used; the words of test's knowledge items occur in no other item at all.
    The slices hold the items of both parts.
    """

    split: Split
    item_slices: dict  # "twins", "cold", "knowledge" -> (I,) bool
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
):
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
        seed: int, decides everything.
        n_users: how many users.
        n_categories, n_styles, n_materials: values of the attributes that titles name.
        n_groups: values of the hidden attribute.
        n_twins: pairs of twins.
        n_singles: warm items without a sibling.
        n_cold, n_knowledge: items of these kinds, halves for validation and test.
        n_synonyms: words of every value that only knowledge items use; validation and test use different ones.
        history: mean number of interactions of a user, validation and test included.
        min_history: the least number.
        cold_share, knowledge_share: about which share of validation and test targets they make up.
        follow: how often the next category is the successor of the last one.
        taste: weight of a user's next best value relative to the better one, between 0 and 1.
        loyalty: the probability of the own group among otherwise equal items.
        n_sentences: size of the general-text corpus.

    Returns:
        World.

    Raises:
        InputError: a size or probability out of range, or fewer texts than items need.
    """
    least = {"seed": (seed, 0), "n_users": (n_users, 1), "n_categories": (n_categories, 2), "n_styles": (n_styles, 2)}
    least |= {"n_materials": (n_materials, 2), "n_groups": (n_groups, 2), "n_twins": (n_twins, 1)}
    least |= {"n_singles": (n_singles, 0), "n_cold": (n_cold, 2), "n_knowledge": (n_knowledge, 2)}
    least |= {"min_history": (min_history, 3), "history": (history, min_history), "n_sentences": (n_sentences, 0)}
    for name, (value, bound) in least.items():
        if value < bound:
            raise InputError(f"make_world: {name} is {value}, but must be {bound} or more.")
    for name, value in (("follow", follow), ("taste", taste), ("loyalty", loyalty)):
        if not 0 < value < 1:
            raise InputError(f"make_world: {name} is {value}, but must lie between 0 and 1, both excluded.")
    if min(cold_share, knowledge_share) <= 0 or cold_share + knowledge_share >= 1:
        raise InputError("make_world: cold_share and knowledge_share must be above 0 and together below 1.")
    n_texts, n_possible = n_twins + n_singles + n_cold + n_knowledge, n_categories * n_styles * n_materials
    if n_texts > n_possible:
        raise InputError(
            f"make_world: {n_texts} texts are needed, but categories × styles × materials give only {n_possible}: "
            "raise one of these or ask for fewer items."
        )
    n_warm = 2 * n_twins + n_singles
    if n_warm < 3 * history:
        raise InputError(f"make_world: a history of {history} needs {3 * history:g} warm items: raise n_twins.")
    rng = np.random.default_rng(seed)
    words = synthetic_words.make_words(
        rng, n_categories=n_categories, n_styles=n_styles, n_materials=n_materials, n_synonyms=n_synonyms
    )

    # Round after round over all (category, style) pairs, each time with another material: so each kind of item takes
    # the same share of every pair, and cold targets suit tastes and pattern just as warm ones do.
    pairs = rng.permutation(n_categories * n_styles)
    materials = np.stack([rng.permutation(n_materials) for _ in pairs])
    text = np.arange(n_texts)
    pair_T, material_T = pairs[text % len(pairs)], materials[text % len(pairs), text // len(pairs)]
    text_of_I = np.concatenate([np.repeat(text[:n_twins], 2), text[n_twins:]])
    kind_I = np.repeat([WARM, COLD, KNOWLEDGE], [n_warm, n_cold, n_knowledge])
    # Within a kind, items of one pair take turns, so that each part offers about every pair.
    part_I = np.full(len(text_of_I), TRAIN)
    for kind in (COLD, KNOWLEDGE):
        members = np.flatnonzero(kind_I == kind)
        members = members[np.argsort(text_of_I[members] % len(pairs), kind="stable")]
        part_I[members] = np.where(np.arange(len(members)) % 2, VALIDATION, TEST)
    first_group = rng.integers(n_groups, size=n_twins)
    second_group = (first_group + rng.integers(1, n_groups, size=n_twins)) % n_groups
    group_I = np.full(len(text_of_I), -1)
    group_I[: 2 * n_twins] = np.stack([first_group, second_group], axis=1).ravel()
    twin_of_I = np.full(len(text_of_I), -1)
    twin_of_I[: 2 * n_twins] = np.arange(2 * n_twins) ^ 1

    # An item's number says nothing about its kind.
    order = rng.permutation(len(text_of_I))
    text_of_I, kind_I, part_I, group_I = (a[order] for a in (text_of_I, kind_I, part_I, group_I))
    place = np.argsort(order)
    twin_of_I = np.where(twin_of_I[order] >= 0, place[twin_of_I[order]], -1)
    category_I, style_I = np.divmod(pair_T[text_of_I], n_styles)
    material_I = material_T[text_of_I]
    # The synonyms that test asks for occur in no validation item either.
    vocabulary_I = np.where(
        kind_I == KNOWLEDGE,
        np.where(part_I == TEST, synthetic_words.ODD_SYNONYMS, synthetic_words.EVEN_SYNONYMS),
        synthetic_words.KNOWN_WORDS,
    )
    titles = synthetic_words.make_titles(
        rng, words, style_I=style_I, material_I=material_I, category_I=category_I, vocabulary_I=vocabulary_I
    )

    user_group_U = rng.integers(n_groups, size=n_users)
    group_UG = np.full((n_users, n_groups), (1 - loyalty) / (n_groups - 1))
    group_UG[np.arange(n_users), user_group_U] = loyalty
    follow_KK = np.full((n_categories + 1, n_categories), (1 - follow) / n_categories)
    follow_KK[np.arange(n_categories), (np.arange(n_categories) + 1) % n_categories] += follow
    follow_KK[-1] = 1 / n_categories
    truth = Truth(
        style_US=_tastes(rng, n_users, n_styles, taste),
        material_UM=_tastes(rng, n_users, n_materials, taste),
        group_UG=group_UG,
        user_group_U=user_group_U,
        follow_KK=follow_KK,
        category_I=category_I,
        style_I=style_I,
        material_I=material_I,
        group_I=group_I,
        kind_I=kind_I,
        part_I=part_I,
        offer_I=np.ones(len(kind_I)),
        words=words,
    )
    length_U = np.minimum(min_history + rng.poisson(history - min_history, size=n_users), n_warm - 1)
    # A trial run, with every item offered alike, shows how much more or less the new items need for their shares.
    trial_item_E = _draw_histories(np.random.default_rng([seed, 1]), truth, length_U)[1]
    n_trials = 2 * n_users
    drawn = {kind: max((kind_I[trial_item_E] == kind).sum(), 1) / n_trials for kind in (COLD, KNOWLEDGE)}
    warm_odds = max(1 - sum(drawn.values()), 1 / n_trials) / (1 - cold_share - knowledge_share)
    for kind, share in ((COLD, cold_share), (KNOWLEDGE, knowledge_share)):
        truth.offer_I[kind_I == kind] = share / drawn[kind] * warm_odds
    user_E, item_E, step_E = _draw_histories(rng, truth, length_U)

    user_ids = _names("u", n_users)
    item_ids = _names("i", len(titles))
    interactions = make_interactions(
        user_ids[user_E],
        item_ids[item_E],
        # Counted from the end: everyone's validation happens on one day and everyone's test on the next.
        time=_FIRST_TIME + _DAY * (length_U.max() - length_U[user_E] + step_E),
        item_fields={name: {"title": title} for name, title in zip(item_ids.tolist(), titles)},
        keep_items_without_interactions=True,
    )
    users = _positions(user_ids, interactions.user_ids)
    items = _positions(item_ids, interactions.item_ids)
    truth = truth._replace(
        **{name: getattr(truth, name)[users] for name in ("style_US", "material_UM", "group_UG", "user_group_U")},
        **{name: getattr(truth, name)[items] for name in Truth._fields if name.endswith("_I")},
    )
    new_place = np.argsort(items)
    twin_of_I = np.where(twin_of_I[items] >= 0, new_place[twin_of_I[items]], -1).astype(np.int32)
    slices = {"twins": twin_of_I >= 0, "cold": truth.kind_I == COLD, "knowledge": truth.kind_I == KNOWLEDGE}
    corpus = synthetic_words.make_corpus(rng, words, n_sentences=n_sentences)
    return World(leave_one_out(interactions), slices, twin_of_I, corpus, truth)


def oracle_scores(world, part, sees="both"):
    """Scores all items for the cases of a part by log P(next item | what the oracle sees), from the true parameters.

    All oracles know the user's tastes and group, the pattern, and what the user had before.
    "both" knows every item; "text" does not know groups, so twins tie exactly; "text_without_corpus" knows in addition
    nothing of knowledge items, which tie at one value; "interactions" knows nothing of cold and knowledge items, which
    tie at one value. None knows which new items are on offer in which part: each counts with one half of its offer.

    Args:
        world: World.
        part: VALIDATION or TEST.
        sees: one of ORACLES.

    Returns:
        (N, I) float32, rows as in `world.split.cases(part)`; -inf for items that the user already had.
    """
    if sees not in ORACLES:
        raise InputError(f"oracle_scores: sees is {sees!r}, but must be one of {', '.join(ORACLES)}.")
    truth = world.truth
    user_N, _ = world.split.cases(part)
    indptr, item_H = world.split.histories(*_before(part))
    unknown_I = {
        "both": np.zeros(len(truth.kind_I), bool),
        "text": np.zeros(len(truth.kind_I), bool),
        "text_without_corpus": truth.kind_I == KNOWLEDGE,
        "interactions": truth.kind_I != WARM,
    }[sees]
    # An unknown item in the last place says nothing about the category that comes next.
    last_N = item_H[indptr[user_N + 1] - 1]
    category_N = np.where(unknown_I[last_N], len(truth.follow_KK) - 1, truth.category_I[last_N])
    weight_NI = _user_weights(truth, user_N, sees_group=not sees.startswith("text"))
    weight_NI *= truth.follow_KK[category_N][:, truth.category_I]
    weight_NI *= np.where(truth.kind_I == WARM, 1.0, truth.offer_I / 2)
    if unknown_I.any():
        weight_NI[:, unknown_I] = weight_NI[:, unknown_I].mean(axis=1, keepdims=True)
    length_N = indptr[user_N + 1] - indptr[user_N]
    rows = np.repeat(np.arange(len(user_N)), length_N)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(length_N) - length_N, length_N)
    weight_NI[rows, item_H[np.repeat(indptr[user_N], length_N) + within]] = 0
    with np.errstate(divide="ignore"):
        return np.log(weight_NI / weight_NI.sum(axis=1, keepdims=True)).astype(np.float32)


def slice_candidates(world, part, seed):
    """Makes the candidate sets on which each slice's chance level is exact.

    Args:
        world: World.
        part: VALIDATION or TEST.
        seed: int, draws the negatives.

    Returns:
        {"pair": a twin and its sibling, where the user never had the sibling (chance 1/2),
         "cold20": a cold item and 19 other cold items of the same part (chance 1/20 for whom they are all alike),
         "knowledge20": the same with knowledge items}; fewer than 19 others: padded with -1.
    """
    truth = world.truth
    user_N, item_N = world.split.cases(part)
    sibling_N = world.twin_of_I[item_N]
    n_items = len(world.twin_of_I)
    had_user, had_item = world.split.edges(TRAIN, VALIDATION, TEST)
    had = had_user.astype(np.int64) * n_items + had_item
    fresh_N = (sibling_N >= 0) & ~np.isin(user_N.astype(np.int64) * n_items + sibling_N, had)
    made = {"pair": _freeze("pair", user_N[fresh_N], np.stack([item_N, sibling_N], axis=1)[fresh_N])}
    for name, kind in (("cold20", COLD), ("knowledge20", KNOWLEDGE)):
        pool = np.flatnonzero((truth.kind_I == kind) & (truth.part_I == part))
        drawn = make_candidates(world.split, part, n_negatives=19, seed=seed, name=name, pool=pool)
        chosen_N = truth.kind_I[item_N] == kind
        made[name] = _freeze(name, user_N[chosen_N], drawn.items_NC[chosen_N])
    for candidates in made.values():
        check_candidates(world.split, candidates)
    return made


def ceilings(world, part, candidates):
    """Evaluates every oracle on candidate sets, by slice.

    Args:
        world: World.
        part: VALIDATION or TEST.
        candidates: iterable of Candidates of that part.

    Returns:
        list of dicts {"oracle", "slice", "protocol", "users", "hr@1", "auc"}; slices "all", "twins", "cold",
        "knowledge" and "warm"; hr@1 counts ties against the target, auc counts them one half.
    """
    user_N, _ = world.split.cases(part)
    row_of_U = np.full(world.split.interactions.n_users, -1)
    row_of_U[user_N] = np.arange(len(user_N))
    every = np.ones(len(world.twin_of_I), bool)
    slices = {"all": every, "warm": world.truth.kind_I == WARM, **world.item_slices}
    rows = []
    for sees in ORACLES:
        scores_NI = oracle_scores(world, part, sees)
        for one in candidates:
            scores_NC = scores_NI[row_of_U[one.user_N][:, None], one.items_NC]
            target_N, other_NC = scores_NC[:, :1], scores_NC[:, 1:]
            valid_NC = one.items_NC[:, 1:] >= 0
            hit_N = ~((other_NC >= target_N) & valid_NC).any(axis=1)
            won_NC = (target_N > other_NC) + 0.5 * (target_N == other_NC)
            auc_N = (won_NC * valid_NC).sum(axis=1) / np.maximum(valid_NC.sum(axis=1), 1)
            for name, mask_I in slices.items():
                chosen = mask_I[one.items_NC[:, 0]]
                if chosen.any():
                    row = {"oracle": sees, "slice": name, "protocol": one.name, "users": int(chosen.sum())}
                    rows.append(row | {"hr@1": float(hit_N[chosen].mean()), "auc": float(auc_N[chosen].mean())})
    return rows


def _freeze(name, user_N, items_NC):
    items_NC = items_NC.astype(np.int32)
    return Candidates(name, user_N.copy(), items_NC, _sha256(name, user_N, items_NC))


def _names(letter, n):
    digits = len(str(max(n - 1, 1)))
    return np.array([f"{letter}{k:0{digits}d}" for k in range(n)])


def _positions(mine, theirs):
    place = {name: k for k, name in enumerate(mine.tolist())}
    return np.array([place[str(name)] for name in theirs])


def _before(part):
    if part not in (VALIDATION, TEST):
        raise InputError(f"The oracles score the parts VALIDATION ({VALIDATION}) and TEST ({TEST}), not {part!r}.")
    return (TRAIN,) if part == VALIDATION else (TRAIN, VALIDATION)


def _tastes(rng, n_users, n_values, taste):
    rank = np.argsort(rng.random((n_users, n_values)), axis=1)
    weight = taste**rank
    return weight / weight.sum(axis=1, keepdims=True)


def _user_weights(truth, user_N, *, sees_group=True):
    n_groups = truth.group_UG.shape[1]
    # The last column serves items for every group, and stands for the group where it is not seen.
    group_NG = np.concatenate([truth.group_UG[user_N], np.full((len(user_N), 1), 1 / n_groups)], axis=1)
    group_I = truth.group_I if sees_group else np.full_like(truth.group_I, -1)
    return (
        truth.style_US[user_N][:, truth.style_I] * truth.material_UM[user_N][:, truth.material_I] * group_NG[:, group_I]
    )


def _draw_histories(rng, truth, length_U):
    """Draws all users' histories step by step, a block of users at a time so that memory stays bounded."""
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
