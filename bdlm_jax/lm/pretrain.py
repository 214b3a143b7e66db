"""Next-token pretraining of the decoder on a text corpus: the "general LLM" of the embedded default.

A corpus becomes rows of a fixed length; the loss is the cross-entropy at every text target, with logits only there.
"""

import gzip
import itertools
import lzma
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdlm_jax.data.batches import Packed
from bdlm_jax.lm.causal_lm import LMConfig, gather_positions, lm_hidden, text_logits
from bdlm_jax.lm.vocabulary import Vocabulary
from bdlm_jax.types import Array, InputError, Params

_OPENERS = {".xz": lzma.open, ".gz": gzip.open, ".txt": open}
_ENCODE_AT_ONCE = 4096


def read_lines(path: str | os.PathLike) -> Iterator[str]:
    """Yields the non-empty lines of a text file, one document each, without loading it.

    Args:
        path: a .txt, .xz or .gz file in UTF-8.

    Returns:
        An iterator over stripped lines.

    Raises:
        InputError: if the file is missing, of another kind, damaged or not UTF-8.
    """
    path = Path(path)
    if path.suffix not in _OPENERS:
        raise InputError(
            f"the corpus {path} ends in none of {', '.join(_OPENERS)}: give it one document a line in such a file."
        )
    if not path.is_file():
        raise InputError(f"the corpus {path} does not exist: check the path.")
    return _read_lines(path)


def _read_lines(path):
    number = 0
    try:
        with _OPENERS[path.suffix](path, "rt", encoding="utf-8") as lines:
            for line in lines:
                number += 1
                if stripped := line.strip():
                    yield stripped
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise InputError(f"the corpus {path} cannot be read behind line {number} ({error}): write it again.") from error


def text_rows(
    texts: Iterable[str] | str | os.PathLike, vocabulary: Vocabulary, length: int, *, max_tokens: int | None = None
) -> Packed:
    """Cuts a corpus into rows in which every token but a document's first is a target.

    Documents stand as <bos> text <eos> one behind the other; a row's end cuts a document, whose rest begins the next
    row as a segment of its own. Positions restart in each segment.

    Args:
        texts: documents, or the path of a file that `read_lines` reads; read as a stream, no further than `max_tokens`.
        vocabulary: encodes them.
        length: L.
        max_tokens: stop behind this many tokens.

    Returns:
        A Packed of R rows without id tokens; its prompts are the segments.

    Raises:
        InputError: if there is no text.
    """
    source = read_lines(texts) if isinstance(texts, str | os.PathLike) else iter(texts)
    chunks, n_tokens = [], 0
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
    stops = np.append(starts[1:], len(flat))
    return Packed(
        tokens=rows(flat, vocabulary.pad),
        positions=rows(position, 0),
        segments=rows(segment_in_row, 0),
        text_index=np.broadcast_to(np.arange(length, dtype=np.int32), (n_rows, length)),
        text_target=rows(np.where(continues, np.append(flat[1:], 0), -1), -1),
        **{name: nothing_0 for name in ("item_index", "user_index", "card_index")},
        **{name: nothing_1 for name in ("item_target", "user", "card_item")},
        prompt_row=starts // length,
        prompt_start=starts % length,
        prompt_stop=stops - starts // length * length,
    )


def text_cross_entropy(
    params: Params, config: LMConfig, hidden_BLM: Array, index_BT: Array, target_BT: Array, *, chunk: int | None = None
) -> tuple[Array, Array]:
    """Sums -log p(target | state) over the targets of a batch, with logits only where a target is.

    Args:
        params: the tree of `init_lm`.
        config: the decoder's shape.
        hidden_BLM: (B, L, M) states of `lm_hidden`.
        index_BT: (B, T) positions.
        target_BT: (B, T) text tokens to be predicted from there, -1 pads.
        chunk: compute the logits for this many targets at a time, and again in the backward pass: for a large V.

    Returns:
        (sum, count), two float32 scalars; the caller divides, after a psum where there are several devices.
    """
    states_NM = gather_positions(hidden_BLM, index_BT).reshape(-1, hidden_BLM.shape[-1])
    target_N = target_BT.reshape(-1)

    def total(states, target):
        nll = optax.softmax_cross_entropy_with_integer_labels(
            text_logits(params, config, states), jnp.maximum(target, 0)
        )
        return jnp.where(target >= 0, nll, 0).sum()

    count = (target_N >= 0).sum().astype(jnp.float32)
    if chunk is None or len(target_N) <= chunk:
        return total(states_NM, target_N), count
    n_pad = -len(target_N) % chunk
    states = jnp.pad(states_NM, ((0, n_pad), (0, 0))).reshape(-1, chunk, states_NM.shape[1])
    target = jnp.pad(target_N, (0, n_pad), constant_values=-1).reshape(-1, chunk)
    sums, _ = jax.lax.scan(lambda acc, part: (acc + jax.checkpoint(total)(*part), None), 0.0, (states, target))
    return sums, count


def text_loss(
    params: Params,
    config: LMConfig,
    batch: dict[str, Array],
    *,
    id_rows_XM: Array | None = None,
    dropout_key_B: Array | None = None,
    chunk: int | None = None,
) -> tuple[Array, Array]:
    """Computes the next-token loss of a batch: sum over its text targets of -log p(token | what stands before it).

    Args:
        params: the tree of `init_lm`.
        config: the decoder's shape.
        batch: of `Packed.batch`.
        id_rows_XM: (X, M) rows of the id tokens, where the batch holds some.
        dropout_key_B: (B,) typed keys; None: no dropout.
        chunk: as in `text_cross_entropy`.

    Returns:
        (sum, count), two float32 scalars: the mean loss is sum / count.
    """
    hidden_BLM = lm_hidden(
        params,
        config,
        batch["tokens"],
        batch["positions"],
        batch["segments"],
        id_rows_XM,
        dropout_key_B=dropout_key_B,
    )
    return text_cross_entropy(params, config, hidden_BLM, batch["text_index"], batch["text_target"], chunk=chunk)
