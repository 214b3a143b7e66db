from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdlm_jax.data.interactions import filter_rating, k_core, make_interactions
from bdlm_jax.types import InputError

ROWS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 8), st.integers(0, 30), st.integers(1, 5)), min_size=1, max_size=60
)


def build(rows, **options):
    user, item, time, rating = map(list, zip(*rows))
    return make_interactions(user, item, time=time, rating=rating, **options)


def raw_rows(x):
    return [(int(x.user_ids[u]), int(x.item_ids[i]), int(t)) for u, i, t in zip(x.user_E, x.item_E, x.time_E)]


def test_rows_are_sorted_by_user_then_time_then_order_in_the_file():
    x = make_interactions(["b", "a", "b", "b"], ["x", "y", "z", "w"], time=[5, 9, 5, 1])
    assert x.user_ids.tolist() == ["a", "b"]
    assert x.item_ids[x.item_E].tolist() == ["y", "w", "x", "z"]
    assert x.time_E.tolist() == [9, 1, 5, 5]
    assert (x.user_E.dtype, x.item_E.dtype, x.time_E.dtype) == (np.int32, np.int32, np.int64)


def test_ids_are_numbered_by_value_when_all_are_numbers_and_as_text_otherwise():
    for raw, ids in [
        ([10, 9, -1], ["-1", "9", "10"]), (["10", "9"], ["9", "10"]), (["10", "9", "x"], ["10", "9", "x"]),
        (["010", "9"], ["010", "9"]), ([10, "10", 9.0], ["9", "10"]), (["--5", "9"], ["--5", "9"]),
    ]:  # fmt: skip
        assert make_interactions(raw, range(len(raw))).user_ids.tolist() == ids


@settings(max_examples=60, deadline=None)
@given(ROWS, st.randoms(use_true_random=False))
def test_the_table_does_not_depend_on_the_order_of_rows_with_distinct_times(rows, random):
    rows = [(u, i, k, r) for k, (u, i, _, r) in enumerate(rows)]
    shuffled = random.sample(rows, len(rows))
    assert build(rows).fingerprint() == build(shuffled).fingerprint()


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_duplicates_follow_their_rule(rows):
    in_time = sorted(enumerate(rows), key=lambda entry: (entry[1][0], entry[1][2], entry[0]))
    ordered = [row[:3] for _, row in in_time]
    first = [row for k, row in enumerate(ordered) if row[:2] not in [r[:2] for r in ordered[:k]]]
    last = [row for k, row in enumerate(ordered) if row[:2] not in [r[:2] for r in ordered[k + 1 :]]]
    assert raw_rows(build(rows)) == first
    assert raw_rows(build(rows, duplicates="last")) == last
    assert raw_rows(build(rows, duplicates="keep")) == ordered
    if len(first) < len(rows):
        with pytest.raises(InputError, match="stands in the table before"):
            build(rows, duplicates="error")


def test_rows_follow_their_times_or_the_order_of_the_file():
    x = make_interactions([1, 1, 1], [3, 1, 2])
    assert (x.item_ids[x.item_E].tolist(), x.time_kind) == (["3", "1", "2"], "order")
    y = make_interactions([1, 1, 1], [3, 1, 2], order=[2, 0, 1])
    assert (y.item_ids[y.item_E].tolist(), y.time_kind) == (["1", "2", "3"], "order")
    assert make_interactions([1], [1], time=[7]).time_kind == "timestamp"
    times = [1700000000123456789, 1700000000123456788]
    for long in (times, list(map(str, times))):  # every digit stays
        assert make_interactions([1, 1], [1, 2], time=long).time_E.tolist() == sorted(times)


PAIRS = {"user": [1, 2], "item": [1, 2]}
REFUSED = [
    ({"user": [], "item": []}, "no rows"),
    ({"user": [1, None]}, "row 1: field 'user' is empty"),
    ({"user": [1.5, 2]}, "row 0: field 'user' is empty or not an id"),
    ({"item": [float("nan"), 2]}, "row 0: field 'item' is empty"),
    ({"item": ["a", ""]}, "row 1: field 'item' is empty"),
    ({"item": [1]}, "field 'item' has 1 rows"),
    ({"user": None}, "'user' and 'item' are both needed"),
    ({"time": [3, -1]}, "row 1: field 'time' is -1"),
    ({"time": [3, 1.5]}, "row 1: field 'time' is 1.5"),
    ({"time": [float("nan"), 1]}, "row 0: field 'time' is nan"),
    ({"time": ["4", "x"]}, "row 1: field 'time' is 'x'"),
    ({"time": [1]}, "field 'time' has 1 rows"),
    ({"order": [1, 2], "time": [1, 2]}, "both given"),
    ({"rating": [1, float("inf")]}, "row 1: field 'rating' is inf"),
    ({"duplicates": "some"}, "duplicates is 'some'"),
]


