"""Frozen candidate sets: drawn once, hashed, and the same for every model that is compared.

Numbers move when candidates are drawn anew at each evaluation; here the file is the protocol.
"""

import dataclasses
import hashlib
import os

import numpy as np

from bdlm_jax.data.splits import PART_NAMES, TEST, TRAIN, VALIDATION, Split, within
from bdlm_jax.runtime.files import replacing
from bdlm_jax.types import InputError, LeakError


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates:
    """What each case ranks."""

    name: str  # of the protocol, such as "cand20": the target and 19 others
    user_N: np.ndarray  # int32
    items_NC: np.ndarray  # int32; column 0 is the target, -1 pads where a user has too few unseen items
    sha256: str  # of the three above

    def __post_init__(self):
        self.user_N.setflags(write=False)
        self.items_NC.setflags(write=False)

    def __len__(self) -> int:
        return len(self.user_N)


def make_candidates(
    split: Split,
    part: int,
    *,
    n_negatives: int,
    seed: int,
    name: str,
    pool: np.ndarray | None = None,
    case_M: np.ndarray | None = None,
) -> Candidates:
    """Draws, for every case of `part`, negatives uniformly without replacement among the items unseen by its user.

    An item is seen if the user has it in any part, so that neither the target nor another positive is a negative.
    `pool` holds the items to draw from (None: all); targets need not be in it. `case_M` numbers the cases to draw for
    (None: all). Each (seed, part, name) has a stream of
    its own: what is chosen on validation meets other negatives at test. Raw PCG64 bits make the draw the same on every
    platform. Source: ours (Floyd's subset sampling, Bentley & Floyd 1987, over all cases at once).
    """
    if n_negatives < 1:
        raise InputError(f"n_negatives is {n_negatives}; give 1 or more.")
    n_items = split.interactions.n_items
    pool_P = np.arange(n_items) if pool is None else np.unique(np.asarray(pool, np.int64))
    if not len(pool_P) or pool_P[0] < 0 or pool_P[-1] >= n_items:
        raise InputError(f"the pool of candidates {name} must hold item indices between 0 and {n_items - 1}.")
    user_N, target_N = split.cases(part)
    if case_M is not None:
        user_N, target_N = user_N[case_M], target_N[case_M]
    user_S, at_N = np.unique(user_N, return_inverse=True)
    indptr, seen = _seen_in_pool(split, pool_P, user_S)
    n_unseen_N = len(pool_P) - np.diff(indptr)[at_N]
    rank_NC = _draw_subsets(np.random.PCG64(stream_seed(seed, part, name)), n_unseen_N, n_negatives)

    # the r-th unseen position is r + (number of seen positions s_k with s_k - k ≤ r): one sorted search for all users
    shifted = seen - (np.arange(len(seen)) - np.repeat(indptr[:-1], np.diff(indptr)))
    stride = len(pool_P) + 1
    keys = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr)) * stride + shifted
    wanted_NC = at_N[:, None] * stride + rank_NC
    position_NC = rank_NC + np.searchsorted(keys, wanted_NC, side="right") - indptr[at_N][:, None]
    negative_NC = np.where(rank_NC < 0, -1, pool_P[np.where(rank_NC < 0, 0, position_NC)])

    items_NC = np.concatenate([target_N[:, None], negative_NC], axis=1).astype(np.int32)
    candidates = freeze_candidates(name, user_N, items_NC)
    check_candidates(split, candidates)
    return candidates


def make_pool_candidates(split: Split, part: int, *, pool: np.ndarray, **options) -> Candidates:
    """As `make_candidates`, for the cases alone whose targets are in `pool` themselves."""
    drawn = make_candidates(split, part, pool=pool, **options)
    inside_N = np.isin(drawn.items_NC[:, 0], pool)
    return freeze_candidates(drawn.name, drawn.user_N[inside_N], drawn.items_NC[inside_N])


def draw_cases(n_cases: int, most: int, *, seed: int, part: int = VALIDATION) -> np.ndarray:
    """Indices, in order, of `most` of the `n_cases` cases of a part (or of all), drawn alike on every platform."""
    raw_N = np.random.PCG64(stream_seed(seed, part, "full")).random_raw(n_cases)
    return np.sort(np.argsort(raw_N, kind="stable")[:most])


