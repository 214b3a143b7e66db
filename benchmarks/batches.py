"""The LM's stream of batches beside Grain's, over the same packed rows: batches a second, a resume, memory.

pip install grain
taskset -c 0 python benchmarks/batches.py      # 100,000 rows of 104 tokens, a minute

Grain's pipeline is its documented one: MapDataset.source(rows).seed(0).shuffle().repeat().batch(32), each row the dict
of its arrays; `to_iter_dataset` with its default threads is timed too. All give every row once an epoch.
"""

import argparse
import resource

import numpy as np
from timing import clock, seconds, spread, unit

from bdlm_jax.lm.packing import FIELDS, LISTS, Packed

BATCH, SEED, RESUMED = 32, 0, 12_345


def made_rows(n_rows: int, length: int) -> Packed:
    """Rows of one history each: every position predicts an item."""
    generator, at = np.random.default_rng(0), np.arange(length, dtype=np.int32)
    arrays = {"tokens": generator.integers(0, 10_000, (n_rows, length), dtype=np.int32)}
    arrays["positions"] = np.broadcast_to(at, (n_rows, length)).copy()
    arrays["segments"] = np.ones((n_rows, length), np.int32)
    widths = dict(zip((index for index, _ in LISTS), (length - 4, 16, 1, 1)))
    for index, target in LISTS:
        arrays[index] = np.broadcast_to(at[: widths[index]], (n_rows, widths[index])).copy()
        arrays[target] = generator.integers(0, 3_000, (n_rows, widths[index]), dtype=np.int32)
    return Packed(**arrays)


class Rows:
    """What Grain reads: a row by its number."""

    def __init__(self, packed: Packed):
        self._packed = packed

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return {name: getattr(self._packed, name)[row] for name in FIELDS}


def peak() -> float:
    """The most memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measure(name: str, take, n: int, resume, held: float) -> str:
    """A row of the table, of `n` batches in five parts; `held` is the peak before."""
    take(0)
    rates = []
    for start in range(1, n, n // 5):
        began = clock()
        for step in range(start, start + n // 5):
            take(step)
        rates.append(n // 5 / (clock() - began))
    return f"| {name} | {spread(rates, ',.0f')} | {1e3 * seconds(lambda: resume(RESUMED)):.1f} | {peak() - held:.0f} |"


def streams(packed: Packed):
    """(name, a batch by its step, the first batch of a stream resumed at a step) of ours and, if installed, Grain's."""

    def own(step):
        return packed.batch(step, batch_size=BATCH, seed=SEED)

    yield "packing.Packed.batch", own, own
    try:
        import grain
    except ModuleNotFoundError:
        return
    name = f"Grain {grain.__version__}, MapDataset"
    data = grain.MapDataset.source(Rows(packed)).seed(SEED).shuffle().repeat().batch(BATCH)
    shown = np.concatenate([data[step]["tokens"] for step in range(len(packed) // BATCH)])
    assert len(np.unique(shown, axis=0)) == len(shown)  # every row once
    yield name, data.__getitem__, data.__getitem__

    def resumed(step):
        stream = iter(data.to_iter_dataset())
        stream.set_state({"next_index": step})
        return next(stream)

    ahead = iter(data.to_iter_dataset())
    yield "… its to_iter_dataset()", lambda _: next(ahead), resumed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--length", type=int, default=104)
    parser.add_argument("--batches", type=int, default=2_000)
    given = parser.parse_args()
    packed = made_rows(given.rows, given.length)
    print(f"{given.rows:,} rows of {given.length} tokens, batches of {BATCH}; {unit()}; median (min–max).\n")
    print(f"| stream | batches a second | first batch of one resumed at step {RESUMED:,} (ms) | more memory (MB) |")
    print("|---|---:|---:|---:|")
    for name, take, resume in streams(packed):
        print(measure(name, take, given.batches, resume, peak()), flush=True)


if __name__ == "__main__":
    main()
