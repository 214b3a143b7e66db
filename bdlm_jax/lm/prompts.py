"""From histories and titles to prompts: token arrays that carry their own targets. NumPy only.

An <iid> stands before its title: predicting it is the recommendation task, and predicting the title from it grounds the
token in language. A state that stands for a user is read after the whole history.
"""

import dataclasses
from collections.abc import Container, Sequence

import numpy as np

from bdlm_jax.lm.vocabulary import Vocabulary
from bdlm_jax.types import InputError

KINDS = ("ids", "ids_titles", "text")
USER_TOKENS = ("start", "end", "none")


@dataclasses.dataclass(frozen=True)
class PromptOptions:
    """How the histories of a run are written; serving.json keeps it."""

    kind: str = "ids_titles"  # of KINDS: see `history_prompt`
    user_token: str = "start"  # of USER_TOKENS: where the user's token stands, "end" after the history; "text" has none
    unnamed: bool = False  # <user> stands in place of <uid>, though the user is known
    max_items: int | None = None  # keep the last this many items
    max_tokens: int | None = None  # drop the oldest items until the prompt fits; if one alone does not, cut its title

    def __post_init__(self):
        for name, known in (("kind", KINDS), ("user_token", USER_TOKENS)):
            if (given := getattr(self, name)) not in known:
                raise InputError(f'prompt {name} "{given}" is not known: write one of {", ".join(known)}.')


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """One token sequence with its targets; -1 stands for none."""

    tokens: np.ndarray  # (L,) int32
    item_targets: np.ndarray  # (L,) the item to be predicted FROM each position
    text_targets: np.ndarray  # (L,) the text token to be predicted FROM each position
    user: int = -1  # whose state is read
    user_at: int = -1  # at this position
    item: int = -1  # whose state is read
    item_at: int = -1  # at this position

    def __len__(self) -> int:
        return len(self.tokens)


def history_prompt(
    vocabulary: Vocabulary,
    items: Sequence[int],
    options: PromptOptions,
    *,
    titles: Sequence[np.ndarray] | None = None,
    user: int | None = None,
    context: np.ndarray | None = None,
    read_user: bool = False,
    predict_first: bool = True,
    cut: Container[int] = (),
) -> Prompt:
    """Makes one prompt of a user's history; one history of n items gives n targets.

    In place of <bos> stands the head of a conversation, where the vocabulary has one.

    kind "ids":        <bos> [<uid>] [context] <iid>1 … <iid>n [<uid>]; each item is predicted from the token before.
    kind "ids_titles": <bos> [<uid>] [context] <iid>1 title1 … <iid>n titlen [<uid>]; the titles are predicted too,
                       and <eos>, which no token shows, where one ends.
    kind "text":       <bos> [context] title1 <eos> … titlen <eos>; text targets only, <eos> included.

    Args:
        items: in time order.
        titles: the title tokens of all I items; not needed for "ids".
        user: None for a new user, whom <user> stands for; `context` are tokens of text about them.
        read_user: the user's state is read at the last token.
        predict_first: the first item is a target (False: it was cut from the middle of a history, say).
        cut: items whose title in `titles` has no end: none is taught behind it.
    """
    kind = options.kind
    if kind != "ids" and titles is None:
        raise InputError(f'prompt kind "{kind}" needs titles: give the title tokens of every item.')
    shown = vocabulary.unnamed_user if user is None or options.unnamed else vocabulary.user_token(user)
    where = "none" if kind == "text" else options.user_token
    head, tail = [*vocabulary.head, *[shown] * (where == "start")], [shown] * (where == "end")
    head, items, texts = _newest(options, items, titles, head, context, n_tail=len(tail))
    body, is_mark = _body(vocabulary, items, texts, kind)
    least = 0 if kind == "text" else 1  # a text ends even where it is empty
    whole = [least <= len(text) == len(titles[item]) and int(item) not in cut for item, text in zip(items, texts)]
    item_S, text_S = _said(vocabulary, body, is_mark, whole, kind)
    if len(items) and not predict_first:
        first = int(is_mark.argmax()) + 1
        item_S[:first] = text_S[:first] = -1
    tokens = np.concatenate([head, body, tail]).astype(np.int32)
    item_targets, text_targets = np.full((2, len(tokens)), -1, np.int32)
    # Each is predicted from the place before it.
    item_targets[len(head) - 1 : len(head) + len(body)] = item_S
    text_targets[len(head) - 1 : len(head) + len(body)] = text_S
    read = {"user": user, "user_at": len(tokens) - 1} if read_user and user is not None else {}
    return Prompt(tokens, item_targets, text_targets, **read)


