"""Runs experiments/tiny.py again and again in one folder, each time killed at another place: for resume_test.py.

Every attempt is a process of its own, forked before JAX starts its threads, so that the imports are paid once.
Prints one line of JSON an attempt: where it was to die, and how it ended.
"""

import json
import os
import signal
import sys
import traceback

# Loaded lazily by the package; here, so that no attempt pays for it.
import orbax.checkpoint  # noqa: F401

from bdlm_jax import story
from bdlm_jax.data import candidates
from bdlm_jax.evaluation import evaluate
from bdlm_jax.run import build
from bdlm_jax.runtime import checkpoint
from experiments import tiny

FUNCTIONS = {
    "candidates": (candidates, "save_candidates"),
    "evaluate": (evaluate, "evaluate_full"),
    "results": (story, "write_json"),
}


def dying_after(function, calls, signal_number=signal.SIGKILL):
    """Sends this process the signal when the function is called for the calls-th time."""
    left = [calls]

    def called(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal_number)
        return function(*args, **kwargs)

    return called


def arrange(where, arm, calls, signal_number):
    """Makes the attempt die in the calls-th unit of an arm in a stage, or in the calls-th call of a function."""
    if where in FUNCTIONS:
        module, name = FUNCTIONS[where]
        setattr(module, name, dying_after(getattr(module, name), calls))
    fit = build.fit

    def fit_and_die(folder, *, stage, arms, checkpoint_seconds, **options):
        doomed = stage == where
        if doomed:
            compiled = arms[arm].compiled
            compiled = compiled._replace(run=dying_after(compiled.run, calls, signal_number))
            arms = arms | {arm: arms[arm]._replace(compiled=compiled)}
        # A stage that is to be killed saves after every unit; one that is to be stopped has to save by itself.
        seconds = 0.0 if doomed and signal_number == signal.SIGKILL else 1e9
        return fit(folder, stage=stage, arms=arms, checkpoint_seconds=seconds, **options)

    build.fit = fit_and_die


def attempt(workdir, where, arm="", calls=1, signal_name="SIGKILL"):
    child = os.fork()
    if not child:
        code = 1
        try:
            if where:
                arrange(where, arm, calls, signal.Signals[signal_name])
            story.train_and_evaluate(tiny.get_config(), workdir)
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    workdir = sys.argv[1]
    for place in json.loads(sys.argv[2]):
        code = attempt(workdir, *place)
        saved = checkpoint.steps(os.path.join(workdir, place[0], "checkpoints"))
        print(json.dumps({"place": place, "code": code, "saved": saved}), flush=True)
