"""experiments/tuned.py has what the studies of docs/tuned chose, and its table what they reached."""

import json
from pathlib import Path

import pytest

from bdlm_jax.domain.models import MODELS, SETTINGS, takes
from bdlm_jax.run.prepare import training_setting
from experiments import tuned

ROOT = Path(__file__).resolve().parents[1]
STUDIES = sorted((ROOT / "docs/tuned").glob("*/*.json"))


def test_every_study_is_in_the_experiment_and_the_other_way_round():
    found = {(path.parent.name, path.stem) for path in STUDIES}
    assert found == {(data, word) for data in tuned.STUDIES for word in tuned.get_config(data).models[1:]} != set()


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_experiment_says_what_the_study_found(path):
    study, data = json.loads(path.read_text()), path.parent.name
    trials, word = study["trials"], path.stem
    values = [trial["value"] for trial in trials if trial["value"] is not None]
    assert study["model"] == word
    assert study["budget"]["seed"] not in {settings["seed"] for settings in tuned.get_hyper()}
    assert len(trials) == study["budget"]["trials"] and max(values) == study["value"]
    assert study["settings"] == tuned.STUDIES[data][word]
    pruned = len(trials) - len(values)
    row = f"| {data} | `{word}` | {trials[0]['value']:.4f} | {study['value']:.4f} | {len(trials)} | {pruned} |"
    assert row.replace(" 0.", " .") in tuned.__doc__


@pytest.mark.parametrize("data", tuned.STUDIES)
def test_no_study_changes_what_another_model_trains_with(data):
    whole, own = tuned.get_config(data), tuned.EXPERIMENTS[data].get_config()
    for model in tuned.STUDIES[data].keys() & MODELS.keys():
        alone = own.copy_and_resolve_references()
        alone.update_from_flattened_dict(tuned.STUDIES[data][model])
        for name in [*own.domain, "std"]:
            if name not in SETTINGS or name in takes(model):
                assert training_setting(whole, model, name) == training_setting(alone, model, name), (model, name)
