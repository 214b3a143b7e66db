"""python -m bdlm_jax.recommend --workdir DIR --user ID | --history "title or id; …" --arm domain|lm -k 10 [--explain],
or --all --out recs.csv for every user.

With a domain model whose score is an inner product neither JAX nor the language model is needed.
"""

import argparse
import json
import sys
from collections.abc import Sequence

import bdlm_jax
from bdlm_jax.runtime.door import REFUSED, refuse
from bdlm_jax.serving import answers, artefact, index
from bdlm_jax.serving.all_users import write_all


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bdlm_jax.recommend", description="Recommends from a finished run.")
    parser.add_argument("--workdir", required=True, help="the run directory")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--user", help="a raw user id")
    who.add_argument("--history", help="a new user: item ids or titles, oldest first, separated by ; or ,")
    who.add_argument("--all", action="store_true", help="every user, into the file --out")
    parser.add_argument("--out", help="of --all: a new .csv or .parquet file (the latter with the extra parquet)")
    parser.add_argument("--arm", default="", help="domain or lm of BDLM, or another model of the run (default: domain)")
    parser.add_argument(
        "--index", type=int, nargs="?", const=index.SEARCHED, metavar="N",
        help=f"look through one in N parts of the items (default {index.SEARCHED}; extra index: faiss)",
    )  # fmt: skip
    parser.add_argument("-k", type=int, default=10, help="how many items (default 10)")
    parser.add_argument("--explain", action="store_true", help="the LM arm writes about each item (generated text)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of that text; 0 (default): the likeliest token")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw among the likeliest tokens of this probability")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    given = parser.parse_args(arguments)
    if given.all != (given.out is not None):
        parser.error("--all and --out go together")
    if given.all and given.explain:
        parser.error("--all does not --explain")
    try:
        run = bdlm_jax.load(given.workdir)
        catalogue, arm = run.catalogue, run.arm(given.arm)
        if given.index is not None:
            arm = index.with_index(arm, one_in=given.index)
            print(index.describe_index(arm), file=sys.stderr)
        if given.all:
            of = artefact.identity(given.workdir, given.arm) + (
                f" by an index of one in {given.index}" if given.index else ""
            )
            print(write_all(catalogue, arm, given.out, k=given.k, of=of))
            return 0
        who = {"histories": [given.history]} if given.user is None else {"users": [given.user]}
        how = {name: getattr(given, name) for name in ("k", "explain", "temperature", "top_p", "seed")}
        (rows,) = answers.recommend(catalogue, arm, **who, **how)
    except REFUSED as error:
        return refuse(error)
    as_text = answers.as_words if given.explain else answers.as_table
    print(json.dumps(rows, indent=1) if given.format == "json" else as_text(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
