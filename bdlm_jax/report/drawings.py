"""The pictures of report.html as inline SVG, coloured by the page's own style sheet: curves, margins, the item map.

Legends and captions are HTML beside a picture, so that they wrap on a narrow screen and never cover a curve.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from bdlm_jax.report.item_map import NEIGHBOURS, ItemMap

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 280, 46, 14, 10, 50  # of a panel of curves
SIDE = 300  # of a panel of the map
SHARES = (0.25, 0.5, 0.75)  # of the items that have interactions: where the next colour begins


class Bar(NamedTuple):
    """One row of the forest: whose margin, which arm's colour, value and interval; `said`: margin, p and claim."""

    label: str
    arm: str
    value: float
    low: float
    high: float
    said: tuple[str, str, str]


class Curve(NamedTuple):
    """A line through one value a phase; `ring` marks the chosen phase."""

    arm: str
    values: Sequence[float]
    ring: int | None = None


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover low … high with `most` steps or fewer."""
    span = max(high - low, 1e-9)
    size = 10.0 ** math.floor(math.log10(span / most))
    step = next(size * times for times in (1, 2, 5, 10, 20) if math.ceil(span / (size * times)) < most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * n, 10) for n in range(first, last + 1)]


def draw_curves(
    said: str, curves: Sequence[Curve], names: Sequence[str], lines: Mapping[str, float], ticks: Sequence[float]
) -> str:
    """One panel of curves by phase; `names` are the phases' (two lines each at most), `lines` are levels by arm."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x(phase):
        return LEFT + 16 + phase * (right - LEFT - 32) / max(len(names) - 1, 1)

    def y(value):
        return bottom - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - TOP)

    parts, digits = [], max(len(f"{tick:g}".partition(".")[2]) for tick in ticks)
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{right}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.{digits}f}</text>')
    step = math.ceil(len(names) * max(len(line) for name in names for line in name.split("\n")) * 7 / (right - LEFT))
    for phase in range((len(names) - 1) % step, len(names), step):
        for row, line in enumerate(names[phase].split("\n")):
            at = f'x="{x(phase):.1f}" y="{bottom + 18 + 15 * row}"'
            parts.append(f'<text {at} text-anchor="middle">{escape(line)}</text>')
    for arm, value in lines.items():
        parts.append(f'<path class="level {arm}" d="M{LEFT} {y(value):.1f}H{right}"/>')
    for arm, values, ring in curves:
        places = [(x(phase), y(value)) for phase, value in enumerate(values)]
        parts.append(f'<path class="curve {arm}" d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b in places)}"/>')
        parts += [_mark(arm, place) for place in places]
        if ring is not None and ring < len(places):
            parts.append('<circle class="ring {}" cx="{:.1f}" cy="{:.1f}" r="8"/>'.format(arm, *places[ring]))
    return _svg("curves", said, WIDTH, HEIGHT, parts)


def draw_forest(bars: Sequence[Bar], caption: str) -> str:
    """Margins with their intervals, one row each, on one axis; the rows are a table that screen readers read."""
    ends = [0.0, *(bar.low for bar in bars), *(bar.high for bar in bars)]
    ticks = nice_ticks(min(ends), max(ends), 5)

    def x(value):
        return f"{4 + 92 * (value - ticks[0]) / (ticks[-1] - ticks[0]):.2f}%"

    rows = []
    for bar in bars:
        line = f'<line class="{bar.arm}" x1="{x(bar.low)}" x2="{x(bar.high)}" y1="50%" y2="50%"/>'
        zero = f'<line class="zero" x1="{x(0)}" x2="{x(0)}" y1="0" y2="100%"/>'
        drawn = f'{zero}{line}<circle class="{bar.arm}" cx="{x(bar.value)}" cy="50%" r="4.5"/>'
        picture = f'<td><svg class="bar" aria-hidden="true">{drawn}</svg></td>'
        said = "".join(f"<td>{escape(words)}</td>" for words in bar.said)
        rows.append(f'<tr><th scope="row">{escape(bar.label)}</th>{picture}{said}</tr>')
    marks = "".join(f'<text x="{x(tick)}" y="13" text-anchor="middle">{_signed(tick)}</text>' for tick in ticks)
    axis = f'<tr class="axis" aria-hidden="true"><td></td><td><svg class="bar">{marks}</svg></td>{"<td></td>" * 3}</tr>'
    heads = ("model against another", "", "margin", "p (Holm)", "claim")
    head = "".join(f'<th scope="col">{words}</th>' for words in heads)
    return (
        f'<table class="forest"><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}{axis}</tbody></table>"
    )


