import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdlm_jax.lm.prompts import (
    KINDS,
    USER_TOKENS,
    PromptOptions,
    card_named_prompt,
    card_prompt,
    history_prompt,
)
from bdlm_jax.lm.vocabulary import Vocabulary
from bdlm_jax.types import InputError

V = Vocabulary(None, 6, 9)
V.__dict__.update(n_text=300, pad=0, bos=1, eos=2, unnamed_user=3, unnamed_item=4)
# Item i has i % 3 + 1 tokens, so that the expected prompts can be written down.
TITLES = [np.arange(100 + 10 * i, 101 + 10 * i + i % 3, dtype=np.int32) for i in range(9)]
IDS, IDS_TITLES, TEXT = (PromptOptions(kind) for kind in KINDS)


def _targets(values):
    """(position, target) of every target."""
    return [(int(at), int(values[at])) for at in np.flatnonzero(values >= 0)]


def test_ids_prompt_predicts_every_item_from_the_token_before_it():
    prompt = history_prompt(V, [4, 0, 7], IDS, user=2, read_user=True)
    assert prompt.tokens.tolist() == [V.bos, V.user_token(2), V.item_token(4), V.item_token(0), V.item_token(7)]
    assert prompt.tokens.dtype == np.int32
    assert _targets(prompt.item_targets) == [(1, 4), (2, 0), (3, 7)]
    assert not _targets(prompt.text_targets)
    assert (prompt.user, prompt.user_at, prompt.item, prompt.item_at) == (2, 4, -1, -1)


def test_ids_titles_prompt_puts_the_id_before_its_title():
    prompt = history_prompt(V, [1, 3], IDS_TITLES, titles=TITLES, user=2, context=np.array([50, 51]))
    # item 1: title 110 111; item 3: title 130
    expected = [V.bos, V.user_token(2), 50, 51, V.item_token(1), 110, 111, V.item_token(3), 130]
    assert prompt.tokens.tolist() == expected
    assert _targets(prompt.item_targets) == [(3, 1), (6, 3)]
    assert _targets(prompt.text_targets) == [(4, 110), (5, 111), (6, V.eos), (7, 130), (8, V.eos)]
    assert (prompt.user, prompt.user_at) == (-1, -1)


def test_text_prompt_ends_every_title_and_has_no_id_token():
    prompt = history_prompt(V, [1, 3], TEXT, titles=TITLES, user=2, context=np.array([50]), read_user=True)
    assert prompt.tokens.tolist() == [V.bos, 50, 110, 111, V.eos, 130, V.eos]
    assert _targets(prompt.text_targets) == [(1, 110), (2, 111), (3, V.eos), (4, 130), (5, V.eos)]
    assert _targets(prompt.item_targets) == []
    assert (prompt.user, prompt.user_at) == (2, 6)


@pytest.mark.parametrize(
    ("options", "user", "expected", "reads"),
    [
        ({"user_token": "end"}, 2, [V.bos, V.item_token(1), V.item_token(3), V.user_token(2)], (2, 3)),
        ({"user_token": "none"}, 2, [V.bos, V.item_token(1), V.item_token(3)], (2, 2)),
        ({}, None, [V.bos, V.unnamed_user, V.item_token(1), V.item_token(3)], (-1, -1)),  # a new user
        ({"unnamed": True}, 2, [V.bos, V.unnamed_user, V.item_token(1), V.item_token(3)], (2, 3)),
        ({"max_items": 1}, 2, [V.bos, V.user_token(2), V.item_token(3)], (2, 2)),
    ],
)
def test_who_the_user_is_and_where(options, user, expected, reads):
    prompt = history_prompt(V, [1, 3], PromptOptions("ids", **options), user=user, read_user=True)
    assert prompt.tokens.tolist() == expected and (prompt.user, prompt.user_at) == reads
    wanted = [(expected.index(V.item_token(i)) - 1, i) for i in (1, 3) if V.item_token(i) in expected]
    assert _targets(prompt.item_targets) == wanted


