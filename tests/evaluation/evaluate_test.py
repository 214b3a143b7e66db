import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdlm_jax.data.candidates import make_candidates
from bdlm_jax.data.interactions import make_interactions
from bdlm_jax.data.splits import TEST, TRAIN, VALIDATION, leave_one_out
from bdlm_jax.evaluation import evaluate, scorers
from bdlm_jax.evaluation.evaluate import CandidateScorer, CatalogueScorer, evaluate_candidates, evaluate_full
from bdlm_jax.types import LeakError

N_USERS, N_ITEMS = 23, 17
GENERATOR = np.random.default_rng(1)
SCORES_UI = GENERATOR.integers(0, 6, (N_USERS, N_ITEMS)).astype(np.float32)  # with ties
SCORER = CatalogueScorer(lambda user_B: jnp.asarray(SCORES_UI)[user_B])
PAIRS = [(u, i) for u in range(N_USERS) for i in GENERATOR.permutation(N_ITEMS)[: 3 + u % 7]]
SPLIT = leave_one_out(make_interactions(*zip(*PAIRS), time=range(len(PAIRS))))
USER_N, TARGET_N = SPLIT.cases(TEST)
SEEN = SPLIT.histories(TRAIN, VALIDATION)


def brute_force(user_N, candidates_of):
    """better, equal, others, one case at a time; candidates_of(n) begins with the target."""
    rows = []
    for n, user in enumerate(user_N):
        own, *others = SCORES_UI[user, candidates_of(n)]
        rows.append([sum(s > own for s in others), sum(s == own for s in others), len(others)])
    return np.array(rows).T


@pytest.fixture(scope="module")
def candidates():
    # 14 negatives are more than the longest histories leave unseen: those rows end in -1.
    made = make_candidates(SPLIT, TEST, n_negatives=14, seed=0, name="cand15")
    assert (made.items_NC[:, 1:] < 0).any() and (made.items_NC >= 0)[:, :5].all()
    return made


@pytest.mark.parametrize("chunk", [1, 5, N_USERS, 512])
def test_counts_equal_brute_force_whatever_the_chunk(candidates, chunk):
    counts = evaluate_candidates(SCORER, candidates, chunk=chunk)
    wanted = brute_force(candidates.user_N, lambda n: [i for i in candidates.items_NC[n] if i >= 0])
    np.testing.assert_array_equal([counts.better, counts.equal, counts.others], wanted)
    np.testing.assert_array_equal(counts.target, candidates.items_NC[:, 0])
    assert counts.better.any() and counts.equal.any()

    def unseen(n):
        seen = SEEN[1][SEEN[0][USER_N[n]] : SEEN[0][USER_N[n] + 1]]
        return [TARGET_N[n], *np.setdiff1d(np.arange(N_ITEMS), [TARGET_N[n], *seen])]

    counts = evaluate_full(SCORER, USER_N, TARGET_N, SEEN, chunk=chunk)
    np.testing.assert_array_equal([counts.better, counts.equal, counts.others], brute_force(USER_N, unseen))


def test_catalogue_and_candidate_scorers_are_judged_alike(candidates):
    def score(user_B, items_BC):  # padding gets the best score there is, and must not count
        return jnp.where(items_BC < 0, 1e9, SCORES_UI[user_B[:, None], items_BC])

    one, other = (evaluate_candidates(s, candidates, chunk=4) for s in (SCORER, CandidateScorer(score)))
    for a, b in zip(one, other):
        np.testing.assert_array_equal(a, b)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_full_counts_equal_a_loop_over_cases_with_ties_nans_and_infinities(data):
    """Users with none to several cases in any order, histories with repeats, scores that are no numbers."""
    values = st.sampled_from([-np.inf, -1.0, 0.0, 1.0, np.inf, np.nan])
    scores_UI = np.array(data.draw(st.lists(st.lists(values, min_size=7, max_size=7), min_size=4, max_size=4)))
    histories, cases = [], []
    for user in range(4):
        items = data.draw(st.permutations(range(7)))
        n_seen, n_cases = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 4)))
        histories.append(items[:n_seen] * data.draw(st.integers(1, 2)))
        cases += [(user, item) for item in items[n_seen : n_seen + n_cases]]
    user_N, target_N = np.array(data.draw(st.permutations(cases)), int).reshape(-1, 2).T
    seen = np.cumsum([0, *map(len, histories)]), np.concatenate([[], *histories]).astype(int)
    scored = []

    def score(user_B):
        scored.append(user_B)
        return jnp.asarray(scores_UI, jnp.float32)[user_B]

    counts = evaluate_full(CatalogueScorer(score), user_N, target_N, seen, chunk=data.draw(st.sampled_from([1, 2, 3])))
    wanted = []
    for user, target in zip(user_N, target_N):
        own, row = scores_UI[user, target], np.delete(scores_UI[user], [target, *histories[user]])
        equal, worse = np.sum(row == own), np.sum(row < own)
        wanted.append([len(row) - equal - worse, equal, len(row)])
    np.testing.assert_array_equal(np.array(counts[2:]).T.reshape(-1, 3), np.reshape(wanted, (-1, 3)))
    np.testing.assert_array_equal(counts[:2], [user_N, target_N])
    assert set(np.concatenate([[], *scored])) == set(user_N)


