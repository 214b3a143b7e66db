"""What propagation over the interactions needs on a mesh, a training step of the domain arm: by hand, from counts."""

import ml_collections

PASSES = 2  # forward, and the same step again for the gradient


def propagation_needs(config: ml_collections.ConfigDict, n_devices: int) -> dict[str, float]:
    """Counts LightGCN's propagation in one step as `domain.cut_graph` cuts it, on the device that has an even share.

    A layer reads the rows of N = U + I nodes, gathered from all devices, and sums along 2·E edges: a multiplication and
    an addition each and column. The last layer's rows are gathered too, for the batch. {} where the config has no such
    graph, or `dry_run.n_interactions` is 0.
    """
    c, given = config.domain, config.dry_run
    if c.model != "lightgcn" or not given.n_interactions:
        return {}
    width, edges, steps = config.shared.width, 2 * given.n_interactions, PASSES * c.n_layers
    n_nodes = sum(-(-n // n_devices) * n_devices for n in (given.n_users, given.n_items))
    return {
        "FLOPs, all devices": 2.0 * steps * edges * width,
        "bytes of its edges' messages, a layer": edges / n_devices * width * 4,
        "bytes of the gathered rows, a layer": n_nodes * width * 4,
        "bytes of the edges, on every device whole": edges * 12,
        "bytes moved, all-gather of rows": (steps + 1) * n_nodes * width * 4 * (n_devices - 1) / n_devices,
    }


def describe_propagation(config: ml_collections.ConfigDict, n_devices: int, *, link: float) -> list[str]:
    """Writes `propagation_needs` as a table; `link` is a device's bytes/s in and out together."""
    if not (found := propagation_needs(config, n_devices)):
        return []
    *bytes_held, moved = list(found.items())[1:]
    layers, edges = config.domain.n_layers, config.dry_run.n_interactions
    return [
        "",
        f"| propagation over {edges:,} interactions, {layers} layers, one step of the domain arm | |",
        "|---|---:|",
        f"| FLOPs, all devices | {found['FLOPs, all devices'] / 1e12:,.3f} T |",
        *[f"| {name.removeprefix('bytes of ')}, a device | {value / 1e9:,.3f} GB |" for name, value in bytes_held],
        f"| {moved[0].removeprefix('bytes moved, ')}, a device | {moved[1] / 1e9:,.3f} GB |",
        *(
            [f"| least time of moving at {link / 2e9:,.0f} GB/s | {moved[1] * 2e3 / link:.3f} ms |"]
            if n_devices > 1
            else []
        ),
    ]
