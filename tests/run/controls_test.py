"""Every control of every experiment: settings that exist, one switch away from BDLM, at equal epochs."""

import importlib

import pytest

from bdlm_jax.run.checks import check_config
from bdlm_jax.run.contenders import OTHERS
from bdlm_jax.run.controls import ANSWERS, CONTROLS

EXPERIMENTS = ("beauty", "beauty_itemgcn", "ml100k", "ml100k_pool", "ml1m", "ml1m_pool", "quickstart", "tiny")


def flat(config):
    return {key: value for key, value in config.items() if not hasattr(value, "items")} | {
        f"{name}.{key}": value
        for name, section in config.items() if hasattr(section, "items")
        for key, value in flat(section).items()
    }  # fmt: skip


def lm_epochs(m):
    return m.lm_epochs + m.rounds * m.lm_epochs_a_round + m.taught.rounds * m.taught.lm_epochs


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("word", CONTROLS)
def test_a_control_is_a_config_that_runs_as_long_as_bdlm(word, experiment):
    config = importlib.import_module(f"experiments.{experiment}").get_config()
    changed = config.copy_and_resolve_references()
    settings = CONTROLS[word].settings(config)
    changed.update_from_flattened_dict(settings)
    check_config(changed, paths=False)
    before, after = flat(config), flat(changed)
    assert {key for key in before if before[key] != after[key]} <= set(settings) <= set(before)
    assert lm_epochs(changed.mutual) == pytest.approx(lm_epochs(config.mutual))
    if word not in ("bdlm_warm", "bdlm_text", "bdlm_warm_taught", "bdlm_rounds_0") and config.mutual.rounds:
        epochs = [c.mutual.rounds * c.mutual.domain_epochs_a_round for c in (config, changed)]
        assert abs(epochs[0] - epochs[1]) <= changed.mutual.rounds / 2 + 1
    assert changed.mutual.distill_epochs == config.mutual.distill_epochs


def test_the_ladder_takes_out_one_ingredient_after_the_other():
    config = importlib.import_module("experiments.ml100k").get_config()
    warm, text = (CONTROLS[word].settings(config) for word in ("bdlm_warm", "bdlm_text"))
    assert text.items() < warm.items()
    assert not any(key.startswith("mutual.lm") and "text" in key for key in text)


def test_the_warm_start_is_taught_as_bdlm_is():
    config = importlib.import_module("experiments.ml1m_pool").get_config()
    settings = CONTROLS["bdlm_warm_taught"].settings(config)
    assert settings["mutual.text_head"] == config.mutual.text_head == "graph"
    assert not {"mutual.teacher", "mutual.taught.kl", "mutual.domain.kl"} & settings.keys()
    config.mutual.text_head = "words"  # which reads the texts
    assert CONTROLS["bdlm_warm_taught"].settings(config)["mutual.text_head"] == "none"
    plain = importlib.import_module("experiments.ml1m").get_config("table")
    assert "bdlm_warm" in plain.models and "bdlm_warm_taught" not in plain.models


def test_every_control_says_what_it_answers():
    assert ANSWERS.keys() <= OTHERS.keys() | {"unlifted"}  # a row of any of them
    assert OTHERS.keys() - ANSWERS.keys() == {"item_pop", "item_knn", "ease", "text_lm", "ids_lm", "bdlm"}
