import math

import numpy as np
import pytest
import scipy.sparse.linalg

from bdlm_jax.data.candidates import check_candidates, make_candidates
from bdlm_jax.data.splits import TEST, TRAIN, VALIDATION
from bdlm_jax.data.twins import COLD, KNOWLEDGE, ORACLES, WARM, make_world, oracle_scores, slice_candidates
from bdlm_jax.data.twins_words import CATEGORIES, MATERIALS, STYLES, frame_words
from bdlm_jax.evaluation.evaluate import ceilings
from bdlm_jax.types import InputError

SMALL = dict(n_users=60, n_twins=20, n_singles=4, n_cold=10, n_knowledge=8, n_sentences=200)


@pytest.fixture(scope="module")
def world():
    return make_world(seed=0)


@pytest.fixture(scope="module")
def small():
    return make_world(seed=5, **SMALL)


@pytest.fixture(scope="module")
def table(world):
    """{(oracle, slice, protocol): row} of the default world's test part."""
    candidates = [make_candidates(world.split, TEST, n_negatives=19, seed=1, name="cand20")]
    candidates += slice_candidates(world, TEST, seed=2).values()
    return {(r["oracle"], r["slice"], r["protocol"]): r for r in ceilings(world, TEST, candidates)}


def titles_of(world, mask_I):
    return [title for title, chosen in zip(world.split.interactions.item_text(), mask_I) if chosen]


def words_of(world, mask_I):
    return {word for title in titles_of(world, mask_I) for word in title.split()}


def test_the_seed_decides_everything(small):
    again, other = make_world(seed=5, **SMALL), make_world(seed=6, **SMALL)
    assert again.split.interactions.fingerprint() == small.split.interactions.fingerprint()
    assert again.corpus == small.corpus
    np.testing.assert_array_equal(again.twin_of_I, small.twin_of_I)
    for sees in ORACLES:
        np.testing.assert_array_equal(oracle_scores(again, TEST, sees), oracle_scores(small, TEST, sees))
    assert other.split.interactions.fingerprint() != small.split.interactions.fingerprint()
    assert other.corpus != small.corpus


def test_twins_share_their_text_to_the_letter_and_differ_in_audience(world):
    title_I = np.array(world.split.interactions.item_text())
    twin = np.flatnonzero(world.item_slices["twins"])
    sibling = world.twin_of_I[twin]
    assert len(twin) == 2 * 80
    np.testing.assert_array_equal(world.twin_of_I[sibling], twin)
    np.testing.assert_array_equal(title_I[sibling], title_I[twin])
    assert (world.truth.group_I[sibling] != world.truth.group_I[twin]).all()
    # their true audiences too: most interactions of an item come from its own group
    user, item = world.split.edges(TRAIN)
    own = world.truth.user_group_U[user] == world.truth.group_I[item]
    assert own[np.isin(item, twin)].mean() > 0.8
    # and nothing else shares a text
    assert len(set(titles_of(world, world.twin_of_I < 0))) == (world.twin_of_I < 0).sum()
    assert not set(titles_of(world, world.twin_of_I < 0)) & set(title_I[twin])


def test_new_items_have_text_and_no_interaction_before_they_are_asked_for(world):
    new_I = world.item_slices["cold"] | world.item_slices["knowledge"]
    assert not (world.item_slices["cold"] & world.item_slices["knowledge"]).any()
    assert world.split.degree(TRAIN)[new_I].sum() == 0
    assert (world.split.degree(TRAIN)[~new_I] >= 50).all()
    asked = {part: set(world.split.cases(part)[1].tolist()) & set(np.flatnonzero(new_I)) for part in (VALIDATION, TEST)}
    assert not asked[VALIDATION] & asked[TEST]
    for kind in ("cold", "knowledge"):
        for part in (VALIDATION, TEST):
            assert len(asked[part] & set(np.flatnonzero(world.item_slices[kind]))) >= 20


