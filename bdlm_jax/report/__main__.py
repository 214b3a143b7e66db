"""What people read of finished runs: results.md and plots of one run, and docs/results.md over many.

`python -m bdlm_jax.report --collect RUN_DIR … --out docs/results.md` groups runs that differ in the seed alone. Every
number comes from results.json and per_user/*.npz; nothing is typed by hand.
"""

import argparse
import os
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from bdlm_jax.report import plots
from bdlm_jax.report.finished_run import (
    Finished,
    best_phases,
    chance_of,
    group_runs,
    half_width,
    phase_names,
    read_run,
    sorted_models,
)
from bdlm_jax.report.tables import FEWEST_TARGETS, group_lines, n_targets
from bdlm_jax.runtime.log import read_metrics
from bdlm_jax.types import InputError

# Of twins the AUC: a model without any means to tell them apart ties, which HR@1 counts as lost.
SLICE_PANELS = {"twins": "auc/pair", "cold": "hr@1/cold20", "knowledge": "hr@1/knowledge20"}


def write_report(folder: str | os.PathLike, results: dict | None = None) -> None:
    """Writes results.md and plots/*.png of one finished run.

    Args:
      folder: the run directory.
      results: what results.json holds, or None to read it.

    Raises:
      InputError: the directory holds no finished run.
    """
    run = read_run(folder, results)
    folder = run.folder
    names = draw_plots([run], folder / "plots", prefix="")
    text = f"# Results: {run.name}, seed {run.config['seed']}\n\n" + "\n".join(
        group_lines([run], names, folder="plots")
    )
    _write(folder / "results.md", text)


def collect(
    folders: Sequence[str | os.PathLike], out: str | os.PathLike, *, title: str, command: str, include=()
) -> None:
    """Writes one page over many finished runs; runs that differ in the seed alone become one section.

    Args:
      folders: run directories.
      out: the page; plots go to plots/ beside it.
      title: its heading.
      command: how it was made, for the page's first line.
      include: text files (tables that benchmarks print) that follow verbatim.

    Raises:
      InputError: a folder that holds no finished run, or a file to include that is missing.
    """
    out, groups = Path(out), group_runs([read_run(folder) for folder in folders])
    lines = [f"<!-- generated, do not edit: {command} -->", f"# {title}", ""]
    lines += ["Every number is read from run directories; ± is the standard deviation over seeds.", ""]
    lines += [f"* [{heading}](#{_anchor(heading)})" for heading in groups] + [""]
    for heading, runs in groups.items():
        prefix = _anchor(heading) + "_"
        names = draw_plots(runs, out.parent / "plots", prefix=prefix)
        lines += [f"## {heading}", "", *group_lines(runs, names, folder="plots", level="###")]
    for path in include:
        if not Path(path).is_file():
            raise InputError(f"{path} is no file to include; run the benchmark that writes it.")
        lines += [Path(path).read_text(encoding="utf-8").strip(), ""]
    out.parent.mkdir(parents=True, exist_ok=True)
    _write(out, "\n".join(lines))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bdlm_jax.report", description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", help="write results.md and the plots of this finished run again")
    parser.add_argument("--collect", nargs="+", metavar="RUN_DIR", help="finished runs for one page")
    parser.add_argument("--out", default="docs/results.md", help="that page")
    parser.add_argument("--title", default="Results")
    parser.add_argument("--include", nargs="+", default=[], metavar="FILE", help="text that follows verbatim")
    given = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    command = f"python -m bdlm_jax.report {shlex.join(words)}"
    try:
        if given.workdir:
            write_report(given.workdir)
        if given.collect:
            collect(given.collect, given.out, title=given.title, command=command, include=given.include)
    except InputError as error:
        print(f"bdlm_jax: {error}", file=sys.stderr)
        return 2
    if not (given.workdir or given.collect):
        parser.error("give --workdir DIR or --collect RUN_DIR …")
    return 0