def stream_seed(seed: int, part: int, name: str) -> int:
    """The PCG64 seed of one draw: sha256 of what it is for."""
    return int.from_bytes(hashlib.sha256(f"{seed}\x1d{PART_NAMES[part]}\x1d{name}".encode()).digest(), "little")


def freeze_candidates(name: str, user_N: np.ndarray, items_NC: np.ndarray) -> Candidates:
    """Hashes candidates that were chosen by hand or by another rule, unchecked: see `check_candidates`."""
    user_N, items_NC = np.array(user_N, np.int32), np.array(items_NC, np.int32)
    return Candidates(name, user_N, items_NC, _sha256(name, user_N, items_NC))


def check_candidates(split: Split, candidates: Candidates) -> None:
    """Raises if these candidates, drawn, loaded or made by hand, cannot be what this split asks."""
    n_users, n_items = split.interactions.n_users, split.interactions.n_items
    user_N, items_NC = candidates.user_N.astype(np.int64), candidates.items_NC
    label, shape = f"candidates {candidates.name}", items_NC.shape
    if len(shape) != 2 or shape[1] < 2 or shape[0] != len(user_N):
        raise InputError(f"{label} have the shape {shape} for {len(user_N)} users; give (users, 1 + negatives).")
    if not (np.all((user_N >= 0) & (user_N < n_users)) and np.all((items_NC >= -1) & (items_NC < n_items))):
        raise InputError(f"{label} name users or items that this data does not have; make them again for it.")
    target_N, negative_NC = items_NC[:, 0], items_NC[:, 1:]
    _raise_at(np.any(negative_NC == target_N[:, None], axis=1), user_N, f"{label}: the target is among its negatives")
    sorted_NC = np.sort(negative_NC, axis=1)
    twice_N = np.any((sorted_NC[:, 1:] == sorted_NC[:, :-1]) & (sorted_NC[:, 1:] >= 0), axis=1)
    _raise_at(twice_N, user_N, f"{label}: a negative stands twice")
    known = split.pairs(TRAIN, VALIDATION, TEST)
    positive_NC = within(user_N[:, None] * n_items + negative_NC, known) & (negative_NC >= 0)
    _raise_at(positive_NC.any(axis=1), user_N, f"{label}: a negative is an interaction of its user")
    held = split.pairs(VALIDATION, TEST)
    if not within(user_N * n_items + target_N, held).all() or (target_N < 0).any():
        raise InputError(f"{label} have targets that this split does not hold out; make them again for it.")


