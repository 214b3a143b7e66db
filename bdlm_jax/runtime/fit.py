"""One loop for everything that trains: phases of units, checkpoints, selection on validation, resume to the same bits.

A unit is one compiled call: a step of the LM arm, an epoch of the domain arm. A phase is a number of units of one arm,
against the other arm's representations as they stood when the phase began.
"""

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bdlm_jax.runtime import checkpoint, distributed, malloc
from bdlm_jax.runtime.files import (
    damaged_file,
    load_safetensors,
    read_json,
    save_safetensors,
    write_checksums,
    write_json,
)
from bdlm_jax.runtime.log import MetricLog, Stopped, StopSignal, duration, progress
from bdlm_jax.runtime.parallel import Compiled
from bdlm_jax.runtime.sharding import spread
from bdlm_jax.types import InputError, Params, TrainState

_LOG = logging.getLogger(__name__)

_WORTH_TELLING = 5.0  # seconds
LOOK_EVERY = 25  # units between two looks at the losses, each of which waits for the device


class Arm(NamedTuple):
    """How one arm trains.

    compiled: its step or epoch.
    optimizer: of optax; each arm has its own state for the shared tables.
    batch: unit number -> batch, so that any unit can be made again.
    view: params -> the other arm as constants, at the start of a phase.
    constants: what never changes, on the device.
    finish: params -> params, once at the end of each of its phases.
    rates: None, or (batch, seconds of a unit) -> how fast that is, in words, for the log.
    """

    compiled: Compiled
    optimizer: Any
    batch: Callable[[int], Any]
    view: Callable[[Params], Params]
    constants: Params
    finish: Callable[[Params], Params] = lambda params: params
    rates: Callable[[Any, float], str] | None = None


class Phase(NamedTuple):
    """A number of units of one arm; `name` is for people."""

    arm: str
    units: int
    name: str


class Fitted(NamedTuple):
    """Each arm's best params on validation, their value, and the phase after which they stood."""

    params: dict[str, Params]
    value: dict[str, float]
    phase: dict[str, int]


def fit(
    folder: str | os.PathLike,
    *,
    stage: str,
    phases: Sequence[Phase],
    arms: dict[str, Arm],
    params: Callable[[], Params],
    key: jax.Array,
    judged: Sequence[str],
    validate: Callable[[str, Params], dict[str, float]] | None = None,
    select: str = "",
    keep: dict[str, int] | None = None,
    watch: Callable[[int, dict[str, float]], None] | None = None,
    stop: StopSignal | None = None,
    checkpoint_seconds: float = 30.0,
    tracker: str = "none",
) -> Fitted:
    """Runs the phases in order, keeps each judged arm's best params, and can be killed at any moment.

    The best are those that `validate` finds, or with `keep` those after the named phase, whatever they are.

    Args:
      folder: holds checkpoints, metrics and the best params; a finished one is read, not trained again.
      phases: each has a unit or more.
      validate: (arm, params) -> metrics; done for every judged arm after every phase.
      select: the metric, among those, that chooses the best phase (higher is better).
      keep: {arm: number of the phase after which its params are kept}, without any validation.
      watch: told after every phase its number and each judged arm's best value so far; what it raises ends the stage.
      stop: a `runtime.log.StopSignal`; where it is requested the loop saves and raises `Stopped`.
      checkpoint_seconds: the most work that a kill can lose, give or take one unit.
      tracker: see `MetricLog`.
    """
    folder = Path(folder)
    if not phases:
        raise InputError(f"the stage {stage} has nothing to train, not a single step: raise its epochs in the config.")
    folder.mkdir(parents=True, exist_ok=True)
    if not _is_done(folder):
        malloc.keep_freed()
        since = time.time()
        tree = _restore_or_begin(folder, arms, params, key, judged)
        cursor, best = tree["cursor"], tree["best"]
        with MetricLog(folder, resume=(stage, cursor["units"]), tracker=tracker, since=since) as log:
            loop = _Loop(folder, stage, phases, arms, tree, log, stop, checkpoint_seconds)
            for number in range(cursor["phase"], len(phases)):
                loop.train(number)
                began, said = time.monotonic(), []
                for arm in judged:
                    if keep is None:
                        said.append(_judge(arm, number, loop, validate, select))
                    elif keep[arm] == number:
                        loop.keep(arm, 0.0, number)
                if said:
                    loop.tell(number, f"validation {select}: {'; '.join(said)}", time.monotonic() - began)
                cursor["phase"], cursor["unit"] = number + 1, 0
                loop.save()
                if watch:
                    watch(number, {arm: best[arm]["value"] for arm in judged})
                if any(distributed.agree(loop.stopping())):
                    raise Stopped(stop.code)
        write_json(folder / "done.json", {"best": best, "units": cursor["units"]})
        write_checksums(folder, ["done.json", "metrics.jsonl", *(f"best_{arm}.safetensors" for arm in judged)])
    return _read_fitted(folder, judged)


