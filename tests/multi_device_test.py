import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def test_multi_device_tests_pass_on_eight_devices():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", str(TESTS / "multi_device"), "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=TESTS.parent, env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout
