"""From histories and titles to prompts: token arrays that carry their own targets. NumPy only.

An <iid> stands before its title: predicting it is the recommendation task, and predicting the title from it grounds the
token in language. A state that stands for a user is read after the whole history.
"""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from bdlm_jax.lm.vocabulary import Vocabulary
from bdlm_jax.types import InputError, LeakError

KINDS = ("ids", "ids_titles", "text")
USER_TOKENS = ("start", "end", "none")


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """One token sequence with its targets.

    Args:
        tokens: (L,) int32.
        item_targets: (L,) the item index to be predicted FROM each position, -1 where there is none.
        text_targets: (L,) the text token to be predicted FROM each position, -1 where there is none.
        user: the user whose state is read at position `user_at`, or -1.
        item: the item whose state is read at position `item_at`, or -1.
    """

    tokens: np.ndarray
    item_targets: np.ndarray
    text_targets: np.ndarray
    user: int = -1
    user_at: int = -1
    item: int = -1
    item_at: int = -1

    def __len__(self) -> int:
        return len(self.tokens)


def history_prompt(
    vocabulary: Vocabulary,
    items: Sequence[int],
    *,
    kind: str = "ids_titles",
    titles: Sequence[np.ndarray] | None = None,
    user: int | None = None,
    user_token: str = "start",
    unnamed: bool = False,
    context: np.ndarray | None = None,
    max_items: int | None = None,
    max_tokens: int | None = None,
    max_title: int | None = None,
    read_user: bool = False,
    predict_first: bool = True,
    next_item: int | None = None,
) -> Prompt:
    """Makes one prompt of a user's history; one history of n items gives n targets.

    kind "ids":        <bos> [<uid>] [context] <iid>1 … <iid>n [<uid>]; each item is predicted from the token before.
    kind "ids_titles": <bos> [<uid>] [context] <iid>1 title1 … <iid>n titlen [<uid>]; the titles are predicted too,
                       and <eos>, which no token shows, where one ends.
    kind "text":       <bos> [context] title1 <eos> … titlen <eos>; text targets only, <eos> included.

    Args:
        vocabulary: numbers the tokens.
        items: (n,) item indices in time order; a training prompt gets training items only (`check_prompt_items`).
        kind: "ids", "ids_titles" or "text".
        titles: for each of all I items its title tokens (of `Vocabulary.encode_text`); not needed for "ids".
        user: the user's index; None for a new user, whom <user> stands for.
        user_token: where the user token stands: "start", "end" (after the history) or "none". "text" has none.
        unnamed: show <user> in place of <uid>, though the user is known.
        context: (·,) tokens of text about the user.
        max_items: keep the last this many items.
        max_tokens: drop the oldest items until the prompt fits; where one item alone does not, cut its title.
        max_title: keep the first this many tokens of each title.
        read_user: the user's state is read at the last token.
        predict_first: the first item is a target (False: it was cut from the middle of a history, say).
        next_item: the item to be predicted from the last token; not for "text".

    Returns:
        A Prompt.

    Raises:
        InputError: if the options do not fit together.
    """
    _check_options(kind, user_token, titles, next_item)
    items = np.asarray(items, np.int32).reshape(-1)
    if max_items is not None:
        items = items[max(0, len(items) - max_items) :]
    user_token = "none" if kind == "text" else user_token
    shown = vocabulary.unnamed_user if user is None or unnamed else vocabulary.user_token(user)
    head = [vocabulary.bos] + ([shown] if user_token == "start" else [])
    tail = [shown] if user_token == "end" else []
    context = np.zeros(0, np.int32) if context is None else np.asarray(context, np.int32)
    texts = [] if kind == "ids" else [np.asarray(titles[item], np.int32)[:max_title] for item in items]
    if max_tokens is not None:
        items, texts, context = _fit(items, texts, context, room=max_tokens - len(head) - len(tail), kind=kind)

    head = np.concatenate([np.asarray(head, np.int32), context])
    n, first = len(items), len(head)
    # Every item is one "mark" token and its title; the mark is the <iid> before it or, in text, the <eos> behind it.
    length_n = np.fromiter(map(len, texts), np.int64, n) if kind != "ids" else np.zeros(n, np.int64)
    begin_n = first + np.concatenate([[0], np.cumsum(length_n + 1)])
    size = int(begin_n[-1]) + len(tail)
    mark_n = begin_n[1:] - 1 if kind == "text" else begin_n[:-1]
    is_title = np.zeros(size, bool)
    is_title[first : begin_n[-1]] = True
    is_title[mark_n] = False

    tokens = np.empty(size, np.int32)
    tokens[:first], tokens[size - len(tail) :] = head, tail
    tokens[mark_n] = vocabulary.eos if kind == "text" else vocabulary.item_token(items)
    if n and kind != "ids":
        tokens[is_title] = np.concatenate(texts)

    item_targets, text_targets = np.full(size, -1, np.int32), np.full(size, -1, np.int32)
    is_text_target = is_title
    if kind == "text":
        is_text_target = is_title.copy()
        is_text_target[mark_n] = True
        if not predict_first and n:
            is_text_target[: begin_n[1]] = False
    else:
        item_targets[mark_n - 1] = items
        if not predict_first and n:
            item_targets[first - 1] = -1
        if next_item is not None:
            item_targets[size - 1] = next_item
    at = np.flatnonzero(is_text_target)
    text_targets[at - 1] = tokens[at]
    if kind == "ids_titles":
        whole_n = length_n == [len(titles[item][:max_title]) for item in items]
        text_targets[begin_n[1:][whole_n & (length_n > 0)] - 1] = vocabulary.eos
    reads = read_user and user is not None
    return Prompt(tokens, item_targets, text_targets, user=user if reads else -1, user_at=size - 1 if reads else -1)


