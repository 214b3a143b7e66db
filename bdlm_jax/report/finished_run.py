"""What the directory of a finished run tells: its cells, counts, chosen phases and times, and comparisons of models."""

import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bdlm_jax.evaluation.evaluate import Counts, load_counts
from bdlm_jax.evaluation.metrics import case_metric
from bdlm_jax.evaluation.statistics import chance_level, mean_half_width
from bdlm_jax.runtime.log import read_metrics
from bdlm_jax.types import InputError

PAUSE_SECONDS = 600.0  # a longer silence between two rows of the logs is a pause, not work


class Finished(NamedTuple):
    """A finished run as its directory tells it; `cells` is {(model, slice, metric): (value, users)}."""

    folder: Path
    config: dict
    environment: dict
    data: dict
    cells: dict[tuple[str, str, str], tuple[float, int]]
    counts: dict[str, dict[str, Counts]]
    ceilings: list[dict]

    @property
    def name(self) -> str:
        return self.config.get("name") or self.data.get("name") or self.folder.name


def read_run(folder: str | os.PathLike, results: dict | None = None) -> Finished:
    """Reads a run directory; InputError where it holds no finished run."""
    folder = Path(folder)
    try:
        config, environment = (json.loads((folder / name).read_text()) for name in ("config.json", "environment.json"))
        results = results or json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{error.filename} is not there: {folder} holds no finished run; start it again.") from None
    cells = {(r["model"], r["slice"], r["metric"]): (r["value"], r["users"]) for r in results["rows"]}
    counts = {path.stem: load_counts(path) for path in sorted((folder / "per_user").glob("*.npz"))}
    return Finished(folder, config, environment, results["data"], cells, counts, results.get("ceilings", []))


def group_runs(runs: Sequence[Finished]) -> dict[str, list[Finished]]:
    """Groups runs whose configs differ in the seed alone; headings tell apart groups of one name."""
    groups: dict[str, list[Finished]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_settings(run), sort_keys=True), []).append(run)
    headed, first = {}, {}
    for members in groups.values():
        settings, name = _settings(members[0]), members[0].name
        before = first.setdefault(name, settings)
        other = [
            f"{key} = {settings.get(key)}" for key in sorted(settings | before) if settings.get(key) != before.get(key)
        ]
        headed[name + (f" with {', '.join(other)}" if other else "")] = sorted(members, key=lambda r: r.config["seed"])
    return headed


def stage_seconds(folder: Path) -> dict[str, float]:
    """Sums, by stage, the time between the rows of the logs; silences over ten minutes count as pauses."""
    rows = sorted(
        (row for path in folder.glob("*/metrics.jsonl") for row in read_metrics(path)), key=lambda row: row["time"]
    )
    seconds: dict[str, float] = {}
    for before, row in zip(rows[:1] + rows, rows):
        gap = row["time"] - before["time"]
        seconds[row["stage"]] = seconds.get(row["stage"], 0.0) + (gap if gap < PAUSE_SECONDS else 0.0)
    return seconds


def phase_names(config: dict) -> list[str]:
    """Names the phases of the mutual rounds, in the order in which `stages.train_bdlm` runs them."""
    m = config["mutual"]
    names = ["LM first"] if m["lm_epochs"] else []
    for number in range(1, m["rounds"] + 1):
        names += [f"round {number}\ndomain"] if m["domain_epochs_a_round"] else []
        names += [f"round {number}\nLM"] if m["lm_epochs_a_round"] else []
    return names


def half_width(run: Finished, key) -> float | None:
    """Half a 95 % interval over cases, for the candidate sets that belong to one slice."""
    (model, part, metric), protocol = key, key[2].split("/")[1]
    counts = run.counts.get(model, {}).get(protocol)
    if part == "all" or counts is None or len(counts.user) < 2 or len(counts.user) != run.cells[key][1]:
        return None
    values = case_metric(metric.split("/")[0], counts.better, counts.equal, counts.others)
    return mean_half_width(values)


def chance_of(run: Finished, part: str, metric: str) -> float | None:
    """Of the slice's own candidate sets, or of a set whose size is the same for all."""
    name, protocol = metric.split("/")
    for counts in run.counts.values():
        if protocol in counts:
            return chance_level(name, counts[protocol].others)
    return None


def sorted_models(runs: Sequence[Finished]) -> list[str]:
    order = ("item_pop", "mf", runs[0].config["domain"]["model"], "text_lm", "ids_lm", "bdlm_domain_unrefreshed")
    names = dict.fromkeys(key[0] for run in runs for key in run.cells)
    rank = {name: place for place, name in enumerate((*order, "bdlm_domain", "bdlm_lm"))}
    return sorted(names, key=lambda name: rank.get(name, -1))


def mean_value(runs, key) -> float:
    values = [run.cells[key][0] for run in runs if key in run.cells]
    return statistics.fmean(values) if values else -math.inf


def best_phases(folder: Path) -> dict | None:
    path = folder / "done.json"
    return json.loads(path.read_text(encoding="utf-8"))["best"] if path.is_file() else None


def _settings(run: Finished) -> dict:
    """The config as flat settings, without what does not change the experiment."""

    def flat(tree, prefix=""):
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{name}.")
            elif prefix + name not in ("seed", "data.path") and not prefix.startswith("runtime."):
                yield prefix + name, value

    return {**dict(flat(run.config)), "name": run.name}
