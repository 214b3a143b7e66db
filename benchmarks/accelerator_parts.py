"""The parts of `accelerator.py`: what each runs, at full size on an accelerator or tiny on a CPU.

A part is `part(rows, given)`; it adds a row for every figure as it comes, and looks at `rows.left` between two.
"""

import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from bdlm_jax.domain.arm import Inputs
from bdlm_jax.domain.models import make_arm
from bdlm_jax.evaluation import scorers
from bdlm_jax.evaluation.evaluate import evaluate_full
from bdlm_jax.lm.causal_lm import init_lm, lm_hidden
from bdlm_jax.lm.config import LMConfig
from bdlm_jax.mutual import sharing
from bdlm_jax.mutual.losses import text_loss
from bdlm_jax.run import plan, work

COUNTS = {"ml-1m": (6040, 3706, 988_129), "gowalla": (29_858, 40_981, 810_128)}  # users, items, training pairs
LORA = {"lm.trains": "lora", "lm.param_dtype": "bfloat16", "lm.lora_rank": 16, "lm.lora_alpha": 32.0}
LEAN = {"lm.param_dtype": "bfloat16", "lm.optimizer": "adafactor", "lm.master_weights": False}
LLM_CASES = {  # in the order of their memory, for the device tells of the highest so far
    "7B, LoRA, layers computed again": ("vicuna_7b", {"lm.batch_rows": 16} | LORA, 4),
    "0.5B, every weight": ("qwen_0_5b", {"lm.batch_rows": 32, "lm.remat": False}, 6),
    "7B, every weight, Adafactor in bfloat16": ("vicuna_7b", {"lm.batch_rows": 16} | LEAN, 2),
    "7B, LoRA, products kept": ("vicuna_7b", {"lm.batch_rows": 16, "lm.remat_keeps": "dots"} | LORA, 6),
    "7B, LoRA": ("vicuna_7b", {"lm.batch_rows": 16, "lm.remat": False} | LORA, 6),
}  # fmt: skip
MFU_WANTED = {"135m": "≥ 50 %", "0.5b": "≥ 50 %", "1b": "≥ 50 %"}


def device() -> str:
    """The first device's name and JAX's backend."""
    return f"{jax.devices()[0].device_kind} ({jax.default_backend()})"


def peak_flops() -> tuple[float, str]:
    """FLOP/s against which utilisation is counted: the vendor's dense bfloat16, or a large product's as measured."""
    if known := work.this_device():
        return known.flops, f"of {known.flops / 1e12:.0f} TFLOP/s, the vendor's"
    import lm_step

    rate = lm_step.measure_matmul_rate("float32", size=1024)
    return rate, f"of {rate / 1e12:.3f} TFLOP/s, a float32 product's as measured"


