"""From text to a model, from the model to a BDLM around it: the doors one behind the other, at the smallest size."""

import json

import pytest

import bdlm_jax
from bdlm_jax.run.pretraining import Settings, pretrain
from bdlm_jax.story import train_and_evaluate
from experiments import own_lm, tiny


@pytest.mark.slow
@pytest.mark.parametrize("trains", ["lora", "full", "bridge"])
def test_an_own_model_is_trained_served_and_says_how_well_it_still_speaks(tmp_path, trains):
    (tmp_path / "corpus.txt").write_text("\n".join(f"text {n} of a small world" for n in range(60)))
    shape = Settings(vocab_size=300, width=16, layers=1, heads=2, kv_heads=1, length=128, epochs=1, batch_rows=4)
    pretrain([str(tmp_path / "corpus.txt")], tmp_path / "model", shape)
    config, own = tiny.get_config(), own_lm.get_config()
    for section in ("lm", "pretrain"):
        small = {name: config[section][name] for name in ("warmup_steps", "batch_rows") if name in config[section]}
        config[section].update(own[section])
        config[section].update(small)
    config.lm.path, config.lm.trains, config.pretrain.samples = str(tmp_path / "model"), trains, 16
    config.lm_alone.row_std = config.mutual.learning_rate_bridge = 0.0
    config.models = ("ids_lm", "bdlm")
    results = train_and_evaluate(config, str(tmp_path / "run"))
    language = results["language"]
    assert language == json.loads((tmp_path / "run" / "language.json").read_text())
    assert language["text"] == "the model's own samples" and language["tokens"] > 16
    assert (language["before"] == language["after"]) == (trains == "bridge")
    assert f"{language['after']:.2f}, and was {language['before']:.2f}" in (tmp_path / "run" / "results.md").read_text()
    run = bdlm_jax.load(tmp_path / "run")
    assert len(run.recommend(users=run.users[:1], arm="lm", k=3)) == 3
