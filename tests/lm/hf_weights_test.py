import json
import shutil
import tracemalloc

import jax
import numpy as np
import pytest
from golden import make_golden
from safetensors.numpy import load_file, save_file

from bdlm_jax.lm.hf_config import lm_config_from_hf
from bdlm_jax.lm.hf_weights import export_tensors, find_folder, load_lm, tensor_map
from bdlm_jax.types import InputError

LLAMA, GPT2 = make_golden.HERE / "llama", make_golden.HERE / "gpt2"


@pytest.fixture(scope="module")
def llama_config():
    return lm_config_from_hf(LLAMA)


@pytest.fixture
def folder(tmp_path):
    """A writable copy of the stored Llama."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(LLAMA / name, tmp_path / name)
    return tmp_path


def assert_equal_trees(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_a_base_models_names_and_old_buffers_are_understood(tmp_path):
    config = lm_config_from_hf(GPT2)
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(GPT2 / "model.safetensors").items()}
    save_file({**tensors, "h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}, tmp_path / "model.safetensors")
    assert_equal_trees(load_lm(tmp_path, config), load_lm(GPT2, config))


@pytest.mark.parametrize("case", ["llama", "qwen2"])
def test_spare_rows_start_as_the_mean_of_the_others(case):
    folder = make_golden.HERE / case
    plain, wide = (load_lm(folder, lm_config_from_hf(folder, vocab_size=n)) for n in (None, 104))
    for leaf in ("embedding",) if case == "qwen2" else ("embedding", "head"):
        np.testing.assert_array_equal(wide[leaf][:101], plain[leaf])
        mean = np.broadcast_to(np.mean(plain[leaf], axis=0), (3, 24))
        np.testing.assert_allclose(wide[leaf][101:], mean, atol=1e-3)  # of bfloat16 rows


def test_each_leaf_goes_where_it_is_placed(llama_config):
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"embedding": ("fsdp",), "layers/mlp/up_proj/kernel": (None, "fsdp")}
    placed = {path: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)) for path, spec in specs.items()}
    params = load_lm(LLAMA, llama_config, placement=placed.get)
    assert params["embedding"].sharding == placed["embedding"]
    assert params["layers"]["mlp"]["up_proj"]["kernel"].sharding == placed["layers/mlp/up_proj/kernel"]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    assert_equal_trees(params, load_lm(LLAMA, llama_config))


def test_further_subtrees_are_not_exported(llama_config):
    params = load_lm(LLAMA, llama_config)
    names = [name for name, _ in export_tensors({**params, "bridge": {"into": np.ones(3)}}, llama_config)]
    assert names == list(tensor_map(llama_config))


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({NORM: None}, r"lacks the tensor model\.norm\.weight: "),
        ({"extra": np.ones(2)}, "has the tensor extra, which a llama"),
        ({NORM: np.ones(25, np.float32)}, r"model\.norm\.weight has the shape \(25,\), the config asks for \(24,\)"),
        ({"lm_head.weight": np.ones((102, 24), np.float32)}, r"\(102, 24\), the config asks"),
        ({NORM: np.ones(24, np.int8)}, "dtype I8"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(folder, llama_config, change, words):
    tensors = load_file(folder / "model.safetensors") | change
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / "model.safetensors")
    with pytest.raises(InputError, match=words):
        load_lm(folder, llama_config)


def test_broken_and_missing_files_are_named_and_pickles_never_opened(folder, llama_config):
    def is_refused(words):
        with pytest.raises(InputError, match=words):
            load_lm(folder, llama_config)

    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    whole = single.read_bytes()
    for broken in (whole[:-10], whole[:4], b"\xff" * 64):
        single.write_bytes(broken)
        is_refused(r"model\.safetensors cannot be read as a safetensors file")
    index.write_text(json.dumps({"weight_map": {NORM: "model-1.safetensors"}}))
    is_refused(r"names model-1\.safetensors, which is not in the folder")
    index.write_text("{}")
    is_refused("is no index of safetensors files")
    index.unlink()
    single.unlink()
    is_refused(r"neither model\.safetensors nor")
    (folder / "pytorch_model.bin").write_bytes(b"")
    is_refused(r"\.bin pickles only.*convert them")


def test_a_hub_id_without_a_network_is_refused_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_folder(tmp_path) == tmp_path
    with pytest.raises(InputError, match="nobody/nothing is no folder here, and the hub cannot be reached"):
        find_folder("nobody/nothing")
    with pytest.raises(InputError, match="no folder here and no hub id"):
        find_folder("a/b/c")


def test_large_matrices_are_written_once_cast_and_transposed(tmp_path):
    shape = {"hidden_size": 200, "intermediate_size": 640, "num_attention_heads": 4, "num_hidden_layers": 3}
    golden = json.loads((LLAMA / "config.json").read_text())
    config = lm_config_from_hf(golden | shape | {"num_key_value_heads": 2, "vocab_size": 1000, "head_dim": 50})
    draw = np.random.default_rng(0)
    stored = {name: draw.normal(size=tensor.shape).astype(np.float16) for name, tensor in tensor_map(config).items()}
    save_file(stored, tmp_path / "model.safetensors")
    load_lm(tmp_path, config)  # what is traced and imported once is not counted
    tracemalloc.start()
    params = load_lm(tmp_path, config)
    peak = tracemalloc.get_traced_memory()[1]  # NumPy tells of every array
    tracemalloc.stop()
    assert peak < 1.2 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    back = dict(export_tensors(params, config))
    for name, value in stored.items():
        np.testing.assert_array_equal(back[name], value.astype(np.float32), err_msg=name)
