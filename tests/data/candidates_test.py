import dataclasses
import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdlm_jax.data.candidates import (
    check_candidates,
    check_independent,
    check_unchanged,
    freeze_candidates,
    load_candidates,
    make_candidates,
    save_candidates,
)
from bdlm_jax.data.interactions import make_interactions
from bdlm_jax.data.splits import TEST, TRAIN, VALIDATION, leave_one_out
from bdlm_jax.types import InputError, LeakError


def make_split(n_users, n_items, length, seed=0):
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(n_users), length)
    item = np.concatenate([rng.choice(n_items, size=length, replace=False) for _ in range(n_users)])
    fields = {i: {"title": str(i)} for i in range(n_items)}
    return leave_one_out(make_interactions(user, item, item_fields=fields, keep_items_without_interactions=True))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(6, 15), st.integers(3, 6), st.integers(1, 12), st.integers(0, 99), st.booleans())
def test_negatives_are_distinct_unseen_and_as_many_as_there_are(n_users, n_items, length, n_negatives, seed, narrow):
    split = make_split(n_users, n_items, length, seed)
    pool = np.arange(0, n_items, 2) if narrow else None
    candidates = make_candidates(split, TEST, n_negatives=n_negatives, seed=seed, name="c", pool=pool)
    assert candidates.items_NC.shape == (n_users, 1 + n_negatives)
    assert np.array_equal(candidates.items_NC[:, 0], split.cases(TEST)[1])
    for user, row in zip(candidates.user_N, candidates.items_NC):
        seen = set(split.interactions.item_E[split.interactions.user_E == user].tolist())
        unseen = set(range(n_items) if pool is None else pool.tolist()) - seen
        drawn = row[1:][row[1:] >= 0].tolist()
        assert len(set(drawn)) == len(drawn) == min(n_negatives, len(unseen))
        assert set(drawn) <= unseen
        assert np.all(row[1 + len(drawn) :] == -1)


def test_every_subset_and_every_order_is_equally_likely():
    n_items, length, n_negatives = 8, 3, 2
    split = make_split(3000, n_items, length)
    candidates = make_candidates(split, TEST, n_negatives=n_negatives, seed=1, name="c")
    indptr, seen = split.histories(0, 1, 2)
    ranks = Counter()
    for user, row in zip(candidates.user_N, candidates.items_NC):
        unseen = sorted(set(range(n_items)) - set(seen[indptr[user] : indptr[user + 1]].tolist()))
        ranks[tuple(unseen.index(item) for item in row[1:])] += 1
    cells = list(itertools.permutations(range(n_items - length), n_negatives))
    expected = 3000 / len(cells)
    chi2 = sum((ranks[cell] - expected) ** 2 / expected for cell in cells)
    assert set(ranks) <= set(cells)
    assert chi2 < 43.8  # 0.999 quantile for 20 - 1 degrees of freedom


def test_the_draw_is_frozen():
    split = make_split(3, 30, 4)

    def sha256(part=TEST, seed=7, name="cand5"):
        return make_candidates(split, part, n_negatives=4, seed=seed, name=name).sha256

    assert sha256() == sha256()
    assert len({sha256(), sha256(seed=8), sha256(name="other"), sha256(VALIDATION)}) == 4
    everything = {i: {} for i in range(20)}
    table = make_interactions([0] * 3, [0, 1, 2], item_fields=everything, keep_items_without_interactions=True)
    drawn = make_candidates(leave_one_out(table), TEST, n_negatives=3, seed=0, name="cand4").items_NC
    digest = hashlib.sha256(b"0\x1dtest\x1dcand4").digest()
    raw = np.random.PCG64(int.from_bytes(digest, "little")).random_raw(6)
    uniform = [int(bits >> np.uint64(11)) * 2.0**-53 for bits in raw]
    picks = []
    for column, last in enumerate((14, 15, 16)):  # 17 unseen items, three draws: Floyd's last values
        pick = int(uniform[column] * (last + 1))
        picks.append(last if pick in picks else pick)
    order = np.argsort(uniform[3:], kind="stable")
    assert drawn[0].tolist() == [2] + [picks[k] + 3 for k in order]


def shared_negatives(one, other):
    """Per case how many negatives two candidate sets of the same users share."""
    assert np.array_equal(one.user_N, other.user_N)
    return np.array([len(set(a[1:]) & set(b[1:])) for a, b in zip(one.items_NC, other.items_NC)])


@pytest.mark.parametrize("other", [(VALIDATION, "cand20", 0), (TEST, "cand20b", 0), (TEST, "cand20", 1)])
def test_parts_protocols_and_seeds_share_the_negatives_that_chance_gives(other):
    n_items, length, n = 200, 5, 19
    split = make_split(400, n_items, length)
    drawn = make_candidates(split, TEST, n_negatives=n, seed=0, name="cand20")
    part, name, seed = other
    shared = shared_negatives(drawn, make_candidates(split, part, n_negatives=n, seed=seed, name=name))
    unseen = n_items - length
    mean, variance = n * n / unseen, n * n / unseen * (1 - n / unseen) * (unseen - n) / (unseen - 1)
    assert abs(shared.mean() - mean) < 5 * (variance / 400) ** 0.5


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(6, 40), st.integers(3, 6), st.integers(1, 12), st.integers(0, 99))
def test_independent_parts_pass_whatever_the_size(n_users, n_items, length, n_negatives, seed):
    split = make_split(n_users, n_items, length, seed)
    made = (make_candidates(split, p, n_negatives=n_negatives, seed=seed, name="c") for p in (VALIDATION, TEST))
    check_independent(split, *made)


