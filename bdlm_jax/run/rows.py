"""The LM arm's rows of tokens: training histories, item cards and corpus; prompts to read states from.

Everything here is NumPy and made once a run from the split; training rows hold training items only, which is checked.
"""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import ml_collections
import numpy as np

from bdlm_jax.data.splits import TRAIN
from bdlm_jax.lm import packing as batches
from bdlm_jax.lm import prompts
from bdlm_jax.lm.packing import Packed
from bdlm_jax.lm.vocabulary import Vocabulary
from bdlm_jax.types import InputError

_ENCODE_AT_ONCE = 4096


class Texts(NamedTuple):
    """Tokens of every item's title (cut to `max_title_tokens`) and of every user's context, if there is any."""

    vocabulary: Vocabulary
    titles: list[np.ndarray]
    contexts: list[np.ndarray] | None


def encode_texts(config: ml_collections.ConfigDict, data, vocabulary: Vocabulary) -> Texts:
    """Encodes the item texts and user contexts of a `prepare.Data`."""
    limit = config.prompts.max_title_tokens
    titles = [title[:limit] for title in vocabulary.encode_text(data.item_texts)]
    contexts = [c[:limit] for c in vocabulary.encode_text(data.user_texts)] if data.user_texts else None
    return Texts(vocabulary, titles, contexts)


def training_rows(config: ml_collections.ConfigDict, data, texts: Texts, *, kind: str) -> Packed:
    """Packs every user's training history as prompts of one kind ("ids", "ids_titles", "text").

    A history longer than a row becomes several windows, cut from its end; the user's state is read after the last one.
    """
    indptr, item = data.split.histories(TRAIN)
    made = []
    for user in np.flatnonzero(np.diff(indptr)):
        history = item[indptr[user] : indptr[user + 1]]
        for window, start in _windows(config, texts, history, kind):
            prompt = _history_prompt(
                config, texts, int(user), window, kind, read_user=start + len(window) == len(history), first=start == 0
            )
            if kind != "text":
                prompts.check_prompt_items(texts.vocabulary, prompt, history, user=int(user))
            made.append(prompt)
    return batches.pack(made, config.prompts.length, pad=texts.vocabulary.pad)


def reading_rows(config: ml_collections.ConfigDict, data, texts: Texts, *, kind: str, parts: tuple[int, ...]) -> Packed:
    """Packs one prompt a user, the last window of what is known, at whose end the user's state is read.

    The prompt shows <user> in place of <uid> unless `prompts.read_named`: a row that was trained on the whole history
    has seen every target, so an LM that trusts it learns to look up and not to foresee (ours).
    """
    indptr, item = data.split.histories(*parts)
    made = [
        _history_prompt(
            config, texts, user, item[indptr[user] : indptr[user + 1]], kind,
            read_user=True, first=True, unnamed=not config.prompts.read_named,
        )
        for user in range(data.n_users)
    ]  # fmt: skip
    return batches.pack(made, config.prompts.length, pad=texts.vocabulary.pad)


def card_rows(config: ml_collections.ConfigDict, texts: Texts, *, named: bool = False) -> Packed:
    """Packs every item's card: its title, then the state that stands for what text says of it."""
    make = prompts.card_named_prompt if named else prompts.card_prompt
    made = [make(texts.vocabulary, i, title, max_tokens=config.prompts.length) for i, title in enumerate(texts.titles)]
    return batches.pack(made, config.prompts.length, pad=texts.vocabulary.pad)


def corpus_rows(config: ml_collections.ConfigDict, data, texts: Texts) -> Packed | None:
    """Packs the pretraining corpus, or returns None where there is none."""
    if not data.corpus:
        return None
    limit = config.pretrain.max_tokens
    return text_rows(data.corpus, texts.vocabulary, config.prompts.length, max_tokens=limit)


