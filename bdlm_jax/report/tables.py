"""The sections of a report in Markdown: header, tables by slice, margins, chosen rounds, times."""

import statistics
from collections.abc import Sequence

import numpy as np

from bdlm_jax.evaluation.metrics import case_metric
from bdlm_jax.evaluation.statistics import Margin, relative_margin
from bdlm_jax.report.finished_run import (
    Finished,
    best_phases,
    chance_of,
    half_width,
    mean_value,
    phase_names,
    sorted_models,
    stage_seconds,
)

MAIN_METRICS = (
    "hr@1/cand20", "hr@1/cand100", "hr@10/cand100", "ndcg@10/cand100", "mrr/cand100", "hr@10/full", "ndcg@10/full",
)  # fmt: skip
SLICE_METRICS = {
    "twins": ("hr@1/pair", "auc/pair", "hr@1/cand20", "hr@1/cand100"),
    "cold": ("hr@1/cold20", "ndcg@10/cold20", "auc/cold20", "hr@10/cand100", "ndcg@10/full"),
    "knowledge": ("hr@1/knowledge20", "ndcg@10/knowledge20", "auc/knowledge20", "hr@10/cand100", "ndcg@10/full"),
}
MARGIN_METRICS = ("hr@1/cand20", "hr@1/cand100", "hr@10/cand100", "ndcg@10/cand100", "ndcg@10/full")
# With fewer the 95 % interval of a share around one half is wider than .43.
FEWEST_TARGETS = 20
SLICE_WORDS = {
    "twins": "Items that share their text with another item. `pair`: the target against its twin.",
    "cold": "Targets without any interaction before. `cold20`: the target against 19 other such items.",
    "knowledge": "Cold items in words that no other item uses; only the pretraining corpus ties them to known words. "
    "`knowledge20`: against 19 others.",
}


def group_lines(runs: Sequence[Finished], pictures: dict[str, str], *, folder: str, level: str = "##") -> list[str]:
    lines = [*_header(runs), "", f"{level} All targets", "", *_table(runs, "all", MAIN_METRICS), ""]
    lines += [f"![{caption}]({folder}/{name})" for caption, name in pictures.items() if "models" in name] + [""]
    if margins := _margins(runs):
        lines += [f"{level} Margins of both arms", "", *margins, ""]
    for name, metrics in SLICE_METRICS.items():
        if any(key[1] == name for key in runs[0].cells):
            lines += [f"{level} Slice {name}", "", SLICE_WORDS[name], "", *_slice(runs, name, metrics), ""]
    lines += [
        "Ties count against the model in HR, NDCG and MRR, and as half in AUC: who scores all candidates alike has "
        "HR 0 and AUC .5.", "",
    ]  # fmt: skip
    lines += [f"![{caption}]({folder}/{name})" for caption, name in pictures.items() if "slices" in name] + [""]
    if chosen := [line for run in runs for line in _chosen(run)]:
        lines += [f"{level} Chosen rounds", "", *chosen, ""]
    lines += [f"![{caption}]({folder}/{name})" for caption, name in pictures.items() if "learning" in name] + [""]
    return lines + [f"{level} Time", "", *_times(runs), ""]


def n_targets(runs: Sequence[Finished], part: str, metric: str) -> int:
    """Counts the targets behind a metric on a slice, in the run that has the fewest."""
    return min(
        max((users for key, (_, users) in run.cells.items() if key[1:] == (part, metric)), default=0) for run in runs
    )


def _slice(runs: Sequence[Finished], part: str, metrics: Sequence[str]) -> list[str]:
    counts = {metric: n for metric in metrics if (n := n_targets(runs, part, metric))}
    enough = [metric for metric, n in counts.items() if n >= FEWEST_TARGETS]
    few = [f"{metric} ({n})" for metric, n in counts.items() if n < FEWEST_TARGETS]
    line = f"Too few targets to say anything (under {FEWEST_TARGETS}): {', '.join(few)}."
    return (_table(runs, part, enough) if enough else []) + (["", line] if few else [])


