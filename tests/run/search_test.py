"""Tuning with the tiny experiment: validation alone, within the budget, and the same whether or not it was stopped."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bdlm_jax.domain.models import MODELS
from bdlm_jax.run import checks, search, stages
from bdlm_jax.run.controls import CONTROLS
from bdlm_jax.types import InputError
from experiments import defaults, tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def validation_alone(monkeypatch):
    """A count of test cases, or a prompt of test time, is what no tuning may ask for."""
    count, reading = stages.count_cases, stages.rows.reading_rows

    def guarded_count(run, scorer, part, protocol, **options):
        assert part == "validation", "tuning has scored the test part"
        return count(run, scorer, part, protocol, **options)

    def guarded_reading(run, *, part, **options):
        assert part == "validation", "tuning has read what is known at test time"
        return reading(run, part=part, **options)

    monkeypatch.setattr(stages, "count_cases", guarded_count)
    monkeypatch.setattr(stages.rows, "reading_rows", guarded_reading)


def test_every_setting_of_a_space_exists_and_may_be_what_it_says():
    settings = dict(checks._flatten(defaults.get_config()))
    for word, space in search.SPACES.items():
        for key, (low, high, log) in space.items():
            assert type(low) is type(high) is type(settings[key]), f"{word}: {key}"
            assert low < high and (low > 0 or not log)
            assert checks.RULES[key].holds(low) and checks.RULES[key].holds(high), f"{word}: {key}"
            assert "epochs" not in key, "epochs are the budget"
    assert {*MODELS, "ids_lm", "bdlm"} <= search.SPACES.keys() and not search.SPACES.keys() & CONTROLS.keys()


def test_three_trials_of_a_trained_model(tmp_path):
    config = tiny.get_config()
    tuned = search.tune(config, str(tmp_path), word="lightgcn", n_trials=3)
    assert config.models == tiny.get_config().models, "the caller's config stays as it is"
    assert tuned == json.loads((tmp_path / "lightgcn" / "tuned.json").read_text())
    assert tuned["budget"]["trials"] == len(tuned["trials"]) == 3
    assert tuned["budget"]["epochs"]["domain.epochs"] == config.domain.epochs
    first = tuned["trials"][0]["settings"]
    assert first == search.rounded({key: dict(checks._flatten(config))[key] for key in first}), "its own come first"
    values = [trial["value"] for trial in tuned["trials"] if trial["value"] is not None]
    assert tuned["value"] == max(values) and len(set(values)) > 1
    for line in (tmp_path / "lightgcn" / "settings.txt").read_text().splitlines():
        key, value = line.strip().removeprefix("c.").split(" = ")
        assert tuned["settings"][key] == float(value)
    # The best trial's own stage is what its value says.
    best = [trial["settings"] for trial in tuned["trials"]].index(tuned["settings"])
    done = json.loads((tmp_path / "lightgcn" / "trials" / str(best) / "lightgcn" / "done.json").read_text())
    assert done["best"]["domain"]["value"] == tuned["value"]
    assert search.tune(config, str(tmp_path), word="lightgcn", n_trials=3)["trials"] == tuned["trials"]


def test_a_study_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    config = tiny.get_config()
    whole = search.tune(config, str(tmp_path / "whole"), word="item_knn", n_trials=4)
    train, seen = search._train, []

    def killed(*arguments):
        seen.append(arguments)
        if len(seen) == 3:
            raise SystemExit
        return train(*arguments)

    monkeypatch.setattr(search, "_train", killed)
    with pytest.raises(SystemExit):
        search.tune(config, str(tmp_path / "killed"), word="item_knn", n_trials=4)
    tuned = search.tune(config, str(tmp_path / "killed"), word="item_knn", n_trials=4)
    assert tuned["trials"] == whole["trials"] and len(seen) == 5
    assert len({json.dumps(trial["settings"]) for trial in whole["trials"]}) == 4
    config.item_knn.shrink = 1.0
    with pytest.raises(InputError, match="holds a study of other settings"):
        search.tune(config, str(tmp_path / "killed"), word="item_knn", n_trials=4)


def test_a_trial_of_the_last_quarter_is_pruned_and_so_is_one_that_diverges(tmp_path, monkeypatch):
    # Four go to their end; the fifth is the last after its third phase; the seventh was the last in its first two.
    whole = [[0.1, 0.2, 0.3, 0.3], [0.1, 0.2, 0.4, 0.4], [0.1, 0.3, 0.35, 0.4], [0.2, 0.3, 0.5, 0.5]]
    curves = [*whole, [0.05, 0.1, 0.2, 0.9], None, [0.0, 0.05, 0.4, 0.6]]
    told, trials = [], iter(curves)

    def train(run, own, word, decoder):
        curve = next(trials)
        if curve is None:
            raise FloatingPointError("lightgcn: loss is not finite")
        for phase, value in enumerate(curve):
            told.append(value)
            own.watch("another stage", phase, {"domain": 0.0})
            own.watch("lightgcn", phase, {"domain": value})
        return max(curve)

    monkeypatch.setattr(search, "_train", train)
    tuned = search.tune(tiny.get_config(), str(tmp_path), word="lightgcn", n_trials=7)
    assert [trial["value"] for trial in tuned["trials"]] == [0.3, 0.4, 0.4, 0.5, None, None, 0.6]
    assert told == [*itertools.chain(*whole), 0.05, 0.1, 0.2, 0.0, 0.05, 0.4, 0.6], "the fifth went no further"
    assert tuned["budget"]["pruned"] == 2 and tuned["value"] == 0.6


def test_what_a_config_has_outside_a_range_stays_as_it_is(tmp_path, monkeypatch):
    config, seen = tiny.get_config(), []
    config.mutual.lm.align_item = 0.0
    monkeypatch.setattr(search, "_train", lambda run, own, word, decoder: seen.append(own.config) or 0.5)
    tuned = search.tune(config, str(tmp_path), word="bdlm", n_trials=2)
    assert "mutual.lm.align_item" not in tuned["settings"] and "mutual.lm.kl" in tuned["settings"]
    assert [c.mutual.lm.align_item for c in seen] == [0.0, 0.0]
    assert seen[0].lm.learning_rate == config.lm.learning_rate != seen[1].lm.learning_rate


def test_what_cannot_be_tuned_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="--model bdlm_warm has no search space; choose one of item_knn"):
        search.tune(tiny.get_config(), str(tmp_path), word="bdlm_warm", n_trials=1)
    with pytest.raises(InputError, match="--trials is 0"):
        search.tune(tiny.get_config(), str(tmp_path), word="mf", n_trials=0)
    command = [sys.executable, "-m", "bdlm_jax.tune", "--config=experiments/tiny.py", f"--workdir={tmp_path}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("bdlm_jax: --model is missing; give --config ")


@pytest.mark.slow
@pytest.mark.parametrize("word", [word for word in search.SPACES if word not in ("lightgcn", "item_knn")])
def test_every_space_trains(tmp_path, word):
    tuned = search.tune(tiny.get_config(), str(tmp_path), word=word, n_trials=2)
    assert 0 <= tuned["value"] <= 1 and len(tuned["trials"]) == 2
