"""The pictures of a report: learning curves of both arms by round, and bars by model with their chance levels.

Blue is the domain arm's family, orange the LM arm's; the pair is told apart by every common kind of colour vision.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from bdlm_jax.report.claims import Claim
from bdlm_jax.report.finished_run import (
    FEWEST_TARGETS,
    STAGE_WORDS,
    Finished,
    chance_of,
    curve_notes,
    distill_epochs,
    is_control,
    mean_and_spread,
    n_targets,
    phase_names,
    sorted_models,
)
from bdlm_jax.report.glance import Standing
from bdlm_jax.report.tables import number
from bdlm_jax.runtime.files import replacing

COLOURS = {
    "item_pop": "#b3b3b3", "mf": "#9ecae1", "text_lm": "#fdd0a2", "ids_lm": "#fdae6b",
    "bdlm_domain_unrefreshed": "#4292c6", "bdlm_domain": "#08519c", "bdlm_lm": "#d94801",
}  # fmt: skip
ALONE = "#6baed6"  # the domain model alone, whichever it is
ARM = {"domain": ("domain arm", "#08519c", "o-"), "lm": ("LM arm", "#d94801", "s-")}
_MARK = {"bdlm": "a", "distill": "b"}  # of what `curve_notes` explains
_GREY = "#555555"
BAR_METRICS = ("hr@1/cand20", "hr@1/cand100", "ndcg@10/full")
# Of twins the AUC: a model without any means to tell them apart ties, which HR@1 counts as lost.
SLICE_METRIC = {"twins": "auc/pair", "cold": "hr@1/cold20", "knowledge": "hr@1/knowledge20"}


def draw(runs: Sequence[Finished], folder: Path, *, prefix: str = "") -> dict[str, str]:
    """Draws what the runs have numbers for; returns the line of Markdown that shows each on a page beside `folder`."""
    first = f"{runs[0].title}, seed {runs[0].seed}"
    title = f"{runs[0].title}, {len(runs)} seeds" if len(runs) > 1 else first
    bars = {metric: ("all", metric) for metric in BAR_METRICS if n_targets(runs, "all", metric)}
    sliced = {
        f"{part}: {metric}": (part, metric)
        for part, metric in SLICE_METRIC.items()
        if n_targets(runs, part, metric) >= FEWEST_TARGETS
    }
    slices = _draw_bars(runs, sliced, title=f"Where one source does not suffice: {title}")
    pictures = {
        "learning_curves": ("learning curves of both arms by round", _draw_learning(runs[0], title=first)),
        "models": ("every model, all targets", _draw_bars(runs, bars, title=f"All targets: {title}")),
        "slices": ("twins, cold and knowledge items", slices),
    }
    lines = {}
    for name, (caption, figure) in pictures.items():
        if figure is not None:
            with replacing(folder / f"{prefix}{name}.png") as partial:
                figure.savefig(partial, format="png", dpi=110, metadata={"Software": None})
            lines[name] = f"![{caption}]({folder.name}/{prefix}{name}.png)"
    return lines


def draw_glance(found: Mapping[str, Sequence[Standing]], path: Path) -> str:
    """Draws both arms' margins over their strongest baseline and control, and returns the line that shows them.

    Nothing for less than two experiments, or where no arm was judged; `found` is of `glance.standings`.
    """
    kinds, many = {"baseline": "over the strongest baseline", "control": "over the strongest control"}, len(found) > 1
    found = {heading: both for heading, both in found.items() if any(one.baseline or one.control for one in both)}
    if not (found and many):
        return ""
    size = (3.6 * len(kinds) + 3.2, 0.5 * len(found) + 1.7)
    figure, all_axes = _panels("What BDLM is worth, by experiment", len(kinds), size=size)
    for axes, (kind, words) in zip(all_axes, kinds.items()):
        for row, both in enumerate(found.values()):
            for standing in both:
                if (claim := getattr(standing, kind)) is not None:
                    _draw_margin(axes, row, standing.arm.removeprefix("bdlm_"), claim)
        axes.axvline(0, color=_GREY, linewidth=1)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
        axes.margins(x=0.12)
        axes.set_title(words, fontsize=9.5)
    all_axes[0].set_yticks(range(len(found)), found, fontsize=8)
    all_axes[0].set_ylim(len(found) - 0.5, -0.5)
    styles = {"markersize": 5, "linewidth": 1.4}
    made = [
        Line2D([], [], color=colour, marker=style[0], label=label, **styles) for label, colour, style in ARM.values()
    ]
    figure.legend(
        handles=made, fontsize=8, frameon=False, loc="outside lower left", ncols=2, title_fontsize=8, alignment="left",
        title="Margins with their 95 % intervals over users; hollow: no claim, or one seed.",
    )  # fmt: skip
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110, metadata={"Software": None})
    return f"![both arms beside their strongest baseline and control]({path.parent.name}/{path.name})"


def _draw_margin(axes, row: int, arm: str, claim: Claim) -> None:
    _, colour, style = ARM[arm]
    margin, sure = claim.margin, claim.verdict in ("higher", "lower")
    y = row + (0.17 if arm == "domain" else -0.17)
    axes.plot([margin.low, margin.high], [y, y], color=colour, linewidth=1.4)
    axes.plot(margin.value, y, style[0], color=colour, mfc=colour if sure else "white", markersize=5)
    axes.annotate(
        claim.against, (margin.high, y), (4, 0), textcoords="offset points", fontsize=6.5, color=_GREY, va="center",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
    )  # fmt: skip


def _draw_bars(runs: Sequence[Finished], panels: Mapping[str, tuple[str, str]], *, title: str) -> Figure | None:
    """Horizontal bars by model, a panel for each {title: (slice, metric)}."""
    if not panels:
        return None
    rows = [row for row in sorted_models(runs) if not is_control(row)] or sorted_models(runs)
    shown = {
        name: {row: cell for row in rows if (cell := mean_and_spread(runs, (row, *at)))[0] >= 0}
        for name, at in panels.items()
    }
    models = list(dict.fromkeys(model for cells in shown.values() for model in cells))
    figure, all_axes = _panels(title, len(panels), size=(3.4 * len(panels) + 1.6, 0.34 * len(models) + 1.3))
    for axes, (name, cells) in zip(all_axes, shown.items()):
        place = [models.index(model) for model in cells]
        value, spread = zip(*((mean, spread or 0.0) for mean, spread in cells.values()))
        chance = chance_of(runs[0], panels[name][1])
        axes.barh(place, value, color=[COLOURS.get(model, ALONE) for model in cells], height=0.72)
        axes.set_xlabel(_error_bars(runs, spread), fontsize=8, color=_GREY)
        if any(spread):
            axes.errorbar(value, place, xerr=spread, fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
        right = max([v + s for v, s in zip(value, spread)] + [chance or 0, 1e-3])
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        for y, v, s in zip(place, value, spread):
            x = v + s + right * 0.02
            axes.text(x, y, number(v), va="center", fontsize=8, color="#222222", zorder=4, bbox=box)
        for y in set(range(len(models))).difference(place):
            axes.text(right * 0.02, y, "not measured", va="center", fontsize=8, color=_GREY, style="italic")
        if chance is not None:
            axes.axvline(chance, color=_GREY, linestyle="--", linewidth=1)
            axes.annotate(
                f"chance {number(chance)}", (chance, 1), (0, 1), xycoords=("data", "axes fraction"),
                textcoords="offset points", fontsize=7.5, color=_GREY, ha="center", va="bottom",
            )  # fmt: skip
        axes.set_xlim(0, right * 1.2)
        axes.set_title(name, fontsize=9.5, pad=16)
    all_axes[0].set_yticks(range(len(models)), models, fontsize=9)
    all_axes[0].invert_yaxis()
    for axes in all_axes:
        axes.tick_params(axis="y", length=0)
    return figure


def _error_bars(runs: Sequence[Finished], spread: Sequence[float]) -> str:
    if not any(spread):
        return "one seed: no error bars" if len(runs) == 1 else ""
    return "error bars: deviation over seeds" if len(runs) > 1 else "error bars: 95 % interval over targets"


def _draw_learning(run: Finished, *, title: str) -> Figure | None:
    """Both arms' validation over the mutual rounds, and the domain arm's over its distillation."""
    stages = {stage: (run.best(stage), run.facts["curves"].get(stage)) for stage in STAGE_WORDS}
    if not all(stages["bdlm"]):
        return None
    shown = {stage: made for stage, made in stages.items() if all(made)}
    alone = {"domain": run.domain_model, "lm": "ids_lm"}
    reached, notes = {arm: best for arm, stage in alone.items() if (best := run.best(stage))}, curve_notes(run)
    size, widths = (2.0 + 3.6 * len(shown), 3.5 + 0.16 * len(notes)), [3 - (stage != "bdlm") for stage in shown]
    figure, all_axes = _panels(title, len(shown), size=size, width_ratios=widths)
    for axes, (stage, (best, curves)) in zip(all_axes, shown.items()):
        for arm, values in curves.items():
            label, colour, style = ARM[arm]
            axes.plot(range(len(values)), values, style, color=colour, markersize=4, linewidth=1.6, label=label)
            at = best[arm]["phase"] if arm in best else len(values)
            if at < len(values):
                axes.plot(at, values[at], "o", mfc="none", mec=colour, mew=1.4, markersize=11)
        for arm, found in reached.items():
            line = {"color": ARM[arm][1], "linestyle": ":", "linewidth": 1.3, "alpha": 0.8}
            axes.axhline(found[arm]["value"], label=f"{alone[arm]} alone", **line)
        last, epochs = stage == "distill", range(len(curves.get("domain", ())))
        phases = [str(distill_epochs(run.config, n)) for n in epochs] if last else phase_names(run.config, stage)
        step = -(-len(phases) // (10 if last else 8 if stage == "bdlm" else 5))  # more of them would touch
        shown_phases = range((len(phases) - 1) % step, len(phases), step)
        axes.set_xticks(shown_phases, [phases[n] for n in shown_phases])
        if stage in notes:
            at, place = (0, curves["domain"][0]), {"va": "bottom", "textcoords": "offset points"}
            aside = {"xytext": (-5, 4), "ha": "right"} if stage == "distill" else {"xytext": (5, 4), "ha": "left"}
            axes.annotate(_MARK[stage], at, fontsize=9, color=_GREY, **aside, **place)  # where no curve leads
        axes.margins(x=0.1)
        axes.set_xlabel(STAGE_WORDS[stage].lower(), fontsize=9)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    all_axes[0].set_ylabel(f"{run.config['select']}, validation", fontsize=9)
    # Below the axes, where they cover no curve.
    said = "\n".join(f"{_MARK[stage]}: {note}" for stage, note in notes.items() if stage in shown)
    figure.legend(
        *all_axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower left", ncols=4,
        title=said, title_fontsize=8, alignment="left",
    )  # fmt: skip
    return figure


def _panels(title: str, n: int, *, size: tuple[float, float], width_ratios=None):
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    all_axes = figure.subplots(1, n, sharey=True, squeeze=False, width_ratios=width_ratios)[0]
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.set_axisbelow(True)
    return figure, all_axes