def agreement(rows, given) -> None:
    """The device beside the CPU: losses and gradients, ranks, bfloat16, each attention, scatter-add."""
    cpu, sizes = jax.devices("cpu")[0], (16, 64) if given.tiny else (32, 256)
    shape = dict(width=32, n_layers=1, n_heads=2, n_kv_heads=2, mlp_width=64)
    if not given.tiny:
        shape = dict(width=256, n_layers=2, n_heads=4, n_kv_heads=4, mlp_width=704)
    n_rows, length = sizes[0] // 8, sizes[1]
    tokens_BL = np.random.default_rng(0).integers(0, 512, (n_rows, length), dtype=np.int32)

    def loss(params, config):
        positions_BL = jnp.broadcast_to(jnp.arange(length), tokens_BL.shape)
        hidden = lm_hidden(params, config, tokens_BL, positions_BL, jnp.ones_like(positions_BL), None)
        total, count = text_loss(params, config, hidden.reshape(-1, config.width), tokens_BL.reshape(-1))
        return total / count

    plain = LMConfig(512, **shape)

    def value_and_gradient(config, precision="highest", where=None):
        with jax.default_device(where), jax.default_matmul_precision(precision):
            params = jax.jit(init_lm, static_argnums=1)(jax.random.key(0), plain)
            value, gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, config)
        return float(value), np.concatenate([np.asarray(x, np.float32).ravel() for x in jax.tree.leaves(gradient)])

    def distance(ours, reference):
        return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))

    reference, gradient = value_and_gradient(plain, where=cpu)
    value, own = value_and_gradient(plain)
    rows.add("LM loss, float32, relative distance from the CPU's", abs(value / reference - 1), wanted="< 1e-5")
    rows.add("LM gradient, float32, the same", distance(own, gradient), wanted="< 1e-3")
    for kind in ("einsum", "cudnn") if given.tiny else ("einsum", "xla", "cudnn"):
        half = LMConfig(512, **shape, dtype="bfloat16", attention=kind)
        try:
            value, own = value_and_gradient(half, precision=None)
        except Exception as error:  # cuDNN's is of some GPUs alone: what it says is a result
            rows.add(f"LM, bfloat16, attention {kind}", f"does not run: {str(error).splitlines()[0][:120]}")
            continue
        rows.add(f"LM loss, bfloat16, attention {kind}", abs(value / reference - 1), wanted="< 1e-2")
        rows.add(f"LM gradient, bfloat16, attention {kind}", distance(own, gradient), wanted="< 1e-1")

    n_users, n_items, n_edges = (80, 60, 900) if given.tiny else COUNTS["ml-1m"]
    edges = drawn_edges(n_users, n_items, n_edges)
    counts = []
    for where in (cpu, None):
        with jax.default_device(where):
            # The same tables and the same sums of neighbours on both.
            arm = make_arm("lightgcn", Inputs(64, n_users, n_items, *edges), {"backend": "segment"})
            shared = sharing.init_shared(jax.random.key(0), n_users=n_users, n_items=n_items, width=64)
            cases = np.arange(n_users), (edges[1][:n_users] + 1) % n_items
            nothing = np.zeros(n_users + 1, np.int64), np.zeros(0, np.int32)
            counts.append(evaluate_full(scorers.domain_scorer(arm, {"shared": shared, "domain": {}}), *cases, nothing))
    moved = np.abs(counts[0].better - counts[1].better)
    rows.add("LightGCN: users whose target has the CPU's rank", float(np.mean(moved == 0)), wanted="> 0.99")
    rows.add("LightGCN: the furthest that a target moved", int(moved.max()), "places", "≤ 2")

    n_updates, n_table = (4096, 512) if given.tiny else (2**20, 100_000)
    index_N = jax.random.randint(jax.random.key(1), (n_updates,), 0, n_table)
    update_ND = jnp.ones((n_updates, 64))
    for dtype in ("float32", "int32"):  # float32 was a slow loop on GPUs until jaxlib 0.11.1
        table, updates = jnp.zeros((n_table, 64), dtype), update_ND.astype(dtype)
        add = jax.jit(lambda table, index, updates: table.at[index].add(updates))
        seconds = timed(lambda add=add, a=table, b=updates: add(a, index_N, b))
        rows.add(f"scatter-add of {n_updates:,} x 64, {dtype}", 1000 * seconds, "ms")
        exact = np.bincount(np.asarray(index_N), minlength=n_table)
        rows.add(
            "  its sums are right", bool((np.asarray(add(table, index_N, updates))[:, 0] == exact).all()), "", "True"
        )


def lm_step(rows, given) -> None:
    """The decoder's step at equal work: tokens/s, FLOPs and MFU, everything kept for the backward pass or products."""
    steps_of(rows, given, {"ours": {"remat": False}, "ours, products kept": {"remat": "dots"}})


def lm_step_torch(rows, given) -> None:
    """The same of torch, eager and compiled: in a process of its own, for JAX gives no memory back."""
    if not (cuda_of_torch() or given.tiny):
        rows.add("torch", "sees no such device here")
        return
    # torch's compiler takes longer than the whole tiny run
    compiled = {} if given.tiny else {"torch.compile, SDPA": {"compile_it": True}}
    steps_of(rows, given, {"torch, SDPA": {"compile_it": False}} | compiled)


def steps_of(rows, given, sides: dict[str, dict]) -> None:
    """Times every size of every side; a side's options are `remat`, of ours, or `compile_it`, of torch's."""
    import lm_step as beside

    peak, said = peak_flops()
    rows.add("MFU is", said)
    sizes = {"tiny": 2} if given.tiny else {"135m": 16, "0.5b": 16, "1b": 16}  # rows of a batch
    length, n_steps = (32, 1) if given.tiny else (1024, 8)
    for word, options in sides.items():
        ours = "remat" in options
        for size, n_rows in sizes.items():
            label = f"{size}, {n_rows} x {length} tokens, {word}"
            if rows.left < 30 and not given.tiny:
                rows.add(label, "not begun: no time was left")
                continue

            def measure(kind, size=size, n_rows=n_rows, ours=ours, options=options):
                config = LMConfig(
                    beside.VOCABULARIES.get(size, 256), dtype="float32" if given.tiny else "bfloat16", attention=kind,
                    remat=options.get("remat", False), **beside.SIZES[size],
                )  # fmt: skip
                tokens_SBL = np.random.default_rng(0).integers(0, config.vocab_size, (4, n_rows, length), np.int32)
                if ours:
                    step, n_tokens, _ = beside.make_equal_ours(config, tokens_SBL)
                else:
                    step, n_tokens, _ = beside.make_equal_theirs(
                        config, tokens_SBL, device=cuda_of_torch() or "cpu", **options
                    )
                flops = beside.count_flops(config, batch_size=n_rows, length=length)
                return n_tokens, flops, statistics.median(times(step, n_steps))

            kind, found = first_that_runs(measure, attentions() if ours else ["einsum"])
            if kind is None:
                rows.add(label, found)
                continue
            n_tokens, flops, seconds = found
            rows.add(f"{label}{f', attention {kind}' if ours else ''}", n_tokens / seconds, "tokens/s")
            rows.add("  MFU", flops / seconds / peak, "", MFU_WANTED.get(size, "") if ours else "")


