import jax.numpy as jnp
import numpy as np
import pytest

from bdlm_jax.data import candidates as candidates_lib
from bdlm_jax.data.interactions import make_interactions
from bdlm_jax.data.splits import TEST, TRAIN, VALIDATION, leave_one_out, seen_mask
from bdlm_jax.evaluation.evaluate import (
    CandidateScorer,
    CatalogueScorer,
    evaluate_candidates,
    evaluate_full,
    evaluate_top_k,
    load_counts,
    mean_metric,
    result_rows,
    save_counts,
)
from bdlm_jax.evaluation.scorers import popularity_scorer

N_USERS, N_ITEMS = 23, 17
GENERATOR = np.random.default_rng(1)
SCORES_UI = GENERATOR.integers(0, 6, (N_USERS, N_ITEMS)).astype(np.float32)  # with ties
SCORER = CatalogueScorer(lambda user_B: jnp.asarray(SCORES_UI)[user_B])


def make_split():
    pairs = [(u, i) for u in range(N_USERS) for i in GENERATOR.permutation(N_ITEMS)[: 3 + u % 7]]
    return leave_one_out(make_interactions([u for u, _ in pairs], [i for _, i in pairs], time=range(len(pairs))))


SPLIT = make_split()


def brute_force(user_N, items_of):
    """better, equal, others, one case at a time; items_of(n) begins with the target."""
    rows = []
    for n, user in enumerate(user_N):
        target, *others = items_of(n)
        own = SCORES_UI[user, target]
        rows.append(
            [sum(SCORES_UI[user, i] > own for i in others), sum(SCORES_UI[user, i] == own for i in others), len(others)]
        )
    return np.array(rows).T


@pytest.fixture(scope="module")
def candidates():
    # 14 negatives are more than the longest histories leave unseen: those rows end in -1.
    made = candidates_lib.make_candidates(SPLIT, TEST, n_negatives=14, seed=0, name="cand15")
    assert (made.items_NC[:, 1:] < 0).any() and (made.items_NC >= 0)[:, :5].all()
    return made


@pytest.mark.parametrize("chunk", [1, 5, N_USERS, 512])
def test_candidates_equal_brute_force_whatever_the_chunk(candidates, chunk):
    counts = evaluate_candidates(SCORER, candidates, chunk=chunk)
    wanted = brute_force(candidates.user_N, lambda n: [i for i in candidates.items_NC[n] if i >= 0])
    np.testing.assert_array_equal([counts.better, counts.equal, counts.others], wanted)
    np.testing.assert_array_equal(counts.target, candidates.items_NC[:, 0])
    assert counts.better.any() and counts.equal.any()


def test_catalogue_and_candidate_scorers_are_judged_alike(candidates):
    # Padding gets the best score there is, and must not count.
    score = lambda user_B, items_BC: jnp.where(items_BC < 0, 1e9, SCORES_UI[user_B[:, None], items_BC])  # noqa: E731
    one, other = (evaluate_candidates(s, candidates, chunk=4) for s in (SCORER, CandidateScorer(score)))
    for a, b in zip(one, other):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("chunk", [1, 5, 512])
def test_full_equals_brute_force_whatever_the_chunk(chunk):
    user_N, item_N = SPLIT.cases(TEST)
    seen = SPLIT.histories(TRAIN, VALIDATION)
    histories = [set(seen[1][seen[0][u] : seen[0][u + 1]].tolist()) for u in range(N_USERS)]
    counts = evaluate_full(SCORER, user_N, item_N, seen, chunk=chunk)
    wanted = brute_force(
        user_N, lambda n: [item_N[n], *(i for i in range(N_ITEMS) if i != item_N[n] and i not in histories[user_N[n]])]
    )
    np.testing.assert_array_equal([counts.better, counts.equal, counts.others], wanted)


def test_a_broken_model_gets_nothing():
    user_N, item_N = SPLIT.cases(TEST)
    broken = CatalogueScorer(lambda user_B: jnp.full((len(user_B), N_ITEMS), jnp.nan))
    counts = evaluate_full(broken, user_N, item_N, SPLIT.histories(TRAIN, VALIDATION))
    np.testing.assert_array_equal(counts.better, counts.others)
    constant = CatalogueScorer(lambda user_B: jnp.zeros((len(user_B), N_ITEMS)))
    counts = evaluate_full(constant, user_N, item_N, SPLIT.histories(TRAIN, VALIDATION))
    np.testing.assert_array_equal(counts.equal, counts.others)
    assert mean_metric(counts, "hr@1") == 0 and mean_metric(counts, "auc") == 0.5


def test_no_cases_no_counts():
    none = np.zeros(0, np.int32)
    counts = evaluate_full(SCORER, none, none, SPLIT.histories(TRAIN))
    assert all(len(field) == 0 for field in counts)


def test_seen_mask_by_hand():
    indptr, item = np.array([0, 2, 2, 3]), np.array([3, 0, 1])
    mask = seen_mask((indptr, item), np.array([2, 0, 1, 0]), 4)
    assert mask.tolist() == [
        [False, True, False, False],
        [True, False, False, True],
        [False] * 4,
        [True, False, False, True],
    ]


def test_top_k_leaves_out_what_is_known():
    values = evaluate_top_k(SCORER, SPLIT, TEST, TRAIN, VALIDATION, k=3, chunk=4)
    user_N, item_N = SPLIT.cases(TEST)
    indptr, item = SPLIT.histories(TRAIN, VALIDATION)
    for n, (user, target) in enumerate(zip(user_N, item_N)):
        scores = SCORES_UI[user].copy()
        scores[item[indptr[user] : indptr[user + 1]]] = -np.inf
        top = np.argsort(-scores, kind="stable")[:3]
        assert values["hr@3"][n] == (target in top)
    assert 0 < values["hr@3"].mean() < 1


def test_popularity_ranks_by_training_degree():
    degree = SPLIT.degree(TRAIN)
    np.testing.assert_array_equal(popularity_scorer(degree).score(np.array([3, 0])), np.stack([degree, degree]))


def test_counts_survive_the_disk(tmp_path, candidates):
    counts = {"cand15": evaluate_candidates(SCORER, candidates)}
    user_N, item_N = SPLIT.cases(TEST)
    counts["full"] = evaluate_full(SCORER, user_N, item_N, SPLIT.histories(TRAIN, VALIDATION))
    save_counts(tmp_path / "a" / "counts.npz", counts)
    loaded = load_counts(tmp_path / "a" / "counts.npz")
    assert list(loaded) == ["cand15", "full"]
    for name in counts:
        for a, b in zip(counts[name], loaded[name]):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["counts.npz"]


def test_result_rows_are_means_over_a_slice_of_the_targets(candidates):
    counts = evaluate_candidates(SCORER, candidates)
    cold = np.arange(N_ITEMS) < 4
    rows = result_rows("mf", {"cand15": counts}, {"all": np.ones(N_ITEMS, bool), "cold": cold})
    row = next(r for r in rows if (r["slice"], r["metric"]) == ("cold", "mrr/cand15"))
    where = counts.target < 4
    assert row["users"] == where.sum() > 0 and row["model"] == "mf"
    np.testing.assert_allclose(row["value"], np.mean(1 / (1 + counts.better + counts.equal)[where]))
