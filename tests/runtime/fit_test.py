import logging
import types

import jax
import numpy as np
import pytest

from bdlm_jax.runtime import checkpoint, parallel
from bdlm_jax.runtime import fit as fit_module
from bdlm_jax.runtime.fit import LOOK_EVERY, Arm, Phase, Stopped, fit
from bdlm_jax.runtime.log import StopSignal, read_metrics
from bdlm_jax.types import InputError

FIT = fit_module.__name__  # whose words are meant, not a library's
PHASES = [Phase("a", 3, "first"), Phase("b", 2, "second"), Phase("a", 2, "third")]


def same(tree):
    return tree


def by_params(name, params):
    return {"hr": float(params["a"] - 3 * params["b"])}


def make_arm(name, calls, *, at_unit=None, **changes):
    """An arm whose unit adds its batch's number, and a tenth of the view, to its own entry of the params."""

    def run(state, batch, view, constants):
        calls.append((name, int(batch), float(view["other"])))
        if at_unit:
            at_unit(len(calls))
        value = state.params[name] + np.float32(batch) + np.float32(0.1) * view["other"]
        params = state.params | {name: value}
        return state._replace(params=params, step=state.step + 1), {"loss": value}

    arm = Arm(
        compiled=parallel.Compiled(run, same, same, same, same),
        optimizer=types.SimpleNamespace(init=lambda params: {"sum": np.zeros((), np.float32)}),
        batch=np.int32,
        view=lambda params: {"other": params["a"] + params["b"]},
        constants={},
    )
    return arm._replace(**changes)


def start(folder, calls, *, phases=PHASES, arms=None, at_unit=None, judged=("a", "b"), **options):
    arms = arms or {name: make_arm(name, calls, at_unit=at_unit) for name in "ab"}
    options = {"validate": by_params, "select": "hr", "checkpoint_seconds": 1e9} | options
    return fit(
        folder, stage="toy", phases=phases, arms=arms, params=lambda: {"a": np.float32(0), "b": np.float32(0)},
        key=jax.random.key(0), judged=judged, **options,
    )  # fmt: skip


def test_phases_views_and_cursors_by_hand_and_a_finished_stage_is_only_read(tmp_path, caplog):
    caplog.set_level(logging.INFO, "bdlm_jax")
    calls, values = [], iter([0.5, -0.5, 0.9, -0.9, 0.7, -0.7])  # of a and b after each phase
    fitted = start(tmp_path, calls, validate=lambda *_: {"hr": next(values)})
    # The view is a + b. Against 0, a = 1 + 2; against 3, b = 0 + 1 + 2·0.1·3 = 1.6; a goes on with batches 3 and 4.
    wanted = [("a", 0, 0), ("a", 1, 0), ("a", 2, 0), ("b", 0, 3), ("b", 1, 3), ("a", 3, 4.6), ("a", 4, 4.6)]
    assert [(n, b, pytest.approx(v)) for n, b, v in calls] == wanted
    assert [record.getMessage().strip() for record in caplog.records if record.name == FIT] == [
        "phase 1 of 3 of toy (first): validation hr: a 0.5000, best so far 0.5000; b -0.5000, best so far -0.5000",
        "phase 2 of 3 of toy (second): validation hr: a 0.9000, best so far 0.9000; b -0.9000, best so far -0.5000",
        "phase 3 of 3 of toy (third): validation hr: a 0.7000, best so far 0.9000; b -0.7000, best so far -0.5000",
    ]
    assert fitted.phase == {"a": 1, "b": 0}
    assert fitted.value == {"a": 0.9, "b": -0.5}
    np.testing.assert_allclose([fitted.params["a"][n] for n in "ab"], [3, 1.6], rtol=1e-6)
    np.testing.assert_allclose([fitted.params["b"][n] for n in "ab"], [3, 0], rtol=1e-6)
    again = []
    assert start(tmp_path, again) == fitted and again == []


