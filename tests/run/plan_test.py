"""The tables of docs/scale.md against arithmetic, and XLA's count of the same step against them."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from bdlm_jax.lm.causal_lm import LMConfig, init_lm, lm_hidden
from bdlm_jax.lm.lora import init_lora
from bdlm_jax.run import plan as dry_run
from bdlm_jax.run.plan_graph import propagation_needs
from bdlm_jax.types import InputError
from experiments import ml1m_llm

ROOT = Path(__file__).resolve().parents[2]
M, F, V, DEPTH, D, N_USERS, N_ITEMS = 4096, 11008, 32000, 32, 64, 6040, 3706
KERNELS = DEPTH * (4 * M * M + 3 * M * F)
TABLES, NORMS, BRIDGE = 2 * V * M, (2 * DEPTH + 1) * M, 2 * D * M + D
LORA = {"trains": "lora", "param_dtype": "bfloat16", "lora_rank": 16}


def plan(lm="vicuna_7b", *, devices, device="h200", parallel="mesh", **settings):
    config = ml1m_llm.get_config(lm)
    config.parallel = parallel
    config.dry_run.update({"devices": devices, "device": device})
    config.lm.update(settings)
    return dry_run.make_plan(config)


@pytest.fixture(scope="module")
def eight_h200():
    return plan(devices=8)


def test_eight_h200_full_fine_tuning(eight_h200):
    counted = {leaf.name for leaf in eight_h200.leaves}
    assert len(counted) == len(eight_h200.leaves)
    assert "| decoder | 6,738,415,616 | 6,738,415,616 |" in dry_run.describe(eight_h200, None)
    assert KERNELS + TABLES + NORMS == 6_738_415_616  # as Llama 7B is published
    # 6040 users are 755 a device, 3706 items are padded to 464 a device.
    one = (KERNELS + TABLES) // 8 + NORMS + BRIDGE + (755 + 464) * D
    found = dry_run.bytes_per_device(eight_h200)
    trained = one - 755 * D  # users are never shown
    assert (found["parameters"], found["gradients"]) == (4 * one, 4 * trained)
    assert found["optimiser state"] == pytest.approx(2 * 4 * trained, abs=64)  # two moments, and the steps' counters
    assert found["gathered weights of two layers"] == pytest.approx(2 * 4 * (KERNELS + 2 * DEPTH * M) / DEPTH)
    # 8 rows of 512 tokens a device: the stream of each layer in bfloat16, and what one layer holds: what products read,
    # queries, keys, values and what attention returns, both norms twice in float32, scores, and the MLP.
    tokens = 8 * 512
    layer = tokens * (7 * M * 2 + 4 * M * 4 + 6 * F * 2) + 8 * 32 * 512**2 * (4 + 2)
    assert found["activations"] == DEPTH * tokens * M * 2 + layer
    assert sum(found.values()) < 141e9


@pytest.mark.parametrize("remat", [False, "dots", True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [False, True])
def test_what_a_layer_keeps_is_what_its_vjp_returns(remat, dtype, lora, monkeypatch):
    monkeypatch.setattr("bdlm_jax.lm.decoder._UNROLLED_LAYERS", 0)
    sizes = {"width": 128, "n_layers": 6, "n_heads": 4, "n_kv_heads": 2, "mlp_width": 352}
    lm = LMConfig(32, **sizes, dtype=dtype, remat=remat)
    params, trained = jax.eval_shape(lambda: init_lm(jax.random.key(0), lm)), None
    if lora:  # the decoder is of the compute type then, and does not train
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
        options = {"rank": 2, "targets": r".*_proj/kernel", "alpha": 2.0}
        trained = jax.eval_shape(lambda p: init_lora(jax.random.key(0), p, **options), params)
    tokens = jnp.zeros((4, 64), jnp.int32)
    row = tokens, jnp.broadcast_to(jnp.arange(64), (4, 64)), jnp.ones_like(tokens), None

    def kept_of(params, trained):
        def hidden(trained):
            return lm_hidden(params | {"lora": trained} if lora else trained, lm, *row)

        return jax.vjp(hidden, trained if lora else params)[1]

    kept = jax.eval_shape(kept_of, params, trained)
    scaled = [x for x in jax.tree.leaves(trained) if x.shape[-1:] == (2,)]  # A is kept with its scale and without
    bytes_of = {  # stacked over layers, as weights are
        name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree) if x.shape[:1] == (6,))
        for name, tree in (("kept", kept), ("weights", [params["layers"], trained, scaled]))
    }
    weights = bytes_of["weights"] / (2 if dtype == "bfloat16" and remat is False and not lora else 1)
    counted, layer = dry_run.layer_bytes(lm, 4, 64, trains=not lora)
    assert 6 * counted == pytest.approx(bytes_of["kept"] - weights, rel=0.06)
    assert counted == layer or counted < layer / (2 if lora else 3)  # frozen norms keep half


def test_flops_and_bytes_of_a_step(eight_h200):
    tokens = 64 * 512
    products, square = 2 * tokens * KERNELS, 4 * tokens * 512 * M * DEPTH
    # 40 item targets a row, compared in the tables' width, and 16 text targets in the LM's.
    heads = 2 * 64 * (D * 40 * N_ITEMS + M * 16 * V)
    found = dry_run.flops_per_step(eight_h200)
    assert found["model"] == 3 * (products + square + heads)
    assert found["hardware"] == found["model"] + products + square + heads
    assert found["model"] == pytest.approx(6 * tokens * 6.74e9, rel=0.03)
    moved = dry_run.bytes_moved(eight_h200)
    sharded = 4 * (KERNELS + TABLES + (N_USERS + N_ITEMS) * D)
    assert moved["all-gather of weights"] == pytest.approx(2 * 7 / 8 * sharded)
    assert moved["reduce-scatter of gradients"] == pytest.approx(7 / 8 * (sharded - 4 * N_USERS * D))
    assert moved["all-reduce of gradients"] == pytest.approx(2 * 7 / 8 * 4 * (NORMS + BRIDGE))
    assert moved["all-reduce of activations"] == 0


def test_one_h200_with_lora():
    found = plan(devices=1, parallel="jit", batch_rows=16, **LORA)
    adapters = DEPTH * 16 * (4 * 2 * M + 3 * (M + F))
    assert f"| adapters | {adapters + 1:,} | {adapters:,} |" in dry_run.describe(found, None)  # and their scale
    parts = dry_run.bytes_per_device(found)
    trained = adapters + BRIDGE + N_ITEMS * D
    assert parts["parameters"] == 2 * (KERNELS + TABLES + NORMS) + 4 * (trained + 1 + N_USERS * D)
    assert parts["gradients"] == 4 * trained
    assert parts["optimiser state"] == pytest.approx(8 * trained, abs=64)
    # Nothing as large as the weights beside them: what else there is are activations, of 16 rows here.
    assert set(parts) == {"parameters", "gradients", "optimiser state", "activations"}
    # Forward, the gradient of the states and, of the adapters alone, that of the weights; all but the last once again.
    tokens, flops = 16 * 512, dry_run.flops_per_step(found)
    products, square = 2 * tokens * KERNELS, 4 * tokens * 512 * M * DEPTH
    heads = 2 * 16 * (D * 40 * N_ITEMS + M * 16 * V)
    assert flops["model"] == 2 * products + 3 * (2 * tokens * adapters + square + heads)
    assert flops["hardware"] == flops["model"] + products + 2 * tokens * adapters + square + heads
    assert dry_run.bytes_moved(found) == dict.fromkeys(dry_run.bytes_moved(found), 0)


def test_a_v5e_16_holds_adam_in_float32_by_arithmetic():
    parts = dry_run.bytes_per_device(plan(devices=16, device="tpu_v5e"))
    state = parts["parameters"] + parts["optimiser state"] + parts["gradients"]
    assert state == pytest.approx(16 * 6.7396e9 / 16, rel=0.01)
    assert sum(parts.values()) < 16e9
    assert sum(dry_run.bytes_per_device(plan(devices=8, device="tpu_v5e")).values()) > 16e9


def test_qwen_has_its_published_size():
    found = plan("qwen_0_5b", devices=1, parallel="jit")
    assert "| decoder | 494,032,768 | 494,032,768 |" in dry_run.describe(found, None)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"devices": 8, "device": "b200"}, r"config.dry_run.device is 'b200'; it must be one of a100, "),
        ({"devices": 8, "parallel": "jit"}, r"config.parallel is 'jit', which uses one device, .*devices is 8; set "),
        ({"devices": 12}, r"kernel of shape .* by fsdp"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(asked, message):
    with pytest.raises(InputError, match=message):
        plan(**asked)


PROGRAM = """HloModule jit_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %sum = f32[] add(%x, %y)
}

