"""Negatives drawn on the device, exactly and without rejection, never an item that the user has seen.

In a user's sorted row of seen items a_0 < a_1 < …, a_j - j unseen items stand below a_j. That count never falls, so the
r-th unseen item is found by a binary search of fixed depth: item r + #{j: a_j - j ≤ r}.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from bdlm_jax.types import Array, InputError

POPULARITY_TOTAL = 2**30
ORDER_ROUNDS = 8


@flax.struct.dataclass
class Seen:
    """The seen items of each user: row u is item[indptr[u] : indptr[u + 1]], sorted, without repeats."""

    indptr: Array
    item: Array
    n_items: int = flax.struct.field(pytree_node=False)
    depth: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Popularity:
    """Integer sampling weights: below[i] is the weight before item i, unseen_below[e] what of it user's row e left."""

    below: Array
    unseen_below: Array
    unseen_U: Array


def make_seen(user: Array, item: Array, n_users: int, n_items: int) -> Seen:
    """Sorts the items that each user has seen into rows on the device.

    Args:
      user: (E,) user indices; pairs may repeat and come in any order.
      item: (E,) item indices.
      n_users: U.
      n_items: I.

    Returns:
      A Seen.

    Raises:
      InputError: an index out of range, or a user who has seen every item, for whom no negative exists.
    """
    user, item = np.asarray(user, np.int64), np.asarray(item, np.int64)
    for name, index, size in (("user", user, n_users), ("item", item, n_items)):
        if index.size and (index.min() < 0 or index.max() >= size):
            raise InputError(f"{name} indices reach from {index.min()} to {index.max()}, outside 0…{size - 1}.")
    pairs = np.unique(user * n_items + item)
    count_U = np.bincount(pairs // n_items, minlength=n_users)
    if n_users and count_U.max() >= n_items:
        raise InputError(
            f"user {int(count_U.argmax())} has seen all {n_items} items, so no negative exists: leave that user out."
        )
    return Seen(
        indptr=jnp.asarray(np.concatenate([[0], np.cumsum(count_U)]), jnp.int32),
        item=jnp.asarray(pairs % n_items, jnp.int32),
        n_items=n_items,
        depth=int(count_U.max(initial=0)).bit_length(),
    )


def sample_negatives(key: Array, seen: Seen, user_B: Array) -> Array:
    """Draws one item for each entry of `user_B` (any shape), uniform over the items which that user has not seen.

    Each unseen item's probability is exact to 2⁻³², the grain of one random word.

    Args:
      key: a JAX key.
      seen: from `make_seen`.
      user_B: user indices; a shape (B, N) draws N a row, with replacement.

    Returns:
      int32 items in the shape of `user_B`.
    """
    start, stop = seen.indptr[user_B], seen.indptr[user_B + 1]
    rank = _draw_below(key, seen.n_items - (stop - start))
    return rank + _count_at_most(lambda e: seen.item[e] - (e - start), start, stop, rank, seen.depth)


def make_popularity(seen: Seen, degree_I: Array, *, alpha: float = 0.75) -> Popularity:
    """Turns degrees into integer weights ∝ max(degree, 1)^alpha, at least 1 each, so that draws are exact.

    Args:
      seen: from `make_seen`.
      degree_I: (I,) training interactions of each item.
      alpha: 0 is uniform, 1 the popularity itself; 0.75 is word2vec's.

    Returns:
      A Popularity for `sample_popular_negatives`.
    """
    mass = np.maximum(np.asarray(degree_I, np.float64), 1.0) ** alpha
    weight = np.maximum(1, np.floor(mass / mass.sum() * (POPULARITY_TOTAL - mass.size))).astype(np.int64)
    below = np.concatenate([[0], np.cumsum(weight)])
    indptr, item = np.asarray(seen.indptr), np.asarray(seen.item)
    cumulative = np.concatenate([[0], np.cumsum(weight[item])])
    row = np.repeat(np.arange(indptr.size - 1), np.diff(indptr))
    seen_below = cumulative[:-1] - cumulative[indptr[row]]
    return Popularity(
        below=jnp.asarray(below, jnp.int32),
        unseen_below=jnp.asarray(below[item] - seen_below, jnp.int32),
        unseen_U=jnp.asarray(below[-1] - (cumulative[indptr[1:]] - cumulative[indptr[:-1]]), jnp.int32),
    )


def sample_popular_negatives(key: Array, seen: Seen, popularity: Popularity, user_B: Array) -> Array:
    """Draws one unseen item for each entry of `user_B`, with probability ∝ its weight among the user's unseen items.

    The same search as `sample_negatives`, over weight instead of count; integers keep it exact (ours).

    Args:
      key: a JAX key.
      seen: from `make_seen`.
      popularity: from `make_popularity` on the same `seen`.
      user_B: user indices of any shape.

    Returns:
      int32 items in the shape of `user_B`.
    """
    start, stop = seen.indptr[user_B], seen.indptr[user_B + 1]
    mass = _draw_below(key, popularity.unseen_U[user_B])
    count = _count_at_most(lambda e: popularity.unseen_below[e], start, stop, mass, seen.depth)
    # Weight of the first `count` seen items: below the next seen one, total less unseen; in the whole row, likewise.
    inside = start + count < stop
    at = jnp.where(inside, start + count, 0)
    total = jnp.where(inside, popularity.below[seen.item[at]], popularity.below[-1])
    unseen = jnp.where(inside, popularity.unseen_below[at], popularity.unseen_U[user_B])
    return (jnp.searchsorted(popularity.below, mass + total - unseen, side="right") - 1).astype(jnp.int32)


def random_order(key: Array, n: int) -> Array:
    """Returns a pseudo-random permutation (n,) of 0…n-1 without sorting; on a CPU 1 M rows take a sort's tenth.

    A keyed Feistel network permutes 0…2^k - 1; what falls outside is sent through again until it lands inside, which
    keeps it a permutation (Black and Rogaway 2002, cycle walking). Good for shuffling epochs, not for cryptography.

    Args:
      key: a JAX key.
      n: rows, at least 1; a Python integer below 2³¹.
    """
    high_bits = max(n - 1, 1).bit_length() // 2
    low_bits = max(n - 1, 1).bit_length() - high_bits
    keys = jax.random.bits(key, (ORDER_ROUNDS,), jnp.uint32)

    def shuffle(x):
        high, low = x >> low_bits, x & jnp.uint32(2**low_bits - 1)
        for k in range(0, ORDER_ROUNDS, 2):
            high ^= _mix(low ^ keys[k]) & jnp.uint32(2**high_bits - 1)
            low ^= _mix(high ^ keys[k + 1]) & jnp.uint32(2**low_bits - 1)
        return (high << low_bits) | low

    first = shuffle(jnp.arange(n, dtype=jnp.uint32))
    walk = jax.lax.while_loop(lambda x: jnp.any(x >= n), lambda x: jnp.where(x >= n, shuffle(x), x), first)
    return walk.astype(jnp.int32)


def _mix(x):
    """Spreads every bit of a uint32 over all of them (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _draw_below(key, span):
    """Draws from 0…span-1 as the high word of bits·span: randint takes a remainder, which skews wide spans."""
    bits, span = jax.random.bits(key, span.shape, jnp.uint32), span.astype(jnp.uint32)
    bits_low, bits_high, span_low, span_high = bits & 0xFFFF, bits >> 16, span & 0xFFFF, span >> 16
    middle = bits_high * span_low + (bits_low * span_low >> 16)
    other = bits_low * span_high + (middle & 0xFFFF)
    return (bits_high * span_high + (middle >> 16) + (other >> 16)).astype(jnp.int32)


def _count_at_most(value, start, stop, limit, depth):
    """Counts the entries e of [start, stop) whose non-decreasing value(e) is at most `limit`."""
    low, high = start, stop
    for _ in range(depth):
        middle = (low + high) // 2
        below = (low < high) & (value(middle) <= limit)
        low, high = jnp.where(below, middle + 1, low), jnp.where(below, high, middle)
    return low - start
