import importlib.machinery
import importlib.util
import json
import math
import os
import signal
import sys
import threading
import types

import numpy as np
import pytest

from bdlm_jax.runtime.log import MetricLog, StopSignal, progress, read_metrics
from bdlm_jax.types import InputError

ROWS = [("domain", 1), ("domain", 2), ("lm", 1), ("lm", 2), ("lm", 3), ("mutual", 1)]


def write(folder, *steps, resume=None):
    with MetricLog(folder, resume=resume) as log:
        for stage, step in steps:
            log.write(stage, step, {"loss": step / 2})


def kept(folder):
    return [(row["stage"], row["step"]) for row in read_metrics(folder)]


def test_rows_hold_plain_numbers_and_are_there_at_once(tmp_path):
    assert read_metrics(tmp_path) == []
    with MetricLog(tmp_path) as log:
        log.write("lm", np.int64(3), {"loss": np.float32(0.5), "hits": 2, "norm": math.nan, "scale": math.inf})
        (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=pytest.fail)  # JSON knows no NaN
    assert row.pop("time") >= row.pop("since") > 1.7e9
    assert row == {"stage": "lm", "step": 3, "loss": 0.5, "hits": 2.0, "norm": None, "scale": None}
    assert math.isnan(read_metrics(tmp_path)[0]["norm"])


@pytest.mark.parametrize(
    ("resume", "stay"),
    [
        (("lm", 2), ROWS[:4]),
        (("lm", -1), ROWS[:2]),
        (("domain", 1), ROWS[:1]),
        (("mutual", 9), ROWS),
        (("report", 0), ROWS),
        (None, []),
    ],
)
def test_a_resumed_run_drops_what_it_writes_again(tmp_path, resume, stay):
    write(tmp_path, *ROWS)
    write(tmp_path, resume=resume)
    assert kept(tmp_path) == stay


def test_a_killed_and_resumed_run_holds_each_step_once(tmp_path):
    write(tmp_path, ("lm", 1), ("lm", 2), ("lm", 3))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "lm", "st')
    assert kept(tmp_path) == [("lm", 1), ("lm", 2), ("lm", 3)]
    write(tmp_path, ("lm", 3), ("lm", 4), resume=("lm", 2))
    assert kept(tmp_path) == [("lm", 1), ("lm", 2), ("lm", 3), ("lm", 4)]


def test_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"runtime\.log is wandb, which is not installed; pip install"):
        MetricLog(tmp_path, tracker="wandb")
    with MetricLog(tmp_path, tracker="tensorboard") as log, pytest.raises(InputError, match="called 'step'"):
        log.write("lm", 1, {"step": 2.0})
    (tmp_path / "metrics.jsonl").write_text('{"stage": "lm", "step": 1}\n[1]\n{"stage": "lm", "step": 2}\n')
    with pytest.raises(InputError, match="line 2: not a row"):
        read_metrics(tmp_path)


def test_tensorboard_holds_the_rows_that_stay(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    with MetricLog(tmp_path, tracker="tensorboard") as log:
        log.write("lm", 1, {"loss": 0.5})
        log.write("lm", 2, {"loss": 0.25})
    with MetricLog(tmp_path, resume=("lm", 1), tracker="tensorboard") as log:
        log.write("lm", 2, {"loss": 0.125})
    (path,) = (tmp_path / "tensorboard" / "lm").iterdir()
    data, place, found = path.read_bytes(), 0, []
    while place < len(data):
        # A record: length (8 bytes), its checksum (4), the event, its checksum (4).
        length = int.from_bytes(data[place : place + 8], "little")
        event = Event.FromString(data[place + 12 : place + 12 + length])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        place += 12 + length + 4
    assert found == [("loss", 1, 0.5), ("loss", 2, 0.125)]


def test_weights_and_biases_gets_each_row_and_a_resumed_stage_goes_on_in_its_run(tmp_path, monkeypatch):
    runs = []

    class Run:
        def __init__(self, **options):
            self.options, self.rows, self.finished = options, [], False
            runs.append(self)

        def log(self, metrics, step):
            self.rows.append((step, metrics))

        def finish(self):
            self.finished = True

    stand_in = types.ModuleType("wandb")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin=__file__)
    stand_in.init = Run
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    folder = tmp_path / "run" / "mf"
    folder.mkdir(parents=True)
    with MetricLog(folder, tracker="wandb") as log:
        log.write("mf", 1, {"loss": 0.5})
    with MetricLog(folder, resume=("mf", 1), tracker="wandb") as log:
        log.write("mf", 2, {"loss": 0.125})
    assert [run.rows for run in runs] == [[(1, {"loss": 0.5})], [(2, {"loss": 0.125})]]
    known = {"name": "run/mf", "group": "run", "dir": str(folder), "resume": "allow"}
    assert [run.options for run in runs] == [known | {"id": (folder / "wandb.id").read_text()}] * 2
    assert all(run.finished for run in runs)


def test_the_library_of_weights_and_biases_takes_what_it_is_given(tmp_path, monkeypatch):
    """What stands in its file is not looked at: it may be written after `finish` has returned."""
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    folder = tmp_path / "run" / "mf"
    folder.mkdir(parents=True)
    for step in (1, 2):
        with MetricLog(folder, resume=("mf", step - 1), tracker="wandb") as log:
            log.write("mf", step, {"loss": 0.5})
    assert kept(folder) == [("mf", 1), ("mf", 2)]
    paths = folder.glob("wandb/offline-run-*/*.wandb")
    assert {path.name for path in paths} == {f"run-{(folder / 'wandb.id').read_text()}.wandb"}


def test_a_file_gets_lines_and_a_short_loop_none(capsys):
    assert list(progress(range(3), description="epoch")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    bar = progress(range(3), description="epoch", every_s=1e-9)
    for _ in bar:
        bar.set_postfix(loss=0.25, refresh=False)
    with progress(description="steps", total=10, start=6, every_s=1e-9) as bar:  # by hand, where a resumed run stands
        bar.update(2)
    told = capsys.readouterr().err
    *epochs, steps = told.splitlines()
    assert [line.split(",")[0] for line in epochs] == ["epoch: 1/3 (33%)", "epoch: 2/3 (67%)", "epoch: 3/3 (100%)"]
    assert epochs[-1].endswith("loss=0.25") and steps.startswith("steps: 8/10 (80%)") and "\r" not in told


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress(range(3), description="epoch")) == [0, 1, 2]
    told = capsys.readouterr().err
    assert "\r" in told and "3/3" in told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_request_and_the_second_acts(number):
    seen = []
    before = signal.signal(number, lambda *_: seen.append(number))
    try:
        with StopSignal() as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested and seen == []
            os.kill(os.getpid(), number)
            assert seen == [number]
        with StopSignal() as stop:
            pass
        os.kill(os.getpid(), number)
        assert not stop.requested and seen == [number, number]
    finally:
        signal.signal(number, before)


def test_outside_the_main_thread_nothing_is_watched():
    asked = []

    def work():
        with StopSignal() as stop:
            asked.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert asked == [False]
