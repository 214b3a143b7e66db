"""Optimiser groups chosen by parameter path patterns: what trains, how fast, and what stays frozen; and one update."""

import logging
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bdlm_jax.types import InputError, Params, TrainState, leaf_name

_LOG = logging.getLogger(__name__)
FROZEN = "frozen"
SCHEDULES = ("cosine", "linear", "constant")
OPTIMIZERS = ("adamw", "adafactor")
Rules = list[tuple[str, str]]  # (regular expression of a whole path, group), in order of precedence


def label_params(params: Params, rules: Rules) -> Params:
    """Labels every leaf with the group of the first rule whose pattern matches its whole path."""

    def label(path, _):
        name = leaf_name(path)
        for pattern, group in rules:
            if re.fullmatch(pattern, name):
                return group
        raise InputError(
            f"no optimiser rule matches the parameter {name!r}: add a pattern for it, or ('.*', 'frozen')."
        )

    return jax.tree_util.tree_map_with_path(label, params)


def split_trained(params: Params, rules: Rules | None) -> tuple[Any, Callable[[Any, Params], Params]]:
    """Parts what trains from what does not, so that a gradient is only taken, summed and kept where it is used.

    The second of what it returns puts trained leaves back into a tree. Without rules everything trains.
    """
    if rules is None:
        return params, lambda leaves, tree: leaves
    trains = [label != FROZEN for label in jax.tree.leaves(label_params(params, rules))]

    def put(leaves, tree):
        given, (others, structure) = iter(leaves), jax.tree.flatten(tree)
        return structure.unflatten([next(given) if own else other for own, other in zip(trains, others)])

    return [leaf for own, leaf in zip(trains, jax.tree.leaves(params)) if own], put


def make_schedule(kind: str, peak: float, *, warmup: int, steps: int) -> optax.Schedule:
    """Makes a learning rate of `steps` steps: linear warm-up from 0 to the peak, then what `kind` says.

    "cosine" and "linear" go down to a tenth of the peak at the last step; "constant" stays. A warm-up of all steps is
    cut by one, in which a run of a single step learns.
    """
    warmup = min(warmup, steps - 1)
    if kind == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, peak / 10)
    last = peak / 10 if kind == "linear" else peak
    rise, rest = optax.linear_schedule(0.0, peak, warmup), optax.linear_schedule(peak, last, max(1, steps - warmup))
    return optax.join_schedules([rise, rest], [warmup]) if warmup else rest


def make_optimizer(*, rules: Rules, groups: dict[str, dict], clip_norm: float | None = None):
    """Builds one optax transformation with a group per pattern.

    Args:
      rules: see `label_params`; a leaf in the group "frozen" does not move and costs no optimiser state.
      groups: {name: options}; "learning_rate" is a float or a schedule, "weight_decay" is decoupled (default 0),
        "kind" is "adamw" (default) or "adafactor", "master": see `in_float32` (default: not wrapped).
      clip_norm: clip the gradient of all trained leaves together to this norm, or None.
    """
    transforms = {FROZEN: optax.set_to_zero()}
    for name, options in groups.items():
        make = _adafactor if options.get("kind") == "adafactor" else optax.adamw
        transforms[name] = make(options["learning_rate"], weight_decay=options.get("weight_decay", 0.0))
        if options.get("master") is not None:
            transforms[name] = in_float32(transforms[name], keep_master=options["master"])
    optimizer = optax.multi_transform(transforms, lambda params: label_params(params, rules))
    if clip_norm:

        def trained(tree):
            return jax.tree.map(lambda label: label != FROZEN, label_params(tree, rules))

        optimizer = optax.chain(optax.masked(optax.clip_by_global_norm(clip_norm), trained), optimizer)

    def init(params: Params):
        _LOG.info("  %s", describe_groups(params, label_params(params, rules)))
        return optimizer.init(params)

    return optimizer._replace(init=init)


class MasterState(NamedTuple):
    """The float32 weights that the optimiser moves ({} where they are not kept), and the wrapped state."""

    master: Any
    inner: Any


