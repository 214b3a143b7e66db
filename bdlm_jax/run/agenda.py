"""What a run is going to train, told as it comes to it: its stages in order, what a resumed run goes on with.

`stage_names` follows `contenders` word by word; `tests/run/agenda_test.py` holds the two together.
"""

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax

from bdlm_jax.domain.models import MODELS
from bdlm_jax.run import build, trained
from bdlm_jax.run.build import Decoder, Run, Tables
from bdlm_jax.run.controls import CONTROLS
from bdlm_jax.run.forecast import Forecast
from bdlm_jax.runtime import checkpoint
from bdlm_jax.runtime.fit import Phase
from bdlm_jax.runtime.log import duration

_LOG = logging.getLogger(__name__)
_UNITS = {"lm": "steps of the LM", "domain": "epochs of the domain arm"}


def stage_names(run: Run) -> tuple[str, ...]:
    """The stages of a run in the order in which they are trained, each named by its folder."""
    return tuple(dict.fromkeys(name for word in run.config.models for name in _stages(run, word)))


def _stages(run: Run, word: str) -> list[str]:
    config, model = run.config, run.config.domain.model
    times = ["", "refit/"] if config.data.refit != "none" else [""]
    own = f"{word}/" if word in (*CONTROLS, "ids_lm_distilled") else ""
    if word in CONTROLS:
        model = CONTROLS[word].settings(config).get("domain.model", model)
    distill, refresh = [f"{own}distill"], [f"{own}{times[-1]}refresh"]
    if word in MODELS:
        return [f"{time}{word}" for time in times]
    if word in ("text_lm", "ids_lm"):
        return _pretrain(run) + [f"{time}{word}" for time in times]
    if word in ("pool_alone", "ids_lm_distilled"):
        first, *again = ([f"{time}ids_lm", f"{time}{model}"] for time in times)
        if word == "pool_alone":
            distill = refresh = []
    elif word in ("bdlm", "cached", "pool", *CONTROLS):
        lessons = ["taught"] if config.mutual.taught.rounds else []
        first, *again = ([f"{time}{model}", *(f"{own}{time}{name}" for name in ("bdlm", *lessons))] for time in times)
    else:
        return []
    return [*_pretrain(run), *first, *distill, *(name for names in again for name in names), *refresh]


def _pretrain(run: Run) -> list[str]:
    config = run.config
    given = config.pretrain.corpus or not config.lm.path
    return ["pretrain"] if config.pretrain.epochs > 0 and given and run.data.corpus else []


def follow(run: Run) -> Run:
    """Tells the stages that are to come and what trains in BDLM, and returns the run that tells each as it begins.

    With each it says how long the one before has taken, and about how long those to come will (`forecast`).
    """
    names = stage_names(run)
    done = [name for name in names if _finished(run.root / name)]
    begun = [name for name in names if name not in done and _units(run.root / name)]
    if names:
        _LOG.info("%d stage%s: %s", len(names), "s" * (len(names) > 1), ", ".join(names))
    if done or begun:
        said = [f"{len(done)} of {len(names)} stages are finished" + (f" ({', '.join(done)})" if done else "")]
        said += [f"{name} goes on behind unit {_units(run.root / name)}" for name in begun]
        _LOG.info("resuming: %s", "; ".join(said))
    if any(name.endswith("bdlm") and name not in done for name in names):
        _LOG.info("what trains, by optimiser group:\n  %s", "\n  ".join(_bdlm_table(run)))
    told, started = set(done), time.monotonic()
    at_work: list[tuple[str, Path, float]] = []  # the stage that was trained last, where, and when it began
    ahead = Forecast(run, names, done)

    def begin(name: str, folder: Path, phases: Sequence[Phase]) -> None:
        if name in told:
            return
        told.add(name)
        now = time.monotonic()
        if at_work:
            last, where, began = at_work.pop()
            words = last, duration(now - began), duration(now - started)
            ahead.learn(last, where, now - began)
            _LOG.info("  %s took %s, with its test where it has one; so far the run has taken %s", *words)
        place = f"stage {names.index(name) + 1} of {len(names)}" if name in names else "stage"
        if _finished(folder):
            _LOG.info("%s: %s is finished, in %s", place, name, folder)
            return
        units = Counter()
        for phase in phases:
            units[phase.arm] += phase.units
        work = ", ".join(f"{n:,d} {_UNITS[arm]}" for arm, n in units.items())
        behind = _units(folder)
        goes_on = f"; goes on behind {behind:,d} of {units.total():,d}" if behind else ""
        _LOG.info("%s: %s (%s%s)", place, name, work, goes_on)
        if rest := ahead.rest(name, 1 - behind / max(1, units.total())):
            _LOG.info("  %s", rest)
        at_work.append((name, folder, now))

    return dataclasses.replace(run, begin=begin)


def _finished(folder: Path) -> bool:
    return (folder / "done.json").exists()


def _units(folder: Path) -> int:
    """How many units of an unfinished stage are saved."""
    return max(checkpoint.steps(folder / "checkpoints"), default=0)


def _bdlm_table(run: Run) -> list[str]:
    arm = build.make_arm(run, run.config.domain.model)

    def params():
        tables = Tables(build.init_tables(run, "bdlm", arm), read_std=1.0, out_std=1.0)
        return build.init_params(run, "bdlm", tables, Decoder(None, row_std=1.0))

    return trained.group_table(jax.eval_shape(params), trained.bdlm_rules(run.config, arm))
