"""Words of config.models become rows: controls beside BDLM, states of a cache, sums of arms; and all of it refitted."""

import json

import numpy as np
import pytest

from bdlm_jax.data.splits import TEST, TRAIN, VALIDATION
from bdlm_jax.evaluation.evaluate import load_counts
from bdlm_jax.run import build, contenders
from bdlm_jax.runtime.files import load_safetensors
from bdlm_jax.runtime.fit import best_phases
from bdlm_jax.runtime.log import read_metrics
from bdlm_jax.serving import artefact
from bdlm_jax.story import train_and_evaluate
from experiments import tiny

pytestmark = pytest.mark.once

WORDS = ("lightgcn", "ease", "ids_lm", "ids_lm_distilled", "bdlm", "bdlm_warm", "cached", "pool", "pool_alone")
ROWS = {
    "lightgcn", "ease", "ids_lm", "ids_lm_distilled", "bdlm_lm", "bdlm_domain", "bdlm_domain_unrefreshed",
    "bdlm_warm_lm", "bdlm_warm_domain", "cached_1", "cached_2", "cached_5", "pool", "pool_alone",
}  # fmt: skip


def small():
    config = tiny.get_config()
    config.data.options.update({"n_users": 60, "history": 8})
    config.pretrain.epochs, config.prompts.card_copies = 0.0, 2.0
    config.domain.epochs = 4
    config.mutual.update({"domain_epochs_a_round": 1, "distill_epochs": 4})
    config.mutual.lm.text = 0.0  # compiles sooner
    config.models = WORDS
    config.data.refit = "validation"
    return config


@pytest.fixture(scope="module")
def refitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refit")
    return folder, train_and_evaluate(small(), str(folder))


def test_every_word_gives_its_rows(refitted):
    folder, results = refitted
    assert {row["model"] for row in results["rows"]} == ROWS
    assert {path.stem for path in (folder / "per_user").iterdir()} == ROWS
    full = {name: load_counts(folder / "per_user" / f"{name}.npz")["full"] for name in ROWS}
    for counts in full.values():  # the same cases for all
        assert np.array_equal(counts.target, full["ease"].target)
    different = {full[name].better.tobytes() for name in ROWS}
    assert len(different) >= len(ROWS) - 1  # a pool may be its first arm


def test_models_by_themselves_are_served(refitted):
    """BDLM's controls, sums and what needs no training are there to be judged."""
    served = {name: facts["row"] for name, facts in artefact.served_arms(refitted[0]).items()}
    assert served == {"lightgcn": "lightgcn", "ids_lm": "ids_lm", "lm": "bdlm_lm", "domain": "bdlm_domain"}


def test_a_refit_lasts_as_long_as_was_chosen_and_learns_from_the_validation_part(refitted):
    folder, _ = refitted
    for stage in ("lightgcn", "ids_lm", "bdlm", "bdlm_warm/bdlm"):
        control, _, name = stage.rpartition("/")
        first, again = folder / control / name, folder / control / "refit" / name
        chosen = {arm: best["phase"] for arm, best in best_phases(first).items()}
        assert {arm: best["phase"] for arm, best in best_phases(again).items()} == chosen
        rows = {path: read_metrics(path / "metrics.jsonl") for path in (first, again)}
        assert not any("validation" in key for row in rows[again] for key in row)  # nothing is chosen there
        arm = next(iter(chosen))
        before, after = (
            load_safetensors(path / f"best_{arm}.safetensors")["shared"]["item"] for path in (first, again)
        )
        assert not np.array_equal(before, after)


def test_the_refit_holds_out_the_test_part_alone(tmp_path):
    run = build.start_run(small(), tmp_path)
    assert run.final.final is run.final and run.final.first is run
    parts = [set(zip(*run.data.split.edges(*parts))) for parts in ((TRAIN, VALIDATION), (TEST,))]
    final = run.final.data.split
    assert [set(zip(*final.edges(part))) for part in (TRAIN, TEST)] == parts
    assert not len(final.edges(VALIDATION)[0])
    run.config.data.refit = "none"
    assert build.start_run(run.config, tmp_path).final.first is None


def test_the_weight_of_a_pool_is_the_best_on_validation(refitted):
    folder, _ = refitted
    for name in ("pool", "pool_alone"):
        noted = json.loads((folder / f"{name}.json").read_text())
        assert noted["validation"][str(noted["weight"])] == max(noted["validation"].values())
        assert set(noted["validation"]) == {str(weight) for weight in contenders.POOL_WEIGHTS}


def test_what_is_cached_has_not_read_the_last_items(refitted):
    folder, _ = refitted
    now, late = (load_counts(folder / "per_user" / f"{name}.npz")["full"] for name in ("bdlm_lm", "cached_5"))
    assert np.mean(now.better != late.better) > 0.5
