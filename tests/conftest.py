"""What the tests share: quick compilation, and one tiny run, trained once a session."""

import os
import sys
from pathlib import Path

import pytest

# Compiling is nearly all of the time at these sizes. Set to 0 to test what users run; child processes inherit it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # experiments/ lies beside the package, not in it


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """(config, workdir, results) of experiments/tiny.py, trained once; copy the workdir before you change it."""
    from bdlm_jax.train import train_and_evaluate
    from experiments import tiny

    config, workdir = tiny.get_config(), tmp_path_factory.mktemp("tiny") / "run"
    return config, workdir, train_and_evaluate(config, str(workdir))
