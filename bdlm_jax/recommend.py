"""python -m bdlm_jax.recommend --workdir DIR --user ID | --history "title or id; …" --arm domain|lm -k 10 [--explain].

With the domain arm neither JAX nor the language model is needed.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from bdlm_jax.runtime.door import REFUSED, refuse
from bdlm_jax.serving.answers import ARMS, as_table, as_words, recommend


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bdlm_jax.recommend", description="Recommends from a finished run.")
    parser.add_argument("--workdir", required=True, help="the run directory")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--user", help="a raw user id")
    who.add_argument("--history", help="a new user: item ids or titles, oldest first, separated by ; or ,")
    parser.add_argument("--arm", choices=ARMS, default="domain")
    parser.add_argument("-k", type=int, default=10, help="how many items (default 10)")
    parser.add_argument("--explain", action="store_true", help="the LM arm writes about each item (generated text)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of that text; 0 (default): the likeliest token")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw among the likeliest tokens of this probability")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    given = vars(parser.parse_args(arguments))
    shown = given.pop("format")
    try:
        rows = recommend(**given)
    except REFUSED as error:
        return refuse(error)
    as_text = as_words if given["explain"] else as_table
    print(json.dumps(rows, indent=1) if shown == "json" else as_text(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
