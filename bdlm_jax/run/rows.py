"""The LM arm's rows of tokens: training histories, item cards and corpus; prompts to read states from.

Everything here is NumPy and made once a stage from the split; that no row holds what is to be predicted is checked.
"""

import functools
import itertools
from collections.abc import Iterable

import numpy as np

from bdlm_jax.lm import packing, prompts
from bdlm_jax.lm.packing import Packed
from bdlm_jax.lm.vocabulary import Vocabulary
from bdlm_jax.run import guards
from bdlm_jax.run.build import Run
from bdlm_jax.run.ranked import KNOWN
from bdlm_jax.runtime.log import progress
from bdlm_jax.types import InputError

_ENCODE_AT_ONCE = 4096


def training_rows(run: Run, *, kind: str) -> Packed:
    """Packs every user's training history as prompts of one kind ("ids", "ids_titles", "text").

    A history longer than a row becomes several windows, cut from its end; the user's state is read after the last one.
    """
    made = {user: [] for user in range(run.data.n_users)}
    histories = _histories(run, "validation")
    for user, history in enumerate(progress(histories, description="writing histories", total=len(histories))):
        for window, start in _windows(run, history, kind):
            last = start + len(window) == len(history)
            made[user].append(_history_prompt(run, user, window, kind, read_user=last, first=start == 0))
    return _pack_histories(run, made, "validation")


def reading_rows(run: Run, *, kind: str, part: str, behind: int = 0) -> Packed:
    """Packs one prompt a user, the last window of what is known before `part`, at whose end the user's state is read.

    A state that is some items `behind` has not read the last of them, but one item at least, as a cache would hold it.
    The prompt shows <user> in place of <uid> unless `prompts.read_named`: a row that was trained on the whole history
    has seen every target, so an LM that trusts it learns to look up and not to foresee (ours).
    """
    unnamed, histories = not run.config.prompts.read_named, known_histories(run, part, behind=behind)
    told = enumerate(progress(histories, description="writing histories", total=len(histories)))
    made = {user: [_history_prompt(run, user, h, kind, unnamed=unnamed)] for user, h in told}
    return _pack_histories(run, made, part)


def card_rows(run: Run, *, named: bool = False) -> Packed:
    """Packs every item's card: its title, or the LM's gloss on it, then the state that stands for what text says of it.

    A model of `lm.path` reads the title and does not learn to say it: behind a <bos> it would come to expect titles in
    place of the texts that it knows (docs/experiments.md). Behind an item's token, in a named card, it learns to.
    """
    texts, length = run.texts, run.config.prompts.length
    if named:
        make = functools.partial(prompts.card_named_prompt, texts.vocabulary, max_tokens=length)
        return _pack(run, [make(item, title, cut=item in texts.cut) for item, title in enumerate(texts.titles)])
    made, told = functools.partial(prompts.card_prompt, texts.vocabulary, max_tokens=length), not run.config.lm.path
    return _pack(run, [made(item, read, predict=told) for item, read in enumerate(texts.cards or texts.titles)])


def corpus_rows(run: Run) -> Packed | None:
    """Packs the pretraining corpus, or returns None where there is none."""
    length, limit = run.config.prompts.length, run.config.pretrain.max_tokens
    corpus = run.data.corpus
    return text_rows(corpus, run.texts.vocabulary, length, max_tokens=limit) if corpus else None


def text_rows(texts: Iterable[str], vocabulary: Vocabulary, length: int, *, max_tokens: int | None = None) -> Packed:
    """Packs documents, <bos> text <eos> one behind the other, as `packing.pack_documents` does."""
    source, documents, n_tokens = iter(texts), [], 0
    while (max_tokens is None or n_tokens < max_tokens) and (some := list(itertools.islice(source, _ENCODE_AT_ONCE))):
        for ids in vocabulary.encode_text(some):
            documents.append(np.concatenate([[vocabulary.bos], ids, [vocabulary.eos]]))
            n_tokens += len(documents[-1])
    if not documents:
        raise InputError("the pretraining corpus holds no text: give it at least one document.")
    return packing.pack_documents(documents, length, pad=vocabulary.pad, max_tokens=max_tokens)


