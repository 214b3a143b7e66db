import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bdlm_jax import sweep
from bdlm_jax.runtime import checkpoint
from bdlm_jax.story import train_and_evaluate
from bdlm_jax.types import InputError
from experiments import tiny

ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / "experiments" / "tiny.py")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"grid": ["mutual.round=1,2"]}, r"--set mutual\.round is no setting; did you mean rounds\?"),
        ({"grid": ["seed"]}, r"--set seed is not understood; write --set key=value,value\."),
        ({"grid": ["mf.epochs=1,x"]}, r"--set mf\.epochs=x: .*invalid literal for int"),
        ({"grid": ["mf.epochs=1,0"]}, r"config\.mf\.epochs is 0; it must be a number of at least 1"),
        ({"grid": ["seed=1", "mf.epochs=1"], "seeds": 2}, r"seed is set twice, by --set, --seeds or --hyper"),
        ({"hyper": True}, r"--hyper: .*tiny\.py has no get_hyper\(\)"),
        ({"config": "nowhere.py"}, r"--config: nowhere\.py is no file"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(next(iter(value.values()))),
)
def test_what_cannot_run_is_refused_before_any_run(tmp_path, options, told):
    with pytest.raises(InputError, match=told) as caught:
        sweep.plan_runs(**{"config": TINY, "workdir": tmp_path} | options)
    assert "\n" not in str(caught.value) and not any(tmp_path.iterdir())


def test_a_grid_is_every_combination_under_a_name_of_its_own(tmp_path):
    grid = ['models=("mf",),("mf","lightgcn")', "mf.epochs=1,2,1", "tokenizer.path="]
    runs = sweep.plan_runs(TINY, tmp_path, grid=grid, seeds=2)
    assert len(runs) == len(set(runs)) == 2 * 2 * 2
    settings = list(runs.values())[-1]
    assert settings == {"models": '("mf","lightgcn")', "mf.epochs": "2", "tokenizer.path": "", "seed": "1"}
    assert sweep.read_config(TINY, settings).models == ("mf", "lightgcn")
    for name in runs:
        assert re.fullmatch(r"models=[\w,.=-]+", name) and len(name) <= 160
    assert list(sweep.plan_runs(TINY, tmp_path, grid=["mf.epochs=1,2"], seeds=1)) == [
        "mf.epochs=1,seed=0",
        "mf.epochs=2,seed=0",
    ]
    assert list(sweep.plan_runs(TINY, tmp_path)) == ["tiny"]


def test_an_experiments_own_grid(tmp_path):
    runs = sweep.plan_runs(str(ROOT / "experiments" / "quickstart.py"), tmp_path, hyper=True, grid=["lm.dropout=0.1"])
    assert {"mutual.align": "cosine", "seed": "2", "lm.dropout": "0.1"} in runs.values()


def test_a_folder_of_other_settings_is_refused(tmp_path):
    folder = tmp_path / "seed=0"
    (folder / "mf" / "checkpoints").mkdir(parents=True)  # something was trained there
    (folder / "config.json").write_text(
        json.dumps({**json.loads(tiny.get_config().to_json_best_effort()), "parallel": "pmap"})
    )
    with pytest.raises(InputError, match=r"another config\.parallel: 'pmap', and now it is 'jit'"):
        sweep.plan_runs(TINY, tmp_path, seeds=1)


def commands(tmp_path, **scripts):
    return {tmp_path / name: [sys.executable, "-c", script, str(tmp_path / name)] for name, script in scripts.items()}


FINISHES = "import pathlib, sys; pathlib.Path(sys.argv[1], 'results.md').write_text('done')"
WAITS = """
import pathlib, signal, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
pathlib.Path(sys.argv[1], 'began').touch()
signal.sigwait([signal.SIGTERM])
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
time.sleep(0.5)
pathlib.Path(sys.argv[1], 'saved').touch()
sys.exit(143)
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_fails_stops_no_other(tmp_path, jobs, capfd):
    scripts = {"bad": "import sys; sys.exit('no such thing')", "good": FINISHES, "other": FINISHES}
    ended = sweep.run_all(commands(tmp_path, **scripts), jobs=jobs)
    told = "failed with exit code 1" + (": no such thing" if jobs > 1 else "")
    assert [*ended.values()] == [told, "finished", "finished"]
    assert "good: started, 1 wait" in capfd.readouterr().out
    assert [*sweep.run_all(commands(tmp_path, good="raise", bad=FINISHES), jobs=jobs).values()] == [
        "finished before",
        "finished",
    ]


def test_a_stop_is_passed_on_once_and_waited_for(tmp_path):
    made = commands(tmp_path, first=WAITS, second=WAITS, third=WAITS)
    first, second, third = made

    def stop_when_both_wait():
        while not ((first / "began").exists() and (second / "began").exists()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_when_both_wait)
    thread.start()
    assert [*sweep.run_all(made, jobs=2).values()] == ["stopped", "stopped", "not started"]
    thread.join()
    assert (first / "saved").exists() and (second / "saved").exists() and not third.exists()


def start(folder, *words):
    grid = ['--set=models=("mf",)', "--set=mf.epochs=2000,3", "--set=domain.test_graph=train,train+validation"]
    fixed = ["--set=domain.evaluate_every=1000", "--set=runtime.checkpoint_seconds=1e9"]
    command = [
        sys.executable,
        "-m",
        "bdlm_jax.sweep",
        "--config",
        TINY,
        "--workdir",
        str(folder),
        *grid,
        *fixed,
        *words,
    ]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.once
def test_a_stopped_sweep_goes_on_and_trains_once_what_its_runs_share(tmp_path):
    folder, stages = tmp_path / "grid", tmp_path / "grid" / "stages"
    process = start(folder)
    while not any(path.stat().st_size for path in stages.glob("mf-*/metrics.jsonl")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.terminate()
    told = process.communicate()[0]
    assert process.returncode == 143 and "stopped; the same command goes on" in told, told
    (begun,) = stages.glob("mf-*")
    assert not (begun / "done.json").exists() and 0 < checkpoint.steps(begun / "checkpoints")[-1] < 2000

    process = start(folder, "--jobs=2")
    told = process.communicate()[0]
    assert process.returncode == 0, told
    runs = sorted(path.parent for path in folder.glob("*/results.json"))
    assert len(runs) == 4 and told.count(": finished\n") == 8
    # No training reads domain.test_graph, and nothing else tells two of each three runs apart.
    shared = [(run / "mf").resolve() for run in runs]
    assert len(set(shared)) == 2 and begun in shared

    config = tiny.get_config()
    config.update_from_flattened_dict({"models": ("mf",), "mf.epochs": 2000, "domain.evaluate_every": 1000})
    train_and_evaluate(config, str(tmp_path / "alone"))
    best = "best_domain.safetensors"
    assert (begun / best).read_bytes() == (tmp_path / "alone" / "mf" / best).read_bytes()

    times = [(run / "results.json").stat().st_mtime_ns for run in runs]
    told = start(folder).communicate()[0]
    assert told.count("finished before") == 4
    assert times == [(run / "results.json").stat().st_mtime_ns for run in runs]
