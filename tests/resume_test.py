import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parent

# (stage or function, arm, in which unit or call), each one start that is killed there and begins where the last ended.
PLACES = [
    ("candidates", "", 2),
    ("mf", "domain", 2),
    ("lightgcn", "domain", 4),
    ("pretrain", "lm", 3),
    ("text_lm", "lm", 3),
    ("ids_lm", "lm", 4),
    ("bdlm", "lm", 3),
    ("bdlm", "domain", 2),
    ("bdlm", "lm", 2, "SIGTERM"),
    ("distill", "domain", 3),
    ("refresh", "domain", 2),
    ("evaluate", "", 2),
    ("results", "", 1),
    ("",),
]


def test_a_run_killed_in_every_stage_ends_in_the_same_bits(tiny_run, tmp_path):
    _, reference, results = tiny_run
    cache = {"JAX_COMPILATION_CACHE_DIR": str(reference / "compiled"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(TESTS / "killed_run.py"), str(tmp_path / "run"), json.dumps(PLACES)]
    environment = os.environ | cache | {"PYTHONPATH": str(TESTS.parent)}
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    attempts = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    codes = [-9] * len(PLACES)
    codes[8], codes[-1] = 143, 0  # the stopped one and the last
    assert [a["code"] for a in attempts] == codes, done.stdout[-3000:] + done.stderr[-3000:]
    # What each was killed after: all units before the fatal one were on disk, and the stopped one saved by itself.
    saved = [a["saved"] for a in attempts]
    assert saved[1:6] == [[1], [2, 3], [1, 2], [1, 2], [2, 3]] and saved[9:11] == [[1, 2], [1]]
    bdlm = [steps[-1] for steps in saved[6:9]]
    assert bdlm[0] == 2 and bdlm[2] == bdlm[1] + 1 + 2

    assert json.loads((tmp_path / "run" / "results.json").read_text()) == json.loads(json.dumps(results))
    for path in sorted((reference / "per_user").glob("*.npz")):
        with np.load(path) as wanted, np.load(tmp_path / "run" / "per_user" / path.name) as made:
            assert wanted.files == made.files
            for name in wanted.files:
                np.testing.assert_array_equal(made[name], wanted[name])
    weights = sorted(p.relative_to(reference) for p in reference.rglob("best_*.safetensors"))
    assert {p.parts[0] for p in weights} == {place[0] for place in PLACES[1:-3]}
    for path in weights:
        assert (tmp_path / "run" / path).read_bytes() == (reference / path).read_bytes(), path
