"""What a finished run tells: its cells, counts, chosen phases, curves and times, and means over seeds.

A run is read from its own directory or from the copy of it that `kept_run.keep` makes.
"""

import functools
import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict

from bdlm_jax.domain.closed_form import CLOSED_FORM
from bdlm_jax.domain.models import MODELS
from bdlm_jax.evaluation.evaluate import Counts, load_counts
from bdlm_jax.evaluation.metrics import case_metric
from bdlm_jax.evaluation.statistics import chance_level, mean_half_width
from bdlm_jax.report.compact import load_compact
from bdlm_jax.run import shipped
from bdlm_jax.runtime.files import damaged_file, read_json
from bdlm_jax.runtime.fit import best_phases
from bdlm_jax.runtime.log import read_metrics
from bdlm_jax.types import InputError

PAUSE_SECONDS = 600.0  # where rows do not say when their process began, a longer silence is a pause, not work
FEWEST_TARGETS = 20  # with fewer the 95 % interval of a share around one half is wider than .43
Key = tuple[str, str, str]  # (model, slice, metric)
# What does not change the experiment: which seeds and models a run has, where things lie, how fast they go.
_ASIDE = (
    "seed",
    "models",
    "tuned_on",
    "data.path",
    "pretrain.corpus",
    "runtime.",
    "distributed.",
    "dry_run.",
    "data.titles",
)
STAGE_WORDS = {
    "bdlm": "Mutual rounds",
    "taught": "Then lessons of both arms from their teacher",
    "distill": "Then the domain arm from its teacher, by epochs",
}
BDLM = ("bdlm_domain_unrefreshed", "bdlm_domain", "bdlm_lm")
PAGE = "results.md"  # made of what is read here, and so of no matter to it
_AGAIN = "the same command of bdlm_jax.main makes it anew"
_STAGES = ("*", "*/*", "*/*/*")  # "**" would not follow links into a store of stages


class Finished(NamedTuple):
    """A finished run; `cells` holds (value, users).

    facts: {"best": {stage: {arm: {"phase", "value"}}}, "curves": {stage: {arm: [validation after each phase]}},
    "seconds": {stage: s}, "weights": {pool: of the second model's scores}, "language": of an own model, as
    `run.general.measure` tells it, else {}}; a stage is named by its folder in the run.
    """

    folder: Path
    config: dict
    environment: dict
    data: dict
    cells: dict[Key, tuple[float, int]]
    counts: dict[str, dict[str, Counts]]
    ceilings: list[dict]
    facts: dict

    @property
    def name(self) -> str:
        return self.config.get("name") or self.data.get("name") or self.folder.name

    @property
    def title(self) -> str:
        """What a reader calls the run: the data's name."""
        return self.data.get("name") or self.name

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def domain_model(self) -> str:
        """The model that BDLM starts from, which is also the name of its stage and row alone."""
        return self.config["domain"]["model"]

    def best(self, stage: str) -> dict:
        """{arm: {"phase", "value"}} of a finished stage, empty where it is not."""
        return self.facts["best"].get(stage, {})


def read_run(folder: str | os.PathLike, results: dict | None = None) -> Finished:
    """Reads a run directory or its kept copy; `results` is what results.json holds, or None to read it."""
    folder = Path(folder)
    for name in ("config.json", "environment.json", *(() if results else ("results.json",))):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is not there: {folder} holds no finished run; start it again.")
    within = (path for depth in _STAGES for path in sorted(folder.glob(depth)))
    if lost := next((path for path in within if path.is_symlink() and not path.exists()), None):
        raise InputError(
            f"{lost} leads to {os.readlink(lost)}, which is not there: the run, or the store of its stages, was moved; "
            f"move it back, or {_AGAIN}."
        )
    done = [path.parent for stage in _STAGES for path in sorted(folder.glob(f"{stage}/done.json"))]
    if damaged := damaged_file(folder, but=PAGE):
        first = f"delete it if the settings are the old ones, and {_AGAIN}" if damaged.name == "config.json" else _AGAIN
        raise InputError(f"{damaged} is damaged or gone, for its checksum differs; {first}.")
    for at in done:
        if damaged := damaged_file(at, "done.json", "metrics.jsonl"):
            raise InputError(f"{damaged} is damaged, for its checksum differs; delete {at}, and {_AGAIN}.")
    try:
        return _read_run(folder, results, done)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder} holds no whole run: {error!r} is amiss in its files; {_AGAIN}.") from error


