"""The interaction graph and one exact step of propagation over it, Â·E with Â = D^-½ A D^-½.

Â is symmetric, so the gradient of a step is the step itself: no backend needs a transposed copy or saves anything for
the backward pass. Three backends give the same numbers; which is fastest depends on the device and the graph's size.
On a mesh its edges are cut instead (`cut_graph`).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import jraph
import numpy as np

from bdlm_jax.domain.cut_graph import cut_propagate
from bdlm_jax.runtime import sharding
from bdlm_jax.types import Array, InputError

# Measured on 2 cores at D = 64: the dense product costs about 1.3 ns an entry of R, the gathers about 14 ns an edge. On
# an H200 sums over edges take .14 ms on ML-1M, and a matrix of its size (22 million entries) within a program took XLA
# most of a minute to compile: dense is for small ones there.
ENTRIES_PER_EDGE_CPU = 12
ENTRIES_PER_CALL_CPU = 2**18
DENSE_ENTRIES_ACCELERATOR = 2**20

# Each width is compiled by itself, which costs time; fewer of them pad more.
BLOCK_WIDTHS = (1, 2, 4, 8, 16)


def make_graph(user_E: Array, item_E: Array, *, n_users: int, n_items: int) -> jraph.GraphsTuple:
    """Builds the normalised bipartite graph; item i is node n_users + i.

    An edge u-i weighs 1/√(deg(u)·deg(i)) in both directions; a repeated pair counts once; a node without interactions
    gets a self-loop of weight 1, so that propagation returns its own row (the self-loop is ours). Arrays are NumPy's,
    edges sorted by receiver, `edges` the float32 weights.
    """
    user, item = _checked(user_E, "user_E", n_users), _checked(item_E, "item_E", n_items)
    if user.shape != item.shape:
        raise InputError(f"user_E has {user.size} rows and item_E {item.size}: give one item to each user.")
    n_nodes = n_users + n_items
    return _normalised(user, item + n_users, n_nodes)


def make_item_graph(left_E: Array, right_E: Array, *, n_items: int) -> jraph.GraphsTuple:
    """Builds the normalised graph of items that are joined in pairs: as `make_graph`, its users being none."""
    left, right = _checked(left_E, "left_E", n_items), _checked(right_E, "right_E", n_items)
    apart = left != right
    return _normalised(left[apart], right[apart], n_items)


def _normalised(left: np.ndarray, right: np.ndarray, n_nodes: int) -> jraph.GraphsTuple:
    degree = np.bincount(left, minlength=n_nodes) + np.bincount(right, minlength=n_nodes)
    alone = np.flatnonzero(degree == 0)
    # Sorted as whole numbers, receiver before sender: many times faster than by two columns, for millions of edges.
    edge = np.concatenate([left * n_nodes + right, right * n_nodes + left, alone * n_nodes + alone])
    edge.sort()
    edge = edge[np.diff(edge, prepend=-1) > 0]
    receivers, senders = np.divmod(edge, n_nodes)
    degree = np.bincount(receivers, minlength=n_nodes)
    weights = 1.0 / np.sqrt(degree[receivers] * degree[senders])
    return jraph.GraphsTuple(
        nodes=None,
        edges=weights.astype(np.float32),
        senders=senders.astype(np.int32),
        receivers=receivers.astype(np.int32),
        globals=None,
        n_node=np.array([n_nodes], np.int32),
        n_edge=np.array([senders.size], np.int32),
    )


def make_propagate(
    graph: jraph.GraphsTuple, *, n_users: int, n_items: int, backend: str = "auto"
) -> Callable[[Array, Array], tuple[Array, Array]]:
    """Compiles the graph into propagate(user_UD, item_ID) -> (user_UD, item_ID), the two halves of Â·E.

    Differentiable in reverse mode to any order, in the dtype of the input. "segment" gathers and sums over edges
    (`jraph.segment_sum`); "dense" multiplies by R (U, I); "gather" sums fixed-width blocks of neighbours, for the
    weights of `make_graph` only; "auto" takes the one measured as fastest. On a mesh rows may be padded already
    (`sharding.pad_rows`), and stay so: between two layers they are then gathered once.
    """
    if backend not in BACKENDS:
        raise InputError(f"propagation backend {backend!r} is unknown: choose one of {', '.join(BACKENDS)}.")
    if int(graph.n_node[0]) != n_users + n_items:
        raise InputError(f"the graph has {int(graph.n_node[0])} nodes, not {n_users} users and {n_items} items.")
    if not n_users and backend in ("auto", "dense"):  # a graph of items is no matrix of users by items
        backend = "gather" if jax.default_backend() == "cpu" else "segment"
    if backend == "auto":
        backend = choose_backend(n_users=n_users, n_items=n_items, n_edges=int(graph.n_edge[0]) // 2)
    if backend == "gather":
        _check_weights(graph)
    cut = functools.cache(lambda mesh: cut_propagate(graph, n_users=n_users, n_items=n_items, mesh=mesh))

    @functools.cache
    def whole():  # made where it is first used: on a mesh no device shall hold all edges
        with jax.ensure_compile_time_eval():
            return _MAKE[backend](graph, n_users, n_items)

    def apply(user_UD, item_ID):
        mesh = sharding.traced_mesh()
        return (whole() if mesh is None or mesh.size == 1 else cut(mesh))(user_UD, item_ID)

    @jax.custom_vjp
    def propagate(user_UD, item_ID):
        return apply(user_UD, item_ID)

    propagate.defvjp(lambda user, item: (apply(user, item), None), lambda _, gradients: propagate(*gradients))
    return propagate


def choose_backend(*, n_users: int, n_items: int, n_edges: int) -> str:
    """Returns the backend that "auto" stands for on the present device; n_edges counts interactions once."""
    entries = n_users * n_items
    if jax.default_backend() != "cpu":
        return "dense" if entries <= DENSE_ENTRIES_ACCELERATOR else "segment"
    return "dense" if entries <= ENTRIES_PER_EDGE_CPU * n_edges + ENTRIES_PER_CALL_CPU else "gather"


def _segment_backend(graph, n_users, n_items):
    senders, receivers, weights = (jnp.asarray(x) for x in (graph.senders, graph.receivers, graph.edges))

    def apply(user_UD, item_ID):
        node_ND = jnp.concatenate([user_UD, item_ID])
        messages_ED = weights[:, None].astype(node_ND.dtype) * node_ND[senders]
        node_ND = jraph.segment_sum(messages_ED, receivers, n_users + n_items, indices_are_sorted=True)
        return node_ND[:n_users], node_ND[n_users:]

    return apply


def _dense_backend(graph, n_users, n_items):
    senders, receivers, weights = (np.asarray(x) for x in (graph.senders, graph.receivers, graph.edges))
    own = senders == receivers
    loop_N1 = np.zeros((n_users + n_items, 1), np.float32)
    loop_N1[receivers[own], 0] = weights[own]
    matrix_UI = np.zeros((n_users, n_items), np.float32)
    edge = (receivers < n_users) & ~own
    np.add.at(matrix_UI, (receivers[edge], senders[edge] - n_users), weights[edge])
    matrix_UI, loop_U1, loop_I1 = (jnp.asarray(x) for x in (matrix_UI, loop_N1[:n_users], loop_N1[n_users:]))

    def apply(user_UD, item_ID):
        matrix = matrix_UI.astype(user_UD.dtype)
        user = jnp.matmul(matrix, item_ID, precision="highest") + loop_U1.astype(user_UD.dtype) * user_UD
        item = jnp.matmul(matrix.T, user_UD, precision="highest") + loop_I1.astype(item_ID.dtype) * item_ID
        return user, item

    return apply


def _gather_backend(graph, n_users, n_items):
    """Sums neighbours as a tree: a list is cut into blocks of a few fixed widths, then so is the list of their sums."""
    senders, receivers = np.asarray(graph.senders), np.asarray(graph.receivers)
    scale_N = 1.0 / np.sqrt(np.bincount(receivers, minlength=n_users + n_items))
    levels, last_N = _neighbour_blocks(senders, receivers, n_users + n_items)
    levels, scale_N1 = jax.tree.map(jnp.asarray, levels), jnp.asarray(scale_N, jnp.float32)[:, None]

    def rows_of(table, index):
        return table.at[index].get(mode="promise_in_bounds")

    def closed(table):
        # Padded with what fills blocks, and made once: else XLA may fuse a table into what reads it, and makes its rows
        # again for each reader; on some graphs a step then takes ten times as long.
        return jax.lax.optimization_barrier(jnp.pad(table, ((0, 1), (0, 0))))

    def apply(user_UD, item_ID):
        scale = scale_N1.astype(jnp.promote_types(user_UD.dtype, jnp.float32))
        table = closed(scale * jnp.concatenate([user_UD, item_ID]))
        for blocks in levels:
            # Sums of separate gathers, because XLA fuses these into one pass and a gather with a reduction it does not.
            sums = [sum(rows_of(table, index) for index in block_WE) for block_WE in blocks]
            table = closed(jnp.concatenate(sums))
        user = scale[:n_users] * rows_of(table, last_N[:n_users])
        item = scale[n_users:] * rows_of(table, last_N[n_users:])
        return jax.lax.optimization_barrier((user.astype(user_UD.dtype), item.astype(item_ID.dtype)))

    return apply


def _neighbour_blocks(senders, receivers, n_nodes):
    """Cuts sorted neighbour lists into blocks, the list of blocks again, and so on until each node has one block.

    Returns (levels, row of every node in the last level). A level is a list of index arrays (W, number of blocks of
    width W) into the rows of the level before; the index behind its last row pads.
    """
    levels, n_rows, widest = [], n_nodes, BLOCK_WIDTHS[-1]
    while True:
        degree_N = np.bincount(receivers, minlength=n_nodes)
        first_N = np.cumsum(degree_N) - degree_N
        blocks_N = -(-degree_N // widest)
        place = np.arange(receivers.size) - first_N[receivers]
        block = (np.cumsum(blocks_N) - blocks_N)[receivers] + place // widest
        padded = np.full((blocks_N.sum(), widest), n_rows, np.int32)
        padded[block, place % widest] = senders
        width = np.array(BLOCK_WIDTHS)[np.searchsorted(BLOCK_WIDTHS, np.bincount(block))]
        levels.append([padded[width == w, :w].T for w in BLOCK_WIDTHS if (width == w).any()])
        senders = np.argsort(np.argsort(width, kind="stable"), kind="stable").astype(np.int32)
        receivers, n_rows = np.repeat(np.arange(n_nodes), blocks_N), len(padded)
        if n_rows == n_nodes:
            return levels, senders


def _check_weights(graph):
    scale_N = 1.0 / np.sqrt(np.bincount(graph.receivers, minlength=int(graph.n_node[0])))
    if not np.allclose(graph.edges, scale_N[graph.senders] * scale_N[graph.receivers], rtol=1e-5):
        raise InputError("propagation backend 'gather' takes the weights of make_graph only: choose 'segment'.")


def _checked(index, name, size):
    index = np.asarray(index)
    if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
        raise InputError(f"{name} must be one column of integers, got shape {index.shape} of {index.dtype}.")
    index = index.astype(np.int64)
    bad = np.flatnonzero((index < 0) | (index >= size))
    if bad.size:
        raise InputError(f"{name}[{bad[0]}] is {index[bad[0]]}, outside 0…{size - 1}: map the raw ids first.")
    return index


_MAKE = {"segment": _segment_backend, "dense": _dense_backend, "gather": _gather_backend}
BACKENDS = ("auto", *_MAKE)