def attentions() -> list[str]:
    """The ways to compute attention, the fastest on this device first."""
    return ["cudnn", "xla", "einsum"] if jax.default_backend() == "gpu" else ["einsum"]


def first_that_runs(function, choices):
    """(choice, result) of the first choice that does not fail; (None, what was said) where all do."""
    said = ""
    for choice in choices:
        try:
            return choice, function(choice)
        except Exception as error:  # what one library cannot do is a result, and leaves the others their rows
            said = f"does not run: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return None, said


def llm(rows, given) -> None:
    """BDLM's own LM step on public models' shapes, beside what the dry run foretells of its memory and FLOPs."""
    from experiments import ml1m_llm, tiny

    cases = {"tiny, LoRA": (None, LORA | {"lm.lora_rank": 2}, 1)} if given.tiny else LLM_CASES
    peak, said = peak_flops()
    rows.add("MFU is", said)
    for word, (name, changes, n_steps) in cases.items():
        if rows.left < 30 and not given.tiny:
            rows.add(word, "not begun: no time was left")
            continue
        config = ml1m_llm.get_config(name) if name else tiny.get_config()
        changes = changes | {"parallel": "jit", "dry_run.devices": 1}
        if name is None:
            changes |= {"dry_run.n_users": 40, "dry_run.n_items": 30, "mutual.lm.kl": 0.0, "mutual.lm.align_user": 0.0}
        config.update_from_flattened_dict(changes)
        config.lm.attention = attentions()[0]
        made = plan.make_plan(config)
        foretold = sum(plan.bytes_per_device(made).values())
        limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
        if limit and foretold > limit:
            rows.add(word, f"does not fit: {foretold / 1e9:.0f} GB of {limit / 1e9:.0f} GB, says the dry run")
            continue

        def measure(kind, config=config, n_steps=n_steps):
            config.lm.attention = kind
            return statistics.median(planned_steps(plan.make_plan(config), n_steps))

        kind, seconds = first_that_runs(measure, attentions())
        if kind is None:
            rows.add(word, seconds)
            continue
        made, n_tokens = plan.make_plan(config), made.batch["tokens"].size
        foretold = sum(plan.bytes_per_device(made).values())  # with the attention that ran
        rows.add(f"{word}: {made.batch['tokens'].shape[0]} rows, attention {kind}, a step", seconds, "s")
        rows.add("  tokens/s", n_tokens / seconds)
        wanted = "≥ 55 %" if word.startswith("7B, LoRA") else ""
        rows.add("  MFU", plan.flops_per_step(made)["model"] / seconds / peak, wanted=wanted)
        used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        rows.add("  memory, as the dry run foretells", foretold / 1e9, "GB")
        # The peak is the process's: it tells of the largest step until now.
        rows.add("  memory, highest so far", used / 1e9 if used else "not told by this device", "GB", "within 10 %")


def planned_steps(made, n_steps: int) -> list[float]:
    """Seconds of single steps of a plan, but for the first two, which compile."""
    return list(itertools.islice(step_seconds(made), 2, 2 + n_steps))


def step_seconds(made):
    """Yields the seconds of one step after another of a plan, on one device; weights and the batch are drawn."""
    arm = plan.make_arm(made.run)
    state = arm.compiled.place_state(drawn_state(made), copy=False)
    generator, length = np.random.default_rng(0), made.batch["tokens"].shape[1]
    most = {"item_target": made.run.data.n_items, "user": made.run.data.n_users, "card_item": made.run.data.n_items}
    batch = {}
    for name, leaf in made.batch.items():
        below = length if name.endswith("_index") else most.get(name, made.run.lm.vocab_size)
        batch[name] = generator.integers(0, below, leaf.shape, dtype=np.int32)
    batch |= {
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), batch["tokens"].shape),
        "segments": np.ones_like(batch["tokens"]),
        "row": np.arange(len(batch["row"]), dtype=np.int32),
    }
    view = {name: jnp.full(leaf.shape, 0.01, leaf.dtype) for name, leaf in made.constants[0].items()}
    placed = [arm.compiled.place_constants(tree) for tree in (view, arm.constants)]
    while True:
        began = time.perf_counter()
        state, metrics = arm.compiled.run(state, batch, *placed)
        jax.block_until_ready(metrics)
        yield time.perf_counter() - began