def draw_map(made: ItemMap) -> str:
    """The panels of one item map, with what a pointer needs to name an item and to find it in the other panels."""
    everything = np.concatenate(list(made.points.values()))
    low, high = (np.quantile(everything, q) for q in (0.0005, 0.9995))
    scaled = {
        name: np.clip((xy_S2 - low) / max(high - low, 1e-12), 0, 1) * (SIDE - 16) + 8
        for name, xy_S2 in made.points.items()
    }
    popular = made.popularity_S
    bounds = np.quantile(popular[popular > 0], SHARES) if (popular > 0).any() else np.ones(len(SHARES))
    group_S = np.where(popular > 0, 1 + np.searchsorted(bounds, popular, side="left"), 0)
    panels = []
    for name, xy_S2 in scaled.items():
        parts = []
        for group in range(len(SHARES) + 2):
            path = "".join(f"M{a:.0f} {b:.0f}h0" for a, b in xy_S2[group_S == group])
            parts.append(f'<path class="dots g{group}" d="{path}"/>' if path else "")
        parts.append('<circle class="found" r="6" cx="-20" cy="-20"/>')
        said = f"Item vectors of the {name} on the plane, coloured by popularity"
        panels.append(f"<figure><figcaption>{escape(name)}</figcaption>{_svg('map', said, SIDE, SIDE, parts)}</figure>")
    data = {"titles": made.titles, "points": [np.rint(xy).astype(int).ravel().tolist() for xy in scaled.values()]}
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    return (
        f'<div class="itemmap">{legend(_popularity_words(popular, group_S))}<div class="panels four">{"".join(panels)}'
        f'</div><p class="named" aria-live="polite">Point at an item to read its title.</p>'
        f'<script type="application/json">{text}</script></div>'
    )


def agreement_line(made: ItemMap) -> str:
    """How far the two arms agree on neighbours, in words."""
    chance = NEIGHBOURS**2 / max(len(made.titles) - 1, 1)
    said = [f"{time} BDLM {value:.1f}" for time, value in made.agreement.items()]
    return (
        f"Of an item's {NEIGHBOURS} nearest items in one arm, so many are among its {NEIGHBOURS} nearest in the other: "
        f"{', '.join(said)} (by chance {chance:.1f})."
    )


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """A line of (class, words) with a sample of each class before its words."""
    return f'<ul class="legend">{"".join(f"<li><i class={kind!r}></i>{escape(t)}</li>" for kind, t in entries)}</ul>'


def _popularity_words(popular: np.ndarray, group_S: np.ndarray) -> list[tuple[str, str]]:
    words = []
    for group in np.unique(group_S):
        low, high = popular[group_S == group].min(), popular[group_S == group].max()
        words.append((f"dot g{group}", f"{low:,}" if low == high else f"{low:,} to {high:,}"))
    return [(kind, f"{text} interactions" if n == 0 else text) for n, (kind, text) in enumerate(words)]


def _mark(arm: str, place: tuple[float, float]) -> str:
    a, b = place
    if arm == "lm":
        return f'<rect class="{arm}" x="{a - 3.5:.1f}" y="{b - 3.5:.1f}" width="7" height="7"/>'
    return f'<circle class="{arm}" cx="{a:.1f}" cy="{b:.1f}" r="3.8"/>'


def _signed(share: float) -> str:
    return f"{share:+.0%}" if share else "0%"


def _svg(kind: str, said: str, width: int, height: int, parts: Sequence[str]) -> str:
    box = f'viewBox="0 0 {width} {height}" role="img" aria-label="{escape(said)}"'
    return f'<svg class="{kind}" {box}>{"".join(parts)}</svg>'