def test_first_item_can_be_left_out_of_the_targets():
    ids = history_prompt(V, [1, 3], IDS_TITLES, titles=TITLES, user=2, predict_first=False)
    assert _targets(ids.item_targets) == [(4, 3)]
    assert _targets(ids.text_targets) == [(2, 110), (3, 111), (4, V.eos), (5, 130), (6, V.eos)]
    text = history_prompt(V, [1, 3], TEXT, titles=TITLES, predict_first=False)
    assert _targets(text.text_targets) == [(3, 130), (4, V.eos)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_history_still_gives_a_prompt(kind):
    prompt = history_prompt(V, [], PromptOptions(kind), titles=TITLES, user=1, read_user=True, predict_first=False)
    assert prompt.tokens.tolist() == [V.bos] + ([] if kind == "text" else [V.user_token(1)])
    assert (prompt.user, prompt.user_at) == (1, len(prompt) - 1)
    assert _targets(prompt.item_targets) == _targets(prompt.text_targets) == []


@settings(max_examples=100, deadline=None)
@given(
    items=st.lists(st.integers(0, 8), max_size=12),
    kind=st.sampled_from(KINDS),
    user_token=st.sampled_from(USER_TOKENS),
    context=st.integers(0, 4),
    max_tokens=st.integers(4, 30),
    max_items=st.integers(1, 6) | st.none(),
)
def test_every_target_is_what_stands_behind_it(items, kind, user_token, context, max_tokens, max_items):
    options = PromptOptions(kind, user_token, max_items=max_items, max_tokens=max_tokens)
    prompt = history_prompt(V, items, options, titles=TITLES, user=1, context=np.full(context, 60))
    assert len(prompt) <= max_tokens
    tokens = prompt.tokens
    for at, item in _targets(prompt.item_targets):
        assert tokens[at + 1] == V.item_token(item)
    ends = [at for at, token in _targets(prompt.text_targets) if token == V.eos and kind == "ids_titles"]
    for at, token in _targets(prompt.text_targets):
        assert at in ends or tokens[at + 1] == token
    assert all(at + 1 == len(tokens) or tokens[at + 1] >= V.n_text for at in ends), "<eos> where a title ends"
    if kind == "text":
        assert not (tokens >= V.n_text).any()
        return
    shown = V.items_of(tokens).tolist()
    assert shown == items[len(items) - len(shown) :], "the newest items are kept, in order"
    assert [item for _, item in _targets(prompt.item_targets)] == shown
    assert len(shown) >= min(1, len(items))
    # Every token is the head, an id, or a title token, and every title token is a target.
    n_head = 1 + (user_token != "none") + int((tokens == 60).sum())
    assert len(tokens) == n_head + len(shown) + len(_targets(prompt.text_targets)) - len(ends)


def test_card_reads_the_item_behind_its_text_and_shows_no_id():
    prompt = card_prompt(V, 5, TITLES[5])
    assert prompt.tokens.tolist() == [V.bos, 150, 151, 152, V.unnamed_item]
    assert (prompt.item, prompt.item_at, prompt.user) == (5, 4, -1)
    assert _targets(prompt.text_targets) == [(0, 150), (1, 151), (2, 152)]
    assert _targets(prompt.item_targets) == []
    assert card_prompt(V, 5, TITLES[5], max_tokens=3).tokens.tolist() == [V.bos, 150, V.unnamed_item]
    read = card_prompt(V, 5, TITLES[5], predict=False)
    assert read.tokens.tolist() == prompt.tokens.tolist() and _targets(read.text_targets) == []


def test_named_card_predicts_the_title_from_the_id():
    prompt = card_named_prompt(V, 5, TITLES[5])
    assert prompt.tokens.tolist() == [V.bos, V.item_token(5), 150, 151, 152]
    assert _targets(prompt.text_targets) == [(1, 150), (2, 151), (3, 152), (4, V.eos)]
    assert _targets(prompt.item_targets) == [] and prompt.item == -1
    cut = card_named_prompt(V, 5, TITLES[5], max_tokens=4)
    assert _targets(cut.text_targets) == [(1, 150), (2, 151)], "a title that is cut does not end"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PromptOptions("title"), 'kind "title"'),
        (lambda: PromptOptions(user_token="middle"), 'user_token "middle"'),
        (lambda: history_prompt(V, [1, 2], TEXT), "needs titles"),
        (lambda: history_prompt(V, [1, 2], PromptOptions("ids", max_tokens=2)), "max_tokens leaves no room"),
        (lambda: card_prompt(V, 5, TITLES[5], max_tokens=1), "max_tokens 1 leaves no room"),
    ],
)
def test_options_that_do_not_fit_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_no_end_is_taught_behind_a_title_that_was_cut():
    ids = history_prompt(V, [1, 3], IDS_TITLES, titles=TITLES, user=2, cut={1})
    assert V.eos not in ids.text_targets[:5] and _targets(ids.text_targets)[-1] == (6, V.eos)
    text = history_prompt(V, [1, 3], TEXT, titles=TITLES, cut={3})
    assert text.tokens.tolist() == [V.bos, 110, 111, V.eos, 130, V.eos]
    assert _targets(text.text_targets) == [(0, 110), (1, 111), (2, V.eos), (3, 130)]
    assert V.eos not in card_named_prompt(V, 3, TITLES[3], cut=True).text_targets
    assert V.eos in card_named_prompt(V, 3, TITLES[3]).text_targets


def test_a_conversations_head_takes_the_place_of_bos():
    talks = Vocabulary(None, 6, 9, chat=(1, 70, 71))
    talks.__dict__.update(n_text=300, pad=0, bos=1, eos=2, unnamed_user=3, unnamed_item=4)
    prompt = history_prompt(talks, [4, 0], IDS, user=2, read_user=True)
    assert prompt.tokens.tolist() == [1, 70, 71, V.user_token(2), V.item_token(4), V.item_token(0)]
    assert _targets(prompt.item_targets) == [(3, 4), (4, 0)] and prompt.user_at == 5
    assert card_prompt(talks, 3, TITLES[3]).tokens.tolist() == [1, 130, 4], "a card is no conversation"
