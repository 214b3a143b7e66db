"""The loop with a state that the devices hold in parts: it stays there, and a kill changes no bit."""

import jax
import numpy as np
import pytest
import toy
from toy import OPTIMIZER, make_batch, make_state

from bdlm_jax.runtime.fit import Arm, Phase, fit
from bdlm_jax.runtime.parallel import compile_step

PHASES = [Phase("a", 3, "first"), Phase("b", 2, "second"), Phase("a", 2, "third")]


class Killed(BaseException):
    pass


def step(state, batch, view, constants):
    return toy.step(state, batch)


@pytest.fixture(scope="module")
def compiled():
    made = compile_step(step, parallel="mesh", mesh={"data": 1, "fsdp": 2, "tensor": 2}, n_devices=4)

    def fetch_state(state, *, to_host=True):
        assert not to_host, "the state came to the host"
        return made.fetch_state(state, to_host=False)

    return made._replace(fetch_state=fetch_state)


def train(folder, compiled, *, kill_at=None, seconds=1e9):
    units, seen = [], []

    def run(*arguments):
        units.append(None)
        if len(units) == kill_at:
            raise Killed
        return compiled.run(*arguments)

    def validate(name, params):
        kernel = params["lm"]["layers"]["mlp"]["gate_proj"]["kernel"]
        seen.append(kernel.addressable_shards[0].data.size / kernel.size if isinstance(kernel, jax.Array) else 1)
        return {"fit": float(np.asarray(kernel).sum()) * len(seen)}

    arm = Arm(
        compiled=compiled._replace(run=run),
        optimizer=OPTIMIZER,
        batch=make_batch,
        view=lambda params: {"item": params["shared"]["item"] * 2},
        constants={},
        finish=lambda params: {**params, "shared": {**params["shared"], "user": params["shared"]["user"] * 1.5}},
    )
    fitted = fit(
        folder, stage="toy", phases=PHASES, arms={"a": arm, "b": arm}, params=lambda: make_state().params,
        key=jax.random.key(0), validate=validate, select="fit", judged=("a",), checkpoint_seconds=seconds,
    )  # fmt: skip
    return fitted, seen, len(units)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, compiled):
    return train(tmp_path_factory.mktemp("whole"), compiled)


def test_the_state_stays_in_parts_and_learns_the_numbers_of_one_device(tmp_path, whole):
    fitted, seen, n_units = whole
    assert seen == [1 / 4] * 3 and n_units == 7
    wanted, seen, _ = train(tmp_path, compile_step(step, parallel="jit"))
    assert seen == [1] * 3 and fitted.phase == wanted.phase
    for mine, theirs in zip(jax.tree.leaves(fitted.params), jax.tree.leaves(wanted.params), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("seconds", "left"), [(0.0, 3), (1e9, 4)])
def test_a_kill_changes_no_bit(tmp_path, compiled, whole, seconds, left):
    with pytest.raises(Killed):
        train(tmp_path, compiled, kill_at=5, seconds=seconds)
    (fitted, *_, n_units), wanted = train(tmp_path, compiled), whole[0]
    assert n_units == left
    jax.tree.map(np.testing.assert_array_equal, fitted.params["a"], wanted.params["a"])
