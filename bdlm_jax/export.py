"""python -m bdlm_jax.export --workdir DIR --format domain|hf --out DIR2 [--arm NAME]: a run for other programs.

`domain` is two tables whose inner products are the scores, for NumPy and vector indexes; `hf` is a Hugging Face
directory whose vocabulary ends in the users and items. A folder appears whole or not at all.
"""

import argparse
import sys
from collections.abc import Sequence

from bdlm_jax.runtime.door import REFUSED, refuse
from bdlm_jax.serving.exports import export_domain, export_hf

FORMATS = {"domain": export_domain, "hf": export_hf}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bdlm_jax.export", description="Exports a finished run.")
    parser.add_argument("--workdir", required=True, help="the run directory")
    parser.add_argument("--format", choices=FORMATS, required=True, help="domain: two tables; hf: a language model")
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--arm", default="", help="another model of the run than BDLM's, by its name in the results")
    given = parser.parse_args(arguments)
    try:
        folder = FORMATS[given.format](workdir=given.workdir, out=given.out, arm=given.arm)
    except REFUSED as error:
        return refuse(error)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{path.stat().st_size:>14,}  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
