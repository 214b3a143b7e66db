"""From a table of interactions on disk to the first training step: seconds and peak memory, stage by stage.

    python benchmarks/data_path.py make DIR --interactions 20000000 --users 1000000 --items 200000 [--parquet]
    python benchmarks/data_path.py run DIR [--lm]

`make` writes a shop's log: few users do much, few items sell much, rows in order of time. `run` goes the way of a run
of experiments/own_data.py as far as LightGCN's first step, with `--lm` as far as the first step of a language model of
ids; the table on stdout is Markdown. Linux only (peak memory from /proc).
"""

import argparse
import logging
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # experiments/ lies beside the package
AT_ONCE = 1_000_000  # rows that are drawn and written together
LEAST = 4  # interactions of every user
WORDS = ("red", "blue", "green", "small", "large", "light", "soft", "plain", "wooden", "steel")
THINGS = ("lamp", "chair", "kettle", "jacket", "towel", "bottle", "rug", "shelf", "knife", "clock")


def make(folder: Path, *, n_interactions: int, n_users: int, n_items: int, parquet: bool, seed: int = 0) -> None:
    """Writes interactions and items; every user and every item is there."""
    if n_interactions < max(LEAST * n_users, n_items):
        sys.exit(f"{n_interactions} interactions are too few for {n_users} users and {n_items} items.")
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    activity_U = np.cumsum(generator.lognormal(0.0, 1.0, n_users))
    popularity_I = np.cumsum(np.arange(1, n_items + 1) ** -0.8)
    user_of, item_of = generator.permutation(n_users), generator.permutation(n_items)
    sure_E = generator.permutation(np.repeat(np.arange(n_users, dtype=np.int32), LEAST))
    for start in range(0, n_interactions, AT_ONCE):
        n = min(AT_ONCE, n_interactions - start)
        user_E = user_of[np.searchsorted(activity_U, generator.random(n) * activity_U[-1])]
        item_E = item_of[np.searchsorted(popularity_I, generator.random(n) * popularity_I[-1])]
        first = sure_E[start : start + n]
        user_E[: len(first)] = first
        named = np.arange(start, min(start + n, n_items))
        item_E[: len(named)] = named
        time_E = 1_600_000_000 + start + np.arange(n)
        _write(folder, "interactions", {"user_id": user_E, "item_id": item_E, "timestamp": time_E}, start, parquet)
    words = (generator.choice(WORDS, n_items), generator.choice(THINGS, n_items), range(n_items))
    titles = ["{} {} {}".format(*parts) for parts in zip(*words)]
    _write(folder, "items", {"item_id": np.arange(n_items), "title": titles}, 0, parquet)


def _write(folder, name, columns, start, parquet):
    """Appends rows to one CSV file, or writes them as a part of a parquet folder."""
    named = [f"p{item}" for item in columns["item_id"].tolist()]
    if parquet:
        folder = folder / f"{name}.parquet"
        folder.mkdir(exist_ok=True)
        pd.DataFrame(columns | {"item_id": named}).to_parquet(folder / f"{start // AT_ONCE:05}.parquet", index=False)
        return
    values = [named if column == "item_id" else list(values) for column, values in columns.items()]
    with open(folder / f"{name}.csv", "a" if start else "w", encoding="utf-8") as file:
        file.write("" if start else ",".join(columns) + "\n")
        file.writelines(map((",".join(["{}"] * len(values)) + "\n").format, *values))


class Timeline:
    """Seconds and highest memory of each stage, printed as it ends."""

    def __init__(self):
        self.began = self.last = time.monotonic()
        self.spent = time.process_time()
        print(
            "| stage | seconds | CPU seconds | since the start | peak memory so far (GB) |\n|---|---:|---:|---:|---:|"
        )

    def ended(self, stage: str) -> None:
        now, spent = time.monotonic(), time.process_time()
        peak = int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9
        row = f"{now - self.last:.1f} | {spent - self.spent:.1f} | {now - self.began:.1f} | {peak:.2f}"
        print(f"| {stage} | {row} |", flush=True)
        self.last, self.spent = now, spent


def run(path: Path, *, lm: bool, config=None) -> None:
    """Goes from the files to the first step of LightGCN, and of an LM of ids, as a run of the config does."""
    timeline = Timeline()
    import jax  # its time is a part of what a user waits for
    import jax.numpy as jnp

    from bdlm_jax.mutual.options import DomainWeights, LMWeights, Meeting
    from bdlm_jax.run import build, rows
    from bdlm_jax.run.rates import lm_rates
    from bdlm_jax.types import TrainState
    from experiments import own_data

    config = config or own_data.get_config()
    config.data.path = str(path)
    timeline.ended("imports")
    with tempfile.TemporaryDirectory() as folder:
        run = build.start_run(config, Path(folder))
    data = run.data
    sizes = f"{data.n_users:,} users, {data.n_items:,} items, {len(data.split.interactions):,} interactions"
    timeline.ended(f"read, k-core, split, candidates, tokenizer, texts: {sizes}")

    def first_step(arm, params, view):
        state = TrainState(params, arm.optimizer.init(params), jnp.int32(0), jax.random.key(0))
        compiled = arm.compiled
        placed = compiled.place_constants(view), compiled.place_constants(arm.constants)
        state, metrics = compiled.run(compiled.place_state(state), arm.batch(0), *placed)
        return float(metrics["loss"])

    model = build.make_arm(run, "lightgcn")
    timeline.ended("LightGCN's graph")
    arm = build.make_domain_arm(run, "lightgcn", model, None, DomainWeights(regularisation=1e-4), rate=1e-3)
    timeline.ended("LightGCN's edges, sampler and guards")
    first = {name: arm.constants[name][: config.domain.batch_size] for name in ("edge_user_E", "edge_item_E")}
    arm = arm._replace(constants=arm.constants | first)  # an epoch is one compiled loop: here it is one step
    loss = first_step(arm, build.init_tables(run, "lightgcn", model), {})
    timeline.ended(f"LightGCN's first step (loss {loss:.4f})")
    if lm:
        packed = rows.training_rows(run, kind="ids")
        timeline.ended(f"the LM's {len(packed):,} rows of ids")
        rates = lm_rates(lambda step: 1e-3, shared=1.0)
        arm = build.make_lm_arm(run, packed, Meeting(run.lm), LMWeights(text=0.0), rates)
        tables = build.measure_tables(run, build.DOT_ARM, build.init_tables(run, "lm", build.DOT_ARM), reads="layer0")
        params = build.init_params(run, "lm", tables, build.make_decoder(run, None))
        loss = first_step(arm, params, {})
        timeline.ended(f"the LM's first step (loss {loss:.4f})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--interactions", type=int, default=20_000_000)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--parquet", action="store_true")
    parser.add_argument("--lm", action="store_true", help="as far as a language model's first step")
    arguments = parser.parse_args()
    if arguments.what == "make":
        sizes = {"n_interactions": arguments.interactions, "n_users": arguments.users, "n_items": arguments.items}
        make(arguments.folder, **sizes, parquet=arguments.parquet)
    else:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        run(arguments.folder, lm=arguments.lm)


if __name__ == "__main__":
    main()