def first_step(rows, given):
    """Seconds until ml1m.py's LM has its first step, with XLA's own choices and with fewer: a process for each."""
    code = f"import accelerator_parts; print(accelerator_parts.seconds_to_first_step({given.tiny}))"
    here = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
    for flags in ("", "--xla_gpu_enable_triton_gemm=false", "--xla_gpu_autotune_level=0")[: 1 if given.tiny else 3]:
        label = f"first step of the LM, {f'XLA_FLAGS={flags}' if flags else 'as it is'}"
        if rows.left < 15 and not given.tiny:
            rows.add(label, "not begun: no time was left")
            continue
        paths = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
        env = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(), "PYTHONPATH": paths}
        try:
            done = subprocess.run([sys.executable, "-c", code], env=env, timeout=max(rows.left - 2, 10), **here)
        except subprocess.TimeoutExpired:
            rows.add(label, "stopped: no time was left")
            continue
        if done.returncode:
            rows.add(label, f"does not run: {(done.stderr.strip().splitlines() or ['nothing said'])[-1][:120]}")
        else:
            rows.add(label, float(done.stdout.split()[-1]), "s")


def seconds_to_first_step(is_tiny: bool) -> float:
    """Compiles and runs one step of the LM of experiments/ml1m.py, in float32; its state is drawn before."""
    from experiments import ml1m, tiny

    config = tiny.get_config() if is_tiny else ml1m.get_config()
    config.update_from_flattened_dict({"parallel": "jit", "dry_run.devices": 1})
    return next(step_seconds(plan.make_plan(config)))


def drawn_state(made):
    """A state of a plan's shapes, made leaf by leaf: drawing all at once holds them in float32 too, which no step does.

    All layers are alike.
    """

    def draw(leaf, scale):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return made.run.key
        if not scale or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        one = scale * jax.random.normal(jax.random.key(0), leaf.shape[1:] if len(leaf.shape) > 2 else leaf.shape)
        return jnp.broadcast_to(one.astype(leaf.dtype), leaf.shape)

    scales = made.state._replace(params=0.02, opt_state=0.0, step=0.0, key=0.0)
    return jax.tree.map(lambda scale, part: jax.tree.map(lambda leaf: draw(leaf, scale), part), scales, made.state)


def lightgcn(rows, given) -> None:
    """An epoch beside LightGCN-PyTorch's method, on ML-1M's and Gowalla's sizes."""
    import lightgcn_epoch

    sizes = {"tiny": (60, 50, 600)} if given.tiny else COUNTS
    batches = 2 if given.tiny else 20
    options = SimpleNamespace(
        backend="auto", batch_size=64 if given.tiny else 2048, large_batch_size=256 if given.tiny else 131_072,
        batches=batches, repeats=1 if given.tiny else 3,
    )  # fmt: skip
    for name, (n_users, n_items, n_edges) in sizes.items():
        if name in given.data:
            edges = lightgcn_epoch.training_edges(*given.data[name])
        else:
            edges = (*drawn_edges(n_users, n_items, n_edges), n_users, n_items)
            name += ", drawn"
        if not given.tiny:  # where the peer is timed on the same few batches
            n, wanted = edges[0].size, "< 0.5 s" if name.startswith("gowalla") else ""
            run = lightgcn_epoch.OurLightGCN(*edges, "auto").make_epoch(n, options.batch_size)
            rows.add(f"{name}: whole epoch of {n:,} pairs, batch {options.batch_size:,}", run(), "s", wanted)
        if cuda_of_torch() or given.tiny:
            for line in lightgcn_epoch.measure(name, edges, options):
                _, what, own, peer, ratio = (cell.strip() for cell in line.strip("| ").split(" | "))
                rows.add(f"{name}: {what}, ours / peer", f"{own} / {peer}", wanted=f"ratio {ratio}, ≥ 5")
        else:
            rows.add(f"{name}: the peer", "torch sees no such device here")


