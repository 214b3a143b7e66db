"""What the tests share: quick compilation, an order that keeps two workers busy, and one tiny run a session."""

import json
import os
import sys
from pathlib import Path

import pytest

# Compiling is nearly all of the time at these sizes. Set to 0 to test what users run; child processes inherit it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # experiments/ lies beside the package, not in it

# A worker takes whole files in this order; what takes longest comes first, so that no core waits for another's last.
LONGEST_FIRST = (
    "resume_test.py", "sweep_test.py", "multi_device_test.py", "domain_models_test.py", "two_processes_test.py",
    "causal_lm_test.py", "colab_test.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST_FIRST.index(item.path.name) if item.path.name in LONGEST_FIRST else 99)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, request):
    """(config, workdir, results) of experiments/tiny.py, trained once; copy the workdir before you change it."""
    from bdlm_jax.story import train_and_evaluate
    from experiments import tiny

    config, folder = tiny.get_config(), tmp_path_factory.getbasetemp()
    if not hasattr(request.config, "workerinput"):
        return config, folder / "tiny", train_and_evaluate(config, str(folder / "tiny"))

    import filelock

    workdir, results = folder.parent / "tiny", folder.parent / "tiny.json"
    with filelock.FileLock(f"{workdir}.lock"):
        if not results.exists():
            results.write_text(json.dumps(train_and_evaluate(config, str(workdir))))
    return config, workdir, json.loads(results.read_text())
