import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdlm_jax.lm.packing import FIELDS, concatenate, pack
from bdlm_jax.lm.prompts import Prompt
from bdlm_jax.types import InputError


def _prompt(tokens, *, items=(), texts=(), user=(-1, -1), item=(-1, -1)):
    """A prompt from plain lists; items, texts: (position, target); user, item: (position, number)."""
    item_targets, text_targets = np.full((2, len(tokens)), -1)
    for targets, pairs in ((item_targets, items), (text_targets, texts)):
        for at, value in pairs:
            targets[at] = value
    return Prompt(np.asarray(tokens, np.int32), item_targets, text_targets, user[1], user[0], item[1], item[0])


def test_first_fit_by_hand():
    prompts = [
        _prompt([11, 12, 13], items=[(0, 5), (2, 6)], user=(2, 4)),
        _prompt([21, 22, 23, 24], texts=[(1, 23)], item=(3, 9)),
        _prompt([31, 32], items=[(1, 7)], texts=[(0, 32)]),
    ]
    packed = pack(prompts, 5, pad=99)
    assert packed.tokens.tolist() == [[11, 12, 13, 31, 32], [21, 22, 23, 24, 99]]
    assert packed.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert packed.segments.tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]]
    assert packed.item_index.tolist() == [[0, 2, 4], [0, 0, 0]]
    assert packed.item_target.tolist() == [[5, 6, 7], [-1, -1, -1]]
    assert packed.text_index.tolist() == [[3], [1]] and packed.text_target.tolist() == [[32], [23]]
    assert packed.user_index.tolist() == [[2], [0]] and packed.user.tolist() == [[4], [-1]]
    assert packed.card_index.tolist() == [[0], [3]] and packed.card_item.tolist() == [[-1], [9]]


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 10), min_size=1, max_size=30), seed=st.integers(0, 9))
def test_every_prompt_lies_in_its_row_whole_with_its_targets(sizes, seed):
    generator = np.random.default_rng(seed)
    prompts = []
    for size in sizes:
        at = np.flatnonzero(generator.random(size) < 0.5)
        pairs = [(int(a), int(generator.integers(100))) for a in at]
        tokens = 10 * len(prompts) + np.arange(1, size + 1)  # no two alike: a token says where its prompt lies
        prompts.append(_prompt(tokens, items=pairs, user=(size - 1, 7)))
    packed = pack(prompts, 10)
    assert (packed.segments > 0).sum() == sum(sizes)
    expected, rows = [], []
    for prompt in prompts:
        [(row, start)] = np.argwhere(packed.tokens == prompt.tokens[0])
        stop = start + len(prompt.tokens)
        rows.append(row)
        np.testing.assert_array_equal(packed.tokens[row, start:stop], prompt.tokens)
        np.testing.assert_array_equal(packed.positions[row, start:stop], np.arange(len(prompt.tokens)))
        assert len(set(packed.segments[row, start:stop])) == 1
        expected += [(row, start + at, prompt.item_targets[at]) for at in np.flatnonzero(prompt.item_targets >= 0)]
        assert start + prompt.user_at in packed.user_index[row]
    found = [(r, packed.item_index[r, t], packed.item_target[r, t]) for r, t in np.argwhere(packed.item_target >= 0)]
    assert sorted(expected) == sorted(found)
    # First fit: no earlier row had room for a prompt when it came.
    free = np.full(len(packed), 10)
    for row, size in zip(rows, sizes):
        assert row == np.flatnonzero(free >= size)[0]
        free[row] -= size


@pytest.fixture(scope="module")
def seven():
    """Seven rows of one prompt each, with the user token 100 + n in front."""
    texts = [[(t, 10 * n + t) for t in range(n % 4 + 1)] for n in range(7)]
    return pack([_prompt([100 + n, 1, 2, 3, 4], texts=texts[n]) for n in range(7)], 5)


