import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdlm_jax.lm.prompts import (
    KINDS,
    card_named_prompt,
    card_prompt,
    check_prompt_items,
    history_prompt,
    history_windows,
)
from bdlm_jax.lm.vocabulary import Vocabulary, train_tokenizer
from bdlm_jax.types import InputError, LeakError

N_ITEMS = 9


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary(train_tokenizer(["red shoe", "blue shoe"], 300), 6, N_ITEMS)


# Titles are token arrays, so that the expected prompts can be written down; item i has i % 3 + 1 tokens.
TITLES = [np.arange(100 + 10 * i, 101 + 10 * i + i % 3, dtype=np.int32) for i in range(N_ITEMS)]


def _targets(values):
    """(position, target) of every target."""
    return [(int(at), int(values[at])) for at in np.flatnonzero(values >= 0)]


def test_ids_prompt_predicts_every_item_from_the_token_before_it(vocabulary):
    v = vocabulary
    prompt = history_prompt(v, [4, 0, 7], kind="ids", user=2, read_user=True)
    expected = [v.bos, v.user_token(2), v.item_token(4), v.item_token(0), v.item_token(7)]
    assert prompt.tokens.tolist() == expected and prompt.tokens.dtype == np.int32
    assert _targets(prompt.item_targets) == [(1, 4), (2, 0), (3, 7)]
    assert _targets(prompt.text_targets) == []
    assert (prompt.user, prompt.user_at, prompt.item, prompt.item_at) == (2, 4, -1, -1)


def test_ids_titles_prompt_puts_the_id_before_its_title(vocabulary):
    v = vocabulary
    prompt = history_prompt(v, [1, 3], titles=TITLES, user=2, context=np.array([50, 51]))
    # item 1: title 110 111; item 3: title 130
    expected = [v.bos, v.user_token(2), 50, 51, v.item_token(1), 110, 111, v.item_token(3), 130]
    assert prompt.tokens.tolist() == expected
    assert _targets(prompt.item_targets) == [(3, 1), (6, 3)]
    assert _targets(prompt.text_targets) == [(4, 110), (5, 111), (6, v.eos), (7, 130), (8, v.eos)]
    assert (prompt.user, prompt.user_at) == (-1, -1)


def test_text_prompt_ends_every_title_and_has_no_id_token(vocabulary):
    v = vocabulary
    prompt = history_prompt(v, [1, 3], kind="text", titles=TITLES, user=2, context=np.array([50]), read_user=True)
    assert prompt.tokens.tolist() == [v.bos, 50, 110, 111, v.eos, 130, v.eos]
    assert _targets(prompt.text_targets) == [(1, 110), (2, 111), (3, v.eos), (4, 130), (5, v.eos)]
    assert _targets(prompt.item_targets) == []
    assert (prompt.user, prompt.user_at) == (2, 6)


def test_user_token_at_the_end_predicts_the_next_item(vocabulary):
    v = vocabulary
    prompt = history_prompt(v, [1, 3], kind="ids", user=2, user_token="end", next_item=8, read_user=True)
    assert prompt.tokens.tolist() == [v.bos, v.item_token(1), v.item_token(3), v.user_token(2)]
    assert _targets(prompt.item_targets) == [(0, 1), (1, 3), (3, 8)]
    assert prompt.user_at == 3


@pytest.mark.parametrize("options", [{"user": None}, {"user": 2, "unnamed": True}])
def test_user_stands_in_for_a_user_that_is_new_or_hidden(vocabulary, options):
    prompt = history_prompt(vocabulary, [1], kind="ids", read_user=True, **options)
    assert prompt.tokens[1] == vocabulary.unnamed_user
    assert prompt.user == (-1 if options["user"] is None else 2)


def test_no_user_token(vocabulary):
    prompt = history_prompt(vocabulary, [1], kind="ids", user=2, user_token="none")
    assert prompt.tokens.tolist() == [vocabulary.bos, vocabulary.item_token(1)]
    assert _targets(prompt.item_targets) == [(0, 1)]


