"""The interaction graph and one exact step of propagation over it, Â·E with Â = D^-½ A D^-½.

Â is symmetric, so the gradient of a step is the step itself: no backend needs a transposed copy or saves anything for
the backward pass. Three backends give the same numbers; which is fastest depends on the device and the graph's size.
"""

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import scipy.sparse

from bdlm_jax.types import Array, InputError

BACKENDS = ("auto", "segment", "dense", "host")

# Measured on 2 cores at D = 64: the dense product costs about 1.3 ns an entry of R, the host's threads about 14 ns an
# edge and half a millisecond a call. On an accelerator the dense product wins while R fits comfortably.
ENTRIES_PER_EDGE_CPU = 12
ENTRIES_PER_CALL_CPU = 2**18
DENSE_ENTRIES_ACCELERATOR = 2**25

# XLA copies a callback's unaligned operand of 100 KiB or more on its own thread pool, which on a machine of few cores
# is the thread that waits for the callback: a deadlock. Smaller operands are copied in place, so we hand over pieces.
PIECE_BYTES = 96 * 1024


def make_graph(user_E: Array, item_E: Array, *, n_users: int, n_items: int) -> jraph.GraphsTuple:
    """Builds the normalised bipartite graph; item i is node n_users + i.

    An edge u-i weighs 1/√(deg(u)·deg(i)) in both directions; a repeated pair counts once; a node without interactions
    gets a self-loop of weight 1, so that propagation returns its own row (the self-loop is ours).

    Args:
      user_E: (E,) user indices of the training interactions.
      item_E: (E,) item indices.
      n_users: U.
      n_items: I.

    Returns:
      A GraphsTuple of numpy arrays, receiver-sorted, `edges` the weights float32.

    Raises:
      InputError: an index out of range, or columns of different lengths.
    """
    user, item = _checked(user_E, "user_E", n_users), _checked(item_E, "item_E", n_items)
    if user.shape != item.shape:
        raise InputError(f"user_E has {user.size} rows and item_E {item.size}: give one item to each user.")
    pairs = np.unique(user * n_items + item)
    user, item = pairs // n_items, pairs % n_items + n_users
    n_nodes = n_users + n_items
    degree = np.bincount(np.concatenate([user, item]), minlength=n_nodes)
    weight = 1.0 / np.sqrt(degree[user] * degree[item])
    alone = np.flatnonzero(degree == 0)
    senders = np.concatenate([item, user, alone])
    receivers = np.concatenate([user, item, alone])
    weights = np.concatenate([weight, weight, np.ones(alone.size)])
    order = np.lexsort((senders, receivers))
    return jraph.GraphsTuple(
        nodes=None,
        edges=weights[order].astype(np.float32),
        senders=senders[order].astype(np.int32),
        receivers=receivers[order].astype(np.int32),
        globals=None,
        n_node=np.array([n_nodes], np.int32),
        n_edge=np.array([senders.size], np.int32),
    )