%layer (arg: (s32[], f32[4,16])) -> (s32[], f32[4,16]) {
  %gathered = f32[4,16]{1,0} all-gather(%part), dimensions={1}
  %summed = (bf16[8]{0}, f32[2]{0}) all-reduce(%a, %b), to_apply=%add
  %inner = (s32[]) while(%init), condition=%less, body=%twice, backend_config={"known_trip_count":{"n":"2"}}
}

%twice (arg: (s32[])) -> (s32[]) {
  %shifted = s8[10]{0} collective-permute(%x), source_target_pairs={{0,1}}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %layers = (s32[], f32[4,16]) while(%init), condition=%less, body=%layer, backend_config={"known_trip_count":{"n":"3"}}
  %last = f32[5]{0} all-gather-start(%p), dimensions={0}
  %unknown = (s32[]) while(%init), condition=%less, body=%twice
}
"""


def test_a_loops_body_counts_as_often_as_it_runs():
    assert dry_run.collective_bytes(PROGRAM) == {
        "all-gather": 3 * 4 * 16 * 4 + 5 * 4,
        "all-reduce": 3 * (8 * 2 + 2 * 4),
        "collective-permute": 3 * 2 * 10 + 10,
    }


def test_propagation_is_counted_where_the_interactions_are_told(eight_h200):
    config = eight_h200.run.config.copy_and_resolve_references()
    assert propagation_needs(config, 8) is None and "propagation over" not in dry_run.describe(eight_h200, None)
    config.dry_run.n_interactions = 10**6
    found, n_nodes = propagation_needs(config, 8), 8 * (755 + 464)
    assert found.flops == 2 * 3 * 2 * (2 * 10**6) * D  # both ways through three layers
    assert found.gathered == (2 * 3 + 2) * n_nodes * D * 4 * 7 / 8
    assert found.edges == (2 * 3 + 3) * 4 * 10**6 / 8  # sender, receiver, weight both ways; user, item, seen
    told = dry_run.describe(eight_h200._replace(run=dataclasses.replace(eight_h200.run, config=config)), None)
    assert "| propagation over 1,000,000 interactions, 3 layers, one step of the domain arm | |" in told
    assert number(told, "messages along its edges, a layer, a device") == pytest.approx(2 * 10**6 / 8 * D * 4 / 1e9)


def run(*words):
    command = [sys.executable, "-m", "bdlm_jax.main", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def number(text, name):
    return float(re.search(rf"\| {re.escape(name)} \| ([\d.,]+)", text)[1].replace(",", ""))


def test_the_command_compiles_on_pretended_devices_what_it_counts():
    words = ["parallel=mesh", "mesh.fsdp=2", "mesh.tensor=2", "mesh.data=1", "dry_run.devices=4", "lm.width=512"]
    words += ["tokenizer.vocab_size=8192", "lm.mlp_width=1024", "lm.n_heads=8", "lm.n_kv_heads=2"]
    done = run("--config=experiments/tiny.py", "--dry_run", *[f"--config.{word}" for word in words])
    assert done.returncode == 0, done.stderr
    told = done.stdout
    by_hand = number(told, "parameters") + number(told, "optimiser state")
    assert by_hand > 0.01
    # The batch and the constants of a tiny world are small beside the state: XLA sees the shards that were counted. The
    # figures are rounded to thousandths.
    assert number(told, "arguments (state, batch, constants)") == pytest.approx(by_hand, rel=0.02, abs=0.0015)
    assert number(told, "collectives") > 0
    assert "least time of moving" in told


def test_a_wrong_mesh_is_one_sentence_and_exit_code_2():
    done = run("--config=experiments/ml1m_llm.py:vicuna_7b", "--dry_run", "--config.mesh.data=3")
    assert done.returncode == 2
    _, line = [line for line in done.stderr.splitlines() if line.strip()]  # the first says that it starts
    assert "config.mesh is data 3 x fsdp -1 x tensor 1, which needs a multiple of 3 devices, but there are 8" in line


@pytest.mark.slow
@pytest.mark.parametrize("lm", ["vicuna_7b", "qwen_0_5b"])
def test_the_experiments_compile_whole(lm):
    done = run(f"--config=experiments/ml1m_llm.py:{lm}", "--dry_run")
    assert done.returncode == 0, done.stderr
    by_hand = number(done.stdout, "parameters") + number(done.stdout, "optimiser state")
    assert number(done.stdout, "arguments (state, batch, constants)") == pytest.approx(by_hand, rel=0.02)
