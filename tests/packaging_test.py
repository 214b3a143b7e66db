import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import bdlm_jax

ROOT = Path(__file__).resolve().parents[1]


def test_the_package_imports_at_once_and_alone():
    program = """
import json, sys, time
began = time.perf_counter()
import bdlm_jax
print(json.dumps([time.perf_counter() - began, sorted({name.split(".")[0] for name in sys.modules})]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, modules = json.loads(done.stdout)
    assert seconds < 2
    assert "bdlm_jax" in modules
    assert {"torch", "tensorflow", "jax", "numpy", "transformers"}.isdisjoint(modules)


def test_one_version_everywhere():
    assert re.fullmatch(r"\d+\.\d+\.\d+", bdlm_jax.__version__)
    changelog = ROOT / "CHANGELOG.md"
    if changelog.exists():
        newest = re.search(r"^## \[?v?(\d+\.\d+\.\d+)", changelog.read_text(encoding="utf-8"), re.M)
        assert newest is not None, "CHANGELOG.md has no entry like '## 0.1.0'"
        assert newest[1] == bdlm_jax.__version__


def test_the_installed_version_is_this_one():
    # Not installed is an error here, not a skip: README's command installs it.
    assert importlib.metadata.version("bdlm_jax") == bdlm_jax.__version__


def test_every_folder_with_modules_is_a_package():
    folders = {path.parent for path in (ROOT / "bdlm_jax").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_ci_runs_the_readmes_command():
    block = re.search(r"<!-- ci: tests -->\n```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[
        1
    ]
    command = subprocess.run(
        ["bash", str(ROOT / ".ci" / "run"), "--show"], capture_output=True, text=True, check=True
    ).stdout
    assert command.strip() == block.strip()
    assert re.search(r"pip install .*-e .*\[test\]", command)
    assert re.search(r"^(python -m )?pytest", command, re.M)


def test_ruff_is_the_same_for_people_and_for_ci():
    versions = re.findall(
        r"ruff~=[\d.]+", (ROOT / "setup.py").read_text() + (ROOT / ".pre-commit-config.yaml").read_text()
    )
    assert len(versions) == 3
    assert len(set(versions)) == 1
