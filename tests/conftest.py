"""What the end-to-end tests share: one tiny run, trained once a session."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # experiments/ lies beside the package, not in it


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """(config, workdir, results) of experiments/tiny.py, trained once; copy the workdir before you change it."""
    import jax

    from bdlm_jax.train import train_and_evaluate
    from experiments import tiny

    config, workdir = tiny.get_config(), tmp_path_factory.mktemp("tiny") / "run"
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is nearly all of the time
    try:
        return config, workdir, train_and_evaluate(config, str(workdir))
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
