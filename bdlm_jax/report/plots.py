"""The pictures of a report: learning curves of both arms by round, and bars by model with their chance levels.

Blue is the domain arm's family, orange the LM arm's; the pair is told apart by every common kind of colour vision.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from bdlm_jax.report.finished_run import (
    Finished,
    best_phases,
    chance_of,
    distill_epochs,
    mean_and_spread,
    n_targets,
    phase_names,
    sorted_models,
)
from bdlm_jax.report.tables import FEWEST_TARGETS
from bdlm_jax.runtime.files import replacing
from bdlm_jax.runtime.log import read_metrics

COLOURS = {
    "item_pop": "#b3b3b3", "mf": "#9ecae1", "text_lm": "#fdd0a2", "ids_lm": "#fdae6b",
    "bdlm_domain_unrefreshed": "#4292c6", "bdlm_domain": "#08519c", "bdlm_lm": "#d94801",
}  # fmt: skip
ALONE = "#6baed6"  # the domain model alone, whichever it is
ARM = {"domain": "#08519c", "lm": "#d94801"}
_GREY = "#555555"
BAR_METRICS = ("hr@1/cand20", "hr@1/cand100", "ndcg@10/full")
# Of twins the AUC: a model without any means to tell them apart ties, which HR@1 counts as lost.
SLICE_METRIC = {"twins": "auc/pair", "cold": "hr@1/cold20", "knowledge": "hr@1/knowledge20"}


class Bars(NamedTuple):
    """One panel: a value and a spread (0: none) by model, and the chance level."""

    title: str
    values: Mapping[str, tuple[float, float]]
    chance: float | None


class Curves(NamedTuple):
    """Validation after every phase: `values` by arm, the phase taken, and what stands beside it alone."""

    phases: Sequence[str]
    values: Mapping[str, Sequence[float]]
    chosen: Mapping[str, int]
    alone: Mapping[str, tuple[str, float]]


def draw(runs: Sequence[Finished], folder: Path, *, prefix: str = "") -> dict[str, str]:
    """Draws what the runs have numbers for (the learning curves are the first run's); returns the lines that show it.

    Returns:
      {"learning_curves" | "models" | "slices": Markdown of a page beside `folder`}.
    """
    run, made = runs[0], {}
    first = f"{run.name}, seed {run.seed}"
    title = f"{run.name}, {len(runs)} seeds" if len(runs) > 1 else first

    def path(name: str, caption: str) -> Path:
        made[name] = f"![{caption}]({folder.name}/{prefix}{name}.png)"
        return folder / f"{prefix}{name}.png"

    if curves := _curves(run):
        at = path("learning_curves", "learning curves of both arms by round")
        plot_learning_curves(at, *curves, metric=run.config["select"], title=first)
    if panels := [_bars(runs, "all", metric, title=metric) for metric in BAR_METRICS if n_targets(runs, "all", metric)]:
        plot_bars(path("models", "every model, all targets"), panels, title=f"All targets: {title}")
    shown = {part: m for part, m in SLICE_METRIC.items() if n_targets(runs, part, m) >= FEWEST_TARGETS}
    if panels := [_bars(runs, part, metric, title=f"{part}: {metric}") for part, metric in shown.items()]:
        at = path("slices", "twins, cold and knowledge items")
        plot_bars(at, panels, title=f"Where one source does not suffice: {title}")
    return made


def _bars(runs: Sequence[Finished], part: str, metric: str, *, title: str) -> Bars:
    values = {model: mean_and_spread(runs, (model, part, metric)) for model in sorted_models(runs)}
    shown = {model: (mean, spread or 0.0) for model, (mean, spread) in values.items() if mean >= 0}
    return Bars(title, shown, chance_of(runs[0], metric))


def _curves(run: Finished) -> tuple[Curves, Curves | None] | None:
    best, values = best_phases(run.folder / "bdlm"), _validation(run, "bdlm")
    if best is None or not values:
        return None
    alone = {}
    for arm, stage in (("domain", run.domain_model), ("lm", "ids_lm")):
        if reached := best_phases(run.folder / stage):
            alone[arm] = f"{stage} alone", reached[arm]["value"]
    rounds = Curves(phase_names(run.config), values, {arm: best[arm]["phase"] for arm in best}, alone)
    best, values = best_phases(run.folder / "distill"), _validation(run, "distill")
    if best is None or not values:
        return rounds, None
    epochs = [str(distill_epochs(run.config, phase)) for phase in range(len(values["domain"]))]
    return rounds, Curves(epochs, values, {"domain": best["domain"]["phase"]}, alone)


def _validation(run: Finished, stage: str) -> dict[str, list[float]]:
    """The selected metric after every phase, by arm."""
    rows = read_metrics(run.folder / stage)
    names = {arm: f"validation/{arm}/{run.config['select']}" for arm in ARM}
    curves = {arm: [row[name] for row in rows if name in row] for arm, name in names.items()}
    return {arm: values for arm, values in curves.items() if values}


def plot_bars(path: Path, panels: Sequence[Bars], *, title: str) -> None:
    """Draws horizontal bars by model, a panel each, to a PNG; the models of the first panel name the rows."""
    models = list(dict.fromkeys(model for panel in panels for model in panel.values))
    figure = Figure(figsize=(3.4 * len(panels) + 1.6, 0.34 * len(models) + 1.3), layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(all_axes, panels):
        shown = [model for model in models if model in panel.values]
        value, spread = zip(*(panel.values[model] for model in shown))
        place = [models.index(model) for model in shown]
        axes.barh(place, value, color=[COLOURS.get(model, ALONE) for model in shown], height=0.72)
        if any(spread):
            axes.errorbar(value, place, xerr=spread, fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
        right = max([v + s for v, s in zip(value, spread)] + [panel.chance or 0, 1e-3])
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        for y, v, s in zip(place, value, spread):
            x = v + s + right * 0.02
            axes.text(x, y, f"{v:.3f}", va="center", fontsize=8, color="#222222", zorder=4, bbox=box)
        if panel.chance is not None:
            axes.axvline(panel.chance, color=_GREY, linestyle="--", linewidth=1)
            axes.annotate(
                f"chance {panel.chance:.3g}", (panel.chance, 1), (0, 1), xycoords=("data", "axes fraction"),
                textcoords="offset points", fontsize=7.5, color=_GREY, ha="center", va="bottom",
            )  # fmt: skip
        axes.set_xlim(0, right * 1.2)
        axes.set_title(panel.title, fontsize=9.5, pad=16)
        _quiet(axes)
    all_axes[0].set_yticks(range(len(models)), models, fontsize=9)
    all_axes[0].invert_yaxis()
    for axes in all_axes:
        axes.tick_params(axis="y", length=0)
    _save(figure, path)


def plot_learning_curves(path: Path, rounds: Curves, distillation: Curves | None, *, metric: str, title: str) -> None:
    """Draws both arms' validation over the mutual rounds, and the domain arm's over its distillation, to a PNG."""
    n = 1 + (distillation is not None)
    figure = Figure(figsize=(5.6 if n == 1 else 9.2, 3.5), layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    all_axes = figure.subplots(1, n, sharey=True, squeeze=False, width_ratios=[3, 2][:n])[0]
    names = ("mutual rounds", "then from the chosen LM: epochs")
    for axes, curves, name in zip(all_axes, (rounds, distillation), names):
        for arm, values in curves.values.items():
            colour, style = ARM[arm], {"domain": "o-", "lm": "s-"}[arm]
            label = {"domain": "domain arm", "lm": "LM arm"}[arm]
            axes.plot(range(len(values)), values, style, color=colour, markersize=4, linewidth=1.6, label=label)
            at = curves.chosen.get(arm)
            if at is not None and at < len(values):
                axes.plot(at, values[at], "o", mfc="none", mec=colour, mew=1.4, markersize=11)
        for arm, (label, value) in curves.alone.items():
            axes.axhline(value, color=ARM[arm], linestyle=":", linewidth=1.3, alpha=0.8, label=label)
        step = max(1, len(curves.phases) // 12)
        axes.set_xticks(range(0, len(curves.phases), step), curves.phases[::step], fontsize=7.5)
        axes.set_xlabel(name, fontsize=9)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        _quiet(axes)
    all_axes[0].set_ylabel(f"{metric}, validation", fontsize=9)
    all_axes[0].legend(fontsize=8, frameon=False, loc="best")
    _save(figure, path)


def _quiet(axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110, metadata={"Software": None})
