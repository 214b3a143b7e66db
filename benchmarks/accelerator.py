"""What a GPU or TPU does with this package: one command, parts that end in minutes, results kept as they come.

    python benchmarks/accelerator.py --out runs/accelerator [--minutes 9] [--parts agreement,lm_step] \
        [--data ml-1m=movielens=DIR] [--data gowalla=adjacency=DIR]
    python benchmarks/accelerator.py --out runs/tiny --size tiny          # every part on a CPU, to see that it works

Each part is a process of its own and writes OUT/PART.json after every row; OUT/results.md is made anew after each part,
and by `--table` alone, of rows and notes (notes.json) that were kept. A part that is out of time keeps its rows.
Without `--data` graphs of the same sizes are drawn, and what needs the real interactions is left out. Torch's side is
measured where torch sees the same device.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # experiments/ and the other benchmarks lie beside the package

# What is worth most comes first; seconds that a part may take, and below which it is not begun.
LIMITS = {
    "agreement": (90, 30), "lightgcn": (70, 40), "lm_step": (120, 60), "llm": (120, 60),
    "lm_step_torch": (150, 60), "first_step": (90, 40), "quickstart": (240, 60), "gowalla": (420, 60),
    "ml1m": (470, 120),
}  # fmt: skip


class Rows:
    """A part's rows, in a file that is whole after each of them."""

    def __init__(self, path: Path, seconds: float):
        self.path, self.rows, self.deadline = path, [], time.monotonic() + seconds

    def add(self, what: str, value, unit: str = "", wanted: str = "") -> None:
        """Notes one figure; `wanted` is the bound or target beside which it is read."""
        row = {"what": what, "value": value, "unit": unit, "wanted": wanted}
        self.rows.append(row)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.rows, indent=1))
        partial.replace(self.path)
        print(f"{self.path.stem}: {what}: {_shown(value)} {unit}", flush=True)

    @property
    def left(self) -> float:
        """Seconds until the part must have ended."""
        return self.deadline - time.monotonic()


def run_part(name: str, out: Path, *, size: str, data: dict, seconds: float) -> None:
    """Runs one part in this process; only such a process touches the device."""
    import accelerator_parts as parts_of

    rows = Rows(out / f"{name}.json", seconds)
    rows.add("device", parts_of.device(), wanted=json.dumps(versions()))
    spent = time.process_time()
    parts_of.PARTS[name](rows, SimpleNamespace(tiny=size == "tiny", data=data))
    rows.add("this part", seconds - rows.left, "s")
    rows.add("this part, of the CPU", time.process_time() - spent, "s")


def versions() -> dict[str, str]:
    """Versions of what a figure depends on, and the driver's where there is one."""
    found = {"python": platform.python_version(), "cores": str(len(os.sched_getaffinity(0)))}
    for name in ("jax", "jaxlib", "torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        found["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        found["driver"] = "none"
    return found


def write_table(out: Path, notes: dict[str, str]) -> None:
    """Makes results.json and results.md of what the parts have written so far."""
    names = [*LIMITS, *(name for name in notes if name not in LIMITS)]  # parts of other days are kept beside today's
    found = {name: json.loads(path.read_text()) for name in names if (path := out / f"{name}.json").exists()}
    lines = ["# What was measured on an accelerator", "", f"`{' '.join(['python', *sys.argv])}`"]
    for name, rows in found.items():
        first, *rest = rows
        lines += ["", f"## {name}", "", f"{first['value']}; {first['wanted']}", ""]
        lines += ["| what | value | wanted |", "|---|---:|---|"]
        lines += [f"| {row['what']} | {_shown(row['value'])} {row['unit']} | {row['wanted']} |" for row in rest]
        lines += ["", notes[name]] if name in notes else []
    lines += ["", *[f"* {name}: {note}" for name, note in notes.items() if name not in found]]
    (out / "results.json").write_text(json.dumps({"parts": found, "notes": notes}, indent=1))
    (out / "results.md").write_text("\n".join(lines) + "\n")


def _shown(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def main(words=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(LIMITS))
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all parts together")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=KIND=PATH", help="kinds of load_source")
    parser.add_argument("--here", action="store_true", help="the parts in this process, without their time limits")
    parser.add_argument("--table", action="store_true", help="measures nothing: OUT/results.md of what lies in OUT")
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)  # of the one part of a process
    arguments = parser.parse_args(words)
    names = arguments.parts.split(",")
    if unknown := [name for name in names if name not in LIMITS]:
        parser.error(f"there is no part {unknown[0]}; there are {', '.join(LIMITS)}.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.table:
        kept = arguments.out / "notes.json"
        return write_table(arguments.out, json.loads(kept.read_text()) if kept.exists() else {})
    data = {name: (kind, path) for name, kind, path in (entry.split("=", 2) for entry in arguments.data)}
    options = {"size": arguments.size, "data": data}
    if arguments.seconds:
        return run_part(names[0], arguments.out, **options, seconds=arguments.seconds)
    end, notes = time.monotonic() + 60 * arguments.minutes, {}
    for name in names:
        limit, least = LIMITS[name]
        left = min(limit, end - time.monotonic() - 5)
        (arguments.out / f"{name}.json").unlink(missing_ok=True)
        if arguments.here:
            run_part(name, arguments.out, **options, seconds=limit)
        elif left < least:
            notes[name] = "not begun: no time was left"
        else:
            command = [sys.executable, __file__, "--parts", name, "--out", str(arguments.out), "--seconds", str(left)]
            command += ["--size", arguments.size, *[word for entry in arguments.data for word in ("--data", entry)]]
            # JAX takes what it needs, up to nearly all: torch stands beside it.
            shares = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".92"}
            streams = {"stderr": subprocess.STDOUT, "env": os.environ | shares}
            with open(arguments.out / f"{name}.log", "w") as log:
                try:
                    code = subprocess.run(command, stdout=log, timeout=left, **streams).returncode
                    if code:
                        notes[name] = f"ended with exit code {code}; the end of {name}.log says why"
                except subprocess.TimeoutExpired:
                    notes[name] = f"stopped after {left:.0f} s; the rows are those that were ready"
        write_table(arguments.out, notes)
    print((arguments.out / "results.md").read_text())


if __name__ == "__main__":
    main()