def test_cold_texts_combine_known_words_and_knowledge_words_stand_in_the_corpus_alone(world):
    kind_I, part_I = world.truth.kind_I, world.truth.part_I
    warm_I, cold_I, knowledge_I = (kind_I == kind for kind in (WARM, COLD, KNOWLEDGE))
    assert words_of(world, cold_I) <= words_of(world, warm_I)
    assert not set(titles_of(world, cold_I)) & set(titles_of(world, warm_I))
    for chosen_I in (knowledge_I, knowledge_I & (part_I == TEST)):
        assert not words_of(world, chosen_I) & words_of(world, ~chosen_I)
    assert words_of(world, kind_I >= 0) <= {word for sentence in world.corpus for word in sentence.split()}
    assert not any(title in sentence for title in set(titles_of(world, knowledge_I)) for sentence in world.corpus)


def test_words_are_listed_once_and_frames_use_none_of_them():
    listed = [word for concepts in (CATEGORIES, STYLES, MATERIALS) for concept in concepts for word in concept]
    assert len(listed) == len(set(listed))
    assert not set(listed) & frame_words()


def test_the_company_that_words_keep_ties_synonyms_to_known_words(world):
    concepts = world.truth.words.category + world.truth.words.style + world.truth.words.material
    every_word = [word for concept in concepts for word in concept]
    places = sorted({w for s in world.corpus for w in s.split()} - set(every_word) - frame_words())
    row_of, column_of = ({word: n for n, word in enumerate(listed)} for listed in (every_word, places))
    counts = np.zeros((len(every_word), len(places)))
    for sentence in world.corpus:
        words = set(sentence.split())
        for place in words & column_of.keys():
            for word in words & row_of.keys():
                counts[row_of[word], column_of[place]] += 1
    unit = counts / np.linalg.norm(counts, axis=1, keepdims=True)
    known = unit[[row_of[concept[0]] for concept in concepts]]
    right = [np.argmax(known @ unit[row_of[s]]) == n for n, concept in enumerate(concepts) for s in concept[1:]]
    assert len(right) == 2 * len(concepts)
    assert np.mean(right) > 0.9


def test_shares_lengths_and_pattern_are_as_asked(world):
    for part in (VALIDATION, TEST):
        share_K = np.bincount(world.truth.kind_I[world.split.cases(part)[1]], minlength=3) / 1500
        np.testing.assert_allclose(share_K, [1 - 0.2 - 0.12, 0.2, 0.12], atol=0.04)
    length_U = np.bincount(world.split.interactions.user_E)
    assert length_U.min() >= 8
    assert abs(length_U.mean() - 14) < 0.3
    indptr, item = world.split.histories(TRAIN, VALIDATION)
    user_N, target_N = world.split.cases(TEST)
    category_I = world.truth.category_I
    follows_N = category_I[target_N] == (category_I[item[indptr[user_N + 1] - 1]] + 1) % 8
    for kind in (WARM, COLD, KNOWLEDGE):
        # new items follow the pattern as warm ones do: .7 + .3 / 8, less what is used up
        assert abs(follows_N[world.truth.kind_I[target_N] == kind].mean() - (0.7 + 0.3 / 8)) < 0.1


def test_oracle_scores_are_the_log_of_the_generating_probability(small):
    truth, row = small.truth, 7
    user_N, _ = small.split.cases(TEST)
    indptr, item = small.split.histories(TRAIN, VALIDATION)
    user = user_N[row]
    had = item[indptr[user] : indptr[user + 1]].tolist()
    weights = []
    for i in range(small.split.interactions.n_items):
        successor = (truth.category_I[had[-1]] + 1) % 8 == truth.category_I[i]
        pattern = 0.7 * successor + (1 - 0.7) / 8
        group = 0.5 if truth.group_I[i] < 0 else 0.92 if truth.group_I[i] == truth.user_group_U[user] else 1 - 0.92
        taste = truth.style_US[user, truth.style_I[i]] * truth.material_UM[user, truth.material_I[i]]
        offer = 1 if truth.kind_I[i] == WARM else truth.offer_I[i] / 2
        weights.append(0 if i in had else pattern * group * taste * offer)
    expected = [math.log(w / sum(weights)) if w else -math.inf for w in weights]
    np.testing.assert_allclose(oracle_scores(small, TEST, "both")[row], expected, rtol=1e-5)
    falling = np.sort(truth.style_US[user])[::-1]
    np.testing.assert_allclose(falling / falling[0], [1, 0.4, 0.4**2, 0.4**3, 0.4**4])


