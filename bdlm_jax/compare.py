"""python -m bdlm_jax.compare RUN RUN … [--metric ndcg@10/full] [--baseline NAME] [--out FILE.md] [--html FILE]

Runs that differ in the seed alone count as one experiment; margins are paired by user over seeds.
"""

import argparse
import sys
from collections.abc import Sequence

from bdlm_jax.report.comparison import compare_runs
from bdlm_jax.report.finished_run import read_run
from bdlm_jax.report.page import write_page
from bdlm_jax.runtime.door import REFUSED, refuse
from bdlm_jax.runtime.files import write_text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bdlm_jax.compare", description=__doc__.split("\n")[2])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="finished run directories, or kept ones of docs/runs")
    parser.add_argument("--metric", default="ndcg@10/full")
    parser.add_argument("--baseline", nargs="+", default=(), metavar="NAME", help="rows that all others are held to")
    parser.add_argument("--out", metavar="FILE.md", help="write the page here, beside printing it")
    parser.add_argument("--html", metavar="FILE", help="write it as a page for a browser")
    given = parser.parse_args(arguments)
    try:
        made = compare_runs([read_run(folder) for folder in given.runs], metric=given.metric, baselines=given.baseline)
        text = "\n".join(made.lines()) + "\n"
        if given.out:
            write_text(given.out, "# Comparison\n\n" + text)
        if given.html:
            write_page(given.html, "Comparison", {"": made.runs}, {"": made.claims})
    except REFUSED as error:
        return refuse(error)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
