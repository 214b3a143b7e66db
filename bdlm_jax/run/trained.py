"""Which parameters move in which phases: the optimisers' groups by path, and the table of them that a run tells."""

import math
from collections.abc import Mapping

import jax
import ml_collections

from bdlm_jax.domain.arm import DomainArm
from bdlm_jax.mutual.optimizer import FROZEN, Rules, label_params
from bdlm_jax.types import Params, leaf_name

TEXT_ROWS = r"lm/(embedding|head|position_embedding)"


def lm_rules(trains: str, *, train_shared: bool, train_user: bool = True, rows_apart: bool = False) -> Rules:
    """The optimiser's groups in the LM's phases.

    `trains` is "full" (the decoder), "lora" (its adapters) or "bridge" (neither); the bridge trains in all three.
    Without `train_user` the table of users rests though that of items trains; with `rows_apart` the decoder's rows of
    text tokens are a group of their own, "text_rows".
    """
    apart = [(TEXT_ROWS, "text_rows")] if rows_apart and trains == "full" else []
    return [
        *apart,
        (r"shared/user", "shared" if train_shared and train_user else FROZEN),
        (r"shared/.*", "shared" if train_shared else FROZEN),
        (r"domain/.*", FROZEN),
        (r"lm/bridge/.*", "bridge"),
        (r"lm/lora/alpha", FROZEN),
        (r"lm/lora/.*", "lm" if trains == "lora" else FROZEN),
        (r"lm/.*", "lm" if trains == "full" else FROZEN),
    ]


def domain_rules(arm: DomainArm, *, train_shared: bool) -> Rules:
    """The optimiser's groups in the domain arm's phases."""
    rules = [(r"shared/.*", "domain" if train_shared else FROZEN), (r"domain/.*", "domain"), (r"lm/.*", FROZEN)]
    # Of a model of histories no loss reads the table of users, which AdamW would decay.
    return [(r"shared/user", FROZEN), *rules] if arm.windows else rules


def reaches_users(config: ml_collections.ConfigDict, arm: DomainArm, *, reads: str) -> bool:
    """Says whether the LM's loss reaches the table of users: where none is shown, the propagation alone leads there."""
    return (reads == "propagated" and not arm.windows) or config.prompts.user_dropout < 1


def rows_apart(config: ml_collections.ConfigDict, trains: str) -> bool:
    """Says whether the decoder's rows of text tokens move at a rate of their own."""
    return trains == "full" and config.lm.text_row_rate != 1


def bdlm_rules(config: ml_collections.ConfigDict, arm: DomainArm) -> dict[str, Rules]:
    """The groups of both kinds of BDLM's phases."""
    by, trains = config.shared.trained_by, config.lm.trains
    reached = reaches_users(config, arm, reads=config.mutual.reads)
    shared = {"train_shared": by in ("both", "lm"), "train_user": reached}
    return {
        "LM phases": lm_rules(trains, **shared, rows_apart=rows_apart(config, trains)),
        "domain phases": domain_rules(arm, train_shared=by in ("both", "domain")),
    }


def group_table(params: Params, rules: Mapping[str, Rules]) -> list[str]:
    """Lines with every part of a tree of arrays (or of their shapes), its size, and its group in each kind of phase."""
    parts: dict[tuple, int] = {}
    labels = [jax.tree.leaves(label_params(params, each)) for each in rules.values()]
    for (path, leaf), *groups in zip(jax.tree_util.tree_leaves_with_path(params), *labels):
        key = ("/".join(leaf_name(path).split("/")[:2]), *groups)
        parts[key] = parts.get(key, 0) + math.prod(leaf.shape)
    total = sum(parts.values())
    rows = [["parameters of BDLM", "count", *rules]]
    rows += [[part, f"{count:,d}", *groups] for (part, *groups), count in parts.items()]
    moving = [sum(n for key, n in parts.items() if key[column] != FROZEN) for column in range(1, len(rules) + 1)]
    rows.append(["all, and what trains", f"{total:,d}", *(f"{n:,d} ({n / max(total, 1):.1%})" for n in moving)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([row[0].ljust(widths[0]), row[1].rjust(widths[1]), *map(str.ljust, row[2:], widths[2:])]).rstrip()
        for row in rows
    ]
