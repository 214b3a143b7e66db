"""A step of propagation cut over a mesh: every device sums into its own block of rows what all rows send there.

An edge lies on the device of its receiver alone. The tables are gathered whole for a step, and given up again: N rows
are less than the messages of E edges, which no device holds but its own. Â is symmetric, so that the gradient is the
step itself, and nothing is scattered back.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from bdlm_jax.runtime import sharding
from bdlm_jax.types import Array


def cut_propagate(
    graph: jraph.GraphsTuple, *, n_users: int, n_items: int, mesh: Mesh
) -> Callable[[Array, Array], tuple[Array, Array]]:
    """Returns apply(user_UD, item_ID) -> (user_UD, item_ID), Â·E with its rows cut over all axes of the mesh."""
    over = PartitionSpec(mesh.axis_names)
    block_U, block_I = (-(-n // mesh.size) for n in (n_users, n_items))
    edges = destination_blocks(graph, n_users=n_users, n_parts=mesh.size, block_U=block_U, block_I=block_I)

    def block(user_UD, item_ID, senders_1E, receivers_1E, weights_1E):
        whole = [jax.lax.all_gather(rows, mesh.axis_names, tiled=True) for rows in (user_UD, item_ID)]
        node_ND = jnp.concatenate(whole)
        messages_ED = weights_1E[0, :, None].astype(node_ND.dtype) * node_ND[senders_1E[0]]
        own_ND = jraph.segment_sum(messages_ED, receivers_1E[0], block_U + block_I, indices_are_sorted=True)
        return own_ND[:block_U], own_ND[block_U:]

    # What each device computes from the same gathered rows is its own: there is nothing for the check to follow.
    cut = jax.shard_map(block, mesh=mesh, in_specs=(over,) * 5, out_specs=over, check_vma=False)

    def apply(user_UD, item_ID):
        sizes = (user_UD, block_U), (item_ID, block_I)
        padded = [jnp.pad(rows, ((0, mesh.size * block - len(rows)), (0, 0))) for rows, block in sizes]
        user, item = cut(*padded, *sharding.own_part(edges))
        return user[: len(user_UD)], item[: len(item_ID)]

    return apply


def destination_blocks(
    graph: jraph.GraphsTuple, *, n_users: int, n_parts: int, block_U: int, block_I: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorts edges by the part that holds their receiver -> senders, receivers, weights, (n_parts, E of the largest).

    A part holds `block_U` users and then `block_I` items. Senders are rows of all users and then all items, each padded
    to whole blocks; receivers rows of the part. What pads weighs 0, at the part's last row.
    """

    def place(node):
        """(part, row in it)"""
        user = node < n_users
        at, size = np.where(user, node, node - n_users), np.where(user, block_U, block_I)
        return at // size, at % size + np.where(user, 0, block_U)

    part, row = place(graph.receivers)
    order = np.lexsort((row, part))
    count = np.bincount(part, minlength=n_parts)
    within = np.arange(len(order)) - np.repeat(np.cumsum(count) - count, count)
    sent = np.where(graph.senders < n_users, graph.senders, graph.senders - n_users + n_parts * block_U)
    blocks = []
    for values, padding in ((sent, 0), (row, block_U + block_I - 1), (graph.edges, 0.0)):
        block_PE = np.full((n_parts, max(1, count.max())), padding, values.dtype)
        block_PE[part[order], within] = values[order]
        blocks.append(block_PE)
    return blocks[0].astype(np.int32), blocks[1].astype(np.int32), blocks[2]
