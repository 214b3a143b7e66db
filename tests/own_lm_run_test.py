"""From text to a model, from the model to a BDLM around it: the doors one behind the other, at the smallest size."""

import dataclasses
import json
import re

import jax
import numpy as np
import own_lm
import pytest
from safetensors.numpy import load_file, save_file

import bdlm_jax
from bdlm_jax import export
from bdlm_jax.lm import causal_lm, hf_config, hf_weights
from bdlm_jax.run.pretraining import Settings, pretrain
from bdlm_jax.runtime.files import load_safetensors
from bdlm_jax.serving import artefact, card, scores
from bdlm_jax.story import train_and_evaluate
from experiments import own_lm as experiment
from experiments import tiny

ADAPTERS = "recommends/adapter_config.json", "recommends/adapter_model.safetensors"


def make_config(model, trains):
    """experiments/tiny.py around a model, set as experiments/own_lm.py:merged; "base" is LoRA that does not speak."""
    config, own = tiny.get_config(), experiment.get_config("merged")
    for section in ("lm", "pretrain"):
        small = {name: config[section][name] for name in ("warmup_steps", "batch_rows") if name in config[section]}
        config[section].update(own[section])
        config[section].update(small)
    config.lm.path, config.pretrain.samples = str(model), 16
    config.lm.trains, config.lm.speaks = ("lora", "base") if trains == "base" else (trains, "trained")
    config.lm_alone.row_std = config.mutual.learning_rate_bridge = 0.0
    return config


@pytest.mark.slow
@pytest.mark.parametrize("trains", ["lora", "full", "bridge", "base"])
def test_an_own_model_is_trained_served_and_says_how_well_it_still_speaks(tmp_path, trains):
    (tmp_path / "corpus.txt").write_text("\n".join(f"text {n} of a small world" for n in range(60)))
    shape = Settings(vocab_size=300, width=16, layers=1, heads=2, kv_heads=1, length=128, epochs=1, batch_rows=4)
    pretrain([str(tmp_path / "corpus.txt")], tmp_path / "model", shape)
    config = make_config(tmp_path / "model", trains)
    config.models = ("ids_lm", "bdlm")
    results = train_and_evaluate(config, str(tmp_path / "run"))
    language = results["language"]
    assert language == json.loads((tmp_path / "run" / "language.json").read_text())
    assert language["text"] == "the model's own samples" and language["tokens"] > 16
    assert (language["before"] == language["after"]) == (trains in ("bridge", "base"))
    assert ("adapters" in language) == (trains == "base") and language.get("adapters") != language["after"]
    assert f"{language['after']:.2f}, and was {language['before']:.2f}" in (tmp_path / "run" / "results.md").read_text()
    run = bdlm_jax.load(tmp_path / "run")
    assert len(run.recommend(users=run.users[:1], arm="lm", k=3)) == 3


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """The folder of a run whose adapters recommend and do not write: model/, run/, and hf/, its export."""
    folder = tmp_path_factory.mktemp("apart")
    own_lm.write_model(folder / "model", dataclasses.replace(own_lm.LLAMA, tie_embeddings=True))
    config = make_config(folder / "model", "base")
    config.models, config.mutual.rounds = ("ids_lm",), 0
    train_and_evaluate(config, str(folder / "run"))
    arguments = ["--workdir", str(folder / "run"), "--format", "hf", "--out", str(folder / "hf")]
    assert export.main(arguments) == 0
    return folder


def test_adapters_recommend_and_the_model_is_exported_as_it_came(apart):
    trained = load_safetensors(apart / "run" / "ids_lm" / "best_lm.safetensors")["lm"]["lora"]
    assert all(np.abs(leaf["kernel"]["b"]).max() > 0 for leaf in trained["layers"]["mlp"].values()), "they moved"
    jax.tree.map(np.testing.assert_array_equal, artefact.load_lm_arm(apart / "run").params["lora"], trained)
    written, came = (load_file(apart / name / "model.safetensors") for name in ("hf", "model"))
    for name, weight in came.items():
        np.testing.assert_array_equal(written[name][: len(weight)], weight)


def test_the_card_tells_what_the_text_would_lose_by_the_adapters(apart, tmp_path):
    language = {"text": "the corpus", "tokens": 9, "before": 20.0, "after": 20.0, "adapters": 31.0}
    (tmp_path / "results.json").write_text(json.dumps({"language": language}))
    record = artefact.load_lm_arm(apart / "run"), artefact.load_catalogue(apart / "run")
    told = "writes what that wrote (perplexity on the corpus held out: 20.00, and 31.00 with them)."
    assert told in card.model_card(tmp_path, *record, row="bdlm_lm")
    assert "writes what that wrote." in card.model_card(tmp_path, *record, row="ids_lm"), "which nobody measured"


def test_by_pefts_rule_the_folder_ranks_as_recommend_does(apart, tmp_path):
    folder, served = apart / "hf", artefact.load_lm_arm(apart / "run")
    weights, told = load_file(folder / "model.safetensors"), json.loads((folder / ADAPTERS[0]).read_text())
    pairs = load_file(folder / ADAPTERS[1])
    for name in [name for name in pairs if ".lora_A." in name]:
        delta = told["lora_alpha"] / told["r"] * pairs[name.replace("lora_A", "lora_B")] @ pairs[name]
        weights[name.removeprefix("base_model.model.").replace("lora_A.", "")] += delta
    save_file(weights, tmp_path / "model.safetensors")
    config = hf_config.lm_config_from_hf(folder)
    history = [3, 7, 11]
    tokens_BL = scores._history_prompt(served, history, user=None).tokens[None]
    places = np.arange(tokens_BL.shape[1])[None]
    for source, same in ((tmp_path, True), (folder, False)):
        lm = hf_weights.load_lm(source, config)
        hidden_BLM = causal_lm.lm_hidden(lm, config, tokens_BL, places, np.ones_like(places), None)
        theirs_I = hidden_BLM[0, -1] @ lm["embedding"][served.vocabulary.item_tokens.start :].T
        assert np.allclose(theirs_I, scores.lm_scores(served, [history])[0], rtol=1e-4, atol=1e-4) == same


def test_the_cards_code_recommends_by_peft_and_writes_by_the_base(apart, capsys, monkeypatch):
    torch, _, transformers = map(pytest.importorskip, ("torch", "peft", "transformers"))
    names = {}
    (code,) = re.findall(r"^```python\n(.*?)^```", (apart / "hf" / "README.md").read_text(), re.M | re.S)
    monkeypatch.chdir(apart / "hf")
    exec(compile(code, "README.md", "exec"), names)
    history = artefact.load_catalogue(apart / "run").item_ids[:2]
    rows = bdlm_jax.load(apart / "run").recommend(histories=[history], arm="ids_lm", k=10)
    printed, told = capsys.readouterr().out, names["model"].generation_config
    assert printed.splitlines()[:10] == [f"{a} {b}" for a, b in zip(rows["item"], rows["title"])]
    base = transformers.AutoModelForCausalLM.from_pretrained(apart / "model")
    never = [token for token in told.suppress_tokens if token < base.config.vocab_size]  # rows that no word has
    prompt = names["tokenizer"]("The", return_tensors="pt").input_ids
    options = {"max_new_tokens": 16, "eos_token_id": told.eos_token_id, "pad_token_id": told.pad_token_id}
    assert torch.equal(names["text"], base.generate(prompt, suppress_tokens=never, do_sample=False, **options))
    assert printed.endswith(names["tokenizer"].decode(names["text"][0]) + "\n")
