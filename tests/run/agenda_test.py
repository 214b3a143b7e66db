"""What a run says it will train is what its contenders train, in that order, and what it goes on with."""

import logging
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import pytest

from bdlm_jax.domain.models import MODELS
from bdlm_jax.run import agenda, build, contenders, forecast, stages, teachers, trained
from bdlm_jax.runtime.fit import Phase
from experiments import tiny

BDLM = ("bdlm", "bdlm_warm", "bdlm_on_mf", "bdlm_lm_teaches", "ids_lm_distilled", "cached", "pool", "pool_alone")
RUNS = [
    ("item_pop", "ease", "mf", "text_lm", "ids_lm", "lightgcn", *BDLM),
    *((word,) for word in (*MODELS, *contenders.OTHERS)),
    BDLM[::-1],
]


def make_run(models, *, refit="none", corpus=("some text",), folder=Path("run"), lessons=0):
    config = tiny.get_config()
    config.models, config.data.refit, config.mutual.taught.rounds = models, refit, lessons
    data = SimpleNamespace(n_users=3, n_items=4, corpus=list(corpus), split=None, _replace=lambda **_: data)
    return build.Run(config, folder, data, None, None, None, root=folder)


@pytest.fixture
def walked(monkeypatch):
    """Goes through the contenders of a run, in which nothing is trained, and returns the stages that they ask for."""
    seen = {}

    def note(run, stage):
        seen[(run.folder / stage).relative_to(run.root).as_posix()] = None
        return MagicMock()

    monkeypatch.setattr(build, "merge_validation", lambda split: split)
    for name in ("weigh_texts", "weigh_domain"):
        monkeypatch.setattr(teachers, name, lambda *_, **__: None)
    monkeypatch.setattr(teachers.reading, "bdlm_reader", MagicMock())
    monkeypatch.setattr(stages, "teach_both", lambda run, *_: note(run, "taught"))
    for name in ("text_lm", "ids_lm", "bdlm"):
        monkeypatch.setattr(stages, f"train_{name}", lambda run, *_, stage=name: note(run, stage))
    for name in ("distill", "refresh"):
        monkeypatch.setattr(stages, f"{name}_domain", lambda run, *_, stage=name, **__: note(run, stage))
    monkeypatch.setattr(stages, "train_domain", note)

    def walk(run):
        seen.clear()
        for word in run.config.models:
            for _ in contenders.make_entries(run, word, lambda: run.data.corpus and note(run, "pretrain")):
                pass
        return tuple(seen)

    return walk


@pytest.mark.parametrize("refit", ["none", "validation"])
def test_the_stages_told_are_those_that_the_contenders_ask_for(walked, refit):
    for models in RUNS:
        run = make_run(models, refit=refit)
        assert agenda.stage_names(run) == walked(run), models
    for how in ({"corpus": ()}, {"lessons": 1}):
        run = make_run(("lightgcn", "bdlm", "bdlm_warm"), refit=refit, **how)
        assert agenda.stage_names(run) == walked(run)


def test_a_resumed_run_tells_what_it_goes_on_with_and_each_stage_what_the_one_before_took(
    tmp_path, caplog, monkeypatch
):
    caplog.set_level(logging.INFO, agenda.__name__)
    times = iter((1000.0, 1002.0, 1092.0, 1302.0))  # the start; then as the stages begin that are not finished yet
    monkeypatch.setattr(agenda.time, "monotonic", lambda: next(times))
    (tmp_path / "mf").mkdir()
    (tmp_path / "mf" / "done.json").write_text("{}")
    (tmp_path / "text_lm" / "checkpoints" / "40").mkdir(parents=True)
    row = '{{"stage": "text_lm", "step": {}, "time": {}, "since": 0, "lm/loss": 1}}\n'
    (tmp_path / "text_lm" / "metrics.jsonl").write_text(row.format(1, 7) + row.format(11, 27))  # 2 s a step
    work = {"ids_lm": {"epochs of mf": 9}, "lightgcn": {forecast.LM: 90}, "text_lm": {}}
    monkeypatch.setattr(forecast, "work", lambda _, name: work[name])
    (tmp_path / "store" / "ids_lm").mkdir(parents=True)
    (tmp_path / "store" / "ids_lm" / "done.json").write_text("{}")
    run = agenda.follow(make_run(("mf", "text_lm", "ids_lm", "lightgcn"), corpus=(), folder=tmp_path))
    phases = [Phase("lm", 100, "a"), Phase("domain", 3, "b"), Phase("lm", 20, "c")]
    stored = ("ids_lm", "store/ids_lm")
    for name, folder in (("mf", "mf"), ("text_lm", "text_lm"), stored, stored, ("lightgcn", "lightgcn")):
        run.begin(name, tmp_path / folder, phases)
    assert [record.getMessage() for record in caplog.records] == [
        "4 stages: mf, text_lm, ids_lm, lightgcn",
        "resuming: 1 of 4 stages are finished (mf); text_lm goes on behind unit 40",
        "stage 2 of 4: text_lm (120 steps of the LM, 3 epochs of the domain arm; goes on behind 40 of 123)",
        "  text_lm took 90 s, with its test where it has one; so far the run has taken 92 s",
        f"stage 3 of 4: ids_lm is finished, in {tmp_path / 'store' / 'ids_lm'}",
        "stage 4 of 4: lightgcn (120 steps of the LM, 3 epochs of the domain arm)",
        "  about 4.5 min to go",
    ]


def test_the_table_has_a_line_for_every_part_and_the_shares_that_train():
    config = tiny.get_config()
    config.lm.trains, config.shared.trained_by = "lora", "lm"
    arm = SimpleNamespace(windows=None)
    tree = {
        "shared": {"item": jnp.zeros((5, 2)), "user": jnp.zeros((3, 2))},
        "lm": {"bridge": {"into": jnp.zeros(4)}, "layers": jnp.zeros(1000), "lora": {"a": jnp.zeros(30)}},
    }
    lines = trained.group_table(jax.eval_shape(lambda: tree), trained.bdlm_rules(config, arm))
    assert [line.split() for line in lines[1:-1]] == [
        ["lm/bridge", "4", "bridge", "frozen"],
        ["lm/layers", "1,000", "frozen", "frozen"],
        ["lm/lora", "30", "lm", "frozen"],
        ["shared/item", "10", "shared", "frozen"],
        ["shared/user", "6", "shared", "frozen"],
    ]
    assert lines[-1].split()[-5:] == ["1,050", "50", "(4.8%)", "0", "(0.0%)"]
