"""The decoder against what transformers' torch models computed: stored, and alive in the slow tests."""

import numpy as np
import pytest
from golden import make_golden
from safetensors.numpy import load_file

from bdlm_jax.lm.hf_config import lm_config_from_hf
from bdlm_jax.lm.hf_weights import export_tensors, load_lm


def check(folder, batch, theirs):
    ours = make_golden.our_results(folder, batch)
    found = make_golden.differences(ours, theirs, batch["mask"])
    assert found["logits"] < 1e-4 and found["hidden"] < 1e-4 and found["gradient"] < 1e-3, found
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)


@pytest.mark.parametrize("case", make_golden.STORED)
def test_logits_states_and_gradients_equal_stored_ones_of_transformers(case):
    stored = load_file(make_golden.HERE / case / "expected.safetensors")
    batch = {name: stored.pop(name) for name in ("tokens", "mask", "positions")}
    assert np.abs(stored["logits"]).max() > 1, "the oracle must say something"
    assert {*batch["mask"].sum(1)} == {7, 8, 11}, "padded left, right and not at all"
    check(make_golden.HERE / case, batch, stored)


@pytest.mark.parametrize("case", make_golden.STORED)
def test_what_is_exported_is_what_was_loaded_to_the_bit(case):
    folder = make_golden.HERE / case
    stored = load_file(folder / "model.safetensors")
    config = lm_config_from_hf(folder, dtype="bfloat16")
    exported = dict(export_tensors(load_lm(folder, config, dtype="bfloat16"), config))
    assert exported.keys() == stored.keys()
    for name, array in exported.items():
        assert array.dtype == stored[name].dtype and array.tobytes() == stored[name].tobytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("case", make_golden.CASES)
def test_fresh_models_equal_those_of_transformers(case, tmp_path):
    pytest.importorskip("torch")
    model, batch = make_golden.write_model(case, tmp_path, seed=7), make_golden.make_batch(case, seed=7)
    check(tmp_path, batch, make_golden.torch_results(model, batch))
