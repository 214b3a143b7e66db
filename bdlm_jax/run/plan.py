"""What a config needs before anything is loaded: parameters, bytes per device, FLOPs and bytes moved in an LM step.

By hand from shapes alone, and from XLA, which compiles the very step on as many pretended devices. No weights and no
data are read; of the data only the counts matter, which `config.dry_run` may give. The step is BDLM's LM step against
a domain model of plain tables; propagation over them is the domain arm's, and counted apart (`plan_graph`).
"""

import math
import re
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from bdlm_jax.data.splits import TRAIN
from bdlm_jax.lm.config import LMConfig
from bdlm_jax.lm.packing import LISTS
from bdlm_jax.mutual import lm_step
from bdlm_jax.mutual.options import LMWeights
from bdlm_jax.run import build, checks, plan_graph
from bdlm_jax.run.build import DOT_ARM, Decoder, Run, Tables
from bdlm_jax.run.prepare import drawn_items, lm_shape, prepare_data
from bdlm_jax.run.rates import lm_rates
from bdlm_jax.run.work import DEVICES, Device, step_flops
from bdlm_jax.runtime import parallel, sharding
from bdlm_jax.runtime.fit import Arm
from bdlm_jax.runtime.sharding import Layout
from bdlm_jax.types import InputError, TrainState, leaf_name

_GROUPS = (
    ("params/shared/", "shared tables (id rows)"),
    ("params/domain/", "domain arm"),
    ("params/lm/bridge/", "bridge"),
    ("params/lm/lora/", "adapters"),
    ("params/lm/", "decoder"),
)


# Of a compiled program's text; XLA's own cost analysis counts a loop's body once.
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(_KINDS)})(?:-start)?\(")
_CALLED = re.compile(r"(?:body|to_apply|calls|branch_computations)=\{?%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Leaf(NamedTuple):
    """One array of the step's state as it lies on the mesh."""

    name: str
    dtype: Any
    layout: Layout
    trained: bool = False

    @property
    def bytes(self) -> int:
        return math.prod(self.layout.shape) * jnp.dtype(self.dtype).itemsize


class Plan(NamedTuple):
    """A config's LM step as shapes: no leaf of it is an array; `kept` is the optimiser's state."""

    run: Run
    sizes: dict[str, int]
    device: Device
    state: TrainState
    batch: dict[str, Any]
    constants: tuple[Any, ...]
    leaves: list[Leaf]
    kept: list[Leaf]


def print_needs(config: ml_collections.ConfigDict, _: str | None = None) -> None:
    """Checks a config, and prints what its LM step needs; XLA compiles it too, unless `dry_run.compile` is False.

    Call it before anything touches a device: the process then has `dry_run.devices` pretended ones and no other.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", config.dry_run.devices if config.parallel != "jit" else 1)
    checks.check_config(config, paths=False)
    plan = make_plan(config)
    print(describe(plan, compile_plan(plan) if config.dry_run.compile else None))


def make_plan(config: ml_collections.ConfigDict) -> Plan:
    """Derives all shapes of a checked config's LM step; a mesh or a leaf that does not divide is refused."""
    given = config.dry_run
    if given.device not in DEVICES:
        raise InputError(f"config.dry_run.device is {given.device!r}; it must be one of {', '.join(DEVICES)}.")
    if config.parallel == "jit" and given.devices > 1:
        told = f"config.parallel is 'jit', which uses one device, and config.dry_run.devices is {given.devices}"
        raise InputError(f"{told}; set config.parallel to mesh or pmap.")
    wanted = config.mesh.to_dict() if config.parallel == "mesh" else {"data": given.devices}
    sizes = sharding.mesh_sizes(wanted, given.devices)
    config = ml_collections.ConfigDict(config.to_dict())
    config.parallel, config.mesh = "jit", sizes  # the arm is only asked for its optimiser here
    run = _pretended_run(config)
    arm = make_arm(run)
    state = jax.eval_shape(lambda: make_state(run, arm))
    named = zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(sharding.state_layout(state, sizes)))
    leaves = [Leaf(leaf_name(path), leaf.dtype, layout) for (path, leaf), layout in named]
    kept = [leaf for leaf in leaves if leaf.name.startswith("opt_state/")]
    leaves = [
        leaf._replace(trained=any(other.name.endswith(leaf.name.removeprefix("params")) for other in kept))
        for leaf in leaves
        if leaf.name.startswith("params/")
    ]
    constants = state.params["shared"], jax.eval_shape(lambda: arm.constants)
    config.parallel = "mesh"
    return Plan(run, sizes, DEVICES[given.device], state, abstract_batch(config), constants, leaves, kept)


def make_arm(run: Run) -> Arm:
    """The LM arm of a plan's run, without rows."""
    weights, rate = LMWeights(**run.config.mutual.lm.to_dict()), run.config.lm.learning_rate
    shared = 1.0 if run.config.shared.trained_by in ("both", "lm") and weights.item else None
    rates = lm_rates(lambda step: rate, shared=shared)
    return build.make_lm_arm(run, None, build.make_meeting(run, reads="layer0"), weights, rates)


def make_state(run: Run, arm: Arm) -> TrainState:
    """Draws the state in which a plan's step starts; only its shapes are asked for."""
    tables = Tables(build.init_tables(run, "bdlm", DOT_ARM), read_std=1.0, out_std=1.0)
    params = build.init_params(run, "bdlm", tables, Decoder(None, row_std=1.0))
    return TrainState(params, arm.optimizer.init(params), jnp.int32(0), run.key)


def compile_plan(plan: Plan) -> dict[str, float]:
    """Lets XLA compile the plan's step on pretended CPU devices, and returns what it tells, bytes and FLOPs per device.

    "flops" counts a loop's body once, "moved" (of all collectives) as often as it runs.
    """
    n = math.prod(plan.sizes.values())
    if parallel.device_count() != n:
        raise InputError(f"the dry run needs {n} pretended devices, but there are {parallel.device_count()}.")
    arm, began = make_arm(plan.run), time.monotonic()
    compiled = arm.compiled.lower(plan.state, plan.batch, *plan.constants).compile()
    memory = compiled.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "flops": compiled.cost_analysis().get("flops", math.nan),
        "moved": sum(collective_bytes(compiled.as_text()).values()),
        "seconds": time.monotonic() - began,
    }