def make_propagate(
    graph: jraph.GraphsTuple, *, n_users: int, n_items: int, backend: str = "auto"
) -> Callable[[Array, Array], tuple[Array, Array]]:
    """Compiles the graph into one layer of propagation, differentiable in reverse mode to any order.

    Args:
      graph: from `make_graph`.
      n_users: U.
      n_items: I.
      backend: "segment" gathers and sums over edges (`jraph.segment_sum`); "dense" multiplies by R (U, I); "host" runs
        scipy's CSR product in threads through `jax.pure_callback` (CPU only); "auto" takes the one measured as fastest.

    Returns:
      propagate(user_UD, item_ID) -> (user_UD, item_ID), the two halves of Â·E, in the dtype of the input.

    Raises:
      InputError: an unknown backend, "host" on an accelerator, or a graph of another size.
    """
    if backend not in BACKENDS:
        raise InputError(f"propagation backend {backend!r} is unknown: choose one of {', '.join(BACKENDS)}.")
    if int(graph.n_node[0]) != n_users + n_items:
        raise InputError(f"the graph has {int(graph.n_node[0])} nodes, not {n_users} users and {n_items} items.")
    if backend == "host" and jax.default_backend() != "cpu":
        raise InputError("propagation backend 'host' runs on the CPU only: choose 'auto', 'dense' or 'segment'.")
    if backend == "auto":
        backend = choose_backend(n_users=n_users, n_items=n_items, n_edges=int(graph.n_edge[0]) // 2)
    make = {"segment": _segment_backend, "dense": _dense_backend, "host": _host_backend}[backend]
    apply = make(graph, n_users, n_items)

    @jax.custom_vjp
    def propagate(user_UD, item_ID):
        return apply(user_UD, item_ID)

    propagate.defvjp(lambda user, item: (apply(user, item), None), lambda _, gradients: propagate(*gradients))
    return propagate


def choose_backend(*, n_users: int, n_items: int, n_edges: int) -> str:
    """Returns the backend that "auto" stands for on the present device; n_edges counts interactions once."""
    entries = n_users * n_items
    # Several CPU devices (fake ones, mostly) would queue for the same host threads.
    if jax.default_backend() != "cpu" or jax.local_device_count() > 1:
        return "dense" if entries <= DENSE_ENTRIES_ACCELERATOR else "segment"
    return "dense" if entries <= ENTRIES_PER_EDGE_CPU * n_edges + ENTRIES_PER_CALL_CPU else "host"


def _segment_backend(graph, n_users, n_items):
    senders, receivers, weights = (jnp.asarray(x) for x in (graph.senders, graph.receivers, graph.edges))

    def apply(user_UD, item_ID):
        node_ND = jnp.concatenate([user_UD, item_ID])
        messages_ED = weights[:, None].astype(node_ND.dtype) * node_ND[senders]
        node_ND = jraph.segment_sum(messages_ED, receivers, n_users + n_items, indices_are_sorted=True)
        return node_ND[:n_users], node_ND[n_users:]

    return apply


def _dense_backend(graph, n_users, n_items):
    matrix_UI, loop_U, loop_I = _bipartite(graph, n_users, n_items)
    matrix_UI, loop_U, loop_I = (
        jnp.asarray(matrix_UI.toarray()),
        jnp.asarray(loop_U)[:, None],
        jnp.asarray(loop_I)[:, None],
    )

    def apply(user_UD, item_ID):
        matrix = matrix_UI.astype(user_UD.dtype)
        user = jnp.matmul(matrix, item_ID, precision="highest") + loop_U.astype(user_UD.dtype) * user_UD
        item = jnp.matmul(matrix.T, user_UD, precision="highest") + loop_I.astype(item_ID.dtype) * item_ID
        return user, item

    return apply


def _host_backend(graph, n_users, n_items):
    matrix_UI, loop_U, loop_I = _bipartite(graph, n_users, n_items)
    matrix_IU = matrix_UI.T.tocsr()
    alone_U, alone_I = np.flatnonzero(loop_U), np.flatnonzero(loop_I)
    blocks = max(1, _cores() // 2)
    to_user, to_item = _row_blocks(matrix_UI, blocks), _row_blocks(matrix_IU, blocks)
    pool = _thread_pool()

    def join(results, rows, alone):
        out = results[0] if len(results) == 1 else np.concatenate(results)
        out[alone] += rows[alone]  # self-loops have weight 1
        return out

    # Nothing of JAX may run in here: the thread that would run it may be the one that waits for this function.
    def multiply(user_pieces, item_pieces):
        user = np.concatenate([np.asarray(piece) for piece in user_pieces]).reshape(n_users, -1)
        item = np.concatenate([np.asarray(piece) for piece in item_pieces]).reshape(n_items, -1)
        jobs = [pool.submit(block.__matmul__, item) for block in to_user]
        jobs += [pool.submit(block.__matmul__, user) for block in to_item[:-1]]
        last = to_item[-1] @ user
        done = [job.result() for job in jobs] + [last]
        return join(done[:blocks], user, alone_U), join(done[blocks:], item, alone_I)

    def pieces(rows):
        flat, step = rows.astype(jnp.float32).reshape(-1), PIECE_BYTES // 4
        return [flat[start : start + step] for start in range(0, flat.shape[0], step)]

    def apply(user_UD, item_ID):
        shapes = jax.tree.map(lambda rows: jax.ShapeDtypeStruct(rows.shape, jnp.float32), (user_UD, item_ID))
        out = jax.pure_callback(multiply, shapes, pieces(user_UD), pieces(item_ID), vmap_method="sequential")
        return out[0].astype(user_UD.dtype), out[1].astype(item_ID.dtype)

    return apply


def _bipartite(graph, n_users, n_items):
    """Splits the graph into R (U, I) as CSR and the self-loop weights of users (U,) and items (I,)."""
    senders, receivers, weights = (np.asarray(x) for x in (graph.senders, graph.receivers, graph.edges))
    loop_N = np.zeros(n_users + n_items, np.float32)
    own = senders == receivers
    loop_N[receivers[own]] = weights[own]
    into_user = (receivers < n_users) & ~own
    matrix_UI = scipy.sparse.csr_matrix(
        (weights[into_user], (receivers[into_user], senders[into_user] - n_users)), shape=(n_users, n_items)
    )
    return matrix_UI, loop_N[:n_users], loop_N[n_users:]


def _row_blocks(matrix, blocks):
    bounds = np.searchsorted(matrix.indptr, np.linspace(0, matrix.nnz, blocks + 1))
    bounds[0], bounds[-1] = 0, matrix.shape[0]
    return [matrix[start:stop] for start, stop in itertools.pairwise(bounds)]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _thread_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_cores(), thread_name_prefix="propagate")


def _checked(index, name, size):
    index = np.asarray(index)
    if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
        raise InputError(f"{name} must be one column of integers, got shape {index.shape} of {index.dtype}.")
    index = index.astype(np.int64)
    bad = np.flatnonzero((index < 0) | (index >= size))
    if bad.size:
        raise InputError(f"{name}[{bad[0]}] is {index[bad[0]]}, outside 0…{size - 1}: map the raw ids first.")
    return index