def draw_plots(runs: Sequence[Finished], folder: Path, *, prefix: str) -> dict[str, str]:
    """Draws what the runs have numbers for; the learning curves are the first run's. Returns {caption: file name}."""
    made = {}
    seeds = f"{len(runs)} seeds" if len(runs) > 1 else f"seed {runs[0].config['seed']}"
    title = f"{runs[0].name}, {seeds}"
    if curves := _curves(runs[0]):
        made["learning curves of both arms by round"] = f"{prefix}learning_curves.png"
        seed = f"{runs[0].name}, seed {runs[0].config['seed']}"
        select = runs[0].config["select"]
        plots.plot_learning_curves(folder / f"{prefix}learning_curves.png", *curves, metric=select, title=seed)
    if panels := _panels(runs, "all", ("hr@1/cand20", "hr@1/cand100", "ndcg@10/full")):
        made["every model, all targets"] = f"{prefix}models.png"
        plots.plot_bars(folder / f"{prefix}models.png", panels, title=f"All targets: {title}")
    panels = [p for name, metric in SLICE_PANELS.items() for p in _panels(runs, name, (metric,), named=True)]
    if panels:
        made["twins, cold and knowledge items"] = f"{prefix}slices.png"
        plots.plot_bars(folder / f"{prefix}slices.png", panels, title=f"Where one source does not suffice: {title}")
    return made


def _curves(run: Finished) -> tuple[plots.Curves, plots.Curves | None] | None:
    best = best_phases(run.folder / "bdlm")
    rows = _validation(run.folder / "bdlm", run.config["select"])
    if best is None or not rows:
        return None
    alone = {}
    for arm, stage, label in (("domain", run.config["domain"]["model"], "alone"), ("lm", "ids_lm", "alone")):
        if reached := best_phases(run.folder / stage):
            alone[arm] = f"{stage} {label}", reached[arm]["value"]
    chosen = {arm: best[arm]["phase"] for arm in best}
    rounds = plots.Curves(phase_names(run.config), rows, chosen, alone)
    taught, values = best_phases(run.folder / "distill"), _validation(run.folder / "distill", run.config["select"])
    if taught is None or not values:
        return rounds, None
    every, most = run.config["domain"]["evaluate_every"], run.config["mutual"]["distill_epochs"]
    epochs = [str(min((i + 1) * every, most)) for i in range(len(values["domain"]))]
    return rounds, plots.Curves(epochs, values, {"domain": taught["domain"]["phase"]}, alone)


def _validation(folder: Path, select: str) -> dict[str, list[float]]:
    curves: dict[str, list[float]] = {}
    for row in read_metrics(folder):
        for arm in ("domain", "lm"):
            if f"validation/{arm}/{select}" in row:
                curves.setdefault(arm, []).append(row[f"validation/{arm}/{select}"])
    return curves


def _panels(runs: Sequence[Finished], part: str, metrics: Sequence[str], *, named: bool = False) -> list[plots.Bars]:
    panels = []
    for metric in metrics:
        if part != "all" and n_targets(runs, part, metric) < FEWEST_TARGETS:
            continue
        values = {}
        for model in sorted_models(runs):
            key = (model, part, metric)
            each = [run.cells[key][0] for run in runs if key in run.cells]
            if each:
                spread = statistics.stdev(each) if len(each) > 1 else half_width(runs[0], key) or 0.0
                values[model] = statistics.fmean(each), spread
        if values:
            panels.append(
                plots.Bars(f"{part}: {metric}" if named else metric, values, chance_of(runs[0], part, metric))
            )
    return panels


def _anchor(heading: str) -> str:
    kept = "".join(c for c in heading.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def _write(path: Path, text: str) -> None:
    lines = text.split("\n")
    kept = [line for line, before in zip(lines, [None, *lines]) if line or before]  # one blank line at a time
    partial = path.with_name(path.name + ".partial")
    partial.write_text("\n".join(kept).rstrip() + "\n", encoding="utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    sys.exit(main())
