"""A run's numbers as JSON lines, and in TensorBoard where its writer is installed.

The file holds each step once, however often the run was killed: a resumed run first drops what it is going to write
again. A row is `{"stage": "lm", "step": 10, "time": 1.7e9, "loss": 2.3}`.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bdlm_jax.types import InputError

_RESERVED = ("stage", "step", "time")


class MetricLog:
    """Appends rows to `folder/metrics.jsonl`; a context manager, every row is flushed.

    Args:
        folder: the run's directory; made where it is missing.
        resume: `(stage, step)`: the last step whose rows stay. Later steps of that stage and all rows of the stages
            that came after it are dropped; -1 restarts the stage. None: the file starts empty. Steps of a stage rise:
            what alternates is one stage. Write a step's row before its checkpoint.
        tensorboard: also write event files below `folder/tensorboard`, one folder per stage; None: where the extra is
            installed.

    Raises:
        InputError: `tensorboard=True` without its extra.
    """

    def __init__(
        self, folder: str | Path, *, resume: tuple[str, int] | None = None, tensorboard: bool | None = None
    ) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "metrics.jsonl"
        rows = _rows_to_keep(read_metrics(path), *resume) if resume else []
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(_jsonable(row)) + "\n" for row in rows), encoding="utf-8")
        os.replace(partial, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        self._make_writer = _find_writer(tensorboard)
        self._writers: dict[str, Any] = {}
        if self._make_writer:
            # Event files cannot be truncated: they are written again from the rows that stay.
            shutil.rmtree(self._folder / "tensorboard", ignore_errors=True)
            for row in rows:
                self._write_tensorboard(row)

    def write(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one row.

        Args:
            stage: the stage's name.
            step: steps done in this stage.
            metrics: name -> anything that `float` takes.

        Raises:
            InputError: a metric called "stage", "step" or "time".
        """
        taken = [name for name in _RESERVED if name in metrics]
        if taken:
            raise InputError(f"A metric of stage {stage!r} is called {taken[0]!r}, which every row has; rename it.")
        row = {"stage": stage, "step": int(step), "time": round(time.time(), 3)}
        row |= {name: float(value) for name, value in metrics.items()}
        self._file.write(json.dumps(_jsonable(row)) + "\n")
        self._file.flush()
        if self._make_writer:
            self._write_tensorboard(row)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        for writer in self._writers.values():
            writer.close()

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_tensorboard(self, row: dict[str, Any]) -> None:
        stage = row["stage"]
        if stage not in self._writers:
            self._writers[stage] = self._make_writer(str(self._folder / "tensorboard" / stage))
        for name in row.keys() - set(_RESERVED):
            self._writers[stage].add_scalar(name, row[name], row["step"], walltime=row["time"])


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Reads the rows of a `metrics.jsonl` (or of the folder that holds it), without a last line that a kill cut short.

    Args:
        path: the file or its folder; missing: no rows.

    Returns:
        The rows in file order; a value that is not finite comes back as NaN.

    Raises:
        InputError: a line before the last that is no row.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
            rows.append({name: math.nan if value is None else value for name, value in row.items()})
            row["stage"], row["step"]
        except (ValueError, AttributeError, TypeError, KeyError):
            raise InputError(f"{path}, line {number}: not a row of metrics; remove that line.") from None
    return rows


def _rows_to_keep(rows: list[dict[str, Any]], stage: str, step: int) -> list[dict[str, Any]]:
    order = {name: place for place, name in enumerate(dict.fromkeys(row["stage"] for row in rows))}
    if stage not in order:
        return rows
    return [
        row for row in rows if order[row["stage"]] < order[stage] or (row["stage"] == stage and row["step"] <= step)
    ]


def _jsonable(row: dict[str, Any]) -> dict[str, Any]:
    return {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in row.items()}


def _find_writer(wanted: bool | None) -> Any:
    if wanted is False:
        return None
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        if wanted:
            raise InputError(
                'TensorBoard metrics were asked for, but tensorboardX is missing; pip install "bdlm_jax[tensorboard]".'
            ) from None
        return None
    return SummaryWriter
