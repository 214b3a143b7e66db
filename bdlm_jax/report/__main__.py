"""What people read of finished runs: results.md and plots of one run, and docs/results.md over many.

`python -m bdlm_jax.report --collect RUN_DIR … --out docs/results.md` groups runs that differ in the seed alone. Every
number comes from results.json and per_user/*.npz; nothing is typed by hand.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bdlm_jax.report import plots
from bdlm_jax.report.finished_run import group_runs, read_run
from bdlm_jax.report.tables import group_lines
from bdlm_jax.runtime.files import write_text
from bdlm_jax.types import InputError


def write_report(folder: str | os.PathLike, results: dict | None = None) -> None:
    """Writes results.md and plots/*.png of one finished run; `results` is what results.json holds (None: read it)."""
    run = read_run(folder, results)
    pictures = plots.draw([run], run.folder / "plots")
    lines = [f"# Results: {run.name}, seed {run.seed}", "", *group_lines([run], pictures)]
    _write(run.folder / "results.md", lines)


def collect(
    folders: Sequence[str | os.PathLike], out: str | os.PathLike, *, title: str, command: str, include=()
) -> None:
    """Writes one page over many finished runs; runs that differ in the seed alone become one section.

    Plots go to plots/ beside it; `command` is how it was made; the text files of `include` (tables that benchmarks
    print) follow verbatim.
    """
    out, groups = Path(out), group_runs([read_run(folder) for folder in folders])
    lines = [f"<!-- generated, do not edit: {command} -->", f"# {title}", ""]
    lines += ["Every number is read from run directories; ± is the standard deviation over seeds.", ""]
    lines += [f"* [{heading}](#{_anchor(heading)})" for heading in groups] + [""]
    for heading, runs in groups.items():
        pictures = plots.draw(runs, out.parent / "plots", prefix=_anchor(heading) + "_")
        lines += [f"## {heading}", "", *group_lines(runs, pictures, level="###")]
    for path in include:
        if not Path(path).is_file():
            raise InputError(f"{path} is no file to include; run the benchmark that writes it.")
        lines += [*Path(path).read_text(encoding="utf-8").strip().split("\n"), ""]
    _write(out, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bdlm_jax.report", description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", help="write results.md and the plots of this finished run again")
    parser.add_argument("--collect", nargs="+", metavar="RUN_DIR", help="finished runs for one page")
    parser.add_argument("--out", default="docs/results.md", help="that page")
    parser.add_argument("--title", default="Results")
    parser.add_argument("--include", nargs="+", default=[], metavar="FILE", help="text that follows verbatim")
    given = parser.parse_args(arguments)
    if not (given.workdir or given.collect):
        parser.error("give --workdir DIR or --collect RUN_DIR …")
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
    return 0


def _anchor(heading: str) -> str:
    return "".join(c for c in heading.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _write(path: Path, lines: Sequence[str]) -> None:
    kept = [line for line, before in zip(lines, [None, *lines]) if line or before]  # one blank line at a time
    write_text(path, "\n".join(kept).rstrip() + "\n")


if __name__ == "__main__":
    sys.exit(main())
