"""What people read of finished runs: results.md, report.html and plots of one run, and docs/results.md over many.

`python -m bdlm_jax.report --keep RUN_DIR … --out docs/runs` copies what pages are made from, small enough to commit;
`--collect docs/runs/*/* --out docs/results.md` groups runs that differ in the seed alone. Every number comes from
results.json and per-user counts; nothing is typed by hand.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bdlm_jax.report import page, plots
from bdlm_jax.report.claims import n_judged, page_claims
from bdlm_jax.report.finished_run import PAGE, group_runs, read_run
from bdlm_jax.report.glance import glance_lines, standings
from bdlm_jax.report.keep import keep
from bdlm_jax.report.summary import summary_lines
from bdlm_jax.report.tables import group_lines, plain_table, provenance_lines
from bdlm_jax.runtime.door import REFUSED, refuse
from bdlm_jax.runtime.files import CHECKSUMS, write_checksums, write_text
from bdlm_jax.types import InputError


def write_report(folder: str | os.PathLike, results: dict | None = None) -> str:
    """Writes results.md, report.html and plots/*.png of a finished run, and returns its main table for a terminal.

    `results` is what results.json holds (None: read it).
    """
    run = read_run(folder, results)
    pictures, claims = plots.draw([run], run.folder / "plots"), page_claims({"": [run]})
    lines = [f"# Results: {run.title}, seed {run.seed}", "", *_section([run], pictures, claims[""], n_judged(claims))]
    _write(run.folder / PAGE, lines)
    if (run.folder / CHECKSUMS).exists():
        write_checksums(run.folder, [PAGE], keep=True)
    page.write_page(run.folder / "report.html", lines[0].lstrip("# "), {"": [run]}, claims)
    return plain_table([run])


def collect(
    folders: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    title: str,
    command: str,
    head=(),
    include=(),
    html: str | None = None,
) -> None:
    """Writes one page over many finished runs; runs that differ in the seed alone become one section.

    Plots go to plots/ beside it, each with the page's name before its own; `command` is how it was made; the text files
    of `head` (what the tables say, in words) stand first, and those of `include` (tables that benchmarks print) last,
    verbatim.
    """
    out, groups = Path(out), group_runs([read_run(folder) for folder in folders])
    claims = page_claims(groups)
    lines = [f"<!-- generated, do not edit: {command} -->", f"# {title}", ""]
    lines += [
        *_verbatim(head),
        "Every number is read from run directories; ± is the standard deviation over seeds.",
        "",
    ]
    found = standings(groups, claims)
    picture = plots.draw_glance(found, out.parent / "plots" / f"{out.stem}_glance.png")
    lines += glance_lines(groups, found, _anchor, picture)
    for heading, runs in groups.items():
        pictures = plots.draw(runs, out.parent / "plots", prefix=f"{out.stem}_{_anchor(heading)}_")
        section = _section(runs, pictures, claims[heading], n_judged(claims), level="###")
        lines += [f"## {heading}", "", *section]
    lines += _verbatim(include)
    _write(out, lines)
    if html:
        page.write_page(html, title, groups, claims, head=_verbatim(head))


def _section(runs, pictures, claims, family: int, level: str = "##") -> list[str]:
    """Five lines, what the numbers say at length, and where they come from."""
    whole = group_lines(runs, pictures, claims, family=family, level=level)
    return [*summary_lines(runs, claims, family=family), *whole, f"{level} Provenance", "", *provenance_lines(runs), ""]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bdlm_jax.report", description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", help="write results.md, report.html and the plots of this finished run again")
    parser.add_argument("--collect", nargs="+", metavar="RUN_DIR", help="finished runs for one page")
    parser.add_argument("--keep", nargs="+", metavar="RUN_DIR", help="copy finished runs, made small, to --out")
    parser.add_argument("--out", help="the page (docs/results.md), or where kept runs go (docs/runs)")
    parser.add_argument("--html", metavar="FILE", help="with --collect: the same as one page for a browser")
    parser.add_argument("--title", default="Results")
    parser.add_argument("--head", nargs="+", default=[], metavar="FILE", help="text that stands first, verbatim")
    parser.add_argument("--include", nargs="+", default=[], metavar="FILE", help="text that follows, verbatim")
    given = parser.parse_args(arguments)
    if sum(map(bool, (given.workdir, given.collect, given.keep))) != 1:
        parser.error("give one of --workdir DIR, --collect RUN_DIR … and --keep RUN_DIR …")
    words = sys.argv[1:] if arguments is None else arguments
    command = f"python -m bdlm_jax.report {shlex.join(words)}"
    try:
        if given.workdir:
            write_report(given.workdir)
        for folder in given.keep or ():
            print(keep(folder, given.out or "docs/runs"))
        if given.collect:
            words = {"title": given.title, "head": given.head, "include": given.include, "html": given.html}
            out = given.out or "docs/results.md"
            collect(given.collect, out, command=command, **words)
            print(out)
    except REFUSED as error:
        return refuse(error)
    return 0


def _verbatim(files: Sequence[str | os.PathLike]) -> list[str]:
    lines = []
    for path in files:
        if not Path(path).is_file():
            raise InputError(f"{path} is no file to include; write it, or run the benchmark that does.")
        lines += [*Path(path).read_text(encoding="utf-8").strip().split("\n"), ""]
    return lines


def _anchor(heading: str) -> str:
    return "".join(c for c in heading.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _write(path: Path, lines: Sequence[str]) -> None:
    kept = [line for line, before in zip(lines, [None, *lines]) if line or before]  # one blank line at a time
    write_text(path, "\n".join(kept).rstrip() + "\n")


if __name__ == "__main__":
    sys.exit(main())
