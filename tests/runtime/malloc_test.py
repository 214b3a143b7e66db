import os
import platform
import subprocess
import sys

import pytest

PAGES = """
import resource
import sys
from bdlm_jax.runtime import malloc
if sys.argv[1] == "kept":
    malloc.one_arena()
    print(malloc.keep_freed())
import jax
import numpy as np

@jax.jit
def step(x):
    rows = jax.numpy.sin(x @ x.T)  # 64 MB
    return (rows @ x).sum()

x = np.ones((4096, 16), np.float32)
for _ in range(20):  # until every block has found its place
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc than glibc's")


def run(*words, **variables):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_PRE"))}
    environment = {**kept, "JAX_PLATFORMS": "cpu", **variables}
    done = subprocess.run([sys.executable, "-c", PAGES, *words], env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout.split()


@glibc
def test_a_step_finds_the_pages_of_the_one_before():
    (without,) = run("freed")
    worked, kept = run("kept")
    assert worked == "True"
    if int(without) < 3 * 64 * 2**20 / os.sysconf("SC_PAGESIZE") / 2:
        pytest.skip("the kernel gives large pages")
    assert int(kept) < int(without) / 20, "an arena of a thread takes nothing of 64 MB: was JAX started before?"


@glibc
def test_variables_of_the_user_stand():
    worked, pages = run("kept", MALLOC_TOP_PAD_="0")
    assert worked == "False"
    assert int(pages) > 20  # kept, there are two at most
