"""Two processes of two devices each on loopback against one process of four."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from toy import make, make_state, train

from bdlm_jax.runtime import checkpoint, distributed
from bdlm_jax.types import InputError

ROOT = Path(__file__).resolve().parents[2]


def start(processes, folder):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={4 // processes}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    worker = str(Path(__file__).parent / "distributed_worker.py")
    commands = [
        [sys.executable, worker, coordinator, str(processes), str(process), str(folder)] for process in range(processes)
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, env=environment, **pipes) for command in commands]
    try:
        told = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, "\n".join(err[-3000:] for _, err in told)
    return json.loads(told[0][0].splitlines()[-1])


def test_two_processes_train_the_numbers_of_one(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "begun").write_text("")
    two = start(2, tmp_path)
    compiled = make(data=2, fsdp=2)
    state, losses = train(compiled, compiled.place_state(make_state()), range(4))
    host = compiled.fetch_state(state)
    np.testing.assert_allclose(two["losses"], losses, rtol=1e-5)
    np.testing.assert_allclose(two["item"], host.params["shared"]["item"], rtol=1e-4, atol=2e-6)
    assert two["parts"] == ["(1, 2, 8)"]
    # What two processes wrote together, one process reads; of the run directory only the first wrote a file.
    like = make_state()
    assert checkpoint.restore(checkpoint.latest(tmp_path / "sharded"), like=like).step == 2
    assert (tmp_path / "run" / "seen").read_text() == "0"
    saved = checkpoint.restore(checkpoint.latest(tmp_path / "run" / "host"), like=host._replace(key=np.zeros(2)))
    np.testing.assert_allclose(saved.params["shared"]["item"], two["item"], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"coordinator": "", "processes": 2, "process": 0}, "process 0 of 2 without a coordinator"),
        ({"coordinator": "localhost", "processes": 2, "process": 0}, "coordinator is 'localhost'; give host:port"),
        ({"coordinator": "localhost:99999", "processes": 2, "process": 0}, "coordinator is 'localhost:99999'; give"),
        ({"coordinator": "localhost:1", "processes": 2, "process": 2}, "process is 2; it must be from 0 to 1"),
    ],
)
def test_processes_that_cannot_meet_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        distributed.join(**options)


def test_one_process_decides_alone():
    assert distributed.agree(True, False) == (True, False)
    with distributed.run_folder("here") as folder:
        assert folder == "here"
