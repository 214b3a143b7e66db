"""These tests want eight devices, which XLA only makes at the start of a process: `multi_device_test.py` starts it."""

import os

FLAG = "--xla_force_host_platform_device_count=8"
collect_ignore_glob = [] if FLAG in os.environ.get("XLA_FLAGS", "") else ["*_test.py"]