def _read_run(folder: Path, results: dict | None, done: Sequence[Path]) -> Finished:
    config, environment = (_read(folder / name) for name in ("config.json", "environment.json"))
    results = results or _read(folder / "results.json")
    cells = {(r["model"], r["slice"], r["metric"]): (r["value"], r["users"]) for r in results["rows"]}
    if (folder / "facts.json").is_file():
        facts, (counts, _) = _read(folder / "facts.json"), load_compact(folder / "counts.npz")
    else:
        counts = {path.stem: load_counts(path) for path in sorted((folder / "per_user").glob("*.npz"))}
        facts = {
            "best": {at.relative_to(folder).as_posix(): best_phases(at) for at in done},
            "curves": {at.relative_to(folder).as_posix(): _curves(at, config["select"]) for at in done},
            "weights": {path.stem: _read(path)["weight"] for path in sorted(folder.glob("pool*.json"))},
            "seconds": stage_seconds(folder),
        }
    facts.setdefault("language", results.get("language") or {})
    config = portable(config)
    return Finished(folder, config, environment, results["data"], cells, counts, results.get("ceilings", []), facts)


def portable(config: dict) -> dict:
    """The config with the last name alone of every path, for those of a machine say nothing elsewhere."""
    flat = flatten_dict(config, sep=".", keep_empty_nodes=True)
    paths = {name for name in flat if name.split(".")[-1] in ("path", "corpus", "store")}
    paths |= {
        name for name, value in flat.items() if isinstance(value, str) and value.startswith(("/", "~", "./", "../"))
    }
    return unflatten_dict({n: Path(v).name if n in paths and v else v for n, v in flat.items()}, sep=".")


def group_runs(runs: Sequence[Finished]) -> dict[str, list[Finished]]:
    """Groups runs that differ in seed and models alone; headings are the data's names, and tell groups of one apart.

    A setting that an older run does not have is taken at its default, and the section of a model counts for the runs
    that have that model. A group leaves out seeds of `config.tuned_on`, if it has others: their test tables were seen
    before it was judged.
    """
    groups: list[tuple[dict, list[Finished]]] = []
    for run in runs:
        settings = _settings(run)
        for known, members in groups:
            if _agree(known, settings):
                known |= settings
                members.append(run)
                break
        else:
            groups.append((settings, [run]))
    headed, first = {}, {}
    shared = Counter(title for title, _ in {(members[0].title, members[0].name) for _, members in groups})
    for settings, members in groups:
        title, name = members[0].title, members[0].name
        name = f"{title} ({name})" if shared[title] > 1 else title
        before = first.setdefault(name, settings)
        other = [f"{n} = {settings[n]}" for n in sorted(settings) if settings[n] != before.get(n, settings[n])]
        by_seed: dict[int, Finished] = {}
        for run in members:
            by_seed[run.seed] = _join(by_seed[run.seed], run) if run.seed in by_seed else run
        fair = [run for seed, run in by_seed.items() if seed not in tuned_on(members)] or list(by_seed.values())
        headed[name + (f" with {', '.join(other)}" if other else "")] = sorted(fair, key=lambda run: run.seed)
    return headed


def tuned_on(runs: Sequence[Finished]) -> list[int]:
    """The seeds whose test tables were in view when these runs' settings were chosen."""
    return sorted({seed for run in runs for seed in run.config.get("tuned_on", ())})


def stage_seconds(folder: Path) -> dict[str, float]:
    """Sums, by stage, the time that its processes worked on it, from its beginning in each to the last row it wrote.

    Older rows do not say when their process began: there the time counts from the stage before on, and a silence
    over ten minutes as a pause.
    """
    logs = {
        path.parent.relative_to(folder).as_posix(): sorted(rows, key=lambda row: row["time"])
        for stage in _STAGES
        for path in folder.glob(f"{stage}/metrics.jsonl")
        if (rows := read_metrics(path))
    }
    seconds, ends = {}, [rows[-1]["time"] for rows in logs.values()]
    for stage, rows in sorted(logs.items(), key=lambda log: log[1][0]["time"]):
        start = max((end for end in ends if end <= rows[0]["time"]), default=rows[0]["time"])
        last = {"time": start}
        seconds[stage] = 0.0
        for row in rows:
            before = last["time"] if row.get("since") == last.get("since") else row.get("since", last["time"])
            gap = row["time"] - before
            seconds[stage] += gap if "since" in row or gap < PAUSE_SECONDS else 0.0
            last = row
    return seconds


def phase_names(config: dict, stage: str = "bdlm") -> list[str]:
    """Names the phases of a stage of both arms, in the order in which `stages` runs them."""
    m = config["mutual"]
    if stage == "taught":
        c, numbers = m["taught"], range(1, m["taught"]["rounds"] + 1)
        epochs = {"LM": c["lm_epochs"], "domain": c["domain_epochs"]}
        return [f"lesson {number}\n{arm}" for number in numbers for arm in epochs if epochs[arm]]
    names = ["LM first"] if m["lm_epochs"] else []
    for number in range(1, m["rounds"] + 1):
        names += [f"round {number}\ndomain"] if m["domain_epochs_a_round"] else []
        names += [f"round {number}\nLM"] if m["lm_epochs_a_round"] else []
    return names


