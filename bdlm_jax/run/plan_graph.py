"""What propagation over the interactions needs on a mesh, a training step of the domain arm: by hand, from counts."""

from typing import NamedTuple

import ml_collections

BOTH_WAYS = 2  # forward, and the same step again for the gradient
BATCH_GATHERS = 2  # a batch's rows are taken from the last layer's, gathered whole, and from those that are trained
BATCH_SUMS = (
    3,
    4,
)  # and their gradients summed over the devices: users and items of two pairs, and of the regularisation


class Propagation(NamedTuple):
    """Of one training step; bytes are a device's."""

    flops: float  # of all devices
    messages: float  # along its own edges, of a layer
    rows: float  # gathered for a layer
    edges: float  # its own: of the graph in both directions, of the epoch, and of what users have seen
    gathered: float  # sent, by the ring formula
    summed: float  # the same, of the batch's gradients


def propagation_needs(config: ml_collections.ConfigDict, n_devices: int) -> Propagation | None:
    """Counts LightGCN's propagation as `domain.cut_graph` cuts it, on the device that has an even share.

    A layer reads the rows of N = U + I nodes, gathered from all devices, and sums along 2·E edges: a multiplication and
    an addition each and column. None where the config has no such graph, or `dry_run.n_interactions` is 0.
    """
    c, given = config.domain, config.dry_run
    if c.model != "lightgcn" or not given.n_interactions:
        return None
    row, edges, layers = 4 * config.shared.width, 2 * given.n_interactions, BOTH_WAYS * c.n_layers
    counts, share = (given.n_users, given.n_items), (n_devices - 1) / n_devices
    gathered = row * sum(-(-n // n_devices) * n_devices for n in counts)
    return Propagation(
        flops=2.0 * layers * edges * config.shared.width,
        messages=edges / n_devices * row,
        rows=gathered,
        edges=(edges * 12 + given.n_interactions * 12) / n_devices,
        gathered=(layers + BATCH_GATHERS) * gathered * share,
        summed=2 * row * sum(times * n for times, n in zip(BATCH_SUMS, counts)) * share,
    )


def describe_propagation(config: ml_collections.ConfigDict, n_devices: int, *, link: float) -> list[str]:
    """Writes `propagation_needs` as a table; `link` is a device's bytes/s in and out together."""
    if not (found := propagation_needs(config, n_devices)):
        return []
    what = f"{config.dry_run.n_interactions:,} interactions, {config.domain.n_layers} layers"
    lines = [
        "",
        f"| propagation over {what}, one step of the domain arm | |",
        "|---|---:|",
        f"| FLOPs, all devices | {found.flops / 1e12:,.3f} T |",
        f"| messages along its edges, a layer, a device | {found.messages / 1e9:,.3f} GB |",
        f"| gathered rows, a layer, a device | {found.rows / 1e9:,.3f} GB |",
        f"| its edges, and the interactions that it draws from | {found.edges / 1e9:,.3f} GB |",
    ]
    if n_devices > 1:
        least = 2e3 * (found.gathered + found.summed) / link
        lines += [
            f"| all-gather of rows, a device | {found.gathered / 1e9:,.3f} GB |",
            f"| all-reduce of the batch's gradients, a device | {found.summed / 1e9:,.3f} GB |",
            f"| least time of moving at {link / 2e9:,.0f} GB/s | {least:.3f} ms |",
        ]
    return lines
