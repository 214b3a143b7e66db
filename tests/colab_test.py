import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from experiments import quickstart

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "colab" / "quickstart.ipynb"


def read_notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def flat(config, prefix=""):
    made = {}
    for name, value in config.items():
        made |= flat(value, f"{prefix}{name}.") if hasattr(value, "items") else {prefix + name: value}
    return made


def test_the_notebook_is_valid_and_cleared():
    notebook = read_notebook()
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    installs = [cell for cell in notebook.cells if "install" in cell.metadata.get("tags", [])]
    assert len(installs) == 1
    assert "pip install" in installs[0].source


def test_the_notebook_has_no_logic_of_its_own():
    for cell in read_notebook().cells:
        if cell.cell_type == "code":
            assert "def " not in cell.source
            assert "class " not in cell.source
            assert len(cell.source.splitlines()) <= 20


def test_the_notebook_runs_from_start_to_end(tiny_run, tmp_path, monkeypatch):
    """It trains BDLM of the tiny run once more, in a process of its own; only compiled programs are shared."""
    config, trained, results = tiny_run
    before = flat(quickstart.get_config())
    overrides = {name: value for name, value in flat(config).items() if before.get(name) != value}
    overrides["models"] = ["lightgcn", "bdlm"]
    workdir = tmp_path / "run"
    monkeypatch.setenv("BDLM_NOTEBOOK_OVERRIDES", json.dumps(overrides))
    monkeypatch.setenv("BDLM_NOTEBOOK_WORKDIR", str(workdir))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(trained / "compiled"))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # as the fixture does, for the same programs
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = read_notebook()
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", [])]
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()

    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    shown = [out.data for out in outputs if out.output_type in ("execute_result", "display_data")]
    assert sum("image/png" in data for data in shown) == len(list((workdir / "plots").glob("*.png"))) > 0
    assert any("bdlm_domain" in data.get("text/markdown", "") for data in shown)
    assert sum("text/html" in data for data in shown) == 6  # a history, four recommendations, the twins' audiences
    made = json.loads((workdir / "results.json").read_text(encoding="utf-8"))
    values = {(row["model"], row["slice"], row["metric"]): row["value"] for row in made["rows"]}
    expected = {(row["model"], row["slice"], row["metric"]): row["value"] for row in results["rows"]}
    assert {"lightgcn", "bdlm_domain", "bdlm_lm"} <= {model for model, _, _ in values}
    for name, value in values.items():
        if name[2].endswith("/full"):
            assert value == pytest.approx(expected[name], abs=1e-6), name