@pytest.mark.parametrize("shared_columns", [9, 5])
def test_validation_negatives_at_test_are_refused(shared_columns):
    split = make_split(40, 80, 5)
    validation, test = (make_candidates(split, p, n_negatives=9, seed=0, name="cand10") for p in (VALIDATION, TEST))
    check_independent(split, validation, test)
    items_NC = test.items_NC.copy()
    for row, (target, *negatives) in enumerate(validation.items_NC[:, 1:].tolist()):
        kept = [target, *negatives][:shared_columns]
        items_NC[row, 1:] = (kept + [i for i in test.items_NC[row, 1:] if i not in kept])[:9]
    planted = freeze_candidates("cand10", test.user_N, items_NC)
    check_candidates(split, planted)  # nothing else is wrong with them
    with pytest.raises(LeakError, match="candidates cand10: test shares"):
        check_independent(split, validation, planted)


def test_candidates_that_are_no_more_what_they_were_are_refused():
    split = make_split(4, 20, 5)
    candidates = make_candidates(split, TEST, n_negatives=4, seed=0, name="cand5")
    check_unchanged(candidates, candidates.sha256)
    other = make_candidates(split, TEST, n_negatives=4, seed=1, name="cand5")
    for changed in (other, dataclasses.replace(other, sha256=candidates.sha256)):
        with pytest.raises(LeakError, match="cand5 are not those that this run began with"):
            check_unchanged(changed, candidates.sha256)


@pytest.mark.parametrize(
    ("row", "column", "value", "error", "message"),
    [
        (2, 3, "target", LeakError, "target is among its negatives in 1 of 4 cases, the first at row 2"),
        (1, 2, "trained", LeakError, "a negative is an interaction of its user"),
        (0, 1, "other", LeakError, "a negative stands twice"),
        (0, 0, "trained", InputError, "does not hold out"),
        (0, 1, 20, InputError, "does not have"),
    ],
)
def test_candidates_that_leak_or_are_of_other_data_are_refused(row, column, value, error, message):
    split = make_split(4, 20, 5)
    good = make_candidates(split, TEST, n_negatives=6, seed=0, name="cand7")
    indptr, item = split.histories(TRAIN)
    items_NC = good.items_NC.copy()
    words = {"target": items_NC[row, 0], "other": items_NC[row, 2], "trained": item[indptr[row]]}
    items_NC[row, column] = words.get(value, value)
    with pytest.raises(error, match=message):
        check_candidates(split, dataclasses.replace(good, items_NC=items_NC))


def test_saved_candidates_come_back_and_a_changed_file_does_not(tmp_path):
    split = make_split(4, 20, 5)
    path = tmp_path / "cand5.npz"
    candidates = make_candidates(split, TEST, n_negatives=4, seed=0, name="cand5")
    save_candidates(path, candidates)
    loaded = load_candidates(path)
    assert (loaded.name, loaded.sha256) == ("cand5", candidates.sha256)
    assert np.array_equal(loaded.items_NC, candidates.items_NC)
    assert [entry.name for entry in tmp_path.iterdir()] == ["cand5.npz"]

    changed = candidates.items_NC.copy()
    changed[0, 1] += 1
    save_candidates(path, dataclasses.replace(candidates, items_NC=changed))
    with pytest.raises(InputError, match="hash differs"):
        load_candidates(path)
    np.savez(path, name=np.array("x"), user_N=np.array([{}], object), items_NC=np.zeros((1, 2)), sha256=np.array(""))
    for objects_or_no_zip in (path.read_bytes(), b"PK not a zip"):
        path.write_bytes(objects_or_no_zip)
        with pytest.raises(InputError, match="cannot be read"):
            load_candidates(path)
    with pytest.raises(InputError, match="is not there"):
        load_candidates(tmp_path / "none.npz")


@pytest.mark.parametrize(("asked", "message"), [({"n_negatives": 0}, "is 0"), ({"pool": [99]}, "pool of candidates")])
def test_unusable_requests_are_refused(asked, message):
    with pytest.raises(InputError, match=message):
        make_candidates(make_split(2, 8, 4), TEST, **{"n_negatives": 1, "seed": 0, "name": "c"} | asked)


def test_a_part_without_cases_gives_an_empty_set(tmp_path):
    split = make_split(2, 8, 4)
    short = dataclasses.replace(split, part_E=np.where(split.part_E == VALIDATION, TRAIN, split.part_E))
    empty = make_candidates(short, VALIDATION, n_negatives=3, seed=0, name="c")
    assert (empty.user_N.shape, empty.items_NC.shape) == ((0,), (0, 4))
    save_candidates(tmp_path / "c.npz", empty)
    loaded = load_candidates(tmp_path / "c.npz")
    check_candidates(short, loaded)
    assert loaded.sha256 == empty.sha256