def test_how_long_the_stage_will_take_is_told_from_units_that_were_timed(tmp_path, caplog, monkeypatch):
    """A unit of "a" takes 10 s on this clock, one of "b" 20, the first of a process 100 more; a validation 7 an arm."""
    caplog.set_level(logging.INFO, "bdlm_jax")
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(fit_module.time, "monotonic", lambda: clock.now)

    def work(seconds, value):
        clock.now += seconds
        return value

    arms = {}
    for name, seconds in (("a", 10), ("b", 20)):
        arm = make_arm(name, [])
        run = arm.compiled.run
        slow = [100]
        compiled = arm.compiled._replace(
            run=lambda *given, run=run, s=seconds, slow=slow: work(s + (slow.pop() if slow else 0), run(*given))
        )
        arms[name] = arm._replace(compiled=compiled)
    phases = [Phase("a", 3, "1"), Phase("b", 3, "2"), Phase("a", 5, "3"), Phase("b", 2, "4")]
    start(tmp_path, [], phases=phases, arms=arms, validate=lambda arm, params: work(7, by_params(arm, params)))
    told = [record.getMessage().partition("; about ")[2] for record in caplog.records if record.name == FIT]
    # Behind the second phase: 5 units of 10 s, 2 of 20, and two phases' validations of both arms.
    assert told == ["", f"{5 * 10 + 2 * 20 + 2 * 14} s left of this stage", f"{2 * 20 + 14} s left of this stage", ""]


def test_a_unit_is_timed_from_where_the_device_is_done_with_the_first(tmp_path, caplog, monkeypatch):
    """A step returns at once; its 30 s pass while somebody waits for what it gives. Two units: the second is timed."""
    caplog.set_level(logging.INFO, "bdlm_jax")
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(fit_module.time, "monotonic", lambda: clock.now)

    class Promise:
        waited = False

        def block_until_ready(self):
            clock.now, self.waited = clock.now + (0 if self.waited else 30), True
            return self

        def __array__(self, *_, **__):
            self.block_until_ready()
            return np.zeros(())

    arm = make_arm("a", [])
    run = arm.compiled.run
    compiled = arm.compiled._replace(run=lambda *given: (run(*given)[0], {"loss": Promise()}))
    arms = {"a": arm._replace(compiled=compiled, rates=lambda batch, seconds: f"{seconds:.0f} s a unit")}
    start(tmp_path, [], phases=[Phase("a", 2, "first"), Phase("a", 2, "second")], arms=arms, judged=("a",))
    told = [record.getMessage().strip() for record in caplog.records if record.name == FIT]
    assert told[0] == "first: 30 s a unit" and told[1].endswith("about 60 s left of this stage")


class Killed(BaseException):
    pass


def kill_at(unit):
    def kill(n):
        if n == unit:
            raise Killed

    return kill


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    calls = []
    return start(tmp_path_factory.mktemp("whole"), calls), calls


def test_how_fast_a_phase_was_is_told_in_the_arms_words(tmp_path, caplog):
    caplog.set_level(logging.INFO, "bdlm_jax")
    arms = {name: make_arm(name, []) for name in "ab"}
    arms["a"] = arms["a"]._replace(rates=lambda batch, seconds: f"batch {batch}, {seconds > 0}")
    start(tmp_path, [], arms=arms)
    told = [record.getMessage().strip() for record in caplog.records if "batch" in record.getMessage()]
    assert told == ["first: batch 2, True", "third: batch 4, True"]


def test_with_keep_nothing_is_validated_and_the_named_phases_are_kept(tmp_path):
    fitted = start(tmp_path, [], keep={"a": 2, "b": 1}, validate=None)
    assert fitted.phase == {"a": 2, "b": 1}
    # As above: a = 3 after its first phase; b = 1.6 and the third phase's view is 4.6: a = 3 + 3 + 4 + 2·0.1·4.6.
    assert (fitted.params["a"]["a"], fitted.params["b"]["b"]) == pytest.approx((10.92, 1.6))
    assert fitted.params["b"]["a"] == 3


@pytest.mark.parametrize("seconds", [0.0, 1e9])
@pytest.mark.parametrize("at", [1, 2, 4, 5, 7])
def test_a_kill_in_any_unit_changes_nothing(tmp_path, whole, at, seconds):
    with pytest.raises(Killed):
        start(tmp_path, [], checkpoint_seconds=seconds, at_unit=kill_at(at))
    rest = []
    assert start(tmp_path, rest) == whole[0]
    # Saved after every unit, only the fatal one is done again; saved never, its whole phase.
    assert rest == whole[1][at - 1 if seconds == 0 else {1: 0, 2: 0, 4: 3, 5: 3, 7: 5}[at] :]
    steps = [row["step"] for row in read_metrics(tmp_path) if any(name.endswith("/loss") for name in row)]
    assert steps == sorted(set(steps)) and steps[-1] == 7  # the log holds each look once


def test_a_stop_saves_at_once_and_exits_as_its_signal_would(tmp_path):
    stop, calls = StopSignal(), []

    def ask(n):
        stop.requested = n == 2

    with pytest.raises(Stopped) as stopped:
        start(tmp_path, calls, stop=stop, at_unit=ask)
    assert stopped.value.code == 143 and isinstance(stopped.value, SystemExit)
    assert len(calls) == 2 and checkpoint.steps(tmp_path / "checkpoints") == [2]
    rest = []
    start(tmp_path, rest)
    assert [call[:2] for call in rest] == [("a", 2), ("b", 0), ("b", 1), ("a", 3), ("a", 4)]


