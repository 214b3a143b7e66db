import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdlm_jax.data.interactions import make_interactions
from bdlm_jax.data.splits import (
    PART_NAMES,
    TEST,
    TRAIN,
    VALIDATION,
    Split,
    check_cold_items,
    check_training_edges,
    cold_items,
    draw_cold_items,
    from_parts,
    global_time,
    leave_one_out,
    ratio,
)
from bdlm_jax.types import InputError, LeakError

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def table(lengths, seed=0):
    """Users with these many interactions, shuffled rows, times with ties."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(len(lengths)), lengths)
    item = np.concatenate([rng.choice(12, size=n, replace=False) for n in lengths])
    order = rng.permutation(len(user))
    return make_interactions(user[order], item[order], time=rng.integers(0, 8, len(user)))


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(0, 3))
def test_leave_one_out_holds_out_the_last_two_of_long_enough_users(lengths, min_history):
    x = table(lengths)
    if max(lengths) < min_history + 2:
        with pytest.raises(InputError, match="no user has"):
            leave_one_out(x, min_history=min_history)
        return
    split = leave_one_out(x, min_history=min_history)
    for user, length in enumerate(lengths):
        held = [TRAIN] * (length - 2) + [VALIDATION, TEST] if length >= min_history + 2 else [TRAIN] * length
        assert split.part_E[x.user_E == user].tolist() == held


def test_views_of_a_split_by_hand():
    x = make_interactions([0, 0, 0, 0, 1, 1], [2, 0, 3, 1, 0, 3], time=[1, 2, 3, 4, 1, 2])
    split = leave_one_out(x)
    assert split.counts() == {"train": 4, "validation": 1, "test": 1}
    indptr, item = split.histories(TRAIN, VALIDATION)
    assert (indptr.tolist(), item.tolist()) == ([0, 3, 5], [2, 0, 3, 0, 3])
    assert [part.tolist() for part in split.cases(TEST)] == [[0], [1]]
    assert [part.tolist() for part in split.cases(VALIDATION)] == [[0], [3]]
    assert split.degree(TRAIN).tolist() == [2, 0, 1, 1]
    assert split.degree(TRAIN, VALIDATION, TEST).tolist() == [2, 1, 1, 2]


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.sampled_from([0.0, 0.1, 0.3]), st.sampled_from([0.1, 0.25, 0.5]))
def test_global_time_never_lets_a_later_row_train_for_an_earlier_one(lengths, validation, test):
    x = table(lengths)
    try:
        split = global_time(x, validation=validation, test=test)
    except InputError as error:
        assert "all rows share" in str(error)
        return
    times = [x.time_E[split.part_E == part] for part in (TRAIN, VALIDATION, TEST) if np.any(split.part_E == part)]
    assert all(early.max() < late.min() for early, late in itertools.pairwise(times))
    assert np.sum(split.part_E == TEST) >= int(len(x) * test + 1e-9)


def test_global_time_by_hand_keeps_a_moment_together():
    x = make_interactions(range(10), [0] * 10, time=[0, 1, 2, 3, 4, 5, 6, 7, 7, 7])
    split = global_time(x, validation=0.2, test=0.1)
    assert split.part_E.tolist() == [TRAIN] * 7 + [TEST] * 3
    split = global_time(x, validation=0.2, test=0.3)
    assert split.part_E.tolist() == [TRAIN] * 5 + [VALIDATION] * 2 + [TEST] * 3


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(0, 99))
def test_ratio_takes_the_rounded_down_fraction_of_each_user(lengths, seed):
    x = table(lengths)
    split = ratio(x, validation=0.1, test=0.3, seed=seed)
    for user, length in enumerate(lengths):
        part = split.part_E[x.user_E == user]
        assert np.sum(part == TEST) == 3 * length // 10
        assert np.sum(part == VALIDATION) == length // 10
    assert np.array_equal(split.part_E, ratio(x, validation=0.1, test=0.3, seed=seed).part_E)


def test_ratio_is_uniform_over_positions_and_moves_with_the_seed():
    x = table([10])
    tested = np.mean([ratio(x, validation=0.1, test=0.3, seed=seed).part_E == TEST for seed in range(400)], axis=0)
    assert np.all(np.abs(tested - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 400))


def split_by(function, *fractions, **options):
    return lambda x: function(x, **dict(zip(("validation", "test"), fractions)), **options)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=3, max_size=12), st.floats(0.2, 0.8), st.integers(0, 99))
def test_cold_items_are_out_of_training_and_the_rest_is_left_one_out(lengths, share, seed):
    x = table(lengths)
    try:
        split, part_I = cold_items(x, share=share, seed=seed), draw_cold_items(x, share=share, seed=seed)
    except InputError as error:
        assert "makes no cold item" in str(error) or "no user has 3 interactions" in str(error)
        return
    drawn = [np.flatnonzero(part_I == part) for part in (VALIDATION, TEST)]
    assert len(drawn[0]) <= len(drawn[1]) <= len(drawn[0]) + 1
    assert len(drawn[0]) + len(drawn[1]) == int(share * x.n_items + 1e-9)
    check_cold_items(split, part_I)
    for part, items in zip((VALIDATION, TEST), drawn):
        assert (split.part_E[np.isin(x.item_E, items)] == part).all()
        assert not split.degree(*range(part))[items].any()
    for user in range(x.n_users):  # what is left of each is as if the others had never been
        left = split.part_E[(x.user_E == user) & (part_I[x.item_E] == TRAIN)]
        held = [VALIDATION, TEST] if len(left) > 2 else []
        assert left.tolist() == [TRAIN] * (len(left) - len(held)) + held
    assert np.array_equal(split.part_E, cold_items(x, share=share, seed=seed).part_E)


def test_every_item_is_as_often_cold_and_another_seed_draws_others():
    x = make_interactions([0] * 10 + [1] * 3, [*range(10), 0, 1, 2])
    cold = np.mean([draw_cold_items(x, share=0.4, seed=seed) > TRAIN for seed in range(400)], axis=0)
    assert np.all(np.abs(cold - 0.4) < 5 * np.sqrt(0.4 * 0.6 / 400))


def test_items_without_interactions_are_not_drawn():
    fields = {item: {"title": "t"} for item in range(100)}
    x = make_interactions([0] * 6, range(6), item_fields=fields, keep_items_without_interactions=True)
    assert set(np.flatnonzero(draw_cold_items(x, share=0.9, seed=3))) < set(range(6))


@pytest.mark.parametrize(("part", "earlier"), [(VALIDATION, TRAIN), (TEST, TRAIN), (TEST, VALIDATION)])
def test_one_early_interaction_of_a_cold_item_is_caught(part, earlier):
    x = table([9] * 6)
    split, part_I = cold_items(x, share=0.5, seed=1), draw_cold_items(x, share=0.5, seed=1)
    part_E = split.part_E.copy()
    row = np.flatnonzero(part_I[x.item_E] == part)[0]
    part_E[row] = earlier
    label = f"1 items that are cold in the {PART_NAMES[part]} part .* item {x.item_E[row]}"
    with pytest.raises(LeakError, match=label):
        check_cold_items(Split(x, part_E), part_I)


FRACTIONS = [(0.5, 0.5), (-0.1, 0.3), (0.0, 0.0), (0.2, 1.0)]
REFUSED = [
    *((split_by(ratio, *fractions, seed=0), "fractions whose sum") for fractions in FRACTIONS),
    *((split_by(global_time, *fractions), "fractions whose sum") for fractions in FRACTIONS),
    (split_by(global_time, 0.1, 0.1), "needs timestamps"),
    (split_by(leave_one_out, min_history=-1), "min_history is -1"),
    (lambda x: cold_items(x, share=0.5, seed=0), "a share of 0.5 of 3 items makes no cold item for each part"),
    (lambda x: leave_one_out(x).edges(), "name at least one"),
    (lambda x: Split(x, np.zeros(2)), "one part"),
    (lambda x: from_parts(([1, 1], [4, 5]), ([1, 1], [6, 5])), "test part, row 1: .* is also in the train part"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_cannot_be_split_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make(make_interactions([0, 0, 0], [0, 1, 2]))


def test_from_parts_keeps_the_published_parts_and_drops_repeats_inside_one():
    split = from_parts(([5, 5, 3, 5], [1, 2, 1, 1]), ([3, 5, 5], [9, 7, 8]), validation=([3], [2]))
    x = split.interactions
    assert [(x.user_ids[u], x.item_ids[i], int(p)) for u, i, p in zip(x.user_E, x.item_E, split.part_E)] == [
        ("3", "1", TRAIN), ("3", "2", VALIDATION), ("3", "9", TEST),
        ("5", "1", TRAIN), ("5", "2", TRAIN), ("5", "7", TEST), ("5", "8", TEST),
    ]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(4, 9), min_size=2, max_size=6), st.integers(0, 10**6))
def test_a_single_held_out_edge_is_caught(lengths, pick):
    split = leave_one_out(table(lengths))
    user, item = split.edges(TRAIN)
    check_training_edges(split, user, item)
    held_user, held_item = split.edges(VALIDATION, TEST)
    row = pick % len(held_user)
    with pytest.raises(LeakError, match=f"the first at row {len(user)}: user {held_user[row]}, item {held_item[row]}"):
        check_training_edges(split, np.append(user, held_user[row]), np.append(item, held_item[row]))


def test_validation_edges_are_allowed_only_when_the_test_is_predicted():
    split = leave_one_out(table([5, 6]))
    user, item = split.edges(TRAIN, VALIDATION)
    check_training_edges(split, user, item, allowed=(TRAIN, VALIDATION))
    with pytest.raises(LeakError, match="2 of 9 edges are validation or test"):
        check_training_edges(split, user, item)
    again = leave_one_out(make_interactions([0] * 4, [1, 2, 3, 1], time=[1, 2, 3, 4], duplicates="keep"))
    check_training_edges(again, *again.edges(TRAIN))  # a held-out pair that is training too is no leak
