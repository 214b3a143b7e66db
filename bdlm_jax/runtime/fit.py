"""One loop for everything that trains: phases of units, checkpoints, selection on validation, resume to the same bits.

A unit is one compiled call: a step of the LM arm, an epoch of the domain arm. A phase is a number of units of one arm,
against the other arm's representations as they stood when the phase began.
"""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bdlm_jax.runtime import checkpoint, distributed, parallel, placement
from bdlm_jax.runtime.files import load_safetensors, save_safetensors, write_json
from bdlm_jax.runtime.log import MetricLog
from bdlm_jax.runtime.progress import progress
from bdlm_jax.types import Params, TrainState

LOOK_EVERY = 25  # units between two looks at the losses, each of which waits for the device


class Arm(NamedTuple):
    """How one arm trains.

    compiled: its step or epoch, from `runtime.parallel.compile_step`.
    optimizer: its optax transformation; each arm has its own state for the shared tables.
    batch: unit number -> batch, so that any unit can be made again.
    view: params -> the other arm as constants, at the start of a phase.
    constants: what never changes, on the device.
    finish: params -> params, once at the end of each of its phases.
    """

    compiled: parallel.Compiled
    optimizer: Any
    batch: Callable[[int], Any]
    view: Callable[[Params], Params]
    constants: Params
    finish: Callable[[Params], Params] = lambda params: params


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


class Stopped(SystemExit):
    """The run was asked to stop and has saved; the exit code is 0 because nothing failed."""


def fit(
    folder: str | os.PathLike,
    *,
    stage: str,
    phases: Sequence[Phase],
    arms: dict[str, Arm],
    params: Callable[[], Params],
    key: jax.Array,
    validate: Callable[[str, Params], dict[str, float]],
    select: str,
    judged: Sequence[str],
    stop=None,
    checkpoint_seconds: float = 30.0,
    tensorboard: bool | None = None,
) -> Fitted:
    """Runs the phases in order, keeps each judged arm's best params on validation, and can be killed at any moment.

    Args:
      folder: where checkpoints, metrics and the best params go; a finished folder is read, not trained again.
      stage: the name of the stage in messages.
      phases: what to do.
      arms: the arms that the phases name.
      params: makes the initial params.
      key: the JAX key from which every arm's randomness comes.
      validate: (arm, params) -> metrics of that arm on validation.
      select: the metric, among those, that chooses the best phase (higher is better).
      judged: the arms to validate after every phase.
      stop: a `runtime.progress.StopSignal`, or None.
      checkpoint_seconds: the most work that a kill can lose, give or take one unit.
      tensorboard: see `MetricLog`.

    Returns:
      Fitted.

    Raises:
      FloatingPointError: a loss is not finite; names the stage, the phase and the unit.
      Stopped: after a save, when `stop.requested`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "done.json").exists():
        return _read_fitted(folder, judged)
    tree = _restore_or_begin(folder, arms, params, key, judged)
    cursor, saved_at = tree["cursor"], time.monotonic()
    with MetricLog(folder, resume=(stage, cursor["units"]), tensorboard=tensorboard) as log:
        for number in range(cursor["phase"], len(phases)):
            phase = phases[number]
            arm = arms[phase.arm]
            view = _view(folder, number, arm, tree["params"], resumed=cursor["unit"] > 0)
            view, constants = arm.compiled.place_constants(view), arm.compiled.place_constants(arm.constants)
            state = _place(tree, phase.arm, arm)

            def save(state=None, phase=phase, arm=arm):
                if state is not None:
                    _keep(tree, phase.arm, arm, state)
                checkpoint.save(folder / "checkpoints", cursor["units"], tree, keep=2)

            bar = progress(total=phase.units, start=cursor["unit"], description=f"{stage}: {phase.name}")
            seen, before = [], _units_before(phases, number)
            batch = arm.compiled.place_batch(arm.batch(before + cursor["unit"]))
            while cursor["unit"] < phase.units:
                state, metrics = arm.compiled.run(state, batch, view, constants)
                seen.append(metrics)
                cursor["unit"] += 1
                cursor["units"] += 1
                last = cursor["unit"] == phase.units
                if not last:  # `run` returns at once: the host makes the next batch while the device works
                    batch = arm.compiled.place_batch(arm.batch(before + cursor["unit"]))
                bar.update(1)
                stopping = stop is not None and stop.requested
                late = time.monotonic() - saved_at > checkpoint_seconds
                stopping, late = distributed.agree(stopping, late, now=len(seen) == LOOK_EVERY or last)
                if len(seen) == LOOK_EVERY or last or stopping or late:
                    _write_losses(log, stage, phase, cursor, seen, bar)
                    seen = []
                if (late or stopping) and not last:
                    save(state)
                    saved_at = time.monotonic()
                if stopping and not last:
                    raise Stopped(0)
            bar.close()
            _keep(tree, phase.arm, arm, state)
            del state
            tree["params"] = arm.finish(tree["params"])
            if not arm.compiled.take_state:
                tree["params"] = jax.tree.map(np.asarray, tree["params"])
            for name in judged:
                values = validate(name, tree["params"])
                log.write(
                    stage, cursor["units"], {f"validation/{name}/{k}": v for k, v in values.items()} | {"phase": number}
                )
                if values[select] > tree["best"][name]["value"]:
                    tree["best"][name] = {"value": float(values[select]), "phase": number}
                    save_safetensors(folder / f"best_{name}.safetensors", tree["params"])
            cursor["phase"], cursor["unit"] = number + 1, 0
            save()
            saved_at = time.monotonic()
            if any(distributed.agree(stop is not None and stop.requested)):
                raise Stopped(0)
    write_json(folder / "done.json", {"best": tree["best"], "units": cursor["units"]})
    return _read_fitted(folder, judged)


def _restore_or_begin(folder: Path, arms: dict[str, Arm], params, key, judged) -> dict:
    start, last = params(), checkpoint.latest(folder / "checkpoints")
    tree = {"params": start, "arms": {}, "cursor": {"phase": 0, "unit": 0, "units": 0}}
    tree["best"] = {name: {"value": -math.inf, "phase": -1} for name in judged}
    for i, (name, arm) in enumerate(sorted(arms.items())):
        mine = {"step": np.zeros((), np.int32), "key": jax.random.fold_in(key, i)}
        if arm.compiled.take_state:
            shapes = _shapes(arm, start, **mine)
            if last:
                tree["params"], mine["opt_state"] = shapes.params, shapes.opt_state
            else:
                if tree["params"] is start:
                    tree["params"] = placement.place_as(start, shapes.params)
                places = jax.tree.map(lambda leaf: leaf.sharding, shapes.opt_state)
                mine["opt_state"] = jax.jit(arm.optimizer.init, out_shardings=places)(tree["params"])
        else:
            mine["opt_state"] = arm.optimizer.init(start)
        tree["arms"][name] = mine
    return checkpoint.restore(last, like=tree) if last else tree


def _shapes(arm: Arm, params: Params, *, step, key) -> TrainState:
    """The shapes of an arm's state, with where each leaf lies."""
    shapes = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)  # noqa: E731
    opt_state = jax.eval_shape(arm.optimizer.init, shapes(params))
    return arm.compiled.abstract_state(TrainState(shapes(params), opt_state, shapes(step), shapes(key)))


