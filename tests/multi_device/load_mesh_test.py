"""A model, loaded or drawn, on a mesh that cuts weights: every part goes to its own device, and nowhere else."""

import jax
import numpy as np
import own_lm
import pytest

from bdlm_jax.run import build


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return folder, own_lm.write_model(folder, own_lm.LLAMA)


def make_mesh_run(folder, model, **mesh):
    run = own_lm.make_run(folder, path=str(model[0]))
    run.config.parallel = "mesh"
    run.config.mesh.update(mesh)
    return run


def test_each_device_gets_its_part_alone(tmp_path, model):
    run = make_mesh_run(tmp_path, model, data=2, fsdp=2, tensor=2)
    loaded = build.load_decoder(run)
    kernel, embedding = loaded["layers"]["mlp"]["up_proj"]["kernel"], loaded["embedding"]
    assert tuple(kernel.sharding.spec) == (None, "fsdp", "tensor")
    assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // 4}
    assert {shard.data.shape for shard in embedding.addressable_shards} == {(288 // 4, 8)}
    np.testing.assert_array_equal(kernel, model[1]["layers"]["mlp"]["up_proj"]["kernel"])
    params = own_lm.init_params(run, loaded=loaded)
    assert params["lm"]["layers"]["mlp"]["up_proj"]["kernel"] is kernel
    assert params["lm"]["bridge"]["into"].shape == (16, 8)


def test_what_is_drawn_lies_in_parts_and_is_the_same(tmp_path, model):
    run = make_mesh_run(tmp_path, model, data=2, fsdp=2, tensor=2)
    run.config.lm.path, run.config.lm.n_heads = "", 2
    kernel = own_lm.init_params(run)["lm"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // 4}
    run.config.parallel = "jit"
    alone = own_lm.init_params(run)["lm"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert len(alone.sharding.device_set) == 1
    np.testing.assert_allclose(kernel, alone, atol=1e-6)


@pytest.mark.parametrize(("parallel", "mesh"), [("jit", {}), ("mesh", {"data": 8, "fsdp": 1, "tensor": 1})])
def test_where_nothing_is_cut_one_device_takes_it(tmp_path, model, parallel, mesh):
    run = make_mesh_run(tmp_path, model, **mesh)
    run.config.parallel = parallel
    loaded = build.load_decoder(run)
    assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(loaded))
