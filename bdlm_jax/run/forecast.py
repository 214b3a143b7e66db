"""How long a run still takes: the units to come, by the seconds that their like took so far.

A step of the LM costs about the same in every stage of a run; an epoch of a domain model costs what it did alone, and
another time where the LM teaches. What has not run yet has no seconds, and is named instead.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bdlm_jax.data.splits import TRAIN
from bdlm_jax.domain.models import MODELS
from bdlm_jax.run import general
from bdlm_jax.run.build import Run
from bdlm_jax.run.controls import CONTROLS
from bdlm_jax.run.prepare import training_setting
from bdlm_jax.runtime.files import damaged_file
from bdlm_jax.runtime.log import duration, read_metrics

LM = "steps of the LM"


class Forecast:
    """What a run has learned of its pace so far: from what is finished as it begins, then stage by stage."""

    def __init__(self, run: Run, names: Sequence[str], done: Sequence[str]):
        self._run, self._names, self._done = run, names, {*done}
        self._paces: dict[str, float] = {}
        self._besides: list[float] = []
        for name in done:
            self.learn(name, run.root / name)

    def learn(self, name: str, folder: Path, took: float | None = None) -> None:
        """Reads what a stage has written in a folder; `took` are its seconds with all that belongs to it."""
        rows = [] if damaged_file(folder, "metrics.jsonl") else read_metrics(folder)
        if found := pace(self._run, name, rows):
            self._paces |= found
            if took is not None:
                self._besides.append(max(0.0, took - _trained(work(self._run, name), found)))

    def rest(self, name: str, share: float) -> str:
        """Says how long a stage, of which a share is left, and those behind it will take; "" where nobody knows."""
        if name not in self._names or not self._paces:
            return ""
        ahead = [each for each in self._names[self._names.index(name) :] if each not in self._done]
        first, *others = (work(self._run, each) for each in ahead)
        return told([{kind: share * n for kind, n in first.items()}, *others], self._paces, besides=self._besides)


def work(run: Run, name: str) -> dict[str, float]:
    """Returns {kind of unit: how many} of a stage, by its name, for which no row is packed.

    Of a refit and of `refresh`, which last as long as was chosen, it is the most that it can be.
    """
    run, stage = _own(run, name)
    config, m, taught = run.config, run.config.mutual, _epochs(run.config.domain.model, taught=True)
    epochs = m.lm_epochs + m.rounds * m.lm_epochs_a_round
    if stage in MODELS:
        return {_epochs(stage): training_setting(config, stage, "epochs")}
    if stage == "text_lm":
        shown = 0.0 if config.lm.trains == "bridge" else config.lm_alone.text_epochs
        rows = _history_rows(run, "text")
        replayed = _replayed(run, rows if config.lm.path else run.data.n_users / 4)
        return {LM: shown * _steps(run, rows + replayed)}
    if stage == "ids_lm":
        return {LM: config.lm_alone.ids_times * epochs * _steps(run, _history_rows(run, "ids"))}
    if stage == "bdlm":
        return {LM: epochs * _steps(run, _bdlm_rows(run)), taught: m.rounds * m.domain_epochs_a_round}
    if stage == "taught":
        c, steps = m.taught, _steps(run, _bdlm_rows(run))
        return {LM: c.rounds * c.lm_epochs * steps, taught: c.rounds * c.domain_epochs}
    if stage in ("distill", "refresh"):
        return {taught: m.distill_epochs}
    return {f"the steps of {stage}": 1}  # of a corpus that nobody has counted yet


def pace(run: Run, name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns {kind of unit: seconds of one} of a stage's rows of metrics, its validations among them.

    What a process did before its first row of a sort is left out: most of it is compiling.
    """
    run, stage = _own(run, name)
    domain = _epochs(stage) if stage in MODELS else _epochs(run.config.domain.model, taught=True)
    kinds, seconds, units, begun = {"lm": LM, "domain": domain}, Counter(), Counter(), set()
    kind, before = LM, {}
    for row in rows:
        sort = next(key for key in row if "/" in key).split("/")
        kind = kinds.get(sort[0], kind)  # a validation counts for the phase before it
        sort = row.get("since"), *sort[: 1 if sort[0] in kinds else 2]
        if sort in begun and before.get("since") == row.get("since"):
            seconds[kind] += row["time"] - before["time"]
            units[kind] += row["step"] - before["step"]
        begun.add(sort)
        before = row
    return {kind: seconds[kind] / n for kind, n in units.items() if n}


def told(works: Sequence[Mapping[str, float]], paces: Mapping[str, float], *, besides: Sequence[float] = ()) -> str:
    """Says how long stages will take, and what of them nobody has timed; nothing where that is all of it.

    `besides` are what earlier stages took beside their units, to compile and to be tested: each has the mean of them.
    """
    whole = Counter()
    for each in works:
        whole.update({kind: n for kind, n in each.items() if n})
    timed = _trained(whole, paces)
    new = [kind for kind in whole if kind not in paces]
    beside = f", beside what has not run yet ({', '.join(new)})" if new else ""
    timed += timed and len(works) * sum(besides) / max(1, len(besides))
    return f"about {duration(timed)} to go{beside}" if timed else ""


def _trained(work: Mapping[str, float], paces: Mapping[str, float]) -> float:
    return sum(n * paces[kind] for kind, n in work.items() if kind in paces)


def _own(run: Run, name: str) -> tuple[Run, str]:
    """The run of whose settings a stage is, which are a control's own, and the last part of its name."""
    word, _, _ = name.partition("/")
    own = run.variant(word, CONTROLS[word].settings(run.config)) if word in CONTROLS else run
    return own, name.rpartition("/")[2]


def _epochs(model: str, *, taught: bool = False) -> str:
    return f"{'taught ' * taught}epochs of {model}"


def _steps(run: Run, rows: float) -> float:
    return -(-rows // run.config.lm.batch_rows)


def _history_rows(run: Run, kind: str) -> float:
    """About the rows into which `rows.training_rows` packs: their tokens, without the room that packing leaves."""
    size_I = 1 if kind == "ids" else 1 + _title_sizes(run)
    tokens = np.sum(run.data.split.degree(TRAIN) * size_I)
    return (tokens + run.data.n_users * (1 + len(run.texts.vocabulary.head))) / run.config.prompts.length


def _bdlm_rows(run: Run) -> float:
    config, p = run.config, run.config.prompts
    own = _history_rows(run, p.kind)
    titled = p.titled_share * _history_rows(run, "ids_titles") if p.kind == "ids" else 0.0
    cards = 9 / 8 * p.card_copies * np.sum(2 + _title_sizes(run)) / p.length
    whole = own + titled + cards
    return whole + _replayed(run, whole if config.lm.path else own)


def _replayed(run: Run, rows: float) -> float:
    config = run.config
    own = config.lm.path and not general.stays(config) and config.pretrain.samples
    return config.pretrain.replay_share * rows if run.data.corpus or own else 0.0


def _title_sizes(run: Run) -> np.ndarray:
    return np.fromiter(map(len, run.texts.titles), np.int64, run.data.n_items)