def test_first_item_can_be_left_out_of_the_targets(vocabulary):
    ids = history_prompt(vocabulary, [1, 3], kind="ids_titles", titles=TITLES, user=2, predict_first=False)
    assert _targets(ids.item_targets) == [(4, 3)]
    end = vocabulary.eos
    assert _targets(ids.text_targets) == [(2, 110), (3, 111), (4, end), (5, 130), (6, end)]
    text = history_prompt(vocabulary, [1, 3], kind="text", titles=TITLES, predict_first=False)
    assert _targets(text.text_targets) == [(3, 130), (4, vocabulary.eos)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_history_still_gives_a_prompt(vocabulary, kind):
    next_item = None if kind == "text" else 5
    prompt = history_prompt(vocabulary, [], kind=kind, titles=TITLES, user=1, read_user=True, next_item=next_item)
    assert prompt.tokens.tolist() == [vocabulary.bos] + ([] if kind == "text" else [vocabulary.user_token(1)])
    assert prompt.user_at == len(prompt) - 1
    assert _targets(prompt.item_targets) == ([] if kind == "text" else [(1, 5)])


@settings(max_examples=100, deadline=None)
@given(
    items=st.lists(st.integers(0, N_ITEMS - 1), max_size=12),
    kind=st.sampled_from(KINDS),
    user_token=st.sampled_from(["start", "end", "none"]),
    context=st.integers(0, 4),
    max_tokens=st.integers(4, 30),
    max_items=st.integers(1, 6) | st.none(),
)
def test_every_target_is_what_stands_behind_it(vocabulary, items, kind, user_token, context, max_tokens, max_items):
    v = vocabulary
    options = dict(kind=kind, user_token=user_token, titles=TITLES, user=1, max_items=max_items)
    prompt = history_prompt(v, items, context=np.full(context, 60), max_tokens=max_tokens, **options)
    assert len(prompt) <= max_tokens
    tokens = prompt.tokens
    for at, item in _targets(prompt.item_targets):
        assert tokens[at + 1] == v.item_token(item)
    ends = [at for at, token in _targets(prompt.text_targets) if token == v.eos and kind == "ids_titles"]
    for at, token in _targets(prompt.text_targets):
        assert at in ends or tokens[at + 1] == token
    assert all(at + 1 == len(tokens) or tokens[at + 1] >= v.n_text for at in ends), "<eos> where a title ends"
    if kind == "text":
        assert not (tokens >= v.n_text).any()
        return
    shown = v.items_of(tokens).tolist()
    assert shown == items[len(items) - len(shown) :], "the newest items are kept, in order"
    assert [item for _, item in _targets(prompt.item_targets)] == shown
    assert len(shown) >= min(1, len(items))
    # Every token is the head, an id, or a title token, and every title token is a target.
    n_head = 1 + (user_token != "none") + int((tokens == 60).sum())
    assert len(tokens) == n_head + len(shown) + len(_targets(prompt.text_targets)) - len(ends)


def test_titles_are_cut_on_demand(vocabulary):
    prompt = history_prompt(vocabulary, [2, 5], titles=TITLES, user_token="none", max_title=1)
    v = vocabulary
    assert prompt.tokens.tolist() == [v.bos, v.item_token(2), 120, v.item_token(5), 150]


def test_card_reads_the_item_behind_its_text_and_shows_no_id(vocabulary):
    prompt = card_prompt(vocabulary, 5, TITLES[5])
    assert prompt.tokens.tolist() == [vocabulary.bos, 150, 151, 152, vocabulary.unnamed_item]
    assert (prompt.item, prompt.item_at, prompt.user) == (5, 4, -1)
    assert _targets(prompt.text_targets) == [(0, 150), (1, 151), (2, 152)]
    assert _targets(prompt.item_targets) == []
    assert card_prompt(vocabulary, 5, TITLES[5], max_tokens=3).tokens.tolist()[1:] == [150, vocabulary.unnamed_item]


def test_named_card_predicts_the_title_from_the_id(vocabulary):
    prompt = card_named_prompt(vocabulary, 5, TITLES[5])
    assert prompt.tokens.tolist() == [vocabulary.bos, vocabulary.item_token(5), 150, 151, 152]
    assert _targets(prompt.text_targets) == [(1, 150), (2, 151), (3, 152), (4, vocabulary.eos)]
    assert prompt.item == -1
    cut = card_named_prompt(vocabulary, 5, TITLES[5], max_tokens=4)
    assert _targets(cut.text_targets) == [(1, 150), (2, 151)], "a title that is cut does not end"


def test_windows_are_cut_from_the_end():
    assert [w.tolist() for w in history_windows(range(7), 3)] == [[0], [1, 2, 3], [4, 5, 6]]
    assert [w.tolist() for w in history_windows(range(2), 3)] == [[0, 1]]
    assert history_windows([], 3) == []


def test_future_items_raise(vocabulary):
    prompt = history_prompt(vocabulary, [1, 3], kind="ids", user=2, next_item=8)
    check_prompt_items(vocabulary, prompt, [1, 3, 8])
    with pytest.raises(LeakError, match="item 8"):
        check_prompt_items(vocabulary, prompt, {1, 3})
    with pytest.raises(LeakError, match="user 2"):
        check_prompt_items(vocabulary, prompt, np.array([1, 8]), user=2)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"kind": "title"}, "kind"),
        ({"kind": "ids", "user_token": "middle"}, "user_token"),
        ({"kind": "text"}, "titles"),
        ({"kind": "text", "titles": TITLES, "next_item": 1}, "next_item"),
        ({"kind": "ids", "max_tokens": 2}, "max_tokens"),
    ],
)
def test_options_that_do_not_fit_are_refused(vocabulary, options, word):
    with pytest.raises(InputError, match=word):
        history_prompt(vocabulary, [1, 2], **options)