@pytest.mark.parametrize("part", [VALIDATION, TEST])
def test_oracles_are_blind_exactly_where_they_should_be(small, part):
    user_N, _ = small.split.cases(part)
    had = set(zip(*(a.tolist() for a in small.split.edges(*range(part)))))
    scores = {sees: oracle_scores(small, part, sees) for sees in ORACLES}
    new_I, knowledge_I = small.truth.kind_I != WARM, small.item_slices["knowledge"]
    for sees, score_NI in scores.items():
        assert score_NI.shape == (len(user_N), small.split.interactions.n_items)
        assert {(int(user_N[n]), int(i)) for n, i in zip(*np.nonzero(np.isneginf(score_NI)))} == had, sees
        np.testing.assert_allclose(np.exp(score_NI.astype(np.float64)).sum(axis=1), 1, rtol=1e-5)
    for n, user in enumerate(user_N.tolist()):
        for i in np.flatnonzero(small.item_slices["twins"]):
            sibling = small.twin_of_I[i]
            if (user, i) not in had and (user, sibling) not in had:
                assert scores["text"][n, i] == scores["text"][n, sibling]
                assert scores["both"][n, i] != scores["both"][n, sibling]
        unseen_I = np.array([(user, i) not in had for i in range(len(new_I))])
        assert len(set(scores["interactions"][n, new_I & unseen_I])) == 1
        assert len(set(scores["text_without_corpus"][n, knowledge_I & unseen_I])) == 1
        assert len(set(scores["both"][n, knowledge_I & unseen_I])) > 1


def test_ceilings_show_the_claim(table):
    # text cannot tell twins; interactions cannot rank cold items; without the corpus nobody ranks knowledge items
    blind = [(oracle, "twins", "pair") for oracle in ("text", "text_without_corpus")]
    blind += [("interactions", "cold", "cold20"), ("interactions", "knowledge", "knowledge20")]
    for key in (*blind, ("text_without_corpus", "knowledge", "knowledge20")):
        assert (table[key]["hr@1"], table[key]["auc"]) == (0, 0.5)
    # what sees both does all of it
    assert table["both", "twins", "pair"]["hr@1"] == table["interactions", "twins", "pair"]["hr@1"]
    assert abs(table["both", "twins", "pair"]["hr@1"] - 0.92) < 0.03
    for name, protocol in (("cold", "cold20"), ("knowledge", "knowledge20")):
        assert table["both", name, protocol]["hr@1"] == table["text", name, protocol]["hr@1"] > 0.5
        assert table["both", name, protocol]["auc"] > 0.9
    assert table["text_without_corpus", "cold", "cold20"]["hr@1"] > 0.45
    # and is ahead of each half overall
    both, text, interactions = (table[o, "all", "cand20"]["hr@1"] for o in ("both", "text", "interactions"))
    assert both > text + 0.03
    assert both > interactions + 0.15
    assert table["both", "twins", "cand20"]["hr@1"] > table["text", "twins", "cand20"]["hr@1"] + 0.05
    assert table["both", "cold", "cand20"]["hr@1"] > table["interactions", "cold", "cand20"]["hr@1"] + 0.4


def test_slice_candidates_are_valid_and_cover_their_cases(world):
    for part in (VALIDATION, TEST):
        user_N, item_N = world.split.cases(part)
        made = slice_candidates(world, part, seed=3)
        assert {name: c.name for name, c in made.items()} == {n: n for n in ("pair", "cold20", "knowledge20")}
        for candidates in made.values():
            check_candidates(world.split, candidates)
        pair = made["pair"].items_NC
        np.testing.assert_array_equal(world.twin_of_I[pair[:, 0]], pair[:, 1])
        assert 0.7 * world.item_slices["twins"][item_N].sum() < len(pair) <= world.item_slices["twins"][item_N].sum()
        for name, kind in (("cold20", COLD), ("knowledge20", KNOWLEDGE)):
            items_NC = made[name].items_NC
            chosen_N = world.truth.kind_I[item_N] == kind
            assert items_NC.shape == (chosen_N.sum(), 20)
            np.testing.assert_array_equal(made[name].user_N, user_N[chosen_N])
            np.testing.assert_array_equal(items_NC[:, 0], item_N[chosen_N])
            assert (world.truth.kind_I[items_NC] == kind).all()
            assert (world.truth.part_I[items_NC] == part).all()
        again, other = slice_candidates(world, part, seed=3), slice_candidates(world, part, seed=4)
        assert again["cold20"].sha256 == made["cold20"].sha256 != other["cold20"].sha256