def check_independent(split: Split, validation: Candidates, test: Candidates) -> None:
    """Raises if users meet at test the negatives on which a model was chosen, more often than chance has it.

    With k of n unseen items drawn for each part, k²/n are shared in the mean (hypergeometric); the bound lies six
    deviations and six items above. A user with several cases is compared by the first of each part.
    """
    (user_V, row_V), (user_T, row_T) = (np.unique(c.user_N, return_index=True) for c in (validation, test))
    user_S, at_V, at_T = np.intersect1d(user_V, user_T, assume_unique=True, return_indices=True)
    first_SC, second_SC = validation.items_NC[row_V[at_V], 1:], test.items_NC[row_T[at_T], 1:]
    stride = split.interactions.n_items
    key_SC = np.arange(len(user_S))[:, None] * stride
    first, second = ((items_SC + key_SC)[items_SC >= 0] for items_SC in (first_SC, second_SC))  # a row's are different
    n_shared = int(within(first, np.sort(second)).sum())
    n_S = np.maximum(stride - np.bincount(split.pairs(TRAIN, VALIDATION, TEST) // stride)[user_S], 2)
    a_S, b_S = ((items_SC >= 0).sum(axis=1) for items_SC in (first_SC, second_SC))
    mean = (a_S * b_S / n_S).sum()
    variance = (a_S * b_S / n_S * (1 - a_S / n_S) * (n_S - b_S) / (n_S - 1)).sum()
    if n_shared > mean + 6 * variance**0.5 + 6:
        raise LeakError(
            f"candidates {test.name}: test shares {n_shared} negatives with validation over {len(user_S)} users, "
            f"where chance gives {mean:.0f}; a model would be chosen on what it is tested on."
        )


def check_unchanged(candidates: Candidates, sha256: str) -> None:
    """Raises unless these are, to the bit, the candidates that the run's fingerprint names."""
    if _sha256(candidates.name, candidates.user_N, candidates.items_NC) != sha256:
        raise LeakError(f"candidates {candidates.name} are not those that this run began with, for all its models.")


def save_candidates(path: str | os.PathLike, candidates: Candidates) -> None:
    """Writes candidates as one .npz without objects; the file appears complete or not at all."""
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, **dataclasses.asdict(candidates))


def load_candidates(path: str | os.PathLike) -> Candidates:
    """Reads what `save_candidates` wrote and verifies the hash."""
    try:
        with np.load(path, allow_pickle=False) as file:
            name, sha256 = str(file["name"]), str(file["sha256"])
            user_N, items_NC = file["user_N"].astype(np.int32), file["items_NC"].astype(np.int32)
    except FileNotFoundError:
        raise InputError(f"{path} is not there; make the candidates first.") from None
    except Exception as error:
        raise InputError(f"{path} cannot be read as candidates ({error}); make them again.") from error
    if _sha256(name, user_N, items_NC) != sha256:
        raise InputError(f"{path} is not what was written (its hash differs); make the candidates again.")
    return Candidates(name, user_N, items_NC, sha256)


def _seen_in_pool(split: Split, pool_P: np.ndarray, user_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(indptr (S+1,), sorted pool positions of the items of any part of each of these users)."""
    n_items, pair = split.interactions.n_items, split.pairs(TRAIN, VALIDATION, TEST)
    first_S, end_S = (np.searchsorted(pair, (user_S.astype(np.int64) + more) * n_items) for more in (0, 1))
    nth = np.repeat(np.arange(len(user_S)), end_S - first_S)
    start_S = np.cumsum(end_S - first_S) - (end_S - first_S)
    item = pair[first_S[nth] + np.arange(len(nth)) - start_S[nth]] % n_items
    position = np.searchsorted(pool_P, item)
    inside = pool_P[np.minimum(position, len(pool_P) - 1)] == item
    indptr = np.zeros(len(user_S) + 1, np.int64)
    np.cumsum(np.bincount(nth[inside], minlength=len(user_S)), out=indptr[1:])
    return indptr, position[inside]


def _draw_subsets(bits: np.random.PCG64, size_N: np.ndarray, n_draws: int) -> np.ndarray:
    """(N, n_draws) int64: per row a uniform subset of 0…size-1 in random order; -1 pads where size < n_draws."""
    n_rows = len(size_N)
    draws_N = np.minimum(size_N, n_draws)
    subset_NC = np.full((n_rows, n_draws), -1, np.int64)
    for column in range(n_draws):
        last_N = size_N - draws_N + column
        pick_N = np.floor(_uniform(bits, n_rows) * (last_N + 1)).astype(np.int64)
        taken_N = np.any(subset_NC[:, :column] == pick_N[:, None], axis=1)
        subset_NC[:, column] = np.where(column < draws_N, np.where(taken_N, last_N, pick_N), -1)
    # Floyd's method favours large values in late columns; nobody may read meaning into a column
    shuffle_NC = np.where(subset_NC < 0, 2.0, _uniform(bits, subset_NC.size).reshape(subset_NC.shape))
    return np.take_along_axis(subset_NC, np.argsort(shuffle_NC, axis=1, kind="stable"), axis=1)


def _uniform(bits: np.random.PCG64, size: int) -> np.ndarray:
    return (bits.random_raw(size) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _raise_at(bad_N: np.ndarray, user_N: np.ndarray, what: str) -> None:
    if bad_N.any():
        row, n_bad = int(np.argmax(bad_N)), int(bad_N.sum())
        raise LeakError(f"{what} in {n_bad} of {len(bad_N)} cases, the first at row {row} (user {user_N[row]}).")


def _sha256(name: str, user_N: np.ndarray, items_NC: np.ndarray) -> str:
    digest = hashlib.sha256(f"{name}\x1d{items_NC.shape}\x1d".encode())
    digest.update(np.ascontiguousarray(user_N, "<i4").tobytes())
    digest.update(np.ascontiguousarray(items_NC, "<i4").tobytes())
    return digest.hexdigest()
