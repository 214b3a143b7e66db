import json

import jax
import numpy as np
import pytest
import small_bdlm

from bdlm_jax.mutual import domain_epoch, sharing
from bdlm_jax.mutual.options import DomainWeights
from bdlm_jax.runtime import checkpoint, parallel
from bdlm_jax.runtime import fit as fit_lib
from bdlm_jax.runtime.fit import Arm, Phase, Stopped, fit


def same(tree):
    return tree


class NoOptimizer:
    def init(self, params):
        return {"sum": np.zeros((), np.float32)}


class Stop:
    requested = False


def make_arm(name, calls, *, at_unit=None):
    """An arm whose unit adds its batch's number, and a tenth of the view, to its own entry of the params."""

    def run(state, batch, view, constants):
        calls.append((name, int(batch), float(view["other"])))
        if at_unit:
            at_unit(name, len(calls))
        value = state.params[name] + np.float32(batch) + np.float32(0.1) * view["other"]
        params = state.params | {name: value}
        return state._replace(params=params, step=state.step + 1), {"loss": value}

    return Arm(
        compiled=parallel.Compiled(run, same, same, same, same),
        optimizer=NoOptimizer(),
        batch=lambda number: np.int32(number),
        view=lambda params: {"other": params["a"] + params["b"]},
        constants={},
    )


PHASES = [Phase("a", 3, "first"), Phase("b", 2, "second"), Phase("a", 2, "third")]
VALUES = {0: 0.5, 1: 0.9, 2: 0.7}  # of arm a after each phase; b's are negated


def start(folder, calls, *, phases=PHASES, seconds=1e9, **options):
    at_unit = options.pop("at_unit", None)
    validated = []

    def validate(name, params):
        number = len(validated) // 2
        validated.append(name)
        return {"hr": VALUES[number + options.get("done", 0)] * (1 if name == "a" else -1)}

    return fit(
        folder,
        stage="toy",
        phases=phases,
        arms={name: make_arm(name, calls, at_unit=at_unit) for name in "ab"},
        params=lambda: {"a": np.float32(0), "b": np.float32(0)},
        key=jax.random.key(0),
        validate=options.pop("validate", validate),
        select="hr",
        judged=("a", "b"),
        stop=options.pop("stop", None),
        checkpoint_seconds=seconds,
        tensorboard=False,
    )


def test_phases_views_and_cursors_by_hand(tmp_path):
    calls = []
    fitted = start(tmp_path, calls)
    # The view is a + b. Against 0, a = 1 + 2; against 3, b = 0 + 1 + 2·0.1·3 = 1.6; a goes on with batches 3 and 4.
    wanted = [("a", 0, 0), ("a", 1, 0), ("a", 2, 0), ("b", 0, 3), ("b", 1, 3), ("a", 3, 4.6), ("a", 4, 4.6)]
    assert [(n, b, pytest.approx(v)) for n, b, v in calls] == wanted
    # The best of a is the one after the second phase, of b (values negated) the one after the first.
    assert fitted.phase == {"a": 1, "b": 0}
    assert fitted.value == {"a": 0.9, "b": -0.5}
    np.testing.assert_allclose([fitted.params["a"][n] for n in "ab"], [3, 1.6], rtol=1e-6)
    np.testing.assert_allclose([fitted.params["b"][n] for n in "ab"], [3, 0], rtol=1e-6)


