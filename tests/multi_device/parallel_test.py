"""jit, pmap and meshes of every shape: the same numbers, no copy too many, no second compilation."""

import logging

import jax
import numpy as np
import pytest
from toy import INNER, WIDTH, assert_close, leaves_named, make, make_batch, make_state, step, train

from bdlm_jax.runtime import checkpoint
from bdlm_jax.runtime.parallel import compile_step
from bdlm_jax.types import InputError

ROWS = (("shared/item$", ("data", None)),)
WAYS = [
    ("pmap", {}), ("pmap", {"n_devices": 2}),
    ("mesh", {}), ("mesh", {"n_devices": 4}), ("mesh", {"rules": ROWS}),
    *(
        ("mesh", {"n_devices": data * fsdp * tensor, "mesh": {"data": data, "fsdp": fsdp, "tensor": tensor}})
        for data, fsdp, tensor in [(2, 2, 2), (1, 4, 1), (1, 1, 8), (2, 2, 1)]
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def expected():
    compiled = make("jit")
    state, losses = train(compiled, compiled.place_state(make_state()), range(4))
    assert losses[0] != losses[1]
    return compiled.fetch_state(state), losses


@pytest.mark.parametrize(("parallel", "options"), WAYS)
def test_all_ways_train_to_the_same_numbers(expected, parallel, options):
    assert jax.device_count() == 8
    traces, given = [], make_state()

    def counting_step(state, batch, *, axis_name=None):
        traces.append(state.params["shared"]["user"].shape)
        return step(state, batch, axis_name=axis_name)

    compiled = compile_step(counting_step, parallel=parallel, **options)
    placed = compiled.place_state(given)
    before = compiled.fetch_state(placed)
    state, losses = train(compiled, placed, range(4))
    np.testing.assert_allclose(losses, expected[1], rtol=1e-4)
    fetched = compiled.fetch_state(state)
    assert_close(fetched, expected[0])
    np.testing.assert_array_equal(jax.random.key_data(fetched.key), jax.random.key_data(expected[0].key))
    assert traces == [(7, 3)]  # compiled once, and the step sees no padding
    # The steps ate neither the caller's arrays nor what had been fetched.
    assert_close(before, given)
    assert isinstance(before.params["shared"]["item"], np.ndarray)

    for end, shape in expected_parts(parallel, **options).items():
        weight_and_moments = leaves_named(state, end)
        assert len(weight_and_moments) == 3
        assert {shard.data.shape for leaf in weight_and_moments for shard in leaf.addressable_shards} == {shape}


def expected_parts(parallel, *, n_devices=8, mesh=None, rules=None):
    """The shape of what one device holds of some leaves."""
    if parallel == "pmap":
        return {"shared/item": (1, 10, WIDTH)}
    if rules:
        return {"shared/item": (16 // 8, WIDTH)}
    data, fsdp, tensor = (mesh[axis] for axis in ("data", "fsdp", "tensor")) if mesh else (n_devices, 1, 1)
    return {
        "gate_proj/kernel": (1, WIDTH // fsdp, INNER // tensor),
        "down_proj/kernel": (1, INNER // tensor, WIDTH // fsdp),
        "shared/item": (-(-10 // (data * fsdp * tensor)), WIDTH),
    }


@pytest.mark.parametrize("parallel", ["jit", "pmap", "mesh"])
def test_constants_come_from_the_host_or_are_placed_once(parallel):
    compiled = make(parallel)
    placed = compiled.place_constants(np.float32(0.25))
    assert len(placed.sharding.device_set) == (1 if parallel == "jit" else 8) and placed.sharding.is_fully_replicated
    losses = []
    for offset in (placed, np.float32(0.25), np.float32(9.0)):
        _, metrics = compiled.run(compiled.place_state(make_state()), make_batch(0), offset)
        losses.append(float(metrics["loss"]))
    assert metrics["loss"].shape == () and losses[0] == losses[1] != losses[2]


def test_a_subtree_is_fetched():
    compiled = make("pmap")
    item = compiled.place_state(make_state()).params["shared"]["item"]
    assert compiled.fetch_state({"only": item})["only"].shape == (10, WIDTH) and (item == item[:1]).all()


@pytest.mark.parametrize("parallel", ["pmap", "mesh"])
def test_a_batch_that_does_not_divide_is_refused(parallel):
    compiled = make(parallel)
    for send in (compiled.place_batch, lambda batch: compiled.run(compiled.place_state(make_state()), batch)):
        with pytest.raises(InputError, match=r"of shape \(12,.*8 devices"):
            send(make_batch(0, size=12))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mesh": {"fsdp": 8}}, r"down_proj/kernel of shape \(1, 8, 4\) .* 8 by fsdp"),
        ({"rules": (("item$", (None, "data")),)}, r"params/shared/item of shape \(10, 4\) .* dimension 1 of 4 .* data"),
        ({"rules": (("step$", ("data",)),)}, "does not fit step"),
        ({"rules": (("shared/item$", ("model",)),)}, "does not fit params/shared/item"),
    ],
)
def test_rules_that_do_not_fit_are_refused_before_anything_is_placed(options, words):
    with pytest.raises(InputError, match=words):
        compile_step(step, parallel="mesh", **options).place_state(make_state())


def test_what_one_topology_saves_another_restores(tmp_path, expected):
    losses = []
    for number, sizes in enumerate([{"data": 2, "fsdp": 2}, {}, {"tensor": 4}, {"fsdp": 4}]):
        compiled = make(**sizes) if sizes else make("jit")
        like = compiled.abstract_state(make_state()) if sizes else make_state()
        start = checkpoint.restore(checkpoint.latest(tmp_path), like=like) if number else make_state()
        if number and sizes:
            kernel = start.params["lm"]["layers"]["mlp"]["gate_proj"]["kernel"]
            assert kernel.addressable_shards[0].data.size == kernel.size // 4  # each device has read its own part
        state, loss = train(compiled, compiled.place_state(start), [number])
        losses += loss
        kept = compiled.fetch_state(state, to_host=False) if compiled.in_parts else compiled.fetch_state(state)
        path = checkpoint.save(tmp_path, number, kept, keep=1)
    np.testing.assert_allclose(losses, expected[1], rtol=1e-4)
    assert_close(compiled.fetch_state(state), expected[0])
    # The same checkpoint is one of host arrays too, without a row of padding.
    host = checkpoint.restore(path, like=compiled.fetch_state(state))
    assert_close(host, compiled.fetch_state(state))
    assert isinstance(host.params["shared"]["item"], np.ndarray)


def test_a_second_save_and_a_second_placing_compile_nothing(caplog):
    compiled = make(fsdp=2)  # which no other test here uses
    state = compiled.place_state(make_state())

    def go_round():
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            caplog.clear()
            kept = compiled.fetch_state(state, to_host=False)
            assert kept.params["shared"]["user"].shape == (7, 3)
            compiled.place_state(kept)
        return sum("Finished XLA compilation" in record.getMessage() for record in caplog.records)

    assert go_round() > 0 and go_round() == 0
