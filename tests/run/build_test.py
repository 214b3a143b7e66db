"""From a config to a model: the shape, the weights and the size of the id rows of a Hugging Face model."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import own_lm
import pytest
from safetensors.numpy import load_file, save_file

from bdlm_jax.lm import hf_config, vocabulary
from bdlm_jax.run import build, checks
from bdlm_jax.run.checks import check_config
from bdlm_jax.types import InputError
from experiments import tiny

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
TEXTS = [f"{a}{b} {b}{a}" for a in "bcdfghklm" for b in "aeiou"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return folder, own_lm.write_model(folder, own_lm.LLAMA)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return own_lm.make_run(tmp_path_factory.mktemp("run"), path=str(model[0]), trains="lora", row_std=0.0)


def test_a_path_gives_shape_and_weights(run, model):
    loaded = build.load_decoder(run)
    shape = hf_config.lm_config_from_hf(model[0], dropout=run.config.lm.dropout)
    assert run.lm == dataclasses.replace(shape, vocab_size=288)
    np.testing.assert_array_equal(loaded["embedding"][:283], model[1]["embedding"])
    np.testing.assert_allclose(loaded["embedding"][285], np.mean(model[1]["embedding"], axis=0), atol=1e-6)
    params = own_lm.init_params(run, loaded=loaded)
    np.testing.assert_array_equal(
        params["lm"]["layers"]["mlp"]["up_proj"]["kernel"], loaded["layers"]["mlp"]["up_proj"]["kernel"]
    )
    assert params["lm"]["bridge"]["into"].shape == (16, 8)
    assert set(params["lm"]["lora"]) == {"alpha", "layers"}


@pytest.mark.parametrize("width", [4, 16])
@pytest.mark.parametrize("scales", [False, True])
def test_id_rows_are_as_large_as_the_text_rows_that_the_first_layer_reads(run, width, scales):
    loaded, shape = build.load_decoder(run), dataclasses.replace(run.lm, scale_embedding=scales)
    run = dataclasses.replace(run, config=run.config.copy_and_resolve_references())
    run.__dict__["lm"], run.config.shared.width = shape, width
    params = own_lm.init_params(run, loaded=loaded)
    rows_IM = np.asarray(params["shared"]["item"] @ params["lm"]["bridge"]["into"])
    known = np.asarray(loaded["embedding"])[: len(run.texts.vocabulary.tokenizer)] * (8**0.5 if scales else 1.0)
    wanted = np.linalg.norm(known, axis=1).mean()
    assert np.linalg.norm(rows_IM, axis=1).mean() == pytest.approx(wanted, rel=0.1)
    assert np.sqrt(np.mean(rows_IM**2)) == pytest.approx(np.sqrt(np.mean(known**2)), rel=0.15)


def test_a_config_json_alone_is_trained_from_scratch_in_our_own_words(tmp_path):
    shape = dataclasses.replace(own_lm.GPT2, vocab_size=50257)
    (tmp_path / "config.json").write_text(json.dumps(hf_config.hf_config(shape)))
    run = own_lm.make_run(tmp_path, config=str(tmp_path / "config.json"), param_dtype="bfloat16")
    assert run.lm.family == "gpt2" and run.lm.vocab_size == run.texts.vocabulary.n_text < 400
    assert build.load_decoder(run) is None
    lm = own_lm.init_params(run, "pretrain")["lm"]
    assert lm["embedding"].dtype == lm["layers"]["mlp"]["up_proj"]["bias"].dtype == jnp.bfloat16
    assert lm["bridge"]["into"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"config": "config.json"}, "lm.path and lm.config are both set"),
        ({"trains": "bridge"}, "pretrain.corpus has nothing to train"),
        ({"path": "", "trains": "lora"}, "config.lm.trains is lora, but lm.path names no model"),
        ({"accumulate": 3}, "lm.batch_rows 8 does not divide into lm.accumulate 3"),
        ({"lora_targets": "(q"}, "config.lm.lora_targets is '[(]q'; it must be a regular expression"),
        ({"path": "no/such/folder/here"}, "no/such/folder/here is no folder here"),
        ({"path": "gpt2"}, "config.prompts.length 97 is above the 96 positions"),
        ({"path": "short"}, "config.prompts.length 97 and the 9 tokens of a title are above the 100 positions"),
        ({"path": "<your model>"}, "config.lm.path is not given: --config.lm.path=FOLDER"),
        ({"path": "", "config": "broken.json"}, r"config.lm.config: .*broken.json cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(model, tmp_path, monkeypatch, setting, words):
    monkeypatch.chdir(tmp_path)
    own_lm.write_model(tmp_path / "gpt2", own_lm.GPT2, tokenizer=False)
    own_lm.write_model(tmp_path / "short", dataclasses.replace(own_lm.LLAMA, max_positions=100), tokenizer=False)
    for name, text in (("corpus.txt", "a line\n"), ("broken.json", "{")):
        (tmp_path / name).write_text(text)
    config = tiny.get_config()
    config.lm.path, config.pretrain.corpus, config.prompts.length = str(model[0]), "corpus.txt", 97
    config.lm.update(setting)
    with pytest.raises(InputError, match=words):
        check_config(config)


def _changed(name, **changes):
    """A change of one tensor, or of what config.json says."""

    def change(folder):
        path = folder / name
        if name == "config.json":
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        else:
            tensors = load_file(path)
            tensors["model.norm.weight"][3] = changes["value"]
            save_file(tensors, path)

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_changed("config.json", vocab_size=290), "has 283 rows, and vocab_size in config.json is 290"),
        (_changed("config.json", vocab_size=280), "has 283 rows, and vocab_size in config.json is 280"),
        (_changed("model.safetensors", value=np.nan), "model.norm.weight holds 1 values that are no finite numbers"),
        (lambda folder: (folder / "model.safetensors").write_text(POINTER), "model.safetensors is a Git-LFS pointer"),
        (lambda folder: (folder / "tokenizer.json").write_text(POINTER), "tokenizer.json is a Git-LFS pointer"),
        (lambda folder: (folder / "config.json").write_text(POINTER), "config.json is a Git-LFS pointer"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "config.json holds a list, not a model's settings"),
        (lambda folder: vocabulary.train_tokenizer(TEXTS, 300).save_pretrained(folder), "more than the 283 rows"),
    ],
)
def test_a_faulty_model_is_named_before_any_work(tmp_path, damage, words):
    own_lm.write_model(tmp_path, own_lm.LLAMA)
    config = tiny.get_config()
    config.lm.path = str(tmp_path)
    check_config(config)
    checks._check_model.cache_clear()
    damage(tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        check_config(config)
    assert "\n" not in str(caught.value)


def test_a_list_as_config_json_is_refused_where_weights_are_not_asked_for(tmp_path):
    config = tiny.get_config()
    config.lm.config = str(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(InputError, match=r"config\.lm\.config: .* cannot be read \(it holds a list\)"):
        check_config(config)