def _header(runs: Sequence[Finished]) -> list[str]:
    data, config, environment = runs[0].data, runs[0].config, runs[0].environment
    parts = ", ".join(f"{name} {count:,}" for name, count in data["parts"].items())
    lines = [
        f"* Data: {data['name']}, {data['users']:,} users, {data['items']:,} items, {data['interactions']:,} "
        f"interactions ({parts}); split {config['data']['split']}.",
        f"* Seeds: {', '.join(str(r.config['seed']) for r in runs)}. Selection: `{config['select']}` on validation.",
        "* Hashes (data; candidates of test): "
        + "; ".join(f"`{run.data['sha256'][:12]}`" + "".join(
            f", {name.removeprefix('test/')} `{sha[:8]}`" for name, sha in sorted(run.data["candidates"].items())
            if name.startswith("test/")) for run in runs) + ".",
    ]  # fmt: skip
    versions = [f"{n} {environment[n]}" for n in ("bdlm_jax", "jax", "flax", "python") if n in environment]
    machines = sorted({_machine(run) for run in runs})
    revisions = sorted({run.environment.get("git", "unknown") for run in runs})
    return [*lines, f"* Made on {'; '.join(machines)}; {', '.join(versions)}; revision {', '.join(revisions)}."]


def _machine(run: Finished) -> str:
    cores = run.environment.get("cores")
    return run.environment["devices"].split(", jax")[0] + (f", {cores} CPU cores" if cores else "")


def _table(runs: Sequence[Finished], part: str, metrics: Sequence[str]) -> list[str]:
    keys = {key for run in runs for key in run.cells}
    metrics = [metric for metric in metrics if any(key[1:] == (part, metric) for key in keys)]
    models = [model for model in sorted_models(runs) if any((model, part, metric) in keys for metric in metrics)]
    lines = ["| model | " + " | ".join(metrics) + " |", "|---|" + "---|" * len(metrics)]
    best = {m: max((mean_value(runs, (model, part, m)) for model in models), default=0.0) for m in metrics}
    for model in models:
        cells = [_cell(runs, (model, part, m), bold=mean_value(runs, (model, part, m)) == best[m]) for m in metrics]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    for sees in dict.fromkeys(row["oracle"] for run in runs for row in run.ceilings):
        cells = [_oracle_cell(runs, sees, part, metric) for metric in metrics]
        if any(cells):
            lines.append(f"| *oracle that sees {sees.replace('_', ' ')}* | " + " | ".join(cells) + " |")
    levels = [chance_of(runs[0], part, metric) for metric in metrics]
    lines.append("| *chance* | " + " | ".join("" if v is None else _number(v) for v in levels) + " |")
    users = [str(runs[0].cells[model, part, metric][1]) for metric in metrics for model in models[-1:]]
    return [*lines, "| *targets* | " + " | ".join(users) + " |"]


def _cell(runs, key, *, bold: bool) -> str:
    values = [run.cells[key][0] for run in runs if key in run.cells]
    if not values:
        return ""
    text = _number(statistics.fmean(values))
    text = f"**{text}**" if bold else text
    if len(values) > 1:
        return f"{text} ± {_number(statistics.stdev(values))}"
    half = half_width(runs[0], key)
    return text if half is None else f"{text} ± {_number(half)}"


def _oracle_cell(runs, sees: str, part: str, metric: str) -> str:
    name, protocol = metric.split("/")
    rows = [row for run in runs for row in run.ceilings]
    values = [
        row[name]
        for row in rows
        if (row["oracle"], row["slice"], row["protocol"]) == (sees, part, protocol) and name in row
    ]
    return _number(statistics.fmean(values)) if values else ""


