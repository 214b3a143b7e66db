"""Writes docs/performance.md: every table is what one command printed, kept as JSON in docs/performance.

    python benchmarks/performance.py run [PART ...]     # measures these parts (all, without any), and writes the page
    python benchmarks/performance.py                    # writes the page of what is kept

Data sets lie in data/ (README: "By name"). Peers are measured where they are installed: torch is an extra (`parity`),
RecBole is nobody's dependency (`pip install recbole`).
"""

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs" / "performance"
HEAD = """# Speed

Written by `python benchmarks/performance.py`; each table is what its command printed, kept in docs/performance with
where it ran.

The machine was shared: other work ran on its two cores all the while. So what runs on one core is told in seconds of
the processor, which others do not lengthen (a cache that they fill does, a little); peers are measured in turns with
ours, and the median counts. Seconds of the clock stand only where it says so. A ratio above 1 means that ours is
faster. Nothing here is of an accelerator: `benchmarks/accelerator.py` measures one, and what it found on an H200, as
far as it came in twice a quarter of an hour, is in [performance/h200](performance/h200/results.md).
"""


class Part(NamedTuple):
    """One table of the page: its title, its command behind `python benchmarks/`, and what its numbers say."""

    title: str
    command: str
    says: str = ""


PARTS = {
    "sequence": Part(
        "Next-item training of a small sequence model, beside torch and RecBole",
        "sequence_step.py --data ml-1m=movielens=data/ml-1m --steps 2 --repeats 3",
        """
The aim was twice RecBole's rate. Most of the factor is the method: RecBole makes a row of every prefix of a history,
reads the whole row and learns one item from it; ours and the torch model learn an item at each place of a window.
Beside the same model in torch, whose first loss is compared with ours before the clock starts, it is compiled code
against eager.
""",
    ),
    "lightgcn": Part(
        "An epoch of LightGCN, beside LightGCN-PyTorch's method and RecBole",
        "lightgcn_epoch.py --data ml-1m=movielens=data/ml-1m --batches 3 --repeats 3",
        """
The aim was five times the peers' rate at their batch, and is not reached on one core: a step is six propagations,
each of which reads two million rows of 256 bytes (half a gigabyte, the first line's sixth part), and neither side can
leave one out. Before neighbours' sums were made once (docs/architecture.md) the epoch took 95.7 seconds of this core
in the same command. With the batch that ML-1M is trained with here, an epoch has 8 steps in place of 483.
""",
    ),
    "lightgcn_gowalla": Part(
        "The same on Gowalla",
        "lightgcn_epoch.py --data gowalla=adjacency=data/gowalla --batches 2 --repeats 2",
        """
Here too the aim of five is not reached at the peers' batch: 1.6 million rows of 256 bytes are read by each of a step's
six propagations (2.5 GB), where both sides spend nearly all of their time.
""",
    ),
    "lm": Part(
        "A step of the language model at equal work, beside transformers",
        "lm_step.py --work equal --size 30m --tokens 1024 --length 256 --rounds 3 --steps 1",
        """
The aims were 1.0 beside eager torch and .9 beside the compiled, and are not reached. Where ours spends its time, parts
compiled alone, CPU seconds of the same core (once, by a script that is not kept): the gradient 2.09, of which the
decoder is 1.94 (forward .63) and the head with its loss .25, and AdamW .16. Within them the products with weights take
1.40 (the second table), attention in its plain form .32, gates and norms .07; about .35 is left for rotations,
transposes and copies of what the backward pass needs. torch's products are .07 faster, and its compiler makes all else
in .56 seconds where XLA takes .93.
""",
    ),
    "evaluate": Part(
        "Full ranking of MovieLens-1M",
        "evaluate.py --data ml-1m=movielens=data/ml-1m --peer-users 200 --repeats 2",
        """
The aim was 2 seconds.
""",
    ),
    "evaluate_gowalla": Part(
        "Full ranking of Gowalla, all cases",
        "evaluate.py --data gowalla=adjacency=data/gowalla --cases 0 --peer-users 50 --repeats 1",
        """
The aim was 60 seconds.
""",
    ),
    "serving": Part(
        "Answers: one user, many users, a click, a catalogue of a million items",
        "serving.py --users 6040 --items 3706 --batches 256 --clients --seconds 4 --large 1000000",
        """
The aim for a million items was 10 ms, and is reached about half of the time: this run has 10.6, another of the same
command minutes before 9.4, both on one core of a machine that did nothing else. The exact answer goes through the sieve
(bdlm_jax/serving/sieve.py), which reads 64 MB in place of 256 MB of float32: that took 20.1 ms on a machine that other
work shared, where the sieve took 14.1. The best of each group is found within the products' own pass: alternately in
one process, the search then took 9.6 to 10.1 ms, and 9.9 to 10.6 before (medians of 60 users, six times each). The
products of whole numbers take XLA 8.5 to 11 ms of it, though numpy finds the maximum of their 64 MB in 4.2. Of 12,101
items of Beauty, 12 pass it (three trained models, medians of 300 users each, with groups of 64; they are of 16 now).

What else was tried for the products (once, by a script that is not kept; CPU ms, a million rows of 64): float32 by
numpy 15.4, by XLA 29; int8 by XLA's own product 166, bfloat16 137; the sum written out, in int32 9.1 by columns and
10.8 by blocks of 1,024 rows, in pairs of int16 9.6 and 10.0, in float32 11 to 12, of bfloat16 152; vectors of 512 bits
change little. Bounds by columns do not help: with tables rotated to their main axes, the first 16 columns and the norm
of the rest leave 25 to 84 % of the items to be looked at (medians of 200 users each, five trained models of
MovieLens-1M and Beauty), the first 32 still 5 to 27 %, in scattered rows.

The index goes through a sixteenth of its parts. The tables of this command have no clusters; of those three trained
models' ten best it finds 80, 83 and 86 %, with `--index 8` 91 to 92, with `--index 4` 97.
""",
    ),
    "load": Part(
        "Loading a gigabyte of safetensors",
        "load_weights.py",
        """
The aim was one second. It took 6.87 CPU seconds before (docs/results_2026-11.md), and a tensor beside the weights. Each
leaf is now written once, from the mapped file, transposed on the way, which transformers' layout spares it; its weights
stay mapped. Transposing is what is left: matrices of two bytes go through NumPy at 1.4 GB a second here in strips of
128 rows, and through XLA at 2.0, where copying takes 12 (once, by a script that is not kept; the other core was busy).
""",
    ),
    "growth": Part(
        "What work costs as it grows",
        "growth.py --plot docs/performance/growth.png",
        """
Most of it is linear, or below where a fixed part still weighs (the data path, a few users' ranking). An answer is
steeper below 200,000 items, presumably while a part of its table still lies in a cache, and linear from there on (a
million items took 20.1 ms, before there was a sieve). Attention makes the LM's step quadratic in the history only where
a history is long, which 512 tokens are not yet; width counts twice in each matrix, so that its slope goes from 1
towards 2. The jumps of LightGCN's step are no law: XLA had fused a table of neighbours' sums into what reads it, and
made its rows again for each reader, on some graphs ten times. That is mended since, and measured again below.
""",
    ),
    "growth_lightgcn": Part(
        "LightGCN's step as it grows, with its tables made once",
        "growth.py --only=LightGCN_step --plot docs/performance/growth_lightgcn.png",
        """
Batches of 2,048, so that a step has a fixed part; what grows with the graph is the reading of neighbours' rows, the
same in both directions and each layer.
""",
    ),
    "data_path": Part(
        "Twenty million interactions of a million users, from CSV to the first step",
        "data_path.py run runs/shop --lm",
        """
The aim was five minutes and 8 GB on two cores. The data were made by `python benchmarks/data_path.py make runs/shop`.
Seconds of the clock, beside one run of another experiment on one of the cores. With a dozen other processes the first
five rows took 503 seconds of it (the processor's were as many as here), and the peak was 7.47 GB.
""",
    ),
    "batches": Part(
        "The language model's batches, beside Grain",
        "batches.py",
        """
Ours takes a batch's rows from arrays by one index each, and a step by its number, so that a run resumes where it was by
computing nothing; Grain makes a dict a row and stacks them, which is right where a row must be read or decoded. So the
seekable batches stay.
""",
    ),
    "end_to_end_beauty": Part(
        "Standard Beauty end to end: LightGCN, SASRec, ItemGCN, the ids-only LM and BDLM with both its lessons",
        "end_to_end.py --config experiments/beauty_itemgcn.py --path data/amazon-beauty-standard --workdir runs/beauty",
        """
The aim was half of the 64 minutes that experiments/beauty.py took on two cores, with fewer models; another run had the
other core.
""",
    ),
    "end_to_end_ml1m": Part(
        "MovieLens-1M end to end: ItemPop, MF, LightGCN, both LMs alone and BDLM, a general text read first",
        "end_to_end.py --config experiments/ml1m.py --path data/ml-1m --workdir runs/ml1m "
        "--config.pretrain.corpus=data/imdb-reviews/reviews.txt.xz",
        """
The aim was half of the 36 to 55 minutes that it took before; it is 31, with both cores to itself but for an editor's
commands, and seven tenths of it are the steps of the two LMs that read ids (a step beside a peer's: above). Of one
seed: the run's own test had the domain arm at .174, the LM arm at .173 and the ids-only LM at .170 in NDCG@10/full.
experiments/ml1m_pool.py with LightGCN, SASRec, the ids-only LM and BDLM took 3,422 seconds of one core, another run on
the other (seed 3; SASRec 18 minutes, the ids-only LM 13, BDLM's LM 19).
""",
    ),
}


