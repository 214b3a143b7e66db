"""A run as README starts it on two processes, of one device each, against one process of two devices."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Uneven numbers of users and interactions, and what compiles sooner: multi_device/ splits every loss.
SMALL = {
    "models": "('bdlm',)", "data.options.n_users": 81, "data.options.history": 8, "pretrain.epochs": 0,
    "domain.model": "mf", "domain.epochs": 2, "lm.dropout": 0, "prompts.card_copies": 2,
    "mutual.lm.text": 0, "mutual.lm.align_user": 0, "mutual.lm.kl": 0, "mutual.domain.kl": 0,
    "mutual.domain_epochs_a_round": 1, "mutual.distill_epochs": 2, "select": "ndcg@10/cand20",
}  # fmt: skip


def start(workdir, log, *, devices, **settings):
    flags = f"--xla_force_host_platform_device_count={devices}"
    words = [f"--config.{name}={value}" for name, value in settings.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "bdlm_jax.main", "--config=experiments/tiny.py", f"--workdir={workdir}", *words],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=log.open("w"),
    )


@pytest.mark.parametrize(
    "settings", [pytest.param(SMALL, id="small"), pytest.param({}, id="tiny", marks=pytest.mark.slow)]
)
def test_two_processes_write_the_results_of_one(tmp_path, settings):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    one, two, logs = tmp_path / "one", tmp_path / "two", [tmp_path / f"{n}.log" for n in range(3)]
    settings = settings | {"parallel": "mesh"}
    together = {"distributed.coordinator": coordinator, "distributed.processes": 2}
    started = [start(one, logs[2], devices=2, **settings)] + [
        start(two, logs[n], devices=1, **settings, **together, **{"distributed.process": n}) for n in range(2)
    ]
    try:
        codes = [process.wait(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0, 0, 0], "\n".join(log.read_text()[-2000:] for log in logs)
    assert (two / "results.json").read_bytes() == (one / "results.json").read_bytes()
    assert "bdlm_domain" in (one / "results.json").read_text()
