"""The sections of a report in Markdown: header, tables by slice, margins, controls, chosen rounds, times."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from bdlm_jax.report.claims import LEVEL, Claim
from bdlm_jax.report.finished_run import (
    BDLM,
    FEWEST_TARGETS,
    Finished,
    above_chance,
    chance_of,
    distill_epochs,
    is_control,
    mean_and_spread,
    n_targets,
    phase_names,
    sorted_models,
)
from bdlm_jax.run.controls import ANSWERS, UNLIFTED
from bdlm_jax.runtime.log import duration

MAIN_METRICS = (
    "hr@1/cand20", "hr@1/cand100", "hr@10/cand100", "ndcg@10/cand100", "mrr/cand100", "hr@10/full", "ndcg@10/full",
)  # fmt: skip
SLICES = {
    "warm": ("Targets that had interactions before: what no id model can learn is left out.", MAIN_METRICS),
    "twins": (
        "Items that share their text with another item. `pair`: the target against its twin.",
        ("hr@1/pair", "auc/pair", "hr@1/cand20", "hr@1/cand100"),
    ),
    "cold": (
        "Targets without any interaction before. `cold20`: the target against 19 other such items.",
        ("hr@1/cold20", "ndcg@10/cold20", "auc/cold20", "hr@10/cand100", "ndcg@10/full"),
    ),
    "knowledge": (
        "Cold items in words that no other item uses; only the pretraining corpus ties them to known words. "
        "`knowledge20`: against 19 others.",
        ("hr@1/knowledge20", "ndcg@10/knowledge20", "auc/knowledge20", "hr@10/cand100", "ndcg@10/full"),
    ),
}
TIES = (
    "Ties count against the model in HR, NDCG and MRR, and as half in AUC: who scores all candidates alike has "
    "HR 0 and AUC .5."
)


_MARGIN_HEAD = ("margin", "95 % interval", "deviation over seeds", "p (Holm)", "claim")


def group_lines(
    runs: Sequence[Finished], pictures: Mapping[str, str], claims: Sequence[Claim], *, family: int, level: str = "##"
) -> list[str]:
    """The sections of runs that differ in the seed alone.

    `pictures` are lines by what they show (`plots.draw`), `family` is how many claims the whole page makes.
    """
    lines = [_language(run) for run in runs if run.facts["language"]]
    lines += ["", f"{level} All targets", "", *model_table(runs, "all", MAIN_METRICS), ""]
    lines += [pictures.get("models", ""), ""]
    margins = [claim for claim in claims if not is_control(claim.against)]
    controls = [claim for claim in claims if is_control(claim.against)]
    if margins:
        lines += [f"{level} Margins of both arms", "", *claim_table(margins), "", judged_by(family), ""]
    if controls:
        rows = [row for row in sorted_models(runs) if is_control(row) or row in BDLM]
        shown = [*_controls(controls), "", *_weights(runs), judged_by(family), ""]
        shown += model_table(runs, "all", MAIN_METRICS, rows)
        lines += [f"{level} BDLM beside its controls", "", *shown, ""]
    for name, (words, metrics) in SLICES.items():
        if any(key[1] == name for key in runs[0].cells):
            words += _fewer(runs[0], metrics[0].partition("/")[2])
            lines += [f"{level} Slice {name}", "", words, "", *_slice(runs, name, metrics), ""]
    lines += [TIES, "", pictures.get("slices", ""), ""]
    if chosen := [line for run in runs for line in _chosen(run)]:
        lines += [f"{level} Chosen rounds", "", *chosen, ""]
    return [*lines, pictures.get("learning_curves", ""), "", f"{level} Time", "", *_times(runs), ""]


def claim_table(claims: Sequence[Claim]) -> list[str]:
    return grid(
        ["model", "against", "metric", "its mean", "the other's", *_MARGIN_HEAD],
        [[c.model, c.against, c.metric, number(c.ours), number(c.theirs), *_margin_cells(c)] for c in claims],
    )


def judged_by(family: int) -> str:
    return (
        "Margins are ratios of means, paired by user: each user's values are averaged over seeds, the 95 % interval is "
        "a bootstrap over users, p is of a sign-flip test after Holm's correction over the "
        f"{family} margins of this page. A claim needs p < {LEVEL} and the same direction in every seed."
    )


def provenance_lines(runs: Sequence[Finished]) -> list[str]:
    """Which data, seeds, hashes, machines and versions stand behind the numbers."""
    data, config, environment = runs[0].data, runs[0].config, runs[0].environment
    parts = ", ".join(f"{name} {count:,}" for name, count in sorted(data["parts"].items()))
    versions = [f"{n} {environment[n]}" for n in ("bdlm_jax", "jax", "flax", "python") if n in environment]
    machines = sorted({_machine(run.environment) for run in runs})
    revisions = sorted({run.environment.get("git", "unknown") for run in runs})
    return [
        f"* Data: {data['name']}, {data['users']:,} users, {data['items']:,} items, {data['interactions']:,} "
        f"interactions ({parts}); split {config['data']['split']}." + _judged(data),
        f"* Experiment: {runs[0].name}. Seeds: {', '.join(str(run.seed) for run in runs)}. Selection: "
        f"`{config['select']}` on validation.",
        f"* Hashes (data; candidates of test): {'; '.join(dict.fromkeys(_hashes(run.data) for run in runs))}.",
        f"* Made on {'; '.join(machines)}; {', '.join(versions)}; revision {', '.join(revisions)}.",
    ]


def _judged(data: Mapping) -> str:
    """Says where a drawn part of the cases stands for all."""
    drawn, parts = data.get("judged", {}), data["parts"]
    said = ", ".join(f"{n:,} of {parts[part]:,} of {part}" for part, n in drawn.items())
    return f" Judged on a fixed draw of the cases: {said}." if said else ""


def _language(run: Finished) -> str:
    text = run.facts["language"]
    before, after = text["before"], text["after"]
    return (
        f"* Seed {run.seed}: the language model's perplexity on {text['text']} held out ({text['tokens']:,} tokens) is "
        f"{after:.2f}, and was {before:.2f} before BDLM ({after / before - 1:+.1%})."
        + (f" With the adapters left on it would be {text['adapters']:.2f}." if "adapters" in text else "")
    )


def _machine(environment: Mapping) -> str:
    cores = environment.get("cores")
    return environment["devices"].split(", jax")[0] + (f", {cores} CPU cores" if cores else "")


def _hashes(data: Mapping) -> str:
    candidates = sorted((name.split("/"), sha) for name, sha in data["candidates"].items())
    of_test = [f"{name} `{sha[:8]}`" for (part, name), sha in candidates if part == "test"]
    return ", ".join([f"`{data['sha256'][:12]}`", *of_test])


def _fewer(run: Finished, protocol: str) -> str:
    """Says where the slice has fewer items than the name of its candidates says."""
    held = [counts[protocol].others for counts in run.counts.values() if protocol in counts]
    most = max((int(others_N.max(initial=0)) for others_N in held), default=0)
    return f" Here there are {most}." if protocol in ("cold20", "knowledge20") and 0 < most < 19 else ""


def _slice(runs: Sequence[Finished], part: str, metrics: Sequence[str]) -> list[str]:
    counts = {metric: n for metric in metrics if (n := n_targets(runs, part, metric))}
    enough = [metric for metric, n in counts.items() if n >= FEWEST_TARGETS]
    few = [f"{metric} ({n})" for metric, n in counts.items() if n < FEWEST_TARGETS]
    line = f"Too few targets to say anything (under {FEWEST_TARGETS}): {', '.join(few)}."
    return (model_table(runs, part, enough) if enough else []) + (["", line] if few else [])


def model_table(
    runs: Sequence[Finished], part: str, metrics: Sequence[str], rows: Sequence[str] | None = None
) -> list[str]:
    """Means over seeds of given rows on a slice (all but BDLM's controls), with ceilings, chance and targets."""
    keys = {key for run in runs for key in run.cells}
    metrics = [metric for metric in metrics if any(key[1:] == (part, metric) for key in keys)]
    rows = rows or [row for row in sorted_models(runs) if not is_control(row)] or sorted_models(runs)
    models = [model for model in rows if any((model, part, metric) in keys for metric in metrics)]
    seeds = {model: sum(any(key[0] == model for key in run.cells) for run in runs) for model in models}
    cells = {(model, m): mean_and_spread(runs, (model, part, m)) for model in models for m in metrics}
    chances = [chance_of(runs[0], metric) for metric in metrics]
    best = {}
    for metric in metrics:
        model = max(models, key=lambda model: cells[model, metric][0])
        best[metric] = cells[model, metric][0] if above_chance(runs, (model, part, metric)) else math.inf
    fewer = {model: f" (n = {n})" if n < len(runs) else "" for model, n in seeds.items()}
    rows = [[model + fewer[model], *(_cell(*cells[model, m], best[m]) for m in metrics)] for model in models]
    for sees in dict.fromkeys(row["oracle"] for run in runs for row in run.ceilings):
        levels = [_ceiling(runs, sees, part, metric) for metric in metrics]
        if any(levels):
            rows.append([f"*oracle that sees {sees.replace('_', ' ')}*", *levels])
    rows.append(["*chance*", *("" if chance is None else number(chance) for chance in chances)])
    rows.append(["*targets*", *(str(n_targets(runs[:1], part, metric)) for metric in metrics)])
    return grid(["model", *metrics], rows)


def plain_table(runs: Sequence[Finished]) -> str:
    """All targets by the main metrics, for a terminal."""
    head, _, *rows = model_table(runs, "all", MAIN_METRICS)
    cells = [[cell.strip(" *") for cell in line.replace("**", "").strip("|").split("|")] for line in (head, *rows)]
    first, *widths = (max(map(len, column)) for column in zip(*cells))
    return "\n".join(
        "  ".join([name.ljust(first), *map(str.rjust, others, widths)]).rstrip() for name, *others in cells
    )


def _cell(mean: float, spread: float | None, best: float) -> str:
    if mean == -np.inf:
        return ""
    text = f"**{number(mean)}**" if mean == best else number(mean)
    return text if spread is None else f"{text} ± {number(spread)}"


def _ceiling(runs: Sequence[Finished], sees: str, part: str, metric: str) -> str:
    name, protocol = metric.split("/")
    at = (sees, part, protocol)
    rows = [row for run in runs for row in run.ceilings if (row["oracle"], row["slice"], row["protocol"]) == at]
    values = [row[name] for row in rows if name in row]
    return number(statistics.fmean(values)) if values else ""


def _controls(claims: Sequence[Claim]) -> list[str]:
    rows, asked = [], None
    for c in claims:
        word = control_word(c.against)
        cells = [number(c.theirs), c.model, number(c.ours), *_margin_cells(c)]
        rows.append([c.against, "" if word == asked else ANSWERS.get(word, ""), *cells])
        asked = word
    return grid(["control", "answers", claims[0].metric, "BDLM's row", "its mean", *_MARGIN_HEAD], rows)


def _weights(runs: Sequence[Finished]) -> list[str]:
    said = [f"{pool} {w:g} (seed {run.seed})" for run in runs for pool, w in sorted(run.facts["weights"].items())]
    return [f"The weight of the domain model's scores, chosen on validation: {', '.join(said)}.", ""] if said else []


def control_word(row: str) -> str:
    """The word of `config.models` that a control's row belongs to."""
    word, _, end = row.rpartition("_")
    if row.endswith(UNLIFTED):
        return end
    return word if end in ("lm", "domain") or word == "cached" else row


def _margin_cells(claim: Claim) -> list[str]:
    if not claim.judged:
        return ["", "", "", "", claim.verdict]
    margin, seeds = claim.margin, len(claim.by_seed)
    spread = "one seed" if claim.spread is None else f"± {claim.spread:.1%} (n = {seeds})"
    p = f"{claim.adjusted:.4f}" if claim.adjusted >= 0.0001 else "< .0001"
    return [f"{margin.value:+.1%}", f"{margin.low:+.1%} … {margin.high:+.1%}", spread, p, claim.verdict]


def _chosen(run: Finished) -> list[str]:
    said = []
    for stage in ("bdlm", "taught"):
        if best := run.best(stage):
            names = phase_names(run.config, stage)
            for arm, label in (("domain", "domain arm"), ("lm", "LM arm")):
                phase, value = best[arm]["phase"], number(best[arm]["value"])
                name = names[phase].replace("\n", ", ") if phase < len(names) else f"phase {phase}"
                said.append(f"the {label} after “{name}” ({phase + 1} of {len(names)}), {run.config['select']} {value}")
    if best := run.best("distill"):
        epochs, most = distill_epochs(run.config, best["domain"]["phase"]), run.config["mutual"]["distill_epochs"]
        value = number(best["domain"]["value"])
        said.append(f"then the domain arm after {epochs} of {most} epochs with the chosen LM, {value}")
    return [f"* Seed {run.seed}: {'; '.join(said)} (validation)."] if said else []


def _times(runs: Sequence[Finished]) -> list[str]:
    by_run = [Counter() for _ in runs]  # a control's stages lie in its folder, and count together
    for summed, run in zip(by_run, runs):
        for stage, seconds in run.facts["seconds"].items():
            summed[stage.split("/")[0]] += seconds
    stages = dict.fromkeys(stage for seconds in by_run for stage in seconds)
    rows = [[stage, *(duration(seconds[stage]) for seconds in by_run)] for stage in stages]
    rows.append(["*all stages*", *(duration(sum(seconds.values())) for seconds in by_run)])
    note = "Training, with its validations and compilation; pauses are left out."
    return [*grid(["stage", *(f"seed {run.seed}" for run in runs)], rows), "", note]


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    first, *others = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return [first, "|" + "---|" * len(head), *others]


def number(value: float) -> str:
    return f"{value:.4f}" if 0 < value < 0.01 else f"{value:.3f}"
