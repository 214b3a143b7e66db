"""From prompts to batches of fixed shape: packed into rows once, then served by step number.

A batch is a pure function of (step, batch size, seed), so that a run can resume at any step and give the same numbers.
Rows hold several prompts as segments 1, 2, …; targets are lists of (position, target), so that logits are computed only
there.
"""

import dataclasses
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from bdlm_jax.lm.prompts import Prompt
from bdlm_jax.types import InputError

# name of the positions, name of the targets, for the four kinds of target lists
LISTS = (
    ("item_index", "item_target"),
    ("text_index", "text_target"),
    ("user_index", "user"),
    ("card_index", "card_item"),
)
FIELDS = ("tokens", "positions", "segments", *(name for pair in LISTS for name in pair))  # of Packed, in their order


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """Rows of one length with their target lists; the lists are padded with index 0 and target -1. All int32."""

    tokens: np.ndarray  # (R, L), the padding token where nothing stands
    positions: np.ndarray  # (R, L), restarting in each segment
    segments: np.ndarray  # (R, L), 1, 2, … in each row, 0 for padding
    item_index: np.ndarray  # (R, T): positions from which the next item is predicted,
    item_target: np.ndarray  # and that item
    text_index: np.ndarray  # (R, T): positions from which the next text token is predicted,
    text_target: np.ndarray  # and that token
    user_index: np.ndarray  # (R, T): positions where a user's state is read,
    user: np.ndarray  # and that user
    card_index: np.ndarray  # (R, T): positions where an item's state is read,
    card_item: np.ndarray  # and that item

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def n_steps(self, batch_size: int) -> int:
        """Batches that show every row once (the last one already holds rows of the next epoch)."""
        return -(-len(self) // batch_size)

    def rows(self, row_B: np.ndarray) -> dict[str, np.ndarray]:
        """Takes rows by number, in the given order, as {name of a field: (B, ·), "row": (B,)}, all int32."""
        row_B = np.asarray(row_B, np.int32)
        return {**{name: getattr(self, name)[row_B] for name in FIELDS}, "row": row_B}

    def batch(
        self,
        step: int,
        *,
        batch_size: int,
        seed: int,
        max_text_targets: int | None = None,
        uid_dropout: float = 0.0,
        user_tokens: range | None = None,
        unnamed_user: int | None = None,
    ) -> dict[str, np.ndarray]:
        """Serves the batch of a step, as `rows` does.

        The rows come from one endless stream, the permutations of epoch 0, 1, 2, … one behind the other, of which step
        s takes places s·B … s·B+B-1: nothing is dropped, every epoch shows every row once, and a batch may hold the end
        of one epoch and the beginning of the next.

        Args:
            seed: of the permutations, the subsets of targets and the dropped user tokens.
            max_text_targets: keep at most this many text targets of each row, drawn anew for every step.
            uid_dropout: probability, for each segment, that its user token is shown as `unnamed_user`.
            user_tokens, unnamed_user: of the vocabulary, needed for `uid_dropout`.
        """
        if not len(self):
            raise InputError("there is no prompt to make a batch of: the training data are empty.")
        place_B = np.arange(step * batch_size, (step + 1) * batch_size)
        epoch_B, within_B = np.divmod(place_B, len(self))
        row_B = np.empty(batch_size, np.int32)
        for epoch in range(epoch_B[0], epoch_B[-1] + 1):
            row_B[epoch_B == epoch] = _permutation(len(self), seed, epoch)[within_B[epoch_B == epoch]]
        batch = self.rows(row_B)
        if max_text_targets is not None:
            generator = np.random.default_rng((seed, step, 1))
            lists = _subset(batch["text_index"], batch["text_target"], max_text_targets, generator)
            batch["text_index"], batch["text_target"] = lists
        if uid_dropout:
            if user_tokens is None or unnamed_user is None:
                raise InputError("uid_dropout needs user_tokens and unnamed_user: pass the vocabulary's.")
            generator = np.random.default_rng((seed, step, 2))
            batch["tokens"] = _drop_users(batch, uid_dropout, user_tokens, unnamed_user, generator)
        return batch


def pack(prompts: Sequence[Prompt], length: int, *, pad: int = 0) -> Packed:
    """Packs prompts into rows of L = `length`, each whole into the first row that has room for it, in their order."""
    size_N = np.fromiter(map(len, prompts), np.int64, len(prompts))
    if size_N.max(initial=0) > length:
        worst = int(size_N.argmax())
        more = f"prompt {worst} has {size_N[worst]} tokens and a row holds {length}"
        raise InputError(f"{more}: raise the length, or build the prompts with max_tokens.")

    def joined(name):
        return np.concatenate([np.zeros(0, np.int32), *(getattr(prompt, name) for prompt in prompts)])

    def each(name):
        return np.fromiter((getattr(prompt, name) for prompt in prompts), np.int64, len(prompts))

    row_N, start_N, segment_N = _first_fit(size_N, length)
    n_rows = int(row_N.max(initial=-1)) + 1
    flat = joined("tokens")
    within = np.arange(len(flat)) - np.repeat(np.cumsum(size_N) - size_N, size_N)
    row = np.repeat(row_N, size_N)
    place = np.repeat(start_N, size_N) + within

    tokens = np.full((n_rows, length), pad, np.int32)
    positions, segments = np.zeros((n_rows, length), np.int32), np.zeros((n_rows, length), np.int32)
    tokens[row, place], positions[row, place] = flat, within
    segments[row, place] = np.repeat(segment_N, size_N)

    found = (
        (row, place, joined("item_targets")),
        (row, place, joined("text_targets")),
        (row_N, start_N + each("user_at"), each("user")),
        (row_N, start_N + each("item_at"), each("item")),
    )
    return Packed(tokens, positions, segments, *(array for one in found for array in _target_lists(*one, n_rows)))


def pack_documents(documents: Sequence[np.ndarray], length: int, *, pad: int, max_tokens: int | None = None) -> Packed:
    """Cuts a stream of documents into rows in which every token but a segment's first is a target.

    A row's end cuts a document, whose rest begins the next row as a segment of its own. Positions restart in each
    segment. Of the stream the first `max_tokens` tokens are taken.
    """
    flat = np.concatenate(documents)[:max_tokens].astype(np.int32)
    document = np.repeat(np.arange(len(documents)), [len(one) for one in documents])[: len(flat)]
    n_rows = -(-len(flat) // length)

    place = np.arange(len(flat))
    begins = (np.diff(document, prepend=-1) != 0) | (place % length == 0)
    segment = np.cumsum(begins) - 1
    position = place - np.flatnonzero(begins)[segment]
    segment_in_row = segment - segment[::length][place // length] + 1
    continues = np.append(segment[1:] == segment[:-1], False)

    def rows(values, fill):
        padded = np.full(n_rows * length, fill, np.int32)
        padded[: len(values)] = values
        return padded.reshape(n_rows, length)

    nothing = np.zeros((n_rows, 0), np.int32)
    return Packed(
        tokens=rows(flat, pad),
        positions=rows(position, 0),
        segments=rows(segment_in_row, 0),
        text_index=np.broadcast_to(np.arange(length, dtype=np.int32), (n_rows, length)),
        text_target=rows(np.where(continues, np.append(flat[1:], 0), -1), -1),
        **{name: nothing for pair in LISTS if "text_index" not in pair for name in pair},
    )


def concatenate(parts: Sequence[Packed]) -> Packed:
    """Joins sets of rows of one length, in order, so that their prompts mix in every batch."""
    lengths = {part.length for part in parts}
    if len(lengths) != 1:
        raise InputError(f"packed sets of lengths {sorted(lengths)} cannot be joined: pack them with one length.")
    joined = {}
    for name in FIELDS:
        arrays = [getattr(part, name) for part in parts]
        width = max(array.shape[1] for array in arrays)
        fill = -1 if name in dict(LISTS).values() else 0
        joined[name] = np.concatenate([_widen(array, width, fill) for array in arrays])
    return Packed(**joined)


def _first_fit(size_N, length):
    """Row, start and segment of each prompt, by first fit over a tree of the room left in rows: O(N log N)."""
    n_leaves = 1 << max(0, len(size_N) - 1).bit_length()
    room = [length] * (2 * n_leaves)  # node i has children 2i and 2i+1; every leaf is a row, empty at first
    count = [0] * n_leaves
    row_N, start_N, segment_N = (np.zeros(len(size_N), np.int64) for _ in range(3))
    for n, size in enumerate(size_N.tolist()):
        node = 1
        while node < n_leaves:
            node *= 2
            if room[node] < size:
                node += 1
        row = node - n_leaves
        row_N[n], start_N[n] = row, length - room[node]
        count[row] += 1
        segment_N[n] = count[row]
        room[node] -= size
        while node > 1:
            node //= 2
            left, right = room[2 * node], room[2 * node + 1]
            room[node] = left if left > right else right
    return row_N, start_N, segment_N


def _target_lists(row, place, value, n_rows):
    """Lists (R, T) of the places that have a value and of these, in order of place, padded with 0 and -1."""
    row, place, value = (array[value >= 0] for array in (row, place, value))
    order = np.lexsort((place, row))
    row, place, value = row[order], place[order], value[order]
    count_R = np.bincount(row, minlength=n_rows)
    width = int(count_R.max(initial=0))
    slot = np.arange(len(row)) - np.repeat(np.cumsum(count_R) - count_R, count_R)
    index_RT, target_RT = np.zeros((n_rows, width), np.int32), np.full((n_rows, width), -1, np.int32)
    index_RT[row, slot], target_RT[row, slot] = place, value
    return index_RT, target_RT


def _widen(array_RT, width, fill):
    return np.pad(array_RT, ((0, 0), (0, width - array_RT.shape[1])), constant_values=fill)


def _subset(index_RT, target_RT, size, generator):
    """At most `size` of each row's targets, uniformly drawn, in order of place."""
    if target_RT.shape[1] <= size:
        return _widen(index_RT, size, 0), _widen(target_RT, size, -1)
    draw_RT = np.where(target_RT >= 0, generator.random(target_RT.shape, np.float32), 2)  # pads come last
    slot = np.sort(np.argpartition(draw_RT, size - 1, axis=1)[:, :size], axis=1)
    return np.take_along_axis(index_RT, slot, axis=1), np.take_along_axis(target_RT, slot, axis=1)


def _drop_users(batch, probability, user_tokens, unnamed_user, generator):
    tokens_BL, segments_BL = batch["tokens"], batch["segments"]
    n_segments = segments_BL.shape[1] + 1  # not the batch's highest, so that a draw does not depend on other rows
    drop_BS = generator.random((len(tokens_BL), n_segments), np.float32) < probability
    is_user_BL = (tokens_BL >= user_tokens.start) & (tokens_BL < user_tokens.stop)
    dropped_BL = is_user_BL & np.take_along_axis(drop_BS, segments_BL, axis=1)
    return np.where(dropped_BL, unnamed_user, tokens_BL).astype(np.int32)


@lru_cache(maxsize=4)
def _permutation(n_rows, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n_rows)
