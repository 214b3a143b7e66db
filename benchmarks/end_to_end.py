"""A whole experiment from its data to its report, as a user runs it: seconds, CPU seconds and memory.

python benchmarks/end_to_end.py --config experiments/beauty_itemgcn.py --path data/amazon-beauty-standard --workdir DIR

DIR is new, so that nothing is resumed; what the run says goes to DIR.log. Twenty minutes to an hour.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from timing import cores

from bdlm_jax.report.finished_run import read_run

ROOT = Path(__file__).resolve().parents[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--path", default="", help="the data's folder; empty: the experiment's own")
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given, more = parser.parse_known_args()  # more: the run's own arguments, such as --config.KEY=VALUE
    if given.workdir.exists():
        parser.error(f"{given.workdir} exists: give a new --workdir, or remove it first.")
    command = [sys.executable, "-m", "bdlm_jax.main", "--config", given.config, "--workdir", str(given.workdir)]
    command += [f"--config.data.path={given.path}"] * bool(given.path) + [f"--config.seed={given.seed}", *more]
    began, environment = time.perf_counter(), os.environ | {"PYTHONPATH": str(ROOT)}
    with Path(f"{given.workdir}.log").open("w", encoding="utf-8") as log:
        done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        sys.exit(f"the run ended with {done.returncode}; see {given.workdir}.log")
    total, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    trained = read_run(given.workdir).facts["seconds"]
    rows = [*trained.items(), ("data, tests, report", total - sum(trained.values())), ("**together**", total)]
    print(f"{' '.join(command[3:])}; cores used: {cores()}\n\n| stage | seconds |\n|---|---:|")
    print("\n".join(f"| {name} | {seconds:,.0f} |" for name, seconds in rows))
    cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss / 1e6
    print(f"\nOf the processor {cpu:,.0f} seconds; at its peak {peak:.1f} GB.")


if __name__ == "__main__":
    main()