def mix(parts: list[tuple[Packed | None, float]], *, seed: int) -> Packed:
    """Joins sets of rows, each taken as often as its number says (0.25: a drawn quarter of its rows)."""
    chosen = []
    for number, (packed, copies) in enumerate(parts):
        if packed is None or not len(packed) or copies <= 0:
            continue
        whole, rest = divmod(copies, 1)
        chosen += [packed] * int(whole)
        if n := round(rest * len(packed)):
            drawn_R = np.sort(np.random.default_rng((seed, number)).permutation(len(packed))[:n])
            chosen.append(Packed(*[getattr(packed, name)[drawn_R] for name in packing.FIELDS]))
    return packing.concatenate(chosen)


def text_prefixes(run: Run, *, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the (U, P) tokens and mask of what the text-only LM reads of each user before `part`: the last titles."""
    last = [history[-run.config.evaluate.text_history :] for history in _histories(run, part)]
    made = [_history_prompt(run, user, items, "text", read_user=False).tokens for user, items in enumerate(last)]
    return _padded(made, run.texts.vocabulary.pad)


def title_continuations(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Returns the (I, T) tokens and mask of every title with <eos> behind it, but for those that are cut."""
    titles, cut, vocabulary = run.texts.titles, run.texts.cut, run.texts.vocabulary
    ends = [np.array([] if item in cut else [vocabulary.eos], np.int32) for item in range(len(titles))]
    return _padded([np.concatenate(pair) for pair in zip(titles, ends)], vocabulary.pad)


def prompt_options(run: Run, kind: str, *, unnamed: bool = False) -> prompts.PromptOptions:
    """How the run writes histories."""
    c = run.config.prompts
    return prompts.PromptOptions(kind, c.user_token, unnamed, max_items=c.max_items, max_tokens=c.length)


def known_histories(run: Run, part: str, *, behind: int = 0) -> list[np.ndarray]:
    """Every user's items before `part`, without the last ones, but for one at least."""
    return [history[: max(1, len(history) - behind)] for history in _histories(run, part)]


def _histories(run: Run, part: str) -> list[np.ndarray]:
    """Every user's items, as far as they are known when `part` is predicted."""
    indptr, item = run.data.split.histories(*KNOWN[part])
    # Here for prompts of titles, which no longer tell their items; the others are looked at once more when packed.
    guards.check_known(run.data.split, np.repeat(np.arange(run.data.n_users), np.diff(indptr)), item, part=part)
    return np.split(item, indptr[1:-1])


def _history_prompt(run, user, items, kind, *, read_user=True, first=True, unnamed=False) -> prompts.Prompt:
    texts = run.texts
    return prompts.history_prompt(
        texts.vocabulary,
        items,
        prompt_options(run, kind, unnamed=unnamed),
        titles=texts.titles,
        user=user,
        context=texts.contexts[user] if texts.contexts and kind != "ids" else None,
        read_user=read_user,
        predict_first=first,
        cut=texts.cut,
    )


def _windows(run, history, kind):
    """Yields (window, start) from the end, each the longest that fits into a row."""
    c, texts = run.config.prompts, run.texts
    room = c.length - 1 - len(texts.vocabulary.head) - (c.max_title_tokens if texts.contexts and kind != "ids" else 0)
    sizes = np.array([1 if kind == "ids" else 1 + len(texts.titles[item]) for item in history])
    stop = len(history)
    while stop > 0:
        fitting = int(np.sum(np.cumsum(sizes[:stop][::-1]) <= room))
        start = max(0, stop - max(1, min(fitting, c.max_items)))
        yield history[start:stop], start
        stop = start


def _pack_histories(run: Run, made: dict[int, list[prompts.Prompt]], part: str) -> Packed:
    user_N = np.repeat(list(made), list(map(len, made.values())))
    flat = list(itertools.chain(*made.values()))
    guards.check_prompts(run.data.split, run.texts.vocabulary, user_N, flat, part=part)
    return _pack(run, flat)


def _pack(run: Run, made: list[prompts.Prompt]) -> Packed:
    return packing.pack(made, run.config.prompts.length, pad=run.texts.vocabulary.pad)


def _padded(arrays, fill):
    width = max(map(len, arrays))
    tokens, mask = np.full((len(arrays), width), fill, np.int32), np.zeros((len(arrays), width), bool)
    for row, array in enumerate(arrays):
        tokens[row, : len(array)], mask[row, : len(array)] = array, True
    return tokens, mask