@pytest.mark.parametrize("text", ["", "{", '{"best": 3}', None])
def test_a_damaged_done_json_is_made_again(tmp_path, whole, text):
    assert start(tmp_path, []) == whole[0]
    path = tmp_path / "done.json"
    written = path.read_text()
    path.write_text(written.replace('"phase": 2', '"phase": 1') if text is None else text)
    assert path.read_text() != written
    calls = []
    assert start(tmp_path, calls) == whole[0] and calls == []
    assert path.read_text() == written


@pytest.mark.parametrize(
    ("name", "lost"), [("best_a", "damaged"), ("best_b", "cannot"), ("view", "damaged"), ("view", "gone")]
)
def test_a_damaged_table_is_named_with_what_to_delete(tmp_path, name, lost):
    path = tmp_path / f"{name}.safetensors"
    if name == "view":  # read back within a phase
        with pytest.raises(Killed):
            start(tmp_path, [], checkpoint_seconds=0.0, at_unit=kill_at(5))
    else:
        start(tmp_path, [])
    whole = path.read_bytes()
    path.unlink() if lost == "gone" else path.write_bytes(whole[:-1] + b"!" if lost == "damaged" else whole[:-1])
    told = f"{path} .*{lost}.* Delete {tmp_path}, and the same command trains this stage again"
    with pytest.raises(InputError, match=told.replace("cannot", "cannot be read")):
        start(tmp_path, [])


class Loss:
    """A loss that tells when it is looked at, as one on a device would make the host wait."""

    def __init__(self, tell, unit):
        self.tell, self.unit = tell, unit

    def __array__(self, *options, **more):
        self.tell("look", self.unit)
        return np.asarray(1.0, np.float32)


@pytest.mark.parametrize("units", [1, 5])
def test_the_next_batch_is_made_while_the_device_works(tmp_path, monkeypatch, units):
    monkeypatch.setattr("bdlm_jax.runtime.fit.LOOK_EVERY", 2)
    told = []

    def tell(what, number):
        told.append((what, int(number)))
        return np.int32(number)

    def run(state, batch, view, constants):
        return state, {"loss": Loss(tell, tell("run", batch))}

    compiled = parallel.Compiled(run, same, same, same, place_batch=lambda batch: tell("place", batch))
    arm = make_arm("a", [], compiled=compiled, batch=lambda number: tell("make", number))
    start(tmp_path, [], phases=[Phase("a", units, "x")], arms={"a": arm}, judged=("a",))
    wanted = [("make", 0), ("place", 0)]
    for unit in range(units):
        wanted += [("run", unit)]
        wanted += [("make", unit + 1), ("place", unit + 1)] if unit + 1 < units else []
        if unit % 2 or unit + 1 == units:
            wanted += [("look", n) for n in range(unit - unit % 2, unit + 1)]
    assert told == wanted


def test_finish_works_on_what_the_phase_leaves(tmp_path):
    arm = make_arm("a", [], finish=lambda params: params | {"b": params["a"] + np.float32(10)})
    one = {"phases": [Phase("a", 3, "x")], "arms": {"a": arm}, "judged": ("a",)}
    assert start(tmp_path, [], validate=lambda _, params: {"hr": float(params["b"])}, **one).value == {"a": 13.0}


def test_a_loss_that_is_not_finite_stops_and_says_where(tmp_path):
    arm = make_arm("a", [], batch=lambda number: np.float32(np.inf if number == 30 else 1))
    arm = arm._replace(compiled=arm.compiled._replace(run=lambda state, batch, *_: (state, {"loss": batch})))
    with pytest.raises(FloatingPointError) as error:
        start(tmp_path, [], phases=[Phase("a", 60, "BPR epochs")], arms={"a": arm})
    units = f"between units {LOOK_EVERY + 1} and {2 * LOOK_EVERY}"
    assert str(error.value).startswith(f"toy: loss is not finite in BPR epochs {units}")
    assert "learning rate of the a arm" in str(error.value)
    assert checkpoint.steps(tmp_path / "checkpoints") == []


def test_a_stage_without_a_step_is_refused(tmp_path):
    with pytest.raises(InputError, match="the stage toy has nothing to train, not a single step: raise its epochs"):
        start(tmp_path / "toy", [], phases=[])
    assert not (tmp_path / "toy").exists()
