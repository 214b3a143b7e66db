"""The command line as people type it, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TINY = "experiments/tiny.py"


def run(*words, cwd=ROOT):
    command, environment = [sys.executable, "-m", "bdlm_jax.main"], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True)
    return done.returncode, [line for line in done.stderr.splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--config.lm.widht=3"], "--config.lm.widht is no setting; did you mean width?"),
        (["--config.models=('ncf',)", "--config.ncf.epochs=3"], "--config.ncf.epochs is no setting"),
        (["--config.lm.width=wide"], "--config.lm.width=wide"),
        (["--wrokdir=x"], "workdir"),
        (["--config.tokenizer.path=nowhere"], "config.tokenizer.path: nowhere is not there"),
        (["config.seed=1"], "config.seed=1 is not understood"),
        (["--config.models=mf", "--config.models=bdlm"], "--config.models is given twice; give it once, several"),
        (["--config", "experiments/nothing.py"], "experiments/nothing.py is no file"),
        (["--config", ""], "--config is missing"),
        (["--workdir", ""], "--workdir is missing"),
    ],
)
def test_a_slip_is_one_sentence_and_exit_code_2_before_any_work(tmp_path, words, told):
    code, lines = run(f"--config={TINY}", f"--workdir={tmp_path / 'run'}", *words)
    assert code == 2
    *before, line = lines  # with flags in order, the first line has been told
    assert all("experiments/tiny.py, seed 0" in each for each in before) and len(before) < 2
    assert line.startswith("bdlm_jax: ")
    assert told in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("return nothing", "name 'nothing' is not defined"),
        ("c = defaults.get_config(); c.lm.widht = 3", "broken.py: widht is no setting; did you mean width?"),
        ("c = defaults.get_config(); c.lm.width = 'a'", "broken.py: TypeError: Could not override field 'width'"),
    ],
)
def test_a_config_that_does_not_run_is_one_sentence(tmp_path, body, told):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "broken.py").write_text(f"from experiments import defaults\ndef get_config():\n    {body}\n")
    code, lines = run("--config", tmp_path / "mine" / "broken.py", "--workdir", tmp_path / "run")
    assert (code, len(lines)) == (2, 1)
    assert told in lines[0]


def test_it_runs_from_another_folder(tmp_path):
    code, lines = run("--config", ROOT / TINY, "--workdir", "run", "--config.models=('item_pop',)", cwd=tmp_path)
    text = "\n".join(lines)
    assert code == 0, text
    assert lines[0].endswith("tiny.py, seed 0")
    assert "150 users" in text and "stages: " not in text  # nothing is trained
    told = [line.split() for line in lines if line.lstrip().startswith("item_pop")]
    assert len(told) == 1 and told[0][1] in (tmp_path / "run" / "results.md").read_text()
    assert "orbax" not in text.lower()
    assert {"config.json", "results.json", "results.md", "environment.json"} <= set(os.listdir(tmp_path / "run"))
    assert '"name": "tiny"' in (tmp_path / "run" / "config.json").read_text()
    assert "| item_pop |" in (tmp_path / "run" / "results.md").read_text()


def test_what_trains_is_told_and_a_loss_that_is_not_finite_ends_with_code_1(tmp_path):
    words = ["--config.models=('mf',)", "--config.mf.learning_rate=1e30"]
    code, lines = run("--config", TINY, "--workdir", tmp_path / "run", *words)
    assert code == 1
    assert lines[-1].startswith("bdlm_jax: mf: ")
    assert "not finite" in lines[-1]
    text = "\n".join(lines)
    assert "Traceback" not in text
    assert "orbax" not in text.lower()
    assert "stage 1 of 1: mf (2 epochs of the domain arm)" in text
    assert "3,232 of 3,232 parameters train: domain 3,232" in text
