"""What a config needs before anything is loaded: parameters, bytes per device, FLOPs and bytes moved in an LM step.

By hand from shapes alone, and from XLA, which compiles the very step on as many pretended devices. No weights and no
data are read; of the data only the counts matter, which `config.dry_run` may give. The step is BDLM's LM step against
a domain model of plain tables: propagation over them is not in the numbers.
"""

import math
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from bdlm_jax.lm import causal_lm, lora
from bdlm_jax.lm.packing import LISTS
from bdlm_jax.mutual import lm_step, sharing
from bdlm_jax.mutual.options import LMWeights
from bdlm_jax.run import build as arms
from bdlm_jax.run import checks as config_check
from bdlm_jax.run import hlo_costs
from bdlm_jax.run.prepare import prepare_data
from bdlm_jax.runtime import parallel
from bdlm_jax.runtime import sharding as mesh
from bdlm_jax.types import InputError, TrainState


class Device(NamedTuple):
    """A vendor's public numbers: memory in bytes, dense bfloat16 FLOP/s, link bytes/s in and out together."""

    name: str
    memory: float
    flops: float
    link: float


DEVICES = {
    "a100": Device("NVIDIA A100 80 GB", 80e9, 312e12, 600e9),
    "h100": Device("NVIDIA H100 80 GB", 80e9, 989e12, 900e9),
    "h200": Device("NVIDIA H200", 141e9, 989e12, 900e9),
    "tpu_v5e": Device("TPU v5e", 16e9, 197e12, 200e9),
    "tpu_v5p": Device("TPU v5p", 95e9, 459e12, 600e9),
    "tpu_v6e": Device("TPU v6e", 32e9, 918e12, 448e9),
}
_GROUPS = (
    ("params/shared/", "shared tables (id rows)"),
    ("params/domain/", "domain arm"),
    ("params/lm/bridge/", "bridge"),
    ("params/lm/lora/", "adapters"),
    ("params/lm/", "decoder"),
)


class Plan(NamedTuple):
    """A config's LM step as shapes: nothing in it is an array.

    `leaves` are (name, dtype, Layout, trained) of the parameters; `kept` the same of the optimiser's state.
    """

    config: ml_collections.ConfigDict
    sizes: dict[str, int]
    device: Device
    lm: causal_lm.LMConfig
    state: Any
    batch: dict[str, Any]
    constants: tuple[Any, ...]
    leaves: list[tuple[str, Any, mesh.Layout, bool]]
    kept: list[tuple[str, Any, mesh.Layout]]


