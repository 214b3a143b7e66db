"""What a run tells: its numbers as JSON lines and to a tracker, progress to a person, and a polite stop.

The file of numbers holds each step once, however often the run was killed: a resumed run first drops what it is going
to write again. A row is `{"stage": "lm", "step": 10, "time": 1.7e9, "since": 1.7e9, "loss": 2.3}`, where "since" is
when the process that wrote it began with the stage: what lies between two processes is a pause.
"""

import importlib.util
import json
import math
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bdlm_jax.runtime.files import write_text
from bdlm_jax.types import InputError

_RESERVED = ("stage", "step", "time", "since")
TRACKERS = ("tensorboard", "wandb", "none")  # beside metrics.jsonl


class MetricLog:
    """Appends rows to `folder/metrics.jsonl`; a context manager, every row is flushed.

    Args:
        resume: `(stage, step)`: the last step whose rows stay. Later steps of that stage and all rows of the stages
            that came after it are dropped; -1 restarts the stage. None: the file starts empty. Steps of a stage rise:
            what alternates is one stage. Write a step's row before its checkpoint.
        tracker: a word of `TRACKERS`: "tensorboard" also writes event files below `folder/tensorboard`, one folder per
            stage, where that extra is installed; "wandb" a run of Weights & Biases.
        since: when this process began (`time.time()`); default now.
    """

    def __init__(
        self,
        folder: Path,
        *,
        resume: tuple[str, int] | None = None,
        tracker: str = "none",
        since: float | None = None,
    ):
        path = folder / "metrics.jsonl"
        self._since = round(time.time() if since is None else since, 3)
        rows = _rows_to_keep(read_metrics(path), *resume) if resume else []
        write_text(path, "".join(map(_line, rows)))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed on exit)
        self._tracker = _make_tracker(tracker, folder, rows)

    def write(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one row; `metrics` is name -> anything that `float` takes."""
        taken = [name for name in _RESERVED if name in metrics]
        if taken:
            raise InputError(f"A metric of stage {stage!r} is called {taken[0]!r}, which every row has; rename it.")
        row = {"stage": stage, "step": int(step), "time": round(time.time(), 3), "since": self._since}
        row |= {name: float(value) for name, value in metrics.items()}
        self._file.write(_line(row))
        self._file.flush()
        if self._tracker:
            self._tracker.write(row)

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._tracker:
            self._tracker.close()


class _TensorBoard:
    """Event files of the rows of metrics.jsonl; they cannot be truncated, and are written again of those that stay."""

    def __init__(self, folder: Path, rows: list[dict[str, Any]], make_writer: Any):
        self._events, self._make_writer, self._writers = folder / "tensorboard", make_writer, {}
        shutil.rmtree(self._events, ignore_errors=True)
        for row in rows:
            self.write(row)

    def write(self, row: dict[str, Any]) -> None:
        stage = row["stage"]
        if stage not in self._writers:
            self._writers[stage] = self._make_writer(str(self._events / stage))
        for name in row.keys() - set(_RESERVED):
            self._writers[stage].add_scalar(name, row[name], row["step"], walltime=row["time"])

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class _Wandb:
    """A run of Weights & Biases for each stage of a folder, in the group of the run directory.

    It has an id of its own, kept in the folder: a resumed stage goes on in it. Rows that were sent and are written
    again are the same to the bit, so that it does not matter that they are not taken twice. WANDB_MODE, WANDB_PROJECT
    and what else that library reads from the environment counts.
    """

    def __init__(self, folder: Path, wandb: Any):
        self._folder, self._wandb, self._run = folder, wandb, None

    def write(self, row: dict[str, Any]) -> None:
        if self._run is None:
            path = self._folder / "wandb.id"
            if not path.exists():
                write_text(path, uuid.uuid4().hex[:12])
            names = {"name": f"{self._folder.parent.name}/{row['stage']}", "group": self._folder.parent.name}
            self._run = self._wandb.init(
                id=path.read_text(encoding="utf-8").strip(), resume="allow", dir=str(self._folder), **names
            )
        self._run.log({name: row[name] for name in row.keys() - set(_RESERVED)}, step=row["step"])

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Reads the rows of a `metrics.jsonl`, or of the folder that holds it; none where it is missing.

    A last line that a kill cut short is left out, and a value that is not finite comes back as NaN.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "metrics.jsonl"
    if not path.is_file():
        return []
    rows = []
    text = path.read_bytes().decode("utf-8", "replace")
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
            rows.append({name: math.nan if value is None else value for name, value in row.items()})
            row["stage"], row["step"]
        except (ValueError, AttributeError, TypeError, KeyError):
            raise InputError(f"{path}, line {number}: not a row of metrics; remove that line.") from None
    return rows


def _rows_to_keep(rows: list[dict[str, Any]], stage: str, step: int) -> list[dict[str, Any]]:
    order = list(dict.fromkeys(row["stage"] for row in rows))
    if stage not in order:
        return rows
    earlier = order[: order.index(stage)]
    return [row for row in rows if row["stage"] in earlier or (row["stage"] == stage and row["step"] <= step)]


def _line(row: dict[str, Any]) -> str:
    valid = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in row.items()}
    return json.dumps(valid) + "\n"


def check_tracker(word: str) -> None:
    """Refuses Weights & Biases where it is not installed; TensorBoard, the default, is left out there instead."""
    found = importlib.util.find_spec("wandb") if word == "wandb" else None
    if word == "wandb" and not (found and found.origin):  # a folder of its logs is none
        raise InputError('config.runtime.log is wandb, which is not installed; pip install "bdlm_jax[wandb]".')


def _make_tracker(word: str, folder: Path, rows: list[dict[str, Any]]) -> _TensorBoard | _Wandb | None:
    check_tracker(word)
    if word == "wandb":
        import wandb

        return _Wandb(folder, wandb)
    if word == "tensorboard" and importlib.util.find_spec("tensorboardX"):
        from tensorboardX import SummaryWriter

        return _TensorBoard(folder, rows, SummaryWriter)
    return None


def duration(seconds: float) -> str:
    """Says a time for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def progress(
    iterable: Iterable | None = None, *, description: str, total: int | None = None, start: int = 0, every_s: float = 30
) -> tqdm:
    """tqdm from `start` to `total`; in a file or a CI log one line every `every_s` seconds, and none before."""
    options = {"desc": description, "total": total, "initial": start}
    if sys.stderr.isatty():
        return tqdm(iterable, dynamic_ncols=True, **options)
    form = "{desc}: {n_fmt}/{total_fmt} ({percentage:.0f}%), {rate_fmt}, {elapsed}{postfix}"
    pace = {"mininterval": every_s, "miniters": 1, "delay": every_s}
    return _Lines(iterable, bar_format=form, leave=False, **pace, **options)


class _Lines(tqdm):
    """tqdm writes over its line by a carriage return, which a file keeps: here a line ends, and stands once."""

    monitor_interval = 0  # no thread
    _printed = None

    def display(self, msg: Any = None, pos: Any = None) -> None:
        if self.n != self._printed:
            self._printed = self.n
            print(self, file=self.fp, flush=True)


class Stopped(SystemExit):
    """The run was asked to stop and has saved: it can go on, but it is not finished, and its exit code says so."""


class StopSignal:
    """Turns SIGTERM and SIGINT into a flag, so that a loop can save and leave; a second signal acts as usual.

    Used as a context manager; `.requested` turns True, and `.code` is the exit code that a shell gives to a program
    that the signal ended (143, 130). Outside the main thread it watches nothing, because Python hands signals to the
    main thread only.
    """

    def __init__(self) -> None:
        self.requested, self.code = False, 128 + signal.SIGTERM
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)

    def _request(self, number: int, _: Any) -> None:
        self.requested, self.code = True, 128 + number
        self.__exit__()
        told = f"\n{signal.Signals(number).name}: saving, then leaving (again: leave at once)."
        print(told, file=sys.stderr, flush=True)


def heed(stop: StopSignal | None, iterable: Iterable) -> Iterator:
    """Yields what `iterable` does, until a stop is requested: then it raises `Stopped`."""
    for each in iterable:
        if stop is not None and stop.requested:
            raise Stopped(stop.code)
        yield each
