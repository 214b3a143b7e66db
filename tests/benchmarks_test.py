"""The benchmarks that wait for other machines work here at tiny size: what runs for hours there has run once before."""

import json
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
