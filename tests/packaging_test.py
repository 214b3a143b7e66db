import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import bdlm_jax

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_package_imports_at_once_and_alone():
    program = "import sys, time; t = time.perf_counter(); import bdlm_jax; print(time.perf_counter() - t, *sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, *modules = done.stdout.split()
    assert float(seconds) < 2
    assert "bdlm_jax" in modules
    assert {"torch", "tensorflow", "jax", "numpy", "transformers"}.isdisjoint(modules)


def test_one_version_everywhere():
    newest = re.search(r"^## \[?v?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    # Not installed is an error here, not a skip: README's command installs it.
    assert newest[1] == bdlm_jax.__version__ == importlib.metadata.version("bdlm_jax")


def test_every_folder_with_modules_is_a_package():
    folders = {path.parent for path in (ROOT / "bdlm_jax").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_ci_runs_the_readmes_command():
    block = re.search(r"<!-- ci: tests -->\n```bash\n(.*?)```", README, re.S)[1]
    shown = subprocess.run(["bash", str(ROOT / ".ci" / "run"), "--show"], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == block.strip()
    assert re.search(r"pip install .*-e .*\[test\]", block)
    assert re.search(r"^(python -m )?pytest", block, re.M)


def test_ruff_is_the_same_for_people_and_for_ci():
    text = (ROOT / "setup.py").read_text() + (ROOT / ".pre-commit-config.yaml").read_text()
    versions = re.findall(r"ruff~=[\d.]+", text)
    assert len(versions) == 3 and len(set(versions)) == 1