def test_a_user_with_many_cases_is_scored_once():
    """Memory and time follow the users, not their cases."""
    scored = []

    def score(user_B):
        scored.append(len(user_B))
        return jnp.asarray(SCORES_UI)[user_B]

    none = np.zeros(N_USERS + 1, np.int64), np.zeros(0, np.int64)
    user_N, target_N = np.repeat(np.arange(N_USERS), N_ITEMS), np.tile(np.arange(N_ITEMS), N_USERS)
    counts = evaluate_full(CatalogueScorer(score), user_N, target_N, none, chunk=8)
    assert scored == [8, 8, 8]
    wanted = brute_force(user_N, lambda n: [target_N[n], *np.delete(np.arange(N_ITEMS), target_N[n])])
    np.testing.assert_array_equal(counts[2:], wanted)


@pytest.mark.parametrize("case", [0, len(USER_N) - 1])
def test_a_target_in_the_history_is_a_leak(case):
    indptr, item = SEEN[0], SEEN[1].copy()
    item[indptr[USER_N[case]]] = TARGET_N[case]
    with pytest.raises(LeakError, match=f"item {TARGET_N[case]} is to be found for user {USER_N[case]}, "):
        evaluate_full(SCORER, USER_N, TARGET_N, (indptr, item), chunk=4)


def test_a_broken_model_gets_nothing():
    broken = CatalogueScorer(lambda user_B: jnp.full((len(user_B), N_ITEMS), jnp.nan))
    counts = evaluate_full(broken, USER_N, TARGET_N, SEEN)
    np.testing.assert_array_equal(counts.better, counts.others)
    constant = CatalogueScorer(lambda user_B: jnp.zeros((len(user_B), N_ITEMS)))
    counts = evaluate_full(constant, USER_N, TARGET_N, SEEN)
    np.testing.assert_array_equal(counts.equal, counts.others)
    assert evaluate.mean_metric(counts, "hr@1") == 0 and evaluate.mean_metric(counts, "auc") == 0.5


def test_no_cases_no_counts():
    assert all(len(field) == 0 for field in evaluate_full(SCORER, USER_N[:0], TARGET_N[:0], SEEN))


def test_popularity_ranks_by_training_degree():
    degree = SPLIT.degree(TRAIN)
    np.testing.assert_array_equal(scorers.popularity_scorer(degree).score(np.array([3, 0])), np.stack([degree, degree]))


def test_counts_survive_the_disk(tmp_path, candidates):
    counts = {"cand15": evaluate_candidates(SCORER, candidates), "full": evaluate_full(SCORER, USER_N, TARGET_N, SEEN)}
    evaluate.save_counts(tmp_path / "a" / "counts.npz", counts)
    loaded = evaluate.load_counts(tmp_path / "a" / "counts.npz")
    assert list(loaded) == ["cand15", "full"]
    for name in counts:
        for a, b in zip(counts[name], loaded[name]):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["counts.npz"]


def test_result_rows_are_means_over_a_slice_of_the_targets(candidates):
    counts = evaluate_candidates(SCORER, candidates)
    items = np.arange(N_ITEMS)
    rows = evaluate.result_rows("mf", {"cand15": counts}, {"all": items >= 0, "cold": items < 4, "none": items < 0})
    assert {r["slice"] for r in rows} == {"all", "cold"}
    row = next(r for r in rows if (r["slice"], r["metric"]) == ("cold", "mrr/cand15"))
    where = counts.target < 4
    assert row["users"] == where.sum() > 0 and row["model"] == "mf"
    np.testing.assert_allclose(row["value"], np.mean(1 / (1 + counts.better + counts.equal)[where]))