def bytes_per_device(plan: Plan) -> dict[str, float]:
    """Counts the bytes of one device by hand: what lies there all the time, and what a step adds at its highest."""

    def size(leaf):
        return math.prod(leaf.layout.shard(plan.sizes)) * jnp.dtype(leaf.dtype).itemsize

    found = {
        "parameters": sum(map(size, plan.leaves)),
        "optimiser state": sum(map(size, plan.kept)),
        "gradients": sum(size(leaf) for leaf in plan.leaves if leaf.trained),
        "activations": _activation_bytes(plan),
    }
    if plan.sizes["fsdp"] > 1:  # a layer's weights come together where they are used, the next layer's as it computes
        layers = sum(leaf.bytes for leaf in plan.leaves if leaf.name.startswith("params/lm/layers/"))
        found["gathered weights of two layers"] = 2 * (layers / plan.run.lm.n_layers) / plan.sizes["tensor"]
    return found


def flops_per_step(plan: Plan) -> dict[str, float]:
    """`work.step_flops` of the plan's step."""
    beside = [leaf.layout.shape for leaf in plan.leaves if leaf.name.startswith("params/lm/lora/layers/")]
    c = plan.run.config
    n_logits = drawn_items(c.lm.softmax_items, c.dry_run.n_items) or c.dry_run.n_items
    how = {"weights": LMWeights(**c.mutual.lm.to_dict()), "trains": c.lm.trains, "n_logits": n_logits}
    how |= {"item_width": c.shared.width, "adapters": sum(map(math.prod, beside))}
    return step_flops(plan.run.lm, plan.batch, **how)


