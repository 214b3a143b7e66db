"""What the directory of a finished run tells: its cells, counts, chosen phases and times, and means over seeds."""

import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flax.traverse_util import flatten_dict

from bdlm_jax.evaluation.evaluate import Counts, load_counts
from bdlm_jax.evaluation.metrics import case_metric
from bdlm_jax.evaluation.statistics import chance_level, mean_half_width
from bdlm_jax.runtime.log import read_metrics
from bdlm_jax.types import InputError

PAUSE_SECONDS = 600.0  # a longer silence between two rows of the logs is a pause, not work
FEWEST_TARGETS = 20  # with fewer the 95 % interval of a share around one half is wider than .43
Key = tuple[str, str, str]  # (model, slice, metric)


class Finished(NamedTuple):
    """A finished run as its directory tells it; `cells` holds (value, users)."""

    folder: Path
    config: dict
    environment: dict
    data: dict
    cells: dict[Key, tuple[float, int]]
    counts: dict[str, dict[str, Counts]]
    ceilings: list[dict]

    @property
    def name(self) -> str:
        return self.config.get("name") or self.data.get("name") or self.folder.name

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def domain_model(self) -> str:
        """The model that BDLM starts from, which is also the name of its stage and row alone."""
        return self.config["domain"]["model"]


def read_run(folder: str | os.PathLike, results: dict | None = None) -> Finished:
    """Reads a run directory; `results` is what results.json holds, or None to read it."""
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
    for text, members in groups.items():
        settings, name = json.loads(text), members[0].name
        before = first.setdefault(name, settings)
        other = [f"{n} = {settings.get(n)}" for n in sorted(settings | before) if settings.get(n) != before.get(n)]
        headed[name + (f" with {', '.join(other)}" if other else "")] = sorted(members, key=lambda run: run.seed)
    return headed


def stage_seconds(folder: Path) -> dict[str, float]:
    """Sums, by stage, the time between the rows of the logs; silences over ten minutes count as pauses."""
    rows = [row for path in folder.glob("*/metrics.jsonl") for row in read_metrics(path)]
    rows.sort(key=lambda row: row["time"])
    seconds: dict[str, float] = {}
    for before, row in zip(rows[:1] + rows, rows):
        gap = row["time"] - before["time"]
        seconds[row["stage"]] = seconds.get(row["stage"], 0.0) + (gap if gap < PAUSE_SECONDS else 0.0)
    return seconds


def best_phases(folder: Path) -> dict | None:
    """{arm: {"phase", "value"}} of a finished stage."""
    path = folder / "done.json"
    return json.loads(path.read_text(encoding="utf-8"))["best"] if path.is_file() else None


def phase_names(config: dict) -> list[str]:
    """Names the phases of the mutual rounds, in the order in which `stages.train_bdlm` runs them."""
    m = config["mutual"]
    names = ["LM first"] if m["lm_epochs"] else []
    for number in range(1, m["rounds"] + 1):
        names += [f"round {number}\ndomain"] if m["domain_epochs_a_round"] else []
        names += [f"round {number}\nLM"] if m["lm_epochs_a_round"] else []
    return names


def distill_epochs(config: dict, phase: int) -> int:
    """How many epochs of distillation are done after a phase of it."""
    return min((phase + 1) * config["domain"]["evaluate_every"], config["mutual"]["distill_epochs"])


def mean_and_spread(runs: Sequence[Finished], key: Key) -> tuple[float, float | None]:
    """The mean and deviation over seeds; of a single run half its interval, where it has one; (-inf, None): no run."""
    values = [run.cells[key][0] for run in runs if key in run.cells]
    if len(values) > 1:
        return statistics.fmean(values), statistics.stdev(values)
    return (values[0], _half_width(runs[0], key)) if values else (-math.inf, None)


def n_targets(runs: Sequence[Finished], part: str, metric: str) -> int:
    """Counts the targets behind a metric on a slice, in the run that has the fewest."""
    return min(
        max((users for key, (_, users) in run.cells.items() if key[1:] == (part, metric)), default=0) for run in runs
    )


def chance_of(run: Finished, metric: str) -> float | None:
    """Of the metric's own candidate sets, or of a set whose size is the same for all."""
    name, protocol = metric.split("/")
    others = [counts[protocol].others for counts in run.counts.values() if protocol in counts]
    return chance_level(name, others[0]) if others else None


def sorted_models(runs: Sequence[Finished]) -> list[str]:
    last = (runs[0].domain_model, "text_lm", "ids_lm", "bdlm_domain_unrefreshed", "bdlm_domain", "bdlm_lm")
    rank = {"item_pop": -2} | {name: place for place, name in enumerate(last)}
    names = dict.fromkeys(key[0] for run in runs for key in run.cells)
    return sorted(names, key=lambda name: rank.get(name, -1))


def _half_width(run: Finished, key: Key) -> float | None:
    """Half a 95 % interval over cases, for the candidate sets that belong to one slice."""
    (model, part, metric), protocol = key, key[2].split("/")[1]
    counts = run.counts.get(model, {}).get(protocol)
    if part == "all" or counts is None or len(counts.user) < 2 or len(counts.user) != run.cells[key][1]:
        return None
    return mean_half_width(case_metric(metric.split("/")[0], counts.better, counts.equal, counts.others))


def _settings(run: Finished) -> dict:
    """The config as flat settings, without what does not change the experiment."""
    flat = flatten_dict({**run.config, "name": run.name}, sep=".").items()
    return {n: value for n, value in flat if n not in ("seed", "data.path") and not n.startswith("runtime.")}