def card_prompt(vocabulary: Vocabulary, item: int, title: np.ndarray, *, max_tokens: int | None = None) -> Prompt:
    """Makes <bos> title <item>: what text alone says of an item; its state is read at <item>, its title is predicted.

    Args:
        vocabulary: numbers the tokens.
        item: the item's index, which no token shows.
        title: (·,) its title's tokens.
        max_tokens: cuts the title's end until the prompt fits.

    Returns:
        A Prompt.
    """
    title = _cut_title(title, max_tokens)
    tokens = np.concatenate([[vocabulary.bos], title, [vocabulary.unnamed_item]]).astype(np.int32)
    none = np.full(len(tokens), -1, np.int32)
    text_targets = none.copy()
    text_targets[: len(title)] = title
    return Prompt(tokens, none, text_targets, item=int(item), item_at=len(tokens) - 1)


def card_named_prompt(vocabulary: Vocabulary, item: int, title: np.ndarray, *, max_tokens: int | None = None) -> Prompt:
    """Makes <bos> <iid> title, with the title and its <eos> predicted: it grounds the item's row in its text.

    Args:
        vocabulary: numbers the tokens.
        item: the item's index.
        title: (·,) its title's tokens.
        max_tokens: cuts the title's end until the prompt fits; a title that is cut has no <eos>.

    Returns:
        A Prompt.
    """
    shown = _cut_title(title, max_tokens)
    tokens = np.concatenate([[vocabulary.bos, vocabulary.item_token(item)], shown]).astype(np.int32)
    none = np.full(len(tokens), -1, np.int32)
    text_targets = none.copy()
    text_targets[1:] = [*shown, vocabulary.eos if len(shown) == len(title) else -1]
    return Prompt(tokens, none, text_targets)


def history_windows(items: Sequence[int], max_items: int) -> list[np.ndarray]:
    """Cuts a history into disjoint windows from its end, so that the most recent one is full.

    Args:
        items: (n,) in time order.
        max_items: the longest window.

    Returns:
        Windows in time order; only the first can be shorter. None for an empty history.
    """
    items = np.asarray(items)
    stops = range(len(items), 0, -max_items)
    return [items[max(0, stop - max_items) : stop] for stop in stops][::-1]


def check_prompt_items(
    vocabulary: Vocabulary, prompt: Prompt, allowed: Collection[int] | np.ndarray, *, user: int | None = None
) -> None:
    """Raises if a prompt shows or asks for an item outside a set: the guard against the future in a prompt.

    Args:
        vocabulary: numbers the tokens.
        prompt: what a model is about to be given.
        allowed: the items it may hold, such as the user's training history.
        user: named in the message.

    Raises:
        LeakError: if an item token or an item target is not allowed.
    """
    targets = prompt.item_targets[prompt.item_targets >= 0]
    present = np.union1d(vocabulary.items_of(prompt.tokens), targets)
    leaked = np.setdiff1d(present, np.fromiter(allowed, np.int64, len(allowed)))
    if len(leaked):
        whose = "a prompt" if user is None else f"the prompt of user {user}"
        raise LeakError(f"{whose} holds {len(leaked)} item(s) outside its allowed history, such as item {leaked[0]}.")


def _check_options(kind, user_token, titles, next_item):
    if kind not in KINDS:
        raise InputError(f'prompt kind "{kind}" is not known: write one of {", ".join(KINDS)}.')
    if user_token not in USER_TOKENS:
        raise InputError(f'user_token "{user_token}" is not known: write one of {", ".join(USER_TOKENS)}.')
    if kind != "ids" and titles is None:
        raise InputError(f'prompt kind "{kind}" needs titles: give the title tokens of every item.')
    if kind == "text" and next_item is not None:
        raise InputError('prompt kind "text" has no item target: leave next_item out.')


def _fit(items, texts, context, *, room, kind):
    """Keeps the newest items that fit; always one, whose title and then the context are cut if need be."""
    if room < 1:
        raise InputError("max_tokens leaves no room for one item: raise it.")
    if not len(items):
        return items, texts, context[:room]
    context = context[: room - 1]
    sizes = np.ones(len(items), np.int64) if kind == "ids" else np.asarray([1 + len(text) for text in texts])
    fitting = int(np.sum(np.cumsum(sizes[::-1]) <= room - len(context)))
    keep = max(1, fitting)
    items, texts = items[-keep:], texts[-keep:]
    if not fitting and kind != "ids":
        texts = [texts[0][: room - len(context) - 1]]
    return items, texts, context


def _cut_title(title, max_tokens):
    if max_tokens is not None and max_tokens < 2:
        raise InputError(f"max_tokens {max_tokens} leaves no room for an item's card: give at least 2.")
    return np.asarray(title, np.int32)[: None if max_tokens is None else max_tokens - 2]