def print_needs(config: ml_collections.ConfigDict, _: str | None = None) -> None:
    """Checks a config, and prints what its LM step needs; XLA compiles it too, unless `dry_run.compile` is False.

    Call it before anything touches a device: the process then has `dry_run.devices` pretended ones and no other.

    Args:
      config: of an experiment.

    Raises:
      InputError: the config cannot run on that many devices.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", config.dry_run.devices if config.parallel != "jit" else 1)
    config_check.check_config(config, paths=False)
    plan = make_plan(config)
    print(describe(plan, compile_plan(plan) if config.dry_run.compile else None))


def make_plan(config: ml_collections.ConfigDict) -> Plan:
    """Derives all shapes of a config's LM step.

    Args:
      config: of an experiment, checked.

    Returns:
      Plan.

    Raises:
      InputError: a mesh that does not fit `dry_run.devices`, or a leaf that does not divide over it.
    """
    given = config.dry_run
    if config.parallel == "jit" and given.devices > 1:
        raise InputError(
            f"config.parallel is 'jit', which uses one device, and config.dry_run.devices is {given.devices}; "
            "set config.parallel to mesh or pmap."
        )
    if config.parallel == "mesh":
        sizes = mesh.mesh_sizes(config.mesh.to_dict(), given.devices)
    else:
        sizes = mesh.mesh_sizes({"data": 1 if config.parallel == "jit" else given.devices}, max(1, given.devices))
    config = ml_collections.ConfigDict(config.to_dict())
    config.parallel = "jit"  # the arm is only asked for its optimiser here
    run = _pretended_run(config)
    lm_arm, bridge = _lm_arm(run)
    params = _abstract_params(run, bridge.lm)
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(params, jax.eval_shape(lm_arm.optimizer.init, params), step, key)
    layout = mesh.state_layout(state, sizes)
    named = [
        (mesh.leaf_name(path), leaf.dtype, where)
        for (path, leaf), where in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(layout))
    ]
    kept = [entry for entry in named if entry[0].startswith("opt_state/")]
    leaves = [
        (name, dtype, where, any(other.endswith("/" + name.removeprefix("params/")) for other, _, _ in kept))
        for name, dtype, where in named
        if name.startswith("params/")
    ]
    width = config.shared.width
    view = {name: _floats(table.shape[0], width) for name, table in params["shared"].items()}
    constants = view, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), lm_arm.constants)
    config.parallel = "mesh"
    config.mesh = sizes
    return Plan(
        config, sizes, DEVICES[given.device], bridge.lm, state, _abstract_batch(config), constants, leaves, kept
    )


def compile_plan(plan: Plan) -> dict[str, float]:
    """Lets XLA compile the plan's step on pretended CPU devices, and returns what it tells, per device.

    Returns:
      {"arguments", "temporaries": bytes, "flops": of the program with a loop's body counted once, "moved": bytes of all
      collectives, loops counted fully, "seconds": of compiling}.
    """
    n = math.prod(plan.sizes.values())
    if parallel.device_count() != n:
        raise InputError(f"the dry run needs {n} pretended devices, but there are {parallel.device_count()}.")
    config = plan.config
    lm_arm, _ = _lm_arm(_pretended_run(config))
    began = time.monotonic()
    compiled = lm_arm.compiled.lower(plan.state, plan.batch, *plan.constants).compile()
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "flops": costs.get("flops", math.nan),
        "moved": sum(hlo_costs.collective_bytes(compiled.as_text()).values()),
        "seconds": time.monotonic() - began,
    }


def bytes_per_device(plan: Plan) -> dict[str, float]:
    """Counts the bytes of one device by hand: what lies there all the time, and what a step adds at its highest."""
    size = lambda dtype, where: math.prod(where.shard(plan.sizes)) * jnp.dtype(dtype).itemsize  # noqa: E731
    t, f = plan.sizes["tensor"], plan.sizes["fsdp"]
    kernels = [(n, d, w) for n, d, w, _ in plan.leaves if n.startswith("params/lm/layers/")]
    found = {
        "parameters": sum(size(dtype, where) for _, dtype, where, _ in plan.leaves),
        "optimiser state": sum(size(dtype, where) for _, dtype, where in plan.kept if dtype != jax.dtypes.prng_key),
        "gradients": sum(size(dtype, where) for _, dtype, where, trained in plan.leaves if trained),
        "activations": _activation_bytes(plan),
    }
    if f > 1:  # a layer's weights come together where they are used, and the next layer's while it computes
        whole = sum(math.prod(w.shape) * jnp.dtype(d).itemsize for _, d, w in kernels) / plan.lm.n_layers
        found["gathered weights of two layers"] = 2 * whole / t
    return found


def flops_per_step(plan: Plan) -> dict[str, float]:
    """Counts the multiplications and additions of matrix products in one step, over all devices.

    A product of (n, a) and (a, b) is 2·n·a·b; the backward pass is two of them, or one where the weights are frozen;
    attention is counted over the whole square, as it is computed.

    Returns:
      {"model": forward and backward, "hardware": with what rematerialisation computes again}.
    """
    c, lm, batch = plan.config, plan.lm, plan.batch
    rows, length = batch["tokens"].shape
    projections = (lm.n_heads + lm.n_kv_heads) * 2 * lm.head_dim  # query and output; key and value
    layer = lm.width * (projections + (3 if lm.gated else 2) * lm.mlp_width)
    tokens = lm.n_layers * rows * length
    products, square = 2 * tokens * layer, 4 * tokens * length * lm.n_heads * lm.head_dim
    beside = [where.shape for name, _, where, _ in plan.leaves if name.startswith("params/lm/lora/layers/")]
    thin = 2 * rows * length * sum(math.prod(shape) for shape in beside)
    items = rows * batch["item_target"].shape[1] * c.dry_run.n_items if c.mutual.lm.item else 0
    texts = rows * batch["text_target"].shape[1] * lm.vocab_size if c.mutual.lm.text else 0
    heads = 2 * lm.width * (items + texts)
    backward = products * (2 if c.lm.trains == "full" else 1) + 2 * thin + 2 * square
    model = products + thin + square + backward + 3 * heads
    again = heads + (products + thin + square if lm.remat is True else 0)
    return {"model": float(model), "hardware": float(model + again)}


def bytes_moved(plan: Plan) -> dict[str, float]:
    """Counts the bytes that one device sends in a step, by the ring formulas.

    Over n devices an all-gather or a reduce-scatter of a whole of S bytes moves S·(n-1)/n, an all-reduce twice that.
    fsdp gathers weights in the forward and in the backward pass (with rematerialisation: for the recomputation), and
    scatters gradients; data sums the gradients' shards; tensor sums each block's output, forward and backward.
    """
    n, lm = plan.sizes, plan.lm
    share = lambda axis: (n[axis] - 1) / n[axis]  # noqa: E731
    whole = lambda entry: math.prod(entry[2].shape) * jnp.dtype(entry[1]).itemsize  # noqa: E731
    sharded = [entry for entry in plan.leaves if "fsdp" in str(entry[2].spec)]
    gathered = sum(whole(entry) for entry in sharded) / n["tensor"]
    summed = sum(whole(entry) for entry in sharded if entry[3]) / n["tensor"]
    others = sum(whole(entry) for entry in plan.leaves if entry[3] and entry not in sharded)
    rows, length = plan.batch["tokens"].shape
    stream = rows * length * lm.width * jnp.dtype(lm.dtype).itemsize / (n["data"] * n["fsdp"])
    return {
        "all-gather of weights": 2 * gathered * share("fsdp"),
        "reduce-scatter of gradients": summed * share("fsdp"),
        "all-reduce of gradients": 2 * share("data") * (summed / n["fsdp"] + others) + 2 * share("fsdp") * others,
        "all-reduce of activations": 2 * share("tensor") * stream * lm.n_layers * (4 + 2 * (lm.remat is True)),
    }


def describe(plan: Plan, compiled: dict[str, float] | None) -> str:
    """Writes the tables, as Markdown."""
    device, n = plan.device, math.prod(plan.sizes.values())
    told = " x ".join(f"{axis} {size}" for axis, size in plan.sizes.items())
    lines = [
        f"{n} x {device.name} ({device.memory / 1e9:.0f} GB), mesh {told}; lm.trains {plan.config.lm.trains}, "
        f"optimiser {plan.config.lm.optimizer}, weights {plan.config.lm.param_dtype}, compute {plan.lm.dtype}; "
        f"batch of {plan.batch['tokens'].shape[0]} rows of {plan.batch['tokens'].shape[1]} tokens",
        "",
        "| parameters | all | trained |",
        "|---|---:|---:|",
    ]
    counts: dict[str, list[int]] = {}
    for name, _, where, trained in plan.leaves:
        group = next(words for prefix, words in _GROUPS if name.startswith(prefix))
        count = counts.setdefault(group, [0, 0])
        count[0] += math.prod(where.shape)
        count[1] += math.prod(where.shape) * trained
    counts["together"] = [sum(c[0] for c in counts.values()), sum(c[1] for c in counts.values())]
    lines += [f"| {group} | {a:,} | {b:,} |" for group, (a, b) in counts.items()]
    found = bytes_per_device(plan)
    total = sum(found.values())
    verdict = f"{total / device.memory:.0%} of a device" + ("" if total <= device.memory else ": it does not fit")
    lines += ["", "| bytes per device | GB |", "|---|---:|"]
    lines += [f"| {name} | {_gb(value)} |" for name, value in found.items()]
    lines += [f"| together, by hand | {_gb(total)} ({verdict}) |"]
    flops, moved = flops_per_step(plan), bytes_moved(plan)
    lines += [
        "",
        "| one step | |",
        "|---|---:|",
        f"| model FLOPs, all devices | {flops['model'] / 1e12:,.1f} T |",
        f"| FLOPs with what is computed again | {flops['hardware'] / 1e12:,.1f} T |",
        f"| least time at {device.flops / 1e12:,.0f} TFLOP/s a device | {flops['hardware'] / n / device.flops:.3f} s |",
    ]
    lines += [f"| {name}, a device | {_gb(value)} GB |" for name, value in moved.items() if value]
    if n > 1:
        lines += [
            f"| least time of moving at {device.link / 2e9:,.0f} GB/s | {sum(moved.values()) / device.link * 2:.3f} s |"
        ]
    if compiled:
        lines += [
            "",
            f"| XLA, compiled for pretended CPU devices in {compiled['seconds']:.0f} s | a device |",
            "|---|---:|",
            f"| arguments (state, batch, constants) | {_gb(compiled['arguments'])} GB |",
            f"| temporaries | {_gb(compiled['temporaries'])} GB |",
            f"| collectives | {_gb(compiled['moved'])} GB |",
            f"| FLOPs, a loop's body counted once | {compiled['flops'] / 1e12:,.2f} T |",
        ]
    return "\n".join(lines)


def _lm_arm(run: arms.Run):
    weights = LMWeights(**run.config.mutual.lm.to_dict())
    bridge = arms.make_bridge(run, reads="layer0")
    rate = lambda step: run.config.lm.learning_rate  # noqa: E731
    shared = run.config.shared.trained_by in ("both", "lm")
    size = {"row_std": run.config.lm.row_std or 1.0}
    return arms.make_lm_arm(run, None, bridge, weights, rate=rate, train_shared=shared, **size), bridge


def _pretended_run(config: ml_collections.ConfigDict) -> arms.Run:
    """A run that has counts in place of data and of a tokenizer."""
    n_users, n_items = config.dry_run.n_users, config.dry_run.n_items
    if not (n_users and n_items):
        with tempfile.TemporaryDirectory() as folder:
            data = prepare_data(config, Path(folder))
        n_users, n_items = data.n_users, data.n_items
    nothing = np.zeros(0, np.int32)
    split = SimpleNamespace(
        degree=lambda *parts: np.ones(n_items, np.int64),
        histories=lambda *parts: (np.zeros(n_users + 1, np.int64), nothing),
    )
    own = arms.own_lm_config(config).vocab_size if config.lm.path or config.lm.config else config.tokenizer.vocab_size
    vocabulary = SimpleNamespace(n_text=-(-own // 8) * 8, user_tokens=None, unnamed_user=None)
    config.dry_run.n_users, config.dry_run.n_items = n_users, n_items
    data = SimpleNamespace(n_users=n_users, n_items=n_items, split=split)
    return arms.Run(config, Path(), data, SimpleNamespace(vocabulary=vocabulary), None, jax.random.key(0))


def _abstract_params(run: arms.Run, shape: causal_lm.LMConfig) -> Any:
    c = run.config

    def make():
        key = jax.random.key(0)
        lm = causal_lm.init_lm(key, shape)
        lm = jax.tree.map(lambda leaf: leaf.astype(c.lm.param_dtype), lm)
        if c.lm.trains == "lora":
            options = {"rank": c.lm.lora_rank, "targets": c.lm.lora_targets, "alpha": c.lm.lora_alpha}
            lm = {**lm, lora.LORA: lora.init_lora(key, lm, **options)}
        bridge = sharing.init_bridge(key, width=c.shared.width, lm_width=shape.width)
        tables = sharing.init_shared(key, n_users=c.dry_run.n_users, n_items=c.dry_run.n_items, width=c.shared.width)
        return {"shared": tables, "domain": {}, "lm": {**lm, "bridge": bridge}}

    return jax.eval_shape(make)


def _abstract_batch(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The shapes of `Packed.batch` for rows that are as full as they can be."""
    rows, length = config.lm.batch_rows, config.prompts.length
    title = config.prompts.max_title_tokens + 4
    prompts = max(1, length // (title * 2))
    widths = {
        "item_target": min(length, config.prompts.max_items * (prompts if config.prompts.kind == "ids" else 1)),
        "text_target": min(length, config.lm.max_text_targets),
        "user": prompts,
        "card_item": max(1, length // title),
    }
    whole = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    batch = {name: whole(rows, length) for name in ("tokens", "positions", "segments")} | {"row": whole(rows)}
    return batch | {name: whole(rows, widths[pair[1]]) for pair in LISTS for name in pair}


def _activation_bytes(plan: Plan) -> float:
    """What the backward pass keeps, and the largest set alive beside it: one layer, or the logits of a chunk."""
    lm, n = plan.lm, plan.sizes
    size, t = jnp.dtype(lm.dtype).itemsize, n["tensor"]
    rows, length = plan.batch["tokens"].shape
    rows = math.ceil(rows / (n["data"] * n["fsdp"] * plan.config.lm.accumulate))
    stream = rows * length * lm.width * size
    heads = rows * length * (lm.n_heads + 2 * lm.n_kv_heads) * lm.head_dim * size / t
    scores = rows * lm.n_heads * length**2 * (4 + size) / t  # float32 scores and their weights
    inner = rows * length * (3 if lm.gated else 2) * lm.mlp_width * size / t
    layer = 6 * stream + 2 * heads + scores + inner
    kept = {True: stream, "dots": 2 * stream + heads + inner, False: layer}[lm.remat] * lm.n_layers
    text = min(lm_step.TEXT_CHUNK, rows * plan.batch["text_target"].shape[1]) * lm.vocab_size * 4
    return kept + max(2 * layer, 2 * text)


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _gb(value: float) -> str:
    return f"{value / 1e9:,.3f}"
