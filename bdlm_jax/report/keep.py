"""A finished run made small, for docs/runs: what every number and picture of a page is made from, and nothing else."""

import json
import os
from pathlib import Path

import numpy as np

from bdlm_jax.evaluation.evaluate import result_rows
from bdlm_jax.report.compact import load_compact, save_compact
from bdlm_jax.report.finished_run import Key, read_run
from bdlm_jax.runtime.files import write_json, write_text
from bdlm_jax.types import InputError


def keep(folder: str | os.PathLike, out: str | os.PathLike) -> Path:
    """Copies a finished run, made small, to out/EXPERIMENT/RUN; a path in its config keeps its last name alone."""
    run, slices = read_run(folder), Path(folder) / "data" / "slices.npz"
    if not slices.is_file():
        raise InputError(f"{slices} is not there; start the run again, which reads back all that is trained.")
    to = Path(out) / run.name / run.folder.resolve().name
    if (to / "config.json").is_file() and json.loads((to / "config.json").read_text()) != run.config:
        raise InputError(f"{to} holds a run of another config; move one of the two run directories.")
    with np.load(slices, allow_pickle=False) as arrays:
        save_compact(to / "counts.npz", run.counts, dict(arrays))
    if differ := sorted(recomputed_cells(*load_compact(to / "counts.npz")).items() ^ run.cells.items()):
        raise InputError(f"{folder}: {differ[0][0]} of results.json is not what per_user/ gives; start the run again.")
    for name, content in (("config", run.config), ("environment", run.environment), ("facts", run.facts)):
        write_json(to / f"{name}.json", content)
    results = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
    write_text(to / "results.json", json.dumps(results, sort_keys=True).replace("}, {", "},\n {") + "\n")
    return to


def recomputed_cells(counts, slices) -> dict[Key, tuple[float, int]]:
    """What the rows of results.json must hold, from counts and slices alone."""
    rows = [row for model, protocols in counts.items() for row in result_rows(model, protocols, slices)]
    return {(row["model"], row["slice"], row["metric"]): (row["value"], row["users"]) for row in rows}
