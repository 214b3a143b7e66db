import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from experiments import quickstart

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def notebook():
    return nbformat.read(ROOT / "colab" / "quickstart.ipynb", as_version=4)


def flat(config, prefix=""):
    made = {}
    for name, value in config.items():
        made |= flat(value, f"{prefix}{name}.") if hasattr(value, "items") else {prefix + name: value}
    return made


def test_the_notebook_is_valid_and_has_no_logic_of_its_own(notebook):
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:
        assert "def " not in cell.source and "class " not in cell.source
        assert len(cell.source.splitlines()) <= 20
    (install,) = (cell for cell in cells if "install" in cell.metadata.get("tags", []))
    assert "pip install" in install.source
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (address,) = {re.search(r"git clone (?:-q )?(\S+) bdlm", text)[1] for text in (readme, install.source)}
    assert address


def test_the_notebook_is_kept_with_its_outputs(notebook):
    """Those of the quickstart as it stands there, from a machine of which they say nothing."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and not cell.metadata.get("tags")]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [[*cell.outputs] for cell in cells]
    assert all(outputs) and not [out for made in outputs for out in made if out.output_type == "error"]
    trained = "".join(out.text for out in outputs[0])
    assert "1500 users, 300 items" in trained and "see runs/quickstart/results.md" in trained
    (page,) = (out.data["text/markdown"] for out in outputs[1])
    assert page.startswith("# Results: twins, seed 0") and page.count("](data:image/png;base64,") == 3
    whole = (ROOT / "colab" / "quickstart.ipynb").read_text(encoding="utf-8")
    text = re.sub(r"data:image/png;base64,[\w+/=]+", "", whole)
    assert not re.search(r"(?<![\w.])/(?:home|root|tmp|work|usr|content|Users)/|Traceback", text)
    assert len(text) < 100_000 and len(whole) < 500_000


def test_the_notebook_runs_from_start_to_end(notebook, tiny_run, tmp_path, monkeypatch):
    """It trains BDLM of the tiny run once more, in a process of its own; only compiled programs are shared."""
    config, trained, results = tiny_run
    before = flat(quickstart.get_config())
    overrides = {name: value for name, value in flat(config).items() if before.get(name) != value}
    overrides["models"] = ["lightgcn", "bdlm"]
    workdir = tmp_path / "run"
    monkeypatch.setenv("BDLM_NOTEBOOK_OVERRIDES", json.dumps(overrides))
    monkeypatch.setenv("BDLM_NOTEBOOK_WORKDIR", str(workdir))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(trained / "compiled"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", [])]
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(ROOT)}}).execute()

    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    shown = [out.data for out in outputs if out.output_type in ("execute_result", "display_data")]
    (page,) = (data["text/markdown"] for data in shown if "text/markdown" in data)
    assert page.count("](data:image/png;base64,") == len(list((workdir / "plots").glob("*.png"))) > 0
    assert "bdlm_domain" in page
    assert sum("text/html" in data for data in shown) == 6  # a history, four recommendations, the twins' audiences
    made = json.loads((workdir / "results.json").read_text(encoding="utf-8"))
    values, expected = (
        {(row["model"], row["slice"], row["metric"]): row["value"] for row in rows["rows"]} for rows in (made, results)
    )
    assert {"lightgcn", "bdlm_domain", "bdlm_lm"} <= {model for model, _, _ in values}
    for name, value in values.items():
        if name[2].endswith("/full"):
            assert value == pytest.approx(expected[name], abs=1e-6), name