def test_a_finished_stage_is_read_back_and_not_trained_again(tmp_path):
    first = start(tmp_path, [])
    calls = []
    again = start(tmp_path, calls)
    assert calls == []
    assert (again.phase, again.value) == (first.phase, first.value)
    assert again.params["a"]["b"] == first.params["a"]["b"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("seconds", [0.0, 1e9])
@pytest.mark.parametrize("at", [1, 2, 4, 5, 7])
def test_a_kill_in_any_unit_changes_nothing(tmp_path, at, seconds):
    by_params = lambda name, params: {"hr": float(params["a"] - 3 * params["b"])}  # noqa: E731
    wanted_calls, calls = [], []
    wanted = start(tmp_path / "whole", wanted_calls, validate=by_params)

    def kill(name, n):
        if n == at:
            raise Killed

    with pytest.raises(Killed):
        start(tmp_path / "cut", calls, seconds=seconds, at_unit=kill, validate=by_params)
    rest = []
    fitted = start(tmp_path / "cut", rest, validate=by_params)
    assert fitted == wanted
    # Saved after every unit, only the fatal one is done again; saved never, its whole phase.
    again = wanted_calls[at - 1 :] if seconds == 0 else wanted_calls[{1: 0, 2: 0, 4: 3, 5: 3, 7: 5}[at] :]
    assert rest == again


def test_a_stop_saves_at_once_and_exits_with_zero(tmp_path):
    stop, calls = Stop(), []

    def ask(name, n):
        stop.requested = n == 2

    with pytest.raises(Stopped) as stopped:
        start(tmp_path, calls, stop=stop, at_unit=ask)
    assert stopped.value.code == 0 and isinstance(stopped.value, SystemExit)
    assert len(calls) == 2 and checkpoint.steps(tmp_path / "checkpoints") == [2]
    rest = []
    start(tmp_path, rest)
    assert [call[:2] for call in rest] == [("a", 2), ("b", 0), ("b", 1), ("a", 3), ("a", 4)]


def test_the_log_holds_each_unit_once_after_a_resume(tmp_path):
    def kill(name, n):
        if n == 5:
            raise Killed

    with pytest.raises(Killed):
        start(tmp_path, [], seconds=0.0, at_unit=kill)
    start(tmp_path, [], seconds=0.0, validate=lambda name, params: {"hr": 0.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if any(key.endswith("/loss") for key in row)]
    assert steps == sorted(set(steps)) == [1, 2, 3, 4, 5, 6, 7]


class Loss:
    """A loss that tells when it is looked at, as one on a device would make the host wait."""

    def __init__(self, told, unit):
        self.told, self.unit = told, unit

    def __array__(self, *options, **more):
        self.told.append(("look", self.unit))
        return np.asarray(1.0, np.float32)


@pytest.mark.parametrize("units", [1, 5])
def test_the_next_batch_is_made_while_the_device_works(tmp_path, monkeypatch, units):
    monkeypatch.setattr(fit_lib, "LOOK_EVERY", 2)
    told = []
    tell = lambda what, result: told.append((what, int(result))) or result  # noqa: E731
    arm = make_arm("a", [])
    run = lambda state, batch, *constants: (state, {"loss": Loss(told, tell("run", batch))})  # noqa: E731
    place = lambda batch: tell("place", batch)  # noqa: E731
    arm = arm._replace(
        compiled=arm.compiled._replace(run=run, place_batch=place), batch=lambda n: tell("make", np.int32(n))
    )
    fit(
        tmp_path, stage="toy", phases=[Phase("a", units, "x")], arms={"a": arm}, key=jax.random.key(0), select="hr",
        params=lambda: {"a": np.float32(0), "b": np.float32(0)}, validate=lambda n, p: {"hr": 0.0},
        judged=("a",), tensorboard=False,
    )  # fmt: skip
    wanted = [("make", 0), ("place", 0)]
    for unit in range(units):
        wanted += [("run", unit)]
        wanted += [("make", unit + 1), ("place", unit + 1)] if unit + 1 < units else []
        if unit % 2 or unit + 1 == units:
            wanted += [("look", n) for n in range(unit - unit % 2, unit + 1)]
    assert told == wanted


def test_finish_works_on_what_the_phase_leaves(tmp_path):
    calls = []
    arms = {"a": make_arm("a", calls)._replace(finish=lambda params: params | {"b": params["a"] + np.float32(10)})}
    fitted = fit(
        tmp_path, stage="toy", phases=[Phase("a", 3, "x")], arms=arms, key=jax.random.key(0), select="hr",
        params=lambda: {"a": np.float32(0), "b": np.float32(0)}, validate=lambda n, p: {"hr": float(p["b"])},
        judged=("a",), tensorboard=False,
    )  # fmt: skip
    assert fitted.value == {"a": 13.0}


def test_a_loss_that_is_not_finite_stops_and_says_where(tmp_path):
    arm = small_bdlm.make_arm()
    optimizer = small_bdlm.make_optimizer(rate=1e30)
    epoch = small_bdlm.make_domain_epoch(arm, None, weights=DomainWeights(), optimizer=optimizer, kl_users=0)
    slots = domain_epoch.make_slots(batch_size=16)
    domain = Arm(
        compiled=parallel.compile_step(epoch, parallel="jit"),
        optimizer=optimizer,
        batch=lambda number: slots,
        view=lambda params: {},
        constants=small_bdlm.domain_constants(),
    )
    shared = sharing.init_shared(jax.random.key(0), n_users=small_bdlm.N_USERS, n_items=small_bdlm.N_ITEMS, width=4)
    with pytest.raises(FloatingPointError) as error:
        fit(
            tmp_path, stage="lightgcn", phases=[Phase("domain", 40, "BPR epochs")], arms={"domain": domain},
            params=lambda: {"shared": shared, "domain": arm.init(None)}, key=jax.random.key(0),
            validate=lambda name, params: {"hr": 0.0}, select="hr", judged=("domain",), tensorboard=False,
            checkpoint_seconds=1e9,
        )  # fmt: skip
    message = str(error.value)
    assert (
        message.startswith("lightgcn: ") and "BPR epochs" in message and f"units 1 and {fit_lib.LOOK_EVERY}" in message
    )
    assert "learning rate of the domain arm" in message
    assert checkpoint.steps(tmp_path / "checkpoints") == []
