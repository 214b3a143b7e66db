"""What each user has seen, as sorted rows on the device; negatives drawn past it, exactly and without rejection.

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
# A search's levels that XLA may fuse. On CPUs (JAX 0.11, 0.12) compiling takes longer by a factor for each level, as if
# each were written again for what reads it: an epoch of MovieLens-1M, of 12 or so, had not compiled in ten minutes.
FUSED_LEVELS = 3
MARKED = 2**16  # seen items that `mark_seen` looks at together, at most


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


def make_seen(user: Array, item: Array, n_users: int, n_items: int, *, negatives: bool = True) -> Seen:
    """Sorts the items that each user has seen into rows on the device; pairs may repeat and come in any order.

    Where `negatives` shall be drawn, a user who has seen everything is refused.
    """
    user, item = np.asarray(user, np.int64), np.asarray(item, np.int64)
    for name, index, size in (("user", user, n_users), ("item", item, n_items)):
        if index.size and (index.min() < 0 or index.max() >= size):
            raise InputError(f"{name} indices reach from {index.min()} to {index.max()}, outside 0…{size - 1}.")
    pairs = np.sort(user * n_items + item)
    pairs = pairs[np.diff(pairs, prepend=-1) > 0]  # np.unique hashes first, which is ten times slower here
    count_U = np.bincount(pairs // n_items, minlength=n_users)
    if negatives and n_users and count_U.max() >= n_items:
        raise InputError(
            f"user {int(count_U.argmax())} has seen all {n_items} items, so no negative exists: leave that user out."
        )
    return Seen(
        indptr=jnp.asarray(np.concatenate([[0], np.cumsum(count_U)]), jnp.int32),
        item=jnp.asarray(pairs % n_items, jnp.int32),
        n_items=n_items,
        depth=int(count_U.max(initial=0)).bit_length(),
    )


def mark_seen(seen: Seen, user_N: Array, pick_C: Array | None = None) -> Array:
    """Marks what each of some users has seen: (N, I) bool, or (N, C) of the different items `pick_C`.

    The rows are gone through in parts of `MARKED` items, as many as there are: no array of users × items is kept, and a
    long row among short ones costs its own length alone (ours).
    """
    start_N, count_N = seen.indptr[user_N], seen.indptr[user_N + 1] - seen.indptr[user_N]
    n_rows, width = len(user_N), seen.n_items if pick_C is None else len(pick_C)
    usual = 2 * n_rows * len(seen.item) // (len(seen.indptr) - 1)  # twice the mean: mostly one part is enough
    part = min(MARKED, max(usual, 1))
    end_N = jnp.cumsum(count_N)
    # An item that was not picked is placed behind the last column, where nothing is written.
    place_I = None if pick_C is None else jnp.full(seen.n_items, width).at[pick_C].set(jnp.arange(width))

    def mark(carry):
        first, seen_NC = carry
        entry_P = first + jnp.arange(part)
        row_P = jnp.searchsorted(end_N, entry_P, side="right")
        at_P = jnp.minimum(row_P, n_rows - 1)
        item_P = seen.item.at[entry_P - (end_N - count_N - start_N)[at_P]].get(mode="fill", fill_value=seen.n_items)
        column_P = item_P if place_I is None else place_I.at[item_P].get(mode="fill", fill_value=width)
        return first + part, seen_NC.at[row_P, column_P].set(True, mode="drop")

    empty_NC = jnp.zeros((n_rows, width), bool)
    return jax.lax.while_loop(lambda carry: carry[0] < end_N[-1], mark, (jnp.int32(0), empty_NC))[1]


def make_popularity(seen: Seen, degree_I: Array, *, alpha: float = 0.75) -> Popularity:
    """Turns degrees into integer weights ∝ max(degree, 1)^alpha, at least 1 each, so that draws are exact.

    0 is uniform, 1 the popularity itself; 0.75 is word2vec's.
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


def sample_negatives(key: Array, seen: Seen, user_B: Array, popularity: Popularity | None = None) -> Array:
    """Draws one int32 item for each entry of `user_B` (any shape), over the items which that user has not seen.

    Uniform, each unseen item's probability exact to 2⁻³², the grain of one random word; or ∝ its popularity, by the
    same search over weight instead of count, which integers keep exact (ours).
    """
    start, stop = seen.indptr[user_B], seen.indptr[user_B + 1]
    if popularity is None:
        rank = _draw_below(key, seen.n_items - (stop - start))
        return rank + _count_at_most(lambda e: seen.item[e] - (e - start), start, stop, rank, seen.depth)
    mass = _draw_below(key, popularity.unseen_U[user_B])
    count = _count_at_most(lambda e: popularity.unseen_below[e], start, stop, mass, seen.depth)
    # Weight of the first `count` seen items: below the next seen one, total less unseen; in the whole row, likewise.
    inside = start + count < stop
    at = jnp.where(inside, start + count, 0)
    total = jnp.where(inside, popularity.below[seen.item[at]], popularity.below[-1])
    unseen = jnp.where(inside, popularity.unseen_below[at], popularity.unseen_U[user_B])
    return (jnp.searchsorted(popularity.below, mass + total - unseen, side="right") - 1).astype(jnp.int32)


def random_order(key: Array, n: int, *, first: int | None = None) -> Array:
    """Returns a pseudo-random permutation of 0…n-1 (n < 2³¹), or its `first` entries at the cost of those alone.

    A keyed Feistel network permutes 0…2^k - 1; what falls outside is sent through again until it lands inside, which
    keeps it a permutation (Black and Rogaway 2002, cycle walking). Without sorting: on a CPU 1 M rows take a sort's
    tenth. Good for shuffling epochs, not for cryptography.
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

    start = shuffle(jnp.arange(n if first is None else first, dtype=jnp.uint32))
    walk = jax.lax.while_loop(lambda x: jnp.any(x >= n), lambda x: jnp.where(x >= n, shuffle(x), x), start)
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
    for level in range(depth):
        middle = (low + high) // 2
        below = (low < high) & (value(middle) <= limit)
        low, high = jnp.where(below, middle + 1, low), jnp.where(below, high, middle)
        if level % FUSED_LEVELS == FUSED_LEVELS - 1 or level == depth - 1:
            low, high = jax.lax.optimization_barrier((low, high))
    return low - start
