"""From a config to a model: the shape, the weights and the size of the id rows of a Hugging Face model."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import own_lm
import pytest

from bdlm_jax.lm import hf_config as families
from bdlm_jax.run import build as arms
from bdlm_jax.run.checks import check_config
from bdlm_jax.types import InputError
from experiments import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return folder, own_lm.write_model(folder, own_lm.LLAMA)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return own_lm.make_run(tmp_path_factory.mktemp("run"), path=str(model[0]), trains="lora", row_std=0.0)


def test_a_path_gives_shape_and_weights(run, model):
    shape, loaded = arms.lm_config(run), arms.load_weights(run)
    assert shape == dataclasses.replace(
        families.lm_config_from_hf(model[0], dropout=run.config.lm.dropout), vocab_size=288
    )
    np.testing.assert_array_equal(loaded["embedding"][:283], model[1]["embedding"])
    np.testing.assert_allclose(loaded["embedding"][285], np.mean(model[1]["embedding"], axis=0), atol=1e-6)
    params = arms.init_params(run, arms.DOT_ARM, "ids_lm", reads="layer0", pretrained=loaded)
    np.testing.assert_array_equal(
        params["lm"]["layers"]["mlp"]["up_proj"]["kernel"], loaded["layers"]["mlp"]["up_proj"]["kernel"]
    )
    assert params["lm"]["bridge"]["into"].shape == (16, 8)
    assert set(params["lm"]["lora"]) == {"alpha", "layers"}


@pytest.mark.parametrize("width", [4, 16])
@pytest.mark.parametrize("scales", [False, True])
def test_id_rows_are_as_large_as_the_text_rows_that_the_first_layer_reads(run, monkeypatch, width, scales):
    config = run.config.copy_and_resolve_references()
    config.shared.width = width
    run = run._replace(config=config)
    loaded = arms.load_weights(run)
    shape = dataclasses.replace(arms.lm_config(run), scale_embedding=scales)
    monkeypatch.setattr(arms, "lm_config", lambda run: shape)
    params = arms.init_params(run, arms.DOT_ARM, "ids_lm", reads="layer0", pretrained=loaded)
    rows_IM = np.asarray(params["shared"]["item"] @ params["lm"]["bridge"]["into"])
    known = np.asarray(loaded["embedding"])[: len(run.texts.vocabulary.tokenizer)] * (8**0.5 if scales else 1.0)
    wanted = np.linalg.norm(known, axis=1).mean()
    assert np.linalg.norm(rows_IM, axis=1).mean() == pytest.approx(wanted, rel=0.1)
    assert np.sqrt(np.mean(rows_IM**2)) == pytest.approx(np.sqrt(np.mean(known**2)), rel=0.15)


def test_a_config_json_alone_is_trained_from_scratch_in_our_own_words(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(families.hf_config(dataclasses.replace(own_lm.GPT2, vocab_size=50257)))
    )
    run = own_lm.make_run(tmp_path, config=str(tmp_path / "config.json"), param_dtype="bfloat16")
    shape = arms.lm_config(run)
    assert shape.family == "gpt2" and shape.vocab_size == run.texts.vocabulary.n_text < 400
    assert arms.load_weights(run) is None
    lm = arms.init_params(run, arms.DOT_ARM, "pretrain", reads="layer0")["lm"]
    assert lm["embedding"].dtype == lm["layers"]["mlp"]["up_proj"]["bias"].dtype == jnp.bfloat16
    assert lm["bridge"]["into"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"config": "config.json"}, "lm.path and lm.config are both set"),
        ({"trains": "bridge"}, "pretrain.corpus has nothing to train"),
        ({"accumulate": 3}, "lm.batch_rows 8 does not divide into lm.accumulate 3"),
        ({"lora_targets": "(q"}, "config.lm.lora_targets is '[(]q'; it must be a regular expression"),
        ({"path": "no/such/folder/here"}, "no/such/folder/here is no folder here"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(model, tmp_path, setting, words):
    config = tiny.get_config()
    config.lm.path = str(model[0])
    config.pretrain.corpus = str(tmp_path / "corpus.txt")
    (tmp_path / "corpus.txt").write_text("a line\n")
    config.lm.update(setting)
    with pytest.raises(InputError, match=words):
        check_config(config)


def test_a_row_longer_than_the_learned_positions_is_refused(tmp_path):
    own_lm.write_model(tmp_path, own_lm.GPT2, tokenizer=False)
    config = tiny.get_config()
    config.lm.path, config.prompts.length = str(tmp_path), 97
    with pytest.raises(InputError, match=r"config.prompts.length 97 is above the 96 positions"):
        check_config(config)


def test_a_broken_config_json_is_named(tmp_path):
    config = tiny.get_config()
    config.lm.config = str(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.lm.config: .*config.json cannot be read"):
        check_config(config)