def quickstart(rows, given) -> None:
    """The quickstart end to end."""
    from experiments import quickstart as experiment

    end_to_end(rows, given, experiment.get_config())


def ml1m(rows, given) -> None:
    """experiments/ml1m.py end to end, where MovieLens-1M is given."""
    from experiments import ml1m as experiment

    config = experiment.get_config()
    if not given.tiny:
        if "ml-1m" not in given.data:
            rows.add("ml1m.py", "not begun: it takes --data ml-1m=movielens=DIR")
            return
        config.data.kind, config.data.path = given.data["ml-1m"]
    end_to_end(rows, given, config, wanted="< 180 s")


def end_to_end(rows, given, config, *, wanted: str = "") -> None:
    """Trains and evaluates every model of a config, and notes the seconds and what the models reach."""
    from bdlm_jax.story import train_and_evaluate
    from experiments import tiny

    if given.tiny:
        chosen, config = config, tiny.get_config()
        config.models = ("item_pop", "mf") if chosen.data.kind == "twins" else ("item_pop",)
    began = time.monotonic()
    results = train_and_evaluate(config, tempfile.mkdtemp(prefix=f"{rows.path.stem}_", dir=rows.path.parent))
    rows.add("from the start to the report", time.monotonic() - began, "s", wanted)
    for row in results["rows"]:
        if (row["metric"], row["slice"]) == (config.select, "all"):
            rows.add(f"{row['model']}, {row['metric']}", row["value"])


def gowalla(rows, given) -> None:
    """LightGCN on Gowalla's split as published, as many of its 1000 epochs as there is time for."""
    from tests.golden import gowalla_test as golden

    if given.tiny:
        made, n_epochs, every = small_split(), 4, 2
    elif "gowalla" in given.data:
        from bdlm_jax.data.readers import load_source

        made, n_epochs, every = load_source(*given.data["gowalla"]), 1000, 100
    else:
        rows.add("gowalla", "not begun: it takes --data gowalla=adjacency=DIR")
        return
    began, last = time.monotonic(), 0

    class OutOfTime(Exception):
        pass

    def after(number, metrics, scorer):
        nonlocal last
        jax.block_until_ready(metrics)
        last = number + 1
        if last % every == 0 or rows.left < 25:
            found = golden.measured(made, scorer)
            rows.add(f"recall@20 after {last} epochs, {time.monotonic() - began:.0f} s", found["recall@20"], "",
                     "0.1824 after 1000" if last == 1000 else "")  # fmt: skip
            if rows.left < 25:
                raise OutOfTime

    with contextlib.suppress(OutOfTime):
        golden.train_light_gcn(made, n_epochs=n_epochs, after=after)
    rows.add("epochs", last, "", f"{n_epochs}")


def small_split():
    """Some users with a few items each, of which one is held out."""
    from bdlm_jax.data.splits import from_parts

    user_E, item_E = drawn_edges(40, 30, 300)
    test_E = np.arange(len(user_E)) % 5 == 0
    return from_parts((user_E[~test_E], item_E[~test_E]), (user_E[test_E], item_E[test_E]))


def drawn_edges(n_users: int, n_items: int, n_edges: int) -> tuple[np.ndarray, np.ndarray]:
    """Different pairs, every user and item at least once, popular items often."""
    generator = np.random.default_rng(0)
    item_E = np.minimum((n_items * generator.random(2 * n_edges) ** 2).astype(np.int64), n_items - 1)
    user_E = generator.integers(0, n_users, 2 * n_edges)
    sure = np.arange(max(n_users, n_items))
    pairs = np.concatenate([sure % n_users * n_items + sure % n_items, user_E * n_items + item_E])
    _, first = np.unique(pairs, return_index=True)
    pairs = np.sort(pairs[np.sort(first)[:n_edges]])
    return pairs // n_items, pairs % n_items


def cuda_of_torch() -> str:
    """ "cuda" where torch and JAX see a GPU, else ""."""
    import torch

    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else ""


def times(step, n: int) -> list[float]:
    """Seconds of steps, but for the first two, which compile."""
    found = []
    for number in range(2 + n):
        began = time.perf_counter()
        step(number)
        found.append(time.perf_counter() - began)
    return found[2:]


def timed(function) -> float:
    """Median seconds of a call that returns arrays."""
    return statistics.median(times(lambda _: jax.block_until_ready(function()), 5))


PARTS = {
    "agreement": agreement, "lm_step": lm_step, "lm_step_torch": lm_step_torch, "llm": llm, "lightgcn": lightgcn,
    "first_step": first_step, "quickstart": quickstart, "gowalla": gowalla, "ml1m": ml1m,
}  # fmt: skip