def bytes_moved(plan: Plan) -> dict[str, float]:
    """Counts the bytes that one device sends in a step, by the ring formulas.

    Over n devices an all-gather or a reduce-scatter of a whole of S bytes moves S·(n-1)/n, an all-reduce twice that.
    fsdp gathers weights in the forward and in the backward pass (with rematerialisation: for the recomputation), and
    scatters gradients, as all axes together do with the tables; data sums the gradients' shards; tensor sums each
    block's output, forward and backward.
    """
    n, lm = plan.sizes, plan.run.lm
    share = {axis: (size - 1) / size for axis, size in n.items()}
    tables = [leaf for leaf in plan.leaves if leaf.name.startswith("params/shared/")]
    sharded = [leaf for leaf in plan.leaves if "fsdp" in str(leaf.layout.spec) and leaf not in tables]
    gathered = sum(leaf.bytes for leaf in sharded) / n["tensor"]
    summed = sum(leaf.bytes for leaf in sharded if leaf.trained) / n["tensor"]
    others = sum(leaf.bytes for leaf in plan.leaves if leaf.trained and leaf not in [*sharded, *tables])
    rows_whole, rows_scattered = (
        sum(leaf.bytes for leaf in chosen) * (1 - 1 / math.prod(n.values()))
        for chosen in (tables, [leaf for leaf in tables if leaf.trained])
    )
    rows, length = plan.batch["tokens"].shape
    stream = rows * length * lm.width * jnp.dtype(lm.dtype).itemsize / (n["data"] * n["fsdp"])
    return {
        "all-gather of weights": 2 * (gathered * share["fsdp"] + rows_whole),
        "reduce-scatter of gradients": summed * share["fsdp"] + rows_scattered,
        "all-reduce of gradients": 2 * share["data"] * (summed / n["fsdp"] + others) + 2 * share["fsdp"] * others,
        "all-reduce of activations": 2 * share["tensor"] * stream * lm.n_layers * (4 + 2 * (lm.remat is True)),
    }


