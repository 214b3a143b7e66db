"""The benchmarks work here at tiny size: what runs for minutes, or on other machines, has run once before."""

import argparse
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest

from bdlm_jax.data.readers import load_source
from experiments import tiny

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
pytest.importorskip("torch")  # the peers'


def check_page(folder, names):
    """Reads what was written, and returns {what: value}."""
    page, found = (folder / "results.md").read_text(), json.loads((folder / "results.json").read_text())
    assert set(found["parts"]) == set(names) and found["notes"] == {}
    for name, rows in found["parts"].items():
        assert f"## {name}" in page and len(rows) > 3
        assert rows[0]["what"] == "device" and {"jax", "driver", "torch"} <= set(json.loads(rows[0]["wanted"]))
        for row in rows:  # cuDNN's attention is of GPUs alone
            assert "does not run" not in str(row["value"]) or "cudnn" in row["what"], row
    values = {row["what"].strip(): row["value"] for rows in found["parts"].values() for row in rows}
    assert values["its sums are right"] is True and values["LightGCN: the furthest that a target moved"] == 0
    assert 0 < values["MFU"] < 1 and any(word.startswith("tiny, LoRA: ") for word in values)
    return values


def test_the_parts_of_the_accelerator_benchmark_run_and_are_written_down(tmp_path, tiny_run, monkeypatch):
    import accelerator
    import accelerator_parts

    assert set(accelerator.LIMITS) == set(accelerator_parts.PARTS)
    # Whole runs are trained once a session, and this is one; the slow test below runs them and Gowalla's epochs.
    monkeypatch.setattr("bdlm_jax.story.train_and_evaluate", lambda config, workdir: tiny_run[2])
    names = [name for name in accelerator.LIMITS if name != "gowalla"]
    accelerator.main(["--out", str(tmp_path), "--size", "tiny", "--here", "--parts", ",".join(names)])
    assert check_page(tmp_path, names)["from the start to the report"] >= 0


@pytest.mark.slow
def test_every_part_is_a_process_of_its_own(tmp_path):
    import accelerator

    accelerator.main(["--out", str(tmp_path), "--size", "tiny", "--minutes", "30"])
    assert check_page(tmp_path, accelerator.LIMITS)["epochs"] == 4


def test_the_kept_page_is_what_its_rows_and_notes_make(tmp_path):
    import accelerator

    kept = ROOT / "docs" / "performance" / "h200"
    shutil.copytree(kept, tmp_path / "h200")
    accelerator.main(["--out", str(tmp_path / "h200"), "--table"])
    made, page = ((folder / "results.md").read_text().splitlines()[3:] for folder in (tmp_path / "h200", kept))
    assert made == page and len(page) > 50


def test_a_part_without_time_is_told_and_not_begun(tmp_path):
    import accelerator

    accelerator.main(["--out", str(tmp_path), "--parts", "ml1m", "--minutes", "0.1"])
    assert "not begun: no time was left" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize("lm", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_data_path_goes_from_files_to_a_first_step(tmp_path, capsys, lm):
    import data_path

    sizes = {"n_interactions": 600, "n_users": 60, "n_items": 40}
    data_path.make(tmp_path / "log", **sizes, parquet=False)
    config = tiny.get_config()
    config.data.kind, config.data.options, config.models = "table", {}, ("lightgcn",)
    data_path.run(tmp_path / "log", lm=lm, config=config)
    told = capsys.readouterr().out
    assert "60 users, 40 items" in told and "LightGCN's first step (loss 0." in told
    assert ("the LM's first step (loss" in told) == lm


def test_the_data_path_writes_the_same_rows_as_parquet(tmp_path):
    import data_path

    pytest.importorskip("pyarrow")
    sizes = {"n_interactions": 600, "n_users": 60, "n_items": 40}
    for kind in (False, True):
        data_path.make(tmp_path / str(kind), **sizes, parquet=kind)
    first, second = (load_source("table", tmp_path / str(kind)).fingerprint() for kind in (False, True))
    assert first == second and first["users"] == 60 and first["items"] == 40


def test_the_page_of_speed_holds_what_its_commands_printed():
    import performance

    assert performance.page() == (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for path in performance.KEPT.glob("*.json"):
        assert json.loads(path.read_text())["command"] == performance.PARTS[path.stem].command


class Accepted(Exception):
    pass


def test_the_commands_of_the_page_are_understood(monkeypatch):
    import performance

    parse, parse_known = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args

    def accept(parser, words=None):
        parse(parser, words)
        raise Accepted

    def accept_known(parser, *given):
        found = parse_known(parser, *given)
        if given:  # parse_args's own call
            return found
        raise Accepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", accept)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", accept_known)
    for part in performance.PARTS.values():
        script, *words = part.command.split()
        monkeypatch.setattr(sys, "argv", [script, *words])
        with pytest.raises(Accepted):
            importlib.import_module(script.removesuffix(".py")).main()


def test_a_part_is_measured_kept_and_written_down(tmp_path, monkeypatch):
    import performance

    monkeypatch.setattr(performance, "ROOT", tmp_path)
    monkeypatch.setattr(performance, "KEPT", tmp_path / "docs" / "performance")
    monkeypatch.setattr(performance, "PARTS", {"one": performance.Part("Title", "say.py 7", "What it says.")})
    assert "## Not measured yet\n\n* Title: `python benchmarks/say.py 7`" in performance.page()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "say.py").write_text("import sys; print(f'| {sys.argv[1]} |')")
    performance.main(["run", "one"])
    page = (tmp_path / "docs" / "performance.md").read_text()
    assert "## Title\n\n`python benchmarks/say.py 7`" in page and "| 7 |\n\nWhat it says.\n" in page
    with pytest.raises(SystemExit, match="Parts: one"):
        performance.main(["run", "other"])


