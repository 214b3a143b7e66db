"""report.html: one self-contained page of finished runs, with the tables of results.md, pictures and provenance.

The sections are those of `tables.group_lines`, so that page and Markdown say the same; every word of a run is escaped.
"""

import json
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files

from flax.traverse_util import flatten_dict

from bdlm_jax.report import drawings, markup
from bdlm_jax.report.claims import Claim, n_judged
from bdlm_jax.report.drawings import Bar, Curve
from bdlm_jax.report.finished_run import (
    STAGE_WORDS,
    Finished,
    curve_notes,
    default_settings,
    distill_epochs,
    phase_names,
)
from bdlm_jax.report.glance import glance_lines, standings
from bdlm_jax.report.item_map import item_map
from bdlm_jax.report.summary import five_lines, main_metric
from bdlm_jax.report.tables import group_lines, number, provenance_lines
from bdlm_jax.runtime.files import write_text


def write_page(
    path: str | os.PathLike,
    title: str,
    groups: Mapping[str, Sequence[Finished]],
    claims: Mapping[str, Sequence[Claim]],
    *,
    head: Sequence[str] = (),
) -> None:
    """Writes the page of groups of runs that differ in the seed alone, with the claims of each by its heading.

    `head` is Markdown that stands first.
    """
    found = standings(groups, claims)
    nearest = [
        (s.heading, claim) for both in found.values() for s in both for claim in (s.baseline, s.control) if claim
    ]
    first = _forest({f"{heading}: {_who(claim)}": claim for heading, claim in nearest}, "Each arm's smallest margins")
    lines = [*head, "", *glance_lines(groups, found, markup.slug, "![glance]")]
    main, foot = [markup.blocks(lines, title, {"glance": first})], ['<h2 id="provenance">Provenance</h2>']
    many = len(groups) > 1
    named = {name: f"![{name}]" for name in ("models", "slices", "learning_curves")}
    for heading, runs in groups.items():
        level, prefix = ("h3", markup.slug(heading) + "-") if many else ("h2", "")
        lines = group_lines(runs, named, claims[heading], family=n_judged(claims))
        begin = next(n for n, line in enumerate(lines) if line.startswith("#"))
        metric = main_metric(runs, claims[heading])
        pictures = {
            "models": _forest(
                {_who(c): c for c in claims[heading] if c.judged and c.metric == metric},
                f"Margins by {metric}, all targets",
            ),
            "learning_curves": _curves(runs),
            "map": _map(runs),
        }
        if many:
            main.append(f'<h2 id="{prefix[:-1]}">{escape(heading)}</h2>')
            foot.append(f"<h3>{escape(heading)}</h3>")
        said = five_lines(runs, claims[heading], family=n_judged(claims))
        rows = "".join(f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in said.items())
        main.append(f'<dl class="five">{rows}</dl>')
        main.append(markup.sections([*lines[begin:], "## Item vectors", "![map]"], level, prefix, pictures))
        foot += [markup.blocks([*lines[:begin], *provenance_lines(runs)], heading), _provenance(runs)]
    found = re.findall(r'<h2 id="(.*?)">(.*?)</h2>', "".join(main + foot))
    links = "".join(f'<li><a href="#{name}">{words}</a></li>' for name, words in found)
    style, script = (files("bdlm_jax.report").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    write_text(
        path,
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title>\n'
        f"<style>\n{style}</style></head>\n<body>\n"
        f'<header><h1>{escape(title)}</h1><nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
        f"<main>{''.join(main)}</main>\n<footer>{''.join(foot)}</footer>\n<script>\n{script}</script>\n</body></html>\n",
    )


def _who(claim: Claim) -> str:
    return f"{claim.model} against {claim.against}"


def _forest(claims: Mapping[str, Claim], title: str) -> str:
    """Margins as a picture, each by what it is called."""
    bars = []
    for label, claim in claims.items():
        m, p = claim.margin, f"{claim.adjusted:.3f}" if claim.adjusted >= 0.001 else "< .001"
        said = (f"{m.value:+.1%} ({m.low:+.1%} to {m.high:+.1%})", p, claim.verdict)
        arm = "lm" if claim.model.endswith("lm") else "domain"
        bars.append(Bar(label, arm, m.value, m.low, m.high, said))
    if not bars:
        return ""
    arms = drawings.legend([("line domain", "domain arm"), ("line lm", "LM arm")])
    return f"{arms}{drawings.draw_forest(bars, f'{title}, with 95 % intervals')}"


def _curves(runs: Sequence[Finished]) -> str:
    """Validation by phase of both arms over the rounds, then of the domain arm over its distillation."""
    curves = {
        stage: [
            Curve(arm, values, run.best(stage).get(arm, {}).get("phase"))
            for run in runs
            for arm, values in run.facts["curves"].get(stage, {}).items()
        ]
        for stage in STAGE_WORDS
    }
    curves = {stage: made for stage, made in curves.items() if made}
    if not curves:
        return "<p>No run of these went through mutual rounds: there is no curve.</p>"
    alone = {"domain": runs[0].domain_model, "lm": "ids_lm"}
    found = {arm: [run.best(stage)[arm]["value"] for run in runs if run.best(stage)] for arm, stage in alone.items()}
    levels = {arm: statistics.fmean(values) for arm, values in found.items() if values}
    heights = [value for made in curves.values() for curve in made for value in curve.values]
    ticks = drawings.nice_ticks(min(heights + list(levels.values())), max(heights + list(levels.values())))
    config, panels = runs[0].config, []
    for stage, made in curves.items():
        n = max(len(curve.values) for curve in made)
        last = stage == "distill"
        names = [str(distill_epochs(config, phase)) for phase in range(n)] if last else phase_names(config, stage)
        names += [""] * (n - len(names))
        words = STAGE_WORDS[stage]
        picture = drawings.draw_curves(f"{words}: {config['select']} on validation", made, names, levels, ticks)
        panels.append(f"<figure><figcaption>{escape(words)}</figcaption>{picture}</figure>")
    entries = [("line domain", "domain arm"), ("line lm", "LM arm")]
    entries += [(f"level {arm}", f"{alone[arm]} alone, {number(value)}") for arm, value in levels.items()]
    many = ", a line for each seed" if len(runs) > 1 else ""
    noted = " ".join(f"{note[0].upper()}{note[1:]}." for note in curve_notes(runs[0]).values())
    told = f"<p>{escape(config['select'])} on validation after every phase{many}. {escape(noted)}</p>"
    return f'{told}{drawings.legend([*entries, ("circle", "chosen")])}<div class="panels">{"".join(panels)}</div>'


def _map(runs: Sequence[Finished]) -> str:
    made = next((made for run in runs if (made := item_map(run))), None)
    if made is None:
        return "<p>The tables of a trained BDLM are not kept here, so there is no map of the items.</p>"
    words = (
        "One plane for all panels: the first two principal components of all tables, each centred, scaled and turned "
        "towards the domain arm's last one. Before: each arm alone. After: as they stand at test."
    )
    return f"<p>{words} {escape(drawings.agreement_line(made))}</p>{drawings.draw_map(made)}"


def _provenance(runs: Sequence[Finished]) -> str:
    """Hashes, settings that differ from the defaults, versions."""
    hashes = [("data", run.data["sha256"]) for run in runs]
    hashes += [(f"candidates {name}", sha) for run in runs for name, sha in sorted(run.data["candidates"].items())]
    versions = [(name, str(value)) for run in runs for name, value in sorted(run.environment.items())]
    words, settings = _settings(runs)
    tables = (
        ("Hashes (SHA-256)", ["what", "hash"], dict.fromkeys(hashes)),
        (words, ["setting", "value", "default"], settings),
        ("Versions, revision and machine", ["what", "value"], dict.fromkeys(versions)),
    )
    return "".join(markup.table(*each, kind="wrapped") for each in tables)


def _settings(runs: Sequence[Finished]) -> tuple[str, list[tuple[str, str, str]]]:
    """The settings that differ from experiments/defaults.py; all of them where that file is not at hand."""
    flat = flatten_dict(runs[0].config, sep=".")
    if len(runs) > 1:
        flat["seed"] = ", ".join(str(run.seed) for run in runs)
    if not (usual := default_settings()):
        return "All settings", [(name, _plain(value), "") for name, value in sorted(flat.items())]
    differ = sorted(name for name, value in flat.items() if name not in usual or usual[name] != value)
    rows = [(name, _plain(flat[name]), _plain(usual.get(name, "none"))) for name in differ]
    return "Settings that differ from experiments/defaults.py", rows


def _plain(value) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