def describe(plan: Plan, compiled: dict[str, float] | None) -> str:
    """Writes the tables, as Markdown."""
    device, c, n = plan.device, plan.run.config.lm, math.prod(plan.sizes.values())
    rows, length = plan.batch["tokens"].shape
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.sizes.items())
    counts: dict[str, tuple[int, int]] = {}
    for leaf in plan.leaves:
        group = next(words for prefix, words in _GROUPS if leaf.name.startswith(prefix))
        size, (everything, trained) = math.prod(leaf.layout.shape), counts.get(group, (0, 0))
        counts[group] = everything + size, trained + size * leaf.trained
    counts["together"] = tuple(map(sum, zip(*counts.values())))
    found, flops, moved = bytes_per_device(plan), flops_per_step(plan), bytes_moved(plan)
    total, least = sum(found.values()), sum(moved.values()) / device.link * 2
    verdict = f"{total / device.memory:.0%} of a device" + ("" if total <= device.memory else ": it does not fit")
    lines = [
        f"{n} x {device.name} ({device.memory / 1e9:.0f} GB), mesh {mesh}; lm.trains {c.trains}, "
        f"optimiser {c.optimizer}, weights {c.param_dtype}, compute {plan.run.lm.dtype}; "
        f"batch of {rows} rows of {length} tokens",
        "",
        "| parameters | all | trained |",
        "|---|---:|---:|",
        *[f"| {group} | {a:,} | {b:,} |" for group, (a, b) in counts.items()],
        "",
        "| bytes per device | GB |",
        "|---|---:|",
        *[f"| {name} | {_gb(value)} |" for name, value in found.items()],
        f"| together, by hand | {_gb(total)} ({verdict}) |",
        "",
        "| one step | |",
        "|---|---:|",
        f"| model FLOPs, all devices | {flops['model'] / 1e12:,.1f} T |",
        f"| FLOPs with what is computed again | {flops['hardware'] / 1e12:,.1f} T |",
        f"| least time at {device.flops / 1e12:,.0f} TFLOP/s a device | {flops['hardware'] / n / device.flops:.3f} s |",
        *[f"| {name}, a device | {_gb(value)} GB |" for name, value in moved.items() if value],
        *([f"| least time of moving at {device.link / 2e9:,.0f} GB/s | {least:.3f} s |"] if n > 1 else []),
        *plan_graph.describe_propagation(plan.run.config, n, link=device.link),
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


def collective_bytes(text: str) -> dict[str, float]:
    """Sums the result sizes of a compiled program's collectives by kind, a loop's body as often as it runs.

    A loop without a known number of rounds counts once.
    """
    bodies: dict[str, list[str]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            current = bodies.setdefault(begins[2], [])
            entry = begins[2] if begins[1] else entry
        else:
            current.append(line)
    totals: dict[str, float] = {}

    def walk(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            if found := _COLLECTIVE.search(line):
                totals[found[2]] = totals.get(found[2], 0.0) + times * _size(found[1])
            elif " while(" in line:
                rounds = _TRIPS.search(line)
                walk(_CALLED.search(line)[1], times * (int(rounds[1]) if rounds else 1))
            elif " call(" in line or " conditional(" in line:
                for called in _CALLED.findall(line):
                    walk(called, times)

    walk(entry, 1)
    return totals


def _size(shapes: str) -> int:
    return sum(
        math.prod(int(n) for n in sizes.split(",") if n) * _BYTES.get(kind, 4)
        for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    )


def _pretended_run(config: ml_collections.ConfigDict) -> Run:
    """A run that has counts in place of data and of a tokenizer."""
    given = config.dry_run
    if not (given.n_users and given.n_items):
        with tempfile.TemporaryDirectory() as folder:
            data = prepare_data(config, Path(folder))
        given.n_users, given.n_items = data.n_users, data.n_items
        given.n_interactions = len(data.split.edges(TRAIN)[0])
    split = SimpleNamespace(
        degree=lambda *parts: np.ones(given.n_items, np.int64),
        edges=lambda *parts: (np.arange(given.n_users), np.arange(given.n_users) % given.n_items),
    )
    data = SimpleNamespace(n_users=given.n_users, n_items=given.n_items, split=split)
    n_text = -(-lm_shape(config).vocab_size // 8) * 8
    vocabulary = SimpleNamespace(n_text=n_text, user_tokens=None, unnamed_user=None)
    return Run(config, Path(), data, SimpleNamespace(vocabulary=vocabulary), None, jax.random.key(0), root=Path())


def abstract_batch(config: ml_collections.ConfigDict) -> dict[str, Any]:
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
    shapes = {name: (rows, length) for name in ("tokens", "positions", "segments")} | {"row": (rows,)}
    shapes |= {name: (rows, widths[pair[1]]) for pair in LISTS for name in pair}
    return {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}


def _activation_bytes(plan: Plan) -> float:
    """What the backward pass keeps, and the largest set alive beside it: one layer, or the logits of a chunk."""
    n, c = plan.sizes, plan.run.config.lm
    rows, length = plan.batch["tokens"].shape
    rows = math.ceil(rows / (n["data"] * n["fsdp"] * c.accumulate))
    kept, layer = layer_bytes(plan.run.lm, rows, length, trains=c.trains == "full", parts=n["tensor"])
    kept *= plan.run.lm.n_layers
    if plan.run.lm.remat is False:  # and the weights in the compute type, where they are kept in another
        dtype = jnp.dtype(plan.run.lm.dtype)
        cast = [x for x in plan.leaves if x.name.startswith("params/lm/layers/") and x.dtype != dtype]
        kept += sum(math.prod(x.layout.shape) for x in cast) * dtype.itemsize / (n["fsdp"] * n["tensor"])
    text = min(lm_step.TEXT_CHUNK, rows * plan.batch["text_target"].shape[1]) * plan.run.lm.vocab_size * 4
    return kept + max(layer, 2 * text)


def layer_bytes(lm: LMConfig, rows: int, length: int, *, trains: bool, parts: int = 1) -> tuple[float, float]:
    """Counts what one layer keeps of so many rows for the backward pass, and what it holds while that runs, in bytes.

    What `jax.vjp` returns of it, but for a few numbers a token. `trains`: the norms' scales train too; `parts`: of the
    tensor axis, over which heads and the MLP's inner width are cut.
    """
    tokens, size = rows * length, jnp.dtype(lm.dtype).itemsize
    stream, inner = tokens * lm.width * size, tokens * lm.mlp_width * size / parts
    head = tokens * lm.head_dim * size / parts
    projected = (lm.n_heads + 2 * lm.n_kv_heads) * head + (2 if lm.gated else 1) * inner
    flash = lm.attention == "cudnn"  # it makes scores again, and never holds them
    scores = 0 if flash else rows * lm.n_heads * length**2 * (4 + size) / parts
    # In float32, whatever the compute type: each norm's input, and what its own scale is trained by.
    norms = (2 + 2 * lm.post_norms) * (1 + trains) * tokens * lm.width * 4
    # What products read, what attention returns, and what the activation's derivative takes beside its input.
    layer = projected + 3 * stream + lm.n_heads * head + scores + norms + 4 * inner
    dots = projected + 2 * stream + flash * lm.n_heads * head
    return {True: stream, "dots": dots, False: layer}[lm.remat], layer


def _gb(value: float) -> str:
    return f"{value / 1e9:,.3f}"