@pytest.fixture
def small_log(tmp_path):
    import data_path

    data_path.make(tmp_path / "log", n_interactions=600, n_users=60, n_items=40, parquet=False)
    return f"small=table={tmp_path / 'log'}"


def test_one_sequence_model_is_trained_side_by_side(small_log, capsys, monkeypatch):
    import sequence_step

    monkeypatch.setattr(sequence_step, "BLOCKS", 1)
    words = ["--width", "8", "--length", "5", "--batch-size", "8", "--steps", "1", "--repeats", "1", "--peer-rows", "0"]
    sequence_step.main(["--data", small_log, *words])  # which refuses two that are not the same model
    told = capsys.readouterr().out
    assert "| small, 60 users, 40 items | bdlm_jax |" in told and "| torch, the same model |" in told


def test_growth_is_told_in_slopes_and_drawn(tmp_path, capsys, monkeypatch):
    import growth

    monkeypatch.setattr(growth, "BASE", {"users": 30, "items": 20, "interactions": 200})
    small = {of: growth.grown(of, **growth.BASE) for of in ("users", "interactions")}
    monkeypatch.setattr(growth, "GROWTH", {"data path": (growth.data_path, small)})
    growth.main(["--plot", str(tmp_path / "growth.png")])
    told = capsys.readouterr().out
    assert "| data path | users | 30 · 60 · 120 |" in told and (tmp_path / "growth.png").stat().st_size > 1000
    table = growth.as_table([("work", "size", [1, 2, 4], [3.0, 6.0, 24.0])])
    assert table.endswith("| work | size | 1 · 2 · 4 | 3 · 6 · 24 | 1.00 · 2.00 |")


def test_weights_are_written_and_loaded(tmp_path, monkeypatch):
    import load_weights

    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 300}
    monkeypatch.setattr(load_weights, "SHAPE", load_weights.SHAPE | small)
    total = load_weights.write_checkpoint(tmp_path, 0.0)  # the least: one layer
    _, before, peak, size = load_weights.load_ours(tmp_path, "bfloat16")
    assert size == total and 0 < before <= peak


def test_batches_are_timed_beside_grains_where_it_is_installed(capsys, monkeypatch):
    import batches

    monkeypatch.setattr(sys, "argv", ["batches.py", "--rows", "64", "--length", "32", "--batches", "10"])
    batches.main()
    assert "| packing.Packed.batch | " in capsys.readouterr().out


def test_a_whole_experiment_is_timed(tmp_path, capsys, monkeypatch, tiny_run):
    import shutil
    import subprocess

    import end_to_end

    def run(command, **_):  # it is trained once a session
        shutil.copytree(tiny_run[1], command[command.index("--workdir") + 1])
        return subprocess.CompletedProcess(command, 0)

    words = ["--config", "tiny", "--workdir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["end_to_end.py", *words])
    monkeypatch.setattr(subprocess, "run", run)
    end_to_end.main()
    told = capsys.readouterr().out
    assert "| bdlm | " in told and "| **together** | " in told and "Of the processor" in told
    with pytest.raises(SystemExit):  # what is there would be resumed
        end_to_end.main()


def test_answers_are_timed(tmp_path):
    import serving

    sizes = {"users": 20, "items": 60, "lm_width": 64, "lm_layers": 1}
    serving.write_random_run(str(tmp_path), **sizes)
    rows = serving.measure(str(tmp_path), seconds=0.01, batches=[2], clients=[])
    rows += serving.measure_large(500, seconds=0.01)
    what = [row.split("|")[1].strip() for row in rows]
    assert what[:5] == [
        "domain, 1 at once",
        "domain, 1 after a click",
        "lm, 1 at once",
        "lm, 2 at once",
        "lm, 1 after a click",
    ]
    assert what[5] == "domain, 500 items, 1 at once" and all(float(row.split("|")[3]) > 0 for row in rows)