def _place(tree: dict, name: str, arm: Arm) -> TrainState:
    """The arm's state on its devices; where it lies there already, it is moved out of the tree."""
    mine = tree["arms"][name]
    state = TrainState(tree["params"], mine["opt_state"], mine["step"], mine["key"])
    if arm.compiled.take_state is None:
        return arm.compiled.place_state(state)
    tree["params"], tree["arms"][name] = None, None  # the step uses these arrays up
    return arm.compiled.take_state(state)


def _keep(tree: dict, name: str, arm: Arm, state: TrainState) -> None:
    """Puts a state into the tree: on the host, or as it lies where the devices hold it in parts."""
    kept = (arm.compiled.unpad_state if arm.compiled.take_state else arm.compiled.fetch_state)(state)
    tree["params"] = kept.params
    tree["arms"][name] = {"opt_state": kept.opt_state, "step": kept.step, "key": kept.key}


def _view(folder: Path, number: int, arm: Arm, params: Params, *, resumed: bool) -> Params:
    """The other arm as it stood when the phase began; kept on disk, because the phase changes what it came from."""
    path = folder / "view.safetensors"
    if resumed and path.exists():
        return load_safetensors(path)
    view = jax.tree.map(np.asarray, arm.view(params))
    if view:
        save_safetensors(path, view)
    elif path.exists():
        path.unlink()
    return view


def _units_before(phases: Sequence[Phase], number: int) -> int:
    """Units that the arm of phase `number` has done in earlier phases: the data cursor of its batches."""
    return sum(p.units for p in phases[:number] if p.arm == phases[number].arm)


def _write_losses(log: MetricLog, stage: str, phase: Phase, cursor: dict, seen: list, bar) -> None:
    seen = jax.device_get(seen)
    mean = {name: float(np.mean([float(m[name]) for m in seen])) for name in seen[0]} if seen else {}
    bad = [name for name, value in mean.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(
            f"{stage}: {bad[0]} is not finite in {phase.name} between units {cursor['unit'] - len(seen) + 1} and "
            f"{cursor['unit']}; lower the learning rate of the {phase.arm} arm, or clip its gradient."
        )
    if mean:
        bar.set_postfix(loss=mean["loss"])
        log.write(stage, cursor["units"], {f"{phase.arm}/{name}": value for name, value in mean.items()})


def _read_fitted(folder: Path, judged: Sequence[str]) -> Fitted:
    best = json.loads((folder / "done.json").read_text(encoding="utf-8"))["best"]
    return Fitted(
        params={name: _load_params(folder / f"best_{name}.safetensors") for name in judged},
        value={name: best[name]["value"] for name in judged},
        phase={name: best[name]["phase"] for name in judged},
    )


def _load_params(path: Path) -> Params:
    params = load_safetensors(path)
    params.setdefault("domain", {})  # a flat file cannot hold the empty tree of an arm without params of its own
    return params