def card_prompt(
    vocabulary: Vocabulary, item: int, title: np.ndarray, *, max_tokens: int | None = None, predict: bool = True
) -> Prompt:
    """Makes <bos> title <item>: what text alone says of an item; its state is read at <item>, its title is predicted.

    No token shows the item itself; `max_tokens` cuts the title's end until the prompt fits. Without `predict` the
    title is read alone.
    """
    title = _cut_title(title, max_tokens)
    tokens = np.array([vocabulary.bos, *title, vocabulary.unnamed_item], np.int32)
    none, text_targets = np.full((2, len(tokens)), -1, np.int32)
    if predict:
        text_targets[: len(title)] = title
    return Prompt(tokens, none, text_targets, item=int(item), item_at=len(tokens) - 1)


def card_named_prompt(
    vocabulary: Vocabulary, item: int, title: np.ndarray, *, max_tokens: int | None = None, cut: bool = False
) -> Prompt:
    """Makes <bos> <iid> title, with the title and its <eos> predicted: it grounds the item's row in its text.

    `max_tokens` cuts the title's end until the prompt fits; a title that is cut, here or before, has no <eos>.
    """
    shown = _cut_title(title, max_tokens)
    tokens = np.array([vocabulary.bos, vocabulary.item_token(item), *shown], np.int32)
    none, text_targets = np.full((2, len(tokens)), -1, np.int32)
    text_targets[1:] = [*shown, -1 if cut or len(shown) < len(title) else vocabulary.eos]
    return Prompt(tokens, none, text_targets)


def _newest(options, items, titles, head, context, *, n_tail):
    """The newest items that fit with their titles, and the head with the context that leaves room for one of them.

    There is always one item, if there is any: where it does not fit, its title is cut, and then the context.
    """
    items = np.asarray(items, np.int32).reshape(-1)
    if options.max_items is not None:
        items = items[max(0, len(items) - options.max_items) :]
    texts = [] if options.kind == "ids" else [np.asarray(titles[item], np.int32) for item in items]
    context = [] if context is None else list(context)
    if options.max_tokens is None:
        return [*head, *context], items, texts
    room = options.max_tokens - len(head) - n_tail
    if room < 1:
        raise InputError("max_tokens leaves no room for one item: raise it.")
    if not len(items):
        return [*head, *context[:room]], items, texts
    head = [*head, *context[: room - 1]]
    room -= len(context[: room - 1])
    size_n = np.fromiter(map(len, texts), np.int64) + 1 if texts else np.ones(len(items), np.int64)
    keep = max(1, int(np.sum(np.cumsum(size_n[::-1]) <= room)))
    return head, items[-keep:], [text[: room - 1] for text in texts[-keep:]]  # only a single one can be longer


def _body(vocabulary, items, texts, kind):
    """The history's tokens, and which are marks: every item is one mark and its title.

    The mark is the <iid> before the title or, in text, the <eos> behind it.
    """
    if kind == "ids":
        return vocabulary.item_token(items), np.ones(len(items), bool)
    size_n = np.fromiter(map(len, texts), np.int64, len(texts))
    flat, behind_n = np.concatenate([np.zeros(0, np.int32), *texts]), np.cumsum(size_n)
    at_n, mark_n = (behind_n, vocabulary.eos) if kind == "text" else (behind_n - size_n, vocabulary.item_token(items))
    return np.insert(flat, at_n, mark_n), np.insert(np.zeros(len(flat), bool), at_n, True)


def _said(vocabulary, body, is_mark, whole, kind):
    """What is predicted at each place of the body and right behind it: items and text tokens, -1 where nothing is."""
    item_S, text_S = np.full((2, len(body) + 1), -1, np.int32)
    if kind == "text":
        text_S[:-1] = body
        text_S[np.flatnonzero(is_mark)[~np.asarray(whole, bool)]] = -1
        return item_S, text_S
    item_S[:-1] = np.where(is_mark, body - vocabulary.item_tokens.start, -1)
    text_S[:-1] = np.where(is_mark, -1, body)
    if kind == "ids_titles":
        end_n = np.append(np.flatnonzero(is_mark), len(body))[1:]
        text_S[end_n[whole]] = vocabulary.eos  # a title that was cut does not end
    return item_S, text_S


def _cut_title(title, max_tokens):
    if max_tokens is not None and max_tokens < 2:
        raise InputError(f"max_tokens {max_tokens} leaves no room for an item's card: give at least 2.")
    return np.asarray(title, np.int32)[: None if max_tokens is None else max_tokens - 2]