def text_rows(texts: Iterable[str], vocabulary: Vocabulary, length: int, *, max_tokens: int | None = None) -> Packed:
    """Cuts a corpus into rows in which every token but a document's first is a target.

    Documents stand as <bos> text <eos> one behind the other; a row's end cuts a document, whose rest begins the next
    row as a segment of its own. Positions restart in each segment.

    Args:
        texts: documents, read as a stream, no further than `max_tokens`.
        vocabulary: encodes them.
        length: L.
        max_tokens: stop behind this many tokens.

    Returns:
        A Packed of R rows without id tokens.

    Raises:
        InputError: if there is no text.
    """
    source, chunks, n_tokens = iter(texts), [], 0
    while (max_tokens is None or n_tokens < max_tokens) and (some := list(itertools.islice(source, _ENCODE_AT_ONCE))):
        for ids in vocabulary.encode_text(some):
            chunks.append(np.concatenate([[vocabulary.bos], ids, [vocabulary.eos]]).astype(np.int32))
            n_tokens += len(chunks[-1])
    if not chunks:
        raise InputError("the pretraining corpus holds no text: give it at least one document.")
    flat = np.concatenate(chunks)[:max_tokens]
    document = np.repeat(np.arange(len(chunks)), [len(chunk) for chunk in chunks])[: len(flat)]
    n_rows = -(-len(flat) // length)

    place = np.arange(len(flat))
    starts = np.flatnonzero((np.diff(document, prepend=-1) != 0) | (place % length == 0))
    segment = np.zeros(len(flat), np.int64)
    segment[starts] = 1
    segment = np.cumsum(segment) - 1
    position = place - starts[segment]
    first_segment_R = segment[::length]
    segment_in_row = segment - first_segment_R[place // length] + 1
    continues = np.append(segment[1:] == segment[:-1], False)

    def rows(values, fill):
        padded = np.full(n_rows * length, fill, np.int32)
        padded[: len(values)] = values
        return padded.reshape(n_rows, length)

    nothing_0, nothing_1 = np.zeros((n_rows, 0), np.int32), np.zeros((n_rows, 0), np.int32)
    return Packed(
        tokens=rows(flat, vocabulary.pad),
        positions=rows(position, 0),
        segments=rows(segment_in_row, 0),
        text_index=np.broadcast_to(np.arange(length, dtype=np.int32), (n_rows, length)),
        text_target=rows(np.where(continues, np.append(flat[1:], 0), -1), -1),
        **{name: nothing_0 for name in ("item_index", "user_index", "card_index")},
        **{name: nothing_1 for name in ("item_target", "user", "card_item")},
    )


def mix(parts: list[tuple[Packed | None, float]], *, seed: int) -> Packed:
    """Joins sets of rows, each taken as often as its number says (0.25: a drawn quarter of its rows)."""
    chosen = []
    for number, (packed, copies) in enumerate(parts):
        if packed is None or not len(packed) or copies <= 0:
            continue
        whole, rest = divmod(copies, 1)
        chosen += [packed] * int(whole)
        if n := round(rest * len(packed)):
            order = np.random.default_rng((seed, number)).permutation(len(packed))[:n]
            chosen.append(take_rows(packed, np.sort(order)))
    return batches.concatenate(chosen)


def take_rows(packed: Packed, row_R: np.ndarray) -> Packed:
    """Keeps some rows of a set."""
    return Packed(**{name: value for name, value in packed.rows(row_R).items() if name != "row"})


def text_prefixes(config: ml_collections.ConfigDict, data, texts: Texts, *, parts) -> tuple[np.ndarray, np.ndarray]:
    """Returns the (U, P) tokens and mask of what the text-only LM reads of each user: the last titles."""
    indptr, item = data.split.histories(*parts)
    made = [
        _history_prompt(
            config, texts, user, item[indptr[user] : indptr[user + 1]][-config.evaluate.text_history :], "text",
            read_user=False, first=True,
        ).tokens
        for user in range(data.n_users)
    ]  # fmt: skip
    return _padded(made, texts.vocabulary.pad)


def title_continuations(texts: Texts) -> tuple[np.ndarray, np.ndarray]:
    """Returns the (I, T) tokens and mask of every title with <eos> behind it."""
    ends = np.array([texts.vocabulary.eos], np.int32)
    return _padded([np.concatenate([title, ends]) for title in texts.titles], texts.vocabulary.pad)


def prompt_options(config: ml_collections.ConfigDict, kind: str, *, unnamed: bool = False) -> prompts.PromptOptions:
    """How the run writes histories."""
    c = config.prompts
    return prompts.PromptOptions(kind, c.user_token, unnamed, max_items=c.max_items, max_tokens=c.length)


def _history_prompt(config, texts, user, items, kind, *, read_user, first, unnamed=False):
    return prompts.history_prompt(
        texts.vocabulary,
        items,
        prompt_options(config, kind, unnamed=unnamed),
        titles=texts.titles,
        user=user,
        context=texts.contexts[user] if texts.contexts and kind != "ids" else None,
        read_user=read_user,
        predict_first=first,
    )


def _windows(config, texts, history, kind):
    """Yields (window, start) from the end, each the longest that fits into a row."""
    room = config.prompts.length - 2 - (config.prompts.max_title_tokens if texts.contexts and kind != "ids" else 0)
    sizes = np.ones(len(history), np.int64) if kind == "ids" else np.array([1 + len(texts.titles[i]) for i in history])
    stop = len(history)
    while stop > 0:
        fitting = int(np.sum(np.cumsum(sizes[:stop][::-1]) <= room))
        start = max(0, stop - max(1, min(fitting, config.prompts.max_items)))
        yield history[start:stop], start
        stop = start


def _padded(arrays, fill):
    width = max(map(len, arrays))
    tokens, mask = np.full((len(arrays), width), fill, np.int32), np.zeros((len(arrays), width), bool)
    for row, array in enumerate(arrays):
        tokens[row, : len(array)], mask[row, : len(array)] = array, True
    return tokens, mask