@dataclasses.dataclass
class _Loop:
    """A stage at work; `tree` is what a checkpoint holds: params, what each arm has of its own, cursor and best."""

    folder: Path
    stage: str
    phases: Sequence[Phase]
    arms: dict[str, Arm]
    tree: dict[str, Any]
    log: MetricLog
    stop: StopSignal | None
    checkpoint_seconds: float
    saved_at: float = dataclasses.field(default_factory=time.monotonic)
    pace: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds of a unit, by arm, as last measured

    def train(self, number: int) -> None:
        """Runs what is left of a phase, saves where it is time, and leaves the new params in the tree."""
        phase, cursor = self.phases[number], self.tree["cursor"]
        arm = self.arms[phase.arm]
        compiled = arm.compiled
        view = compiled.place_constants(self._view(number))
        constants = compiled.place_constants(arm.constants)
        state = self._take_state(phase.arm)
        # The data cursor: units that this arm has done in earlier phases.
        before = sum(earlier.units for earlier in self.phases[:number] if earlier.arm == phase.arm)
        batch = compiled.place_batch(arm.batch(before + cursor["unit"]))
        seen, first = [], cursor["unit"]
        with progress(total=phase.units, start=cursor["unit"], description=f"{self.stage}: {phase.name}") as bar:
            while cursor["unit"] < phase.units:
                state, metrics = compiled.run(state, batch, view, constants)
                seen.append(metrics)
                if cursor["unit"] == first:  # which compiles, and `run` returns before the device is done
                    jax.block_until_ready(metrics)
                    began = time.monotonic()
                cursor["unit"] += 1
                cursor["units"] += 1
                last = cursor["unit"] == phase.units
                if not last:  # `run` returns at once: the host makes the next batch while the device works
                    batch = compiled.place_batch(arm.batch(before + cursor["unit"]))
                bar.update(1)
                look = len(seen) == LOOK_EVERY or last
                late = time.monotonic() - self.saved_at > self.checkpoint_seconds
                stopping, late = distributed.agree(self.stopping(), late, now=look)
                if look or stopping or late:
                    bar.set_postfix(loss=self._write_losses(phase, seen), refresh=False)
                    seen = []
                if (stopping or late) and not last:
                    self._put_back(phase.arm, state)
                    self.save()
                if stopping and not last:
                    raise Stopped(self.stop.code)
        if phase.units > first + 1:
            self.pace[phase.arm] = (time.monotonic() - began) / (phase.units - first - 1)
            if arm.rates:
                _LOG.info("  %s: %s", phase.name, arm.rates(batch, self.pace[phase.arm]))
        self._put_back(phase.arm, state)
        del state
        self.tree["params"] = arm.finish(self.tree["params"])
        if not compiled.in_parts:
            self.tree["params"] = jax.tree.map(np.asarray, self.tree["params"])

    def save(self) -> None:
        checkpoint.save(self.folder / "checkpoints", self.tree["cursor"]["units"], self.tree, keep=2)
        self.saved_at = time.monotonic()

    def keep(self, arm: str, value: float, number: int) -> None:
        """Notes and writes the params of an arm as its best, those after a phase."""
        self.tree["best"][arm] = {"value": value, "phase": number}
        save_safetensors(self.folder / f"best_{arm}.safetensors", self.tree["params"])

    def tell(self, number: int, said: str, judging: float) -> None:
        """Says what a phase reached and, where every arm has been timed, how long the stage will take from here on."""
        rest, left = self.phases[number + 1 :], ""
        if rest and all(phase.arm in self.pace for phase in rest):
            seconds = sum(self.pace[phase.arm] * phase.units + judging for phase in rest)
            left = f"; about {duration(seconds)} left of this stage" if seconds >= _WORTH_TELLING else ""
        words = number + 1, len(self.phases), self.stage, self.phases[number].name, said, left
        _LOG.info("  phase %d of %d of %s (%s): %s%s", *words)

    def stopping(self) -> bool:
        return self.stop is not None and self.stop.requested

    def _view(self, number: int) -> Params:
        """The other arm as it stood when the phase began; kept on disk, for the phase changes what it came from."""
        path = self.folder / "view.safetensors"
        begun = self.tree["cursor"]["unit"] > 0
        if begun and path.exists():
            return _read_tensors(path)
        view = jax.tree.map(np.asarray, self.arms[self.phases[number].arm].view(self.tree["params"]))
        if begun and view:
            raise InputError(f"{path} is gone. {_remedy(path)}")
        if view:
            save_safetensors(path, view)
        else:
            path.unlink(missing_ok=True)
        return view

    def _take_state(self, name: str) -> TrainState:
        """The arm's state on its devices; where it lies there already, it is moved out of the tree."""
        compiled, state = self.arms[name].compiled, TrainState(params=self.tree["params"], **self.tree["arms"][name])
        if not compiled.in_parts:
            return compiled.place_state(state)
        self.tree["params"], self.tree["arms"][name] = None, None  # the step uses these arrays up
        return compiled.place_state(state, copy=False)

    def _put_back(self, name: str, state: TrainState) -> None:
        """Puts a state into the tree: on the host, or as it lies where the devices hold it in parts."""
        compiled = self.arms[name].compiled
        kept = compiled.fetch_state(state, to_host=False) if compiled.in_parts else compiled.fetch_state(state)
        self.tree["arms"][name] = kept._asdict()
        self.tree["params"] = self.tree["arms"][name].pop("params")

    def _write_losses(self, phase: Phase, seen: list[dict[str, Any]]) -> float:
        """Logs the means of some units' metrics, and returns that of the loss."""
        unit, units = self.tree["cursor"]["unit"], self.tree["cursor"]["units"]
        seen = jax.device_get(seen)
        mean = {name: float(np.mean([float(m[name]) for m in seen])) for name in seen[0]}
        bad = [name for name, value in mean.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(
                f"{self.stage}: {bad[0]} is not finite in {phase.name} between units {unit - len(seen) + 1} and "
                f"{unit}; lower the learning rate of the {phase.arm} arm, or clip its gradient."
            )
        self.log.write(self.stage, units, {f"{phase.arm}/{name}": value for name, value in mean.items()})
        return mean["loss"]


def _judge(arm: str, number: int, loop: _Loop, validate: Callable, select: str) -> str:
    """Validates an arm after a phase, writes its params where they are its best, and says what was found."""
    tree = loop.tree
    values = validate(arm, tree["params"])
    row = {f"validation/{arm}/{name}": value for name, value in values.items()} | {"phase": number}
    loop.log.write(loop.stage, tree["cursor"]["units"], row)
    if values[select] > tree["best"][arm]["value"]:
        loop.keep(arm, float(values[select]), number)
    return f"{arm} {values[select]:.4f}, best so far {tree['best'][arm]['value']:.4f}"


def _restore_or_begin(folder: Path, arms: dict[str, Arm], params, key, judged) -> dict[str, Any]:
    start, last = params(), checkpoint.latest(folder / "checkpoints")
    tree = {"params": start, "arms": {}, "cursor": {"phase": 0, "unit": 0, "units": 0}}
    tree["best"] = {name: {"value": -math.inf, "phase": -1} for name in judged}
    for i, (name, arm) in enumerate(sorted(arms.items())):
        mine = {"step": np.zeros((), np.int32), "key": jax.random.fold_in(key, i)}
        if not arm.compiled.in_parts:
            mine["opt_state"] = arm.optimizer.init(start)
        else:
            opt_state = jax.eval_shape(arm.optimizer.init, start)
            shapes = arm.compiled.abstract_state(TrainState(start, opt_state, **mine))
            if last:
                tree["params"], mine["opt_state"] = shapes.params, shapes.opt_state
            else:
                if tree["params"] is start:
                    tree["params"] = jax.tree.map(lambda a, to: spread(a, to.sharding, copy=True), start, shapes.params)
                places = jax.tree.map(lambda leaf: leaf.sharding, shapes.opt_state)
                mine["opt_state"] = jax.jit(arm.optimizer.init, out_shardings=places)(tree["params"])
        tree["arms"][name] = mine
    return checkpoint.restore(last, like=tree) if last else tree


def best_phases(folder: str | os.PathLike) -> dict[str, dict]:
    """{arm: {"phase", "value"}} of a finished stage."""
    remedy = "delete it, and the same command of bdlm_jax.main makes it anew"
    return read_json(Path(folder) / "done.json", remedy=remedy)["best"]


def _is_done(folder: Path) -> bool:
    """Tells whether the stage is finished; a damaged done.json goes, for the last checkpoint makes the same again."""
    path = folder / "done.json"
    if not path.exists():
        return False
    try:
        best = json.loads(path.read_text(encoding="utf-8"))["best"]
        whole = all(type(one["phase"]) is int and type(one["value"]) is float for one in best.values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        whole = False
    if whole and damaged_file(folder, "done.json") is None:
        return True
    _LOG.warning("%s is damaged; it is made again of the last checkpoint", path)
    path.unlink()
    return False


def _read_tensors(path: Path) -> Params:
    try:
        return load_safetensors(path)
    except InputError as error:
        raise InputError(f"{error} {_remedy(path)}") from error


def _remedy(path: Path) -> str:
    return f"Delete {path.parent}, and the same command trains this stage again."


def _read_fitted(folder: Path, judged: Sequence[str]) -> Fitted:
    best = best_phases(folder)
    # A flat file cannot hold the empty tree of an arm without params of its own.
    params = {name: {"domain": {}} | _read_tensors(folder / f"best_{name}.safetensors") for name in judged}
    value, phase = ({name: best[name][what] for name in judged} for what in ("value", "phase"))
    return Fitted(params, value, phase)
