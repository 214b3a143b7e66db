"""Optimiser groups chosen by parameter path patterns: what trains, how fast, and what stays frozen."""

import logging
import re

import jax
import optax

from bdlm_jax.types import InputError, Params

_LOG = logging.getLogger(__name__)
FROZEN = "frozen"


def path_name(path) -> str:
    """Joins a JAX key path into "lm/layers/attention/q_proj"."""
    return "/".join(str(getattr(part, "key", getattr(part, "idx", part))) for part in path)


def label_params(params: Params, rules: list[tuple[str, str]]) -> Params:
    """Labels every leaf with the group of the first rule whose pattern matches its whole path.

    Args:
      params: a pytree.
      rules: (regular expression, group name) pairs, in order of precedence.

    Returns:
      A pytree of group names.

    Raises:
      InputError: a leaf that no rule matches.
    """

    def label(path, _):
        name = path_name(path)
        for pattern, group in rules:
            if re.fullmatch(pattern, name):
                return group
        raise InputError(
            f"no optimiser rule matches the parameter {name!r}: add a pattern for it, or ('.*', 'frozen')."
        )

    return jax.tree_util.tree_map_with_path(label, params)


def make_optimizer(*, rules: list[tuple[str, str]], groups: dict[str, dict], clip_norm: float | None = None):
    """Builds one optax transformation with a group per pattern.

    Args:
      rules: see `label_params`; a leaf in the group "frozen" does not move and costs no optimiser state.
      groups: {name: {"learning_rate": float or schedule, "weight_decay": float}} of AdamW.
      clip_norm: clip the gradient of all trained leaves together to this norm, or None.

    Returns:
      optax.GradientTransformation.
    """
    transforms = {FROZEN: optax.set_to_zero()}
    for name, options in groups.items():
        transforms[name] = optax.adamw(options["learning_rate"], weight_decay=options.get("weight_decay", 0.0))
    optimizer = optax.multi_transform(transforms, lambda params: label_params(params, rules))
    if clip_norm:
        trained = lambda tree: jax.tree.map(lambda label: label != FROZEN, label_params(tree, rules))  # noqa: E731
        optimizer = optax.chain(optax.masked(optax.clip_by_global_norm(clip_norm), trained), optimizer)

    def init(params: Params):
        _LOG.info("what trains, and what is frozen:\n%s", describe_groups(params, label_params(params, rules)))
        return optimizer.init(params)

    return optimizer._replace(init=init)


def describe_groups(params: Params, labels: Params) -> str:
    """Prints parameters, group and count of what trains and what does not, one line a top-level subtree and group."""
    counts: dict[tuple[str, str], int] = {}
    named = jax.tree_util.tree_flatten_with_path(params)[0]
    for (path, leaf), group in zip(named, jax.tree.leaves(labels)):
        where = "/".join(path_name(path).split("/")[:2])
        counts[where, group] = counts.get((where, group), 0) + leaf.size
    return "\n".join(f"  {where:<28} {group:<10} {count:>12,d}" for (where, group), count in counts.items())