def in_float32(inner: optax.GradientTransformation, *, keep_master: bool) -> optax.GradientTransformation:
    """Runs an optimiser in float32 for weights of fewer bits.

    With master weights, 4 bytes a parameter, a step smaller than a bfloat16's spacing is not lost: it adds up in the
    float32 copy, of which the weights are the rounding (Micikevicius et al. 2018, section 3.1). Without them only the
    moments are float32.
    """

    def wide(tree):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def init(params):
        return MasterState(wide(params) if keep_master else {}, inner.init(wide(params)))

    def update(grads, state, params):
        weights = state.master if keep_master else wide(params)
        updates, inner_state = inner.update(wide(grads), state.inner, weights)
        if not keep_master:
            return updates, MasterState({}, inner_state)
        master = optax.apply_updates(weights, updates)
        # What lies between the weights and their master: added and rounded, it makes them the master's rounding.
        return jax.tree.map(jnp.subtract, master, wide(params)), MasterState(master, inner_state)

    return optax.GradientTransformation(init, update)


def describe_groups(params: Params, labels: Params) -> str:
    """Says in a line how many parameters of how many train, and in which groups."""
    counts = Counter()
    for leaf, group in zip(jax.tree.leaves(params), jax.tree.leaves(labels)):
        counts[group] += leaf.size
    trained = {group: count for group, count in counts.items() if group != FROZEN}
    groups = ", ".join(f"{group} {count:,d}" for group, count in trained.items())
    return f"{sum(trained.values()):,d} of {counts.total():,d} parameters train" + (f": {groups}" if groups else "")


def update_state(state: TrainState, losses, batch, weights, optimizer, axis_name, *, rules=None, parts: int = 1):
    """Takes one step down Σ weight·(sum / count) of losses(params, batch) -> {term: (sum, count)}.

    Sums and counts run over `axis_name` and over the `parts` in which the batch goes through, so that neither changes
    a number. Returns (state, metrics): every term's mean, their weighted "loss" and the "gradient_norm".
    """
    trained, put = split_trained(state.params, rules)

    def total(tree):
        return jax.lax.psum(tree, axis_name) if axis_name else tree

    def count(terms):
        return {name: jnp.maximum(total(jax.lax.stop_gradient(count)), 1e-9) for name, (_, count) in terms.items()}

    def weighted(shares):
        return sum(getattr(weights, name) * share for name, share in shares.items())

    def objective(trained, batch, counts=None):
        terms = losses(put(trained, state.params), batch)
        counts = count(terms) if counts is None else counts
        shares = {name: value / counts[name] for name, (value, _) in terms.items()}
        return weighted(shares), shares

    gradient = jax.grad(objective, has_aux=True)
    if parts == 1:
        grads, shares = gradient(trained, batch)
    else:
        # The counts of all parts come first: a part's share of the loss is its sum over the whole batch's count. No
        # count depends on the decoder, so the compiler leaves its forward pass out of this.
        batches = jax.tree.map(lambda x: x.reshape(len(x) // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)
        each = jax.lax.map(lambda part: {k: (0.0, n) for k, (_, n) in losses(state.params, part).items()}, batches)
        counts = count(jax.tree.map(jnp.sum, each))

        def add(so_far, part):
            return jax.tree.map(lambda x, y: x + y.astype(x.dtype), so_far, gradient(trained, part, counts)), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained), dict.fromkeys(counts, jnp.zeros(()))
        (grads, shares), _ = jax.lax.scan(add, zeros, batches)
    grads, metrics = total(grads), total(shares)
    metrics |= {"loss": weighted(metrics), "gradient_norm": optax.tree.norm(grads)}
    if rules is not None:
        grads = put(grads, jax.tree.map(jnp.zeros_like, state.params))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state._replace(params=params, opt_state=opt_state, step=state.step + 1), metrics


def _adafactor(learning_rate, *, weight_decay: float):
    """Adafactor with factored second moments and clipped updates, but AdamW's learning rate and decay.

    Source: Shazeer & Stern 2018 (arXiv 1804.04235), algorithm 4 without the relative step size.
    """
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
