import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec

from bdlm_jax.lm import causal_lm
from bdlm_jax.runtime.sharding import mesh_sizes, state_layout
from bdlm_jax.types import InputError, TrainState, leaf_name

HEADS = {"n_heads": 4, "n_kv_heads": 2, "attention_bias": True}
CONFIG = causal_lm.LMConfig(vocab_size=24, width=16, n_layers=3, mlp_width=32, tie_embeddings=False, **HEADS)
SIZES = {"data": 2, "fsdp": 2, "tensor": 4}


def make_state(optimizer):
    def make():
        tables = {"user": jnp.zeros((7, 4)), "item": jnp.zeros((10, 4))}
        params = {"shared": tables, "domain": {}, "lm": causal_lm.init_lm(jax.random.key(0), CONFIG)}
        return TrainState(params, optimizer.init(params), jnp.int32(0), jax.random.key(0))

    return jax.eval_shape(make)


def layouts(state, sizes=SIZES, **options):
    leaves = jax.tree_util.tree_leaves_with_path(state_layout(state, sizes, **options))
    return {leaf_name(path): leaf for path, leaf in leaves}


@pytest.mark.parametrize(
    ("wanted", "n", "sizes"),
    [
        ({"data": -1, "fsdp": 1, "tensor": 1}, 8, (8, 1, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, 16, (2, 4, 2)),
        ({"fsdp": 8}, 8, (1, 8, 1)),
        ({"data": -1, "fsdp": 8, "tensor": 1}, 8, (1, 8, 1)),
    ],
)
def test_the_free_axis_takes_what_is_left(wanted, n, sizes):
    assert tuple(mesh_sizes(wanted, n).values()) == sizes


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"data": 3, "fsdp": 2}, "data 3 x fsdp 2 x tensor 1, which needs 6 devices, but there are 8"),
        ({"data": -1, "fsdp": 3}, "needs a multiple of 3 devices, but there are 8"),
        ({"data": -1, "fsdp": -1}, "one of them may be -1"),
        ({"data": 0}, "sizes are whole numbers from 1"),
        ({"model": 8}, "config.mesh.model is no axis of the mesh; it has data, fsdp, tensor"),
        ({"data": 16}, "needs 16 devices, but there are 8"),
    ],
)
def test_a_wrong_mesh_is_one_sentence(wanted, words):
    with pytest.raises(InputError, match=re.escape(words)):
        mesh_sizes(wanted, 8)


def test_matrices_are_split_by_columns_then_rows_and_tables_by_rows():
    found = layouts(make_state(optax.sgd(0.1)))
    layer = "params/lm/layers/"
    assert found[layer + "self_attn/q_proj/kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert found[layer + "self_attn/q_proj/kernel"].shard(SIZES) == (3, 16 // 2, 16 // 4)
    assert found[layer + "self_attn/o_proj/kernel"].spec == PartitionSpec(None, "tensor", "fsdp")
    assert found[layer + "mlp/down_proj/kernel"].shard(SIZES) == (3, 32 // 4, 16 // 2)
    assert found[layer + "self_attn/k_proj/bias"].shard(SIZES) == (3, 8 // 4)
    assert found[layer + "input_layernorm/scale"].spec == PartitionSpec()
    assert found["params/lm/embedding"].shard(SIZES) == (24 // 8, 16)
    assert found["params/lm/head"].spec == PartitionSpec(("fsdp", "tensor"))
    user = found["params/shared/user"]
    assert (user.shape, user.padded, user.shard(SIZES)) == ((7, 4), (16, 4), (1, 4))
    assert found["key"].spec == found["step"].spec == PartitionSpec()


def test_one_device_shards_and_pads_nothing():
    for layout in layouts(make_state(optax.sgd(0.1)), {"data": 1, "fsdp": 1, "tensor": 1}).values():
        assert layout.spec == PartitionSpec()
        assert layout.padded == layout.shape == layout.shard(SIZES)


@pytest.mark.parametrize("accumulate", [False, True])
def test_optimiser_state_lies_as_its_parameter(accumulate):
    optimizer = optax.adamw(1e-3, mu_dtype=jnp.bfloat16)
    if accumulate:
        optimizer = optax.MultiSteps(optimizer, every_k_schedule=2)
    found = layouts(make_state(optimizer))
    params = {name.removeprefix("params/"): layout for name, layout in found.items() if name.startswith("params/")}
    for name, layout in params.items():
        kept = [n for n in found if n.endswith("/" + name) and not n.startswith("params/")]
        assert len(kept) == 2 + accumulate
        assert {found[n] for n in kept} == {layout}


def test_adafactors_means_keep_the_axes_of_what_is_left():
    found = layouts(make_state(optax.adafactor(1e-3, min_dim_size_to_factor=2)))
    ends = {name: layout for name, layout in found.items() if name.endswith("mlp/gate_proj/kernel")}
    by_shape = {layout.shape: layout.spec for layout in ends.values()}
    # optax keeps v_row without the largest dimension and v_col without the second largest.
    assert by_shape[(3, 16)] == PartitionSpec(None, "fsdp")
    assert by_shape[(3, 32)] == PartitionSpec(None, "tensor")
    assert by_shape[(1,)] == PartitionSpec()
    rows = {layout.shape: layout for name, layout in found.items() if name.endswith("/v_row/shared/user")}
    assert all(layout.padded == layout.shape for layout in rows.values() if layout.spec == PartitionSpec())


def test_a_dimension_that_does_not_divide_is_named():
    with pytest.raises(InputError) as told:
        state_layout(make_state(optax.sgd(0.1)), {"data": 1, "fsdp": 3, "tensor": 1})
    sentence = str(told.value)
    assert "params/lm/layers/mlp/down_proj/kernel of shape (3, 32, 16)" in sentence
    assert "dimension 2 of 16 is split into 3 by fsdp" in sentence
