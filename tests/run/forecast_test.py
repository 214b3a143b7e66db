"""What is told of the training to come: the units that the stages will have, and the seconds that their like took."""

from pathlib import Path

import pytest

from bdlm_jax.run import agenda, build, forecast
from bdlm_jax.run.forecast import LM
from bdlm_jax.runtime.log import read_metrics
from experiments import tiny


def test_a_stage_has_about_the_units_that_it_is_said_to_have(tiny_run):
    config, folder, _ = tiny_run
    run = build.start_run(config, folder)
    said = {name: forecast.work(run, name) for name in agenda.stage_names(run)}
    assert said.pop("pretrain") == {"the steps of pretrain": 1}
    assert said.pop("refresh")["taught epochs of lightgcn"] >= read_metrics(folder / "refresh")[-1]["step"]
    assert said["bdlm"]["taught epochs of lightgcn"] == said["mf"]["epochs of mf"] == 2
    for name, units in said.items():
        assert sum(units.values()) == pytest.approx(read_metrics(folder / name)[-1]["step"], rel=0.2), name
    control = forecast.work(run, "bdlm_on_mf/bdlm")
    assert control == {LM: said["bdlm"][LM], "taught epochs of mf": 2}


def test_a_unit_takes_what_it_took_without_what_was_compiled():
    run = build.Run(tiny.get_config(), Path("run"), *[None] * 4, root=Path("run"))

    def row(time, step, kind, since=0.0):
        return {"stage": "bdlm", "step": step, "time": time, "since": since, f"{kind}/loss": 1.0}

    rows = [row(20, 1, "lm"), row(25, 11, "lm"), row(40, 11, "validation/lm"), row(45, 21, "lm")]
    rows += [row(46, 21, "validation/lm"), row(90, 22, "domain"), row(93, 24, "domain")]
    rows += [row(1000, 31, "lm", since=970.0), row(1004, 41, "lm", since=970.0)]
    found = forecast.pace(run, "bdlm", rows)
    assert found == {LM: (5 + 5 + 1 + 4) / 30, "taught epochs of lightgcn": 3 / 2}
    assert forecast.pace(run, "bdlm_on_mf/distill", rows).keys() == {LM, "taught epochs of mf"}
    assert forecast.pace(run, "mf", rows).keys() == {LM, "epochs of mf"}
    assert forecast.pace(run, "mf", rows[:1]) == {}


def test_what_was_timed_is_summed_and_what_was_not_is_named():
    works = [{LM: 100.0, "epochs of a": 3}, {"epochs of a": 2, "epochs of b": 0}]
    assert forecast.told(works, {LM: 3.0, "epochs of a": 24.0}) == "about 7.0 min to go"
    beside = ", beside what has not run yet (epochs of a)"
    assert forecast.told(works, {LM: 3.0}) == "about 5.0 min to go" + beside
    assert forecast.told(works, {LM: 3.0}, besides=(30.0, 90.0)) == "about 7.0 min to go" + beside
    assert forecast.told(works, {"epochs of b": 1.0}, besides=(30.0,)) == ""