@settings(max_examples=40, deadline=None)
@given(batch_size=st.integers(1, 20), seed=st.integers(0, 3))
def test_batches_walk_the_permutations_without_a_gap(seven, batch_size, seed):
    n_steps = 3 * seven.n_steps(batch_size)
    stream = np.concatenate([seven.batch(s, batch_size=batch_size, seed=seed)["row"] for s in range(n_steps)])
    for epoch in range(len(stream) // 7):
        assert sorted(stream[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert n_steps * batch_size >= 3 * 7


def test_a_batch_is_a_function_of_step_and_seed(seven):
    user = dict(uid_dropout=0.5, user_tokens=range(100, 107), unnamed_user=9)
    first, later, again = (seven.batch(s, batch_size=4, seed=5, max_text_targets=2, **user) for s in (0, 11, 11))
    plain = seven.batch(11, batch_size=4, seed=5)
    assert set(later) == {"row", *FIELDS}
    for name in later:
        np.testing.assert_array_equal(later[name], again[name])
        assert later[name].dtype == np.int32 and later[name].shape == first[name].shape
    np.testing.assert_array_equal(plain["row"], later["row"])
    for name in FIELDS:
        np.testing.assert_array_equal(plain[name], getattr(seven, name)[plain["row"]])
    streams = [[seven.batch(s, batch_size=7, seed=seed)["row"].tolist() for s in range(2)] for seed in (0, 1)]
    assert streams[0] != streams[1] and streams[0][0] != streams[0][1]


def test_text_targets_are_capped_by_a_uniform_subset(seven):
    count, n_steps = np.zeros(4), 600
    for step in range(n_steps):
        batch = seven.batch(step, batch_size=7, seed=1, max_text_targets=2)
        assert batch["text_target"].shape == (7, 2)
        for row, index, target in zip(batch["row"], batch["text_index"], batch["text_target"]):
            n_all = row % 4 + 1
            assert (target >= 0).sum() == min(2, n_all)
            assert all(t == 10 * row + i for i, t in zip(index, target) if t >= 0)
            if row == 3:
                count[index[target >= 0]] += 1
    # Row 3 has four targets of which two are kept: each with probability 1/2.
    assert np.abs(count - n_steps / 2).max() < 5 * np.sqrt(n_steps * 0.5 * 0.5)


def test_uid_dropout_replaces_user_tokens_by_segment_and_nothing_else():
    prompts = [_prompt([100 + n % 5, 1, 2, 100 + n % 5]) for n in range(400)]
    packed = pack(prompts, 8)
    batch = packed.batch(0, batch_size=200, seed=3, uid_dropout=0.25, user_tokens=range(100, 105), unnamed_user=9)
    before, after = packed.tokens[batch["row"]].reshape(-1, 4), batch["tokens"].reshape(-1, 4)
    np.testing.assert_array_equal(before[:, 1:3], after[:, 1:3])
    dropped = after[:, 0] == 9
    np.testing.assert_array_equal(dropped, after[:, 3] == 9)
    np.testing.assert_array_equal(after[~dropped], before[~dropped])
    assert abs(dropped.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 400)
    halves = dropped.reshape(-1, 2)
    assert (halves[:, 0] != halves[:, 1]).any(), "segments of one row are drawn apart"


def test_concatenation_keeps_rows_and_widens_lists():
    left = pack([_prompt([1, 2], items=[(0, 5), (1, 6)])], 3)
    right = pack([_prompt([3, 4, 5], items=[(2, 7)], texts=[(0, 4)]), _prompt([6])], 3)
    both = concatenate([left, right])
    assert both.tokens.tolist() == [[1, 2, 0], [3, 4, 5], [6, 0, 0]]
    assert both.item_target.tolist() == [[5, 6], [7, -1], [-1, -1]]
    assert both.item_index.tolist() == [[0, 1], [2, 0], [0, 0]]
    assert both.text_target.tolist() == [[-1], [4], [-1]]


def test_packing_many_prompts_is_quick():
    prompts = [_prompt(np.arange(n % 37 + 1), items=[(0, 1)]) for n in range(20_000)]
    begin = time.process_time()
    packed = pack(prompts, 64)
    assert time.process_time() - begin < 5, "twenty thousand prompts take about a quarter of a second"
    assert (packed.segments > 0).mean() > 0.9


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: pack([_prompt([1]), _prompt([1, 2, 3, 4])], 3), "prompt 1 has 4 tokens"),
        (lambda: pack([], 3).batch(0, batch_size=2, seed=0), "training data are empty"),
        (lambda: concatenate([pack([_prompt([1])], length) for length in (3, 4)]), r"lengths \[3, 4\]"),
        (lambda: pack([_prompt([1])], 3).batch(0, batch_size=2, seed=0, uid_dropout=0.25), "user_tokens"),
    ],
)
def test_what_cannot_be_packed_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()