def measure(name: str) -> None:
    """Runs a part's command and keeps what it printed, with where it ran."""
    words = PARTS[name].command.split()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "benchmarks" / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{name}: {' '.join(command)} ended with {done.returncode}.")
    kept = {
        "command": PARTS[name].command,
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "of_cores": os.cpu_count(),
        "python": platform.python_version(),
        "printed": done.stdout.strip(),
    }
    KEPT.mkdir(exist_ok=True)
    (KEPT / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def page() -> str:
    """Makes the page of the parts that are kept, in their order, and names those that are not."""
    made, missing = [HEAD], []
    for name, part in PARTS.items():
        if (path := KEPT / f"{name}.json").is_file():
            made.append(section(name, part, json.loads(path.read_text(encoding="utf-8"))))
        else:
            missing.append(f"* {part.title}: `python benchmarks/{part.command}`\n")
    return "\n".join(made) + ("\n## Not measured yet\n\n" + "".join(missing) if missing else "")


def section(name: str, part: Part, kept: dict) -> str:
    where = (
        f"{kept['date']}, {kept['cores']} of {kept['of_cores']} cores ({kept['processor']}), Python {kept['python']}"
    )
    says = f"\n{part.says.strip()}\n" if part.says else ""
    if (KEPT / f"{name}.png").is_file():
        says = f"\n![{part.title}](performance/{name}.png)\n{says}"
    return f"## {part.title}\n\n`python benchmarks/{kept['command']}`\n\n{where}.\n\n{kept['printed']}\n{says}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def main(words: list[str]) -> None:
    if (words and words[0] != "run") or not {*words[1:]} <= {*PARTS}:
        sys.exit(f"{__doc__}\nParts: {', '.join(PARTS)}")
    for name in words[1:] or (PARTS if words else ()):
        measure(name)
    (ROOT / "docs" / "performance.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