def _margins(runs: Sequence[Finished]) -> list[str]:
    alone = runs[0].config["domain"]["model"]
    lines = []
    for arm in ("bdlm_domain", "bdlm_lm"):
        for baseline in (alone, "text_lm", "ids_lm"):
            for metric in MARGIN_METRICS:
                margins = [m for run in runs if (m := _margin(run, arm, baseline, metric)) is not None]
                if margins:
                    values = [mean_value(runs, (model, "all", metric)) for model in (arm, baseline)]
                    cells = [arm, baseline, metric, *map(_number, values), *_margin_cells(margins)]
                    lines.append("| " + " | ".join(cells) + " |")
    if not lines:
        return []
    spread = "95 % interval" if len(runs) == 1 else "mean ± deviation over seeds"
    head = ["| arm | against | metric | arm | baseline | margin | " + spread + " | claim |", "|---" * 8 + "|"]
    note = "Intervals are paired by user. “no claim”: " + (
        "the interval holds 0."
        if len(runs) == 1
        else "not every seed's own 95 % interval leaves 0 out on the same side."
    )
    return [*head, *lines, "", note]


def _margin(run: Finished, arm: str, baseline: str, metric: str) -> Margin | None:
    name, protocol = metric.split("/")
    pair = [run.counts.get(model, {}).get(protocol) for model in (arm, baseline)]
    if None in pair or not np.array_equal(pair[0].target, pair[1].target):
        return None
    values = [case_metric(name, c.better, c.equal, c.others) for c in pair]
    return relative_margin(pair[0].user, *values)


def _margin_cells(margins: Sequence[Margin]) -> list[str]:
    known = [margin.value for margin in margins if margin.value is not None]
    if len(known) < len(margins):
        return ["", "the baseline is 0", ""]
    mean = statistics.fmean(known)
    same = all(m.claims and (m.value > 0) == (mean > 0) for m in margins)
    claim = ("higher" if mean > 0 else "lower") if same else "no claim"
    if len(margins) == 1:
        return [f"{mean:+.1%}", f"{margins[0].low:+.1%} … {margins[0].high:+.1%}", claim]
    return [f"{mean:+.1%}", f"± {statistics.stdev(known):.1%} (n = {len(known)})", claim]


def _chosen(run: Finished) -> list[str]:
    names, lines = phase_names(run.config), []
    if best := best_phases(run.folder / "bdlm"):
        for arm, label in (("domain", "domain arm"), ("lm", "LM arm")):
            phase, value = best[arm]["phase"], best[arm]["value"]
            name = names[phase].replace("\n", ", ") if phase < len(names) else f"phase {phase}"
            lines.append(
                f"the {label} after “{name}” ({phase + 1} of {len(names)}), {run.config['select']} {_number(value)}"
            )
    if best := best_phases(run.folder / "distill"):
        every, most = run.config["domain"]["evaluate_every"], run.config["mutual"]["distill_epochs"]
        epochs = min((best["domain"]["phase"] + 1) * every, most)
        value = _number(best["domain"]["value"])
        lines.append(f"then the domain arm after {epochs} of {most} epochs with the chosen LM, {value}")
    return [f"* Seed {run.config['seed']}: {'; '.join(lines)} (validation)."] if lines else []


def _times(runs: Sequence[Finished]) -> list[str]:
    by_run = [stage_seconds(run.folder) for run in runs]
    stages = list(dict.fromkeys(stage for seconds in by_run for stage in seconds))
    lines = [
        "| stage | " + " | ".join(f"seed {run.config['seed']}" for run in runs) + " |",
        "|---|" + "---|" * len(runs),
    ]
    for stage in stages:
        lines.append(f"| {stage} | " + " | ".join(_duration(seconds.get(stage, 0.0)) for seconds in by_run) + " |")
    lines.append("| *all stages* | " + " | ".join(_duration(sum(seconds.values())) for seconds in by_run) + " |")
    return [
        *lines,
        "",
        "Between the rows of the logs, validation and compilation included, silences over ten minutes left out.",
    ]


def _number(value: float) -> str:
    return f"{value:.4f}" if 0 < value < 0.01 else f"{value:.3f}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