def test_interactions_teach_groups_and_tastes_and_nothing_on_new_items(world):
    """A plain spectral model of the training matrix stands for what a LightGCN can learn."""
    user, item = world.split.edges(TRAIN)
    shape = (world.split.interactions.n_users, world.split.interactions.n_items)
    matrix = scipy.sparse.csr_matrix((np.ones(len(user)), (user, item)), shape)
    scale = [np.maximum(np.asarray(matrix.sum(axis=axis)).ravel(), 1) ** -0.5 for axis in (1, 0)]
    matrix = scipy.sparse.diags(scale[0]) @ matrix @ scipy.sparse.diags(scale[1])
    basis = scipy.sparse.linalg.svds(matrix, k=16, v0=np.ones(shape[1]))[2].T
    score_UI = (matrix @ basis) @ basis.T

    def auc(candidates):
        score_NC = score_UI[candidates.user_N[:, None], candidates.items_NC].round(9)
        target_N, other_NC = score_NC[:, :1], score_NC[:, 1:]
        return ((target_N > other_NC) + 0.5 * (target_N == other_NC)).mean()

    made = slice_candidates(world, TEST, seed=0)
    assert auc(made["pair"]) > 0.75
    assert auc(made["cold20"]) == auc(made["knowledge20"]) == 0.5


def test_small_pools_are_padded_and_ceilings_skip_the_padding(small):
    candidates = slice_candidates(small, TEST, seed=0)["cold20"]
    assert ((candidates.items_NC >= 0).sum(axis=1) == 10 // 2).all()  # 5 cold items in test, 15 places left empty
    assert [r["auc"] for r in ceilings(small, TEST, [candidates]) if r["oracle"] == "interactions"] == [0.5, 0.5]


@pytest.mark.parametrize(
    "changes",
    [
        dict(n_users=1),
        dict(n_users=2100, n_sentences=0),  # more than one block of users
        dict(n_groups=3),
        dict(n_categories=14, n_styles=10, n_materials=9, n_synonyms=3),  # past the lists: coined words
        dict(n_singles=2, n_cold=2, n_knowledge=2),
        dict(history=8, min_history=8),
    ],
)
def test_any_size(changes):
    size = SMALL | changes
    world = make_world(seed=1, **size)
    x, truth = world.split.interactions, world.truth
    sizes = {"warm": 2 * size["n_twins"] + size["n_singles"], "twins": 2 * size["n_twins"]}
    sizes |= {"cold": size["n_cold"], "knowledge": size["n_knowledge"]}
    assert {name: int(mask_I.sum()) for name, mask_I in world.item_slices.items()} == sizes
    assert (x.n_users, x.n_items) == (size["n_users"], sum(sizes.values()) - sizes["twins"])
    assert len(world.corpus) == size["n_sentences"]
    assert len(set(zip(x.user_E.tolist(), x.item_E.tolist()))) == len(x)
    for part in (VALIDATION, TEST):
        assert len(world.split.cases(part)[0]) == size["n_users"]
        target_N = world.split.cases(part)[1]
        assert (truth.part_I[target_N[truth.kind_I[target_N] != WARM]] == part).all()
    twin = np.flatnonzero(world.item_slices["twins"])
    assert (truth.group_I[twin] != truth.group_I[world.twin_of_I[twin]]).all()
    words = [word for concepts in truth.words for concept in concepts for word in concept]
    assert len(set(words)) == len(words)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n_users=0), "n_users"),
        (dict(seed=-1), "seed"),
        (dict(loyalty=1.0), "loyalty"),
        (dict(cold_share=0.9, knowledge_share=0.2), "cold_share"),
        (dict(n_twins=1000), "categories × styles × materials"),
        (dict(n_twins=10, history=30), "raise n_twins"),
        (dict(history=5), "history"),
        (dict(n_synonyms=1), "n_synonyms"),
    ],
)
def test_impossible_worlds_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make_world(**(dict(seed=0) | SMALL | changes))


@pytest.mark.parametrize(("part", "sees", "message"), [(TEST, "tea leaves", "sees"), (TRAIN, "both", "VALIDATION")])
def test_unknown_oracles_and_parts_are_refused(small, part, sees, message):
    with pytest.raises(InputError, match=message):
        oracle_scores(small, part, sees)