@pytest.mark.parametrize(("columns", "message"), REFUSED)
def test_bad_columns_are_named(columns, message):
    with pytest.raises(InputError, match=message):
        make_interactions(**PAIRS | columns)


def test_fields_follow_the_ids_and_title_is_always_there():
    fields = {20: {"title": "Twenty", "genre": "drama"}, "3": {"genre": "war"}, 99: {"title": "Cold"}}
    x = make_interactions([1, 1], [20, 3], item_fields=fields, user_fields={1: {"age": "25-34", "job": "writer"}})
    assert x.item_ids.tolist() == ["3", "20"]
    assert x.item_fields["title"].tolist() == ["", "Twenty"]
    assert x.item_text(("title", "genre")) == ["war", "Twenty; drama"]
    assert x.user_text(("age", "job")) == ["25-34; writer"]
    assert make_interactions([1], [2]).item_text() == [""]
    with pytest.raises(InputError, match="item field 'plot' is not in this data; choose among: genre, title"):
        x.item_text(("plot",))
    cold = make_interactions([1, 1], [20, 3], item_fields=fields, keep_items_without_interactions=True)
    assert cold.item_ids.tolist() == ["3", "20", "99"]
    assert cold.item_text() == ["", "Twenty", "Cold"]
    assert cold.item_ids[cold.item_E].tolist() == ["20", "3"]


def test_categoricals_are_read_by_their_codes_and_arrays_cannot_be_written():
    x = make_interactions(pd.Categorical(["b", "a", "b"]), pd.Categorical([7, 5, 6]))
    assert x.fingerprint() == make_interactions(["b", "a", "b"], [7, 5, 6]).fingerprint()
    with pytest.raises(ValueError, match="read-only"):
        x.user_E[0] = 3


def test_fingerprint_counts_and_sees_every_part():
    def fingerprint(user=(1, 2), item=(7, 8), time=(1, 2), rating=(4.0, 5.0), title="A"):
        fields = {7: {"title": title}}
        return make_interactions(user, item, time=time, rating=rating, item_fields=fields).fingerprint()

    assert fingerprint() == {"users": 2, "items": 2, "interactions": 2, "sha256": fingerprint()["sha256"]}
    changes = [{"user": (1, 3)}, {"item": (8, 7)}, {"time": (1, 3)}, {"rating": (4.0, 4.0)}, {"rating": None}]
    prints = [fingerprint(), fingerprint(title="B"), *(fingerprint(**change) for change in changes)]
    assert len({entry["sha256"] for entry in prints}) == len(prints)


def naive_core(pairs, user, item):
    while True:
        users, items = Counter(u for u, _ in pairs), Counter(i for _, i in pairs)
        keep = {(u, i) for u, i in pairs if users[u] >= user and items[i] >= item}
        if keep == pairs:
            return keep
        pairs = keep


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 3), st.integers(1, 3))
def test_k_core_equals_the_naive_iteration_and_keeps_fields(rows, user, item):
    fields = {i: {"title": f"item {i}"} for i in range(9)}
    x = build(rows, item_fields=fields)
    expected = naive_core({row[:2] for row in raw_rows(x)}, user, item)
    if not expected:
        with pytest.raises(InputError, match="no interaction is left"):
            k_core(x, user=user, item=item)
        return
    core = k_core(x, user=user, item=item)
    assert {row[:2] for row in raw_rows(core)} == expected
    assert raw_rows(core) == [row for row in raw_rows(x) if row[:2] in expected]
    assert set(core.item_ids) == {str(i) for _, i in expected}
    assert core.item_text() == [f"item {i}" for i in core.item_ids]


def test_filter_rating_drops_rows_and_what_they_leave_empty():
    cold = {"item_fields": {5: {"title": "never seen"}}, "keep_items_without_interactions": True}
    x = make_interactions([1, 1, 2], [1, 2, 3], rating=[5, 2, 1], **cold)
    y = filter_rating(x, minimum=2)
    assert (y.user_ids.tolist(), y.item_ids.tolist()) == (["1"], ["1", "2", "5"])
    assert y.rating_E.tolist() == [5, 2]
    with pytest.raises(InputError, match="rating of 6 or more"):
        filter_rating(x, minimum=6)
    with pytest.raises(InputError, match="needs the field 'rating'"):
        filter_rating(make_interactions([1], [1]), minimum=2)