def curve_notes(run: Finished) -> dict[str, str]:
    """Explains, by stage, what a reader of the domain arm's curve wonders at; empty where there is nothing to see."""
    rounds, distilled = (run.facts["curves"].get(stage, {}).get("domain") for stage in ("bdlm", "distill"))
    alone, m, notes = run.best(run.domain_model).get("domain"), run.config["mutual"], {}
    moved = run.config["shared"]["trained_by"] in ("both", "lm") and m["lm_epochs"]
    if rounds and alone and moved and rounds[0] < alone["value"]:
        notes["bdlm"] = f"below {run.domain_model} alone: the LM's steps move the table that both arms read"
    best = (run.best("taught") or run.best("bdlm")).get("domain")
    if distilled and best and max(distilled) > 1.1 * best["value"]:
        epochs = f"{m['distill_epochs']} epochs (a round has {m['domain_epochs_a_round']})"
        notes["distill"] = f"the jump: the chosen LM stands still and teaches for {epochs}"
    return notes


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


def above_chance(runs: Sequence[Finished], key: Key) -> bool:
    """Whether a model is told from a ranking at random: by its spread, and by how many targets there are.

    No metric within 0 … 1 varies more between targets than one that is 0 or 1: half its interval is 1.96 √(m (1-m)/n).
    """
    (mean, spread), chance = mean_and_spread(runs, key), chance_of(runs[0], key[2]) or 0.0
    wide = 1.96 * math.sqrt(max(mean * (1 - mean), 0.0) / max(n_targets(runs, *key[1:]), 1)) if mean > 0 else 0.0
    return mean - max(spread or 0.0, wide) > chance


def sorted_models(runs: Sequence[Finished]) -> list[str]:
    """Baselines in the order of their years, BDLM's controls, and BDLM last."""
    last = ("text_lm", "ids_lm", "<controls>", "bdlm_domain_unrefreshed", "bdlm_domain", "bdlm_lm")
    order = ("item_pop", "item_knn", "ease", "<others>", runs[0].domain_model, *last)
    names = dict.fromkeys(key[0] for run in runs for key in run.cells)

    def place(name: str) -> int:
        return order.index(name if name in order else "<controls>" if is_control(name) else "<others>")

    return sorted(names, key=place)


def is_control(row: str) -> bool:
    """Whether a row is of one of BDLM's controls (`run/controls.py`), not of BDLM itself or a baseline."""
    return row not in BDLM and row.startswith(("bdlm_", "cached", "pool", "ids_lm_distilled"))


def _half_width(run: Finished, key: Key) -> float | None:
    """Half a 95 % interval over cases, for the candidate sets that belong to one slice."""
    (model, part, metric), protocol = key, key[2].split("/")[1]
    counts = run.counts.get(model, {}).get(protocol)
    if part == "all" or counts is None or len(counts.user) < 2 or len(counts.user) != run.cells[key][1]:
        return None
    return mean_half_width(case_metric(metric.split("/")[0], counts.better, counts.equal, counts.others))


def _join(run: Finished, other: Finished) -> Finished:
    """One run of two with the same settings and seed, for different models; what both have must agree."""
    where = f"{run.folder} and {other.folder} have the same settings and seed"
    if run.cells.keys() == other.cells.keys():
        raise InputError(f"{where}, and the same models; give one of them.")
    if differ := sorted(key for key in run.cells.keys() & other.cells.keys() if run.cells[key] != other.cells[key]):
        raise InputError(f"{where}, yet not the same {differ[0][2]} of {differ[0][0]}; give one of them.")
    facts = {name: {**run.facts[name], **other.facts[name]} for name in run.facts}
    return run._replace(cells=run.cells | other.cells, counts=run.counts | other.counts, facts=facts)


@functools.cache
def default_settings() -> dict:
    """The settings of experiments/defaults.py, flat, as JSON has them; none where that file is not at hand."""
    config = shipped.default_config()
    return flatten_dict(json.loads(config.to_json_best_effort()), sep=".") if config else {}


def _settings(run: Finished) -> dict:
    """The config as flat settings, without what does not change the experiment or is of models that it has not."""
    rows = {key[0].removeprefix("bdlm_on_").removesuffix("_lm").removesuffix("_domain") for key in run.cells}
    others = tuple(f"{name}." for name in (*MODELS, *CLOSED_FORM) if name not in rows | {run.domain_model})
    flat = flatten_dict({**run.config, "name": run.name}, sep=".").items()
    return {name: value for name, value in flat if not name.startswith((*_ASIDE, *others))}


def _agree(settings: dict, other: dict) -> bool:
    usual = {n: v for n, v in default_settings().items() if n.split(".")[0] not in (*MODELS, *CLOSED_FORM)}
    both = settings | other
    return all(settings.get(n, usual.get(n, v)) == other.get(n, usual.get(n, v)) for n, v in both.items())


def _curves(stage: Path, metric: str) -> dict[str, list[float]]:
    """The selected metric on validation after every phase, by arm."""
    rows, curves = read_metrics(stage), {}
    for arm in ("domain", "lm"):
        if values := [row[name] for row in rows if (name := f"validation/{arm}/{metric}") in row]:
            curves[arm] = values
    return curves


def _read(path: Path) -> dict:
    return read_json(path, remedy=_AGAIN)
