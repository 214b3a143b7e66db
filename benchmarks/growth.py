"""What work costs as it grows: users, items, interactions, histories and the language model, each doubled twice.

    taskset -c 0 python benchmarks/growth.py [--plot growth.png] [--only LM_step]

Everything is drawn at random and small; each time is the least of a few, after a first that compiles. A slope is
log2(time at twice the size / time): 1 is linear.
"""

import argparse
import functools
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import timing
from lightgcn_epoch import OurLightGCN
from lm_step import make_equal_ours
from sequence_step import OurSASRec

from bdlm_jax.data import splits
from bdlm_jax.data.candidates import make_candidates
from bdlm_jax.data.interactions import k_core, make_interactions
from bdlm_jax.data.splits import TEST, TRAIN, VALIDATION
from bdlm_jax.domain.arm import inner_products
from bdlm_jax.evaluation.evaluate import CatalogueScorer, chunk_users, evaluate_full
from bdlm_jax.lm.config import LMConfig
from bdlm_jax.serving import answers
from bdlm_jax.serving.artefact import ServedDomain
from bdlm_jax.serving.catalogue import Catalogue

BASE = {"users": 4000, "items": 2000, "interactions": 80_000}
REPEATS = 3


@functools.cache
def log(users: int, items: int, interactions: int) -> tuple[np.ndarray, np.ndarray]:
    """Different pairs; few users do much, few items are taken often."""
    draw = np.random.default_rng(0)
    activity_U, popularity_I = np.cumsum(draw.lognormal(0, 1, users)), np.cumsum(np.arange(1, items + 1) ** -0.7)
    user_E = np.searchsorted(activity_U, draw.random(2 * interactions) * activity_U[-1])
    item_E = np.searchsorted(popularity_I, draw.random(2 * interactions) * popularity_I[-1])
    _, first = np.unique(user_E * items + item_E, return_index=True)
    some = np.sort(first)[:interactions]
    return user_E[some], item_E[some]


@functools.cache
def make_split(**sizes: int) -> splits.Split:
    return splits.leave_one_out(make_interactions(*log(**sizes)))


def least(function) -> float:
    """Milliseconds of the processor."""
    function()
    return 1e3 * min(timing.seconds(function) for _ in range(REPEATS))


def data_path(**sizes: int) -> float:
    raw = log(**sizes)

    def prepare():
        split = splits.leave_one_out(k_core(make_interactions(*raw), user=3, item=3))
        make_candidates(split, TEST, n_negatives=99, seed=0, name="sampled")

    return least(prepare)


def lightgcn_step(**sizes: int) -> float:
    user_E, item_E = log(**sizes)
    n_users, n_items, batch, n_steps = sizes["users"], sizes["items"], 2048, 8
    ours = OurLightGCN(user_E, item_E, n_users, n_items, "auto")
    return least(ours.make_epoch(n_steps * batch, batch)) / n_steps


def sasrec_step(length: int = 50, **sizes: int) -> float:
    ours = OurSASRec(make_split(**sizes), width=64, length=length, batch=64, steps=1)
    return least(ours.run)


def full_ranking(**sizes: int) -> float:
    split, draw = make_split(**sizes), np.random.default_rng(0)
    n_users, n_items = split.interactions.n_users, split.interactions.n_items
    user_UD, item_ID = (jnp.asarray(draw.standard_normal((n, 64), np.float32)) for n in (n_users, n_items))
    scorer = CatalogueScorer(jax.jit(lambda user_B: inner_products(user_UD[user_B], item_ID)))
    chunk = chunk_users(512, n_items)
    cases, seen = split.cases(TEST), split.histories(TRAIN, VALIDATION)
    return least(lambda: evaluate_full(scorer, *cases, seen, chunk=chunk))


def one_answer(items: int) -> float:
    draw = np.random.default_rng(0)
    arm = ServedDomain("mf", *(draw.standard_normal((n, 64), np.float32) for n in (64, items)), np.ones(items))
    names = [f"u{n}" for n in range(64)], [f"i{n}" for n in range(items)], [""] * items
    catalogue = Catalogue(*names, np.arange(65) * 50, draw.integers(items, size=64 * 50))
    return least(lambda: [answers.recommend(catalogue, arm, users=[f"u{n}"]) for n in range(20)]) / 20


def lm_step(length: int = 128, layers: int = 4, width: int = 128) -> float:
    sizes = {"n_heads": width // 64, "n_kv_heads": width // 64, "mlp_width": 3 * width}
    config = LMConfig(4096, width=width, n_layers=layers, **sizes)
    tokens_SBL = np.random.default_rng(0).integers(4096, size=(2, 4, length)).astype(np.int32)
    step, _, _ = make_equal_ours(config, tokens_SBL)
    return least(functools.partial(step, 0))


def grown(of: str, **base: int):
    """The sizes with one of them once, twice and four times as large."""
    return [(n * base[of], base | {of: n * base[of]}) for n in (1, 2, 4)]


GROWTH = {  # what: (what takes the time, {what grows: its sizes})
    "data path": (data_path, {of: grown(of, **BASE) for of in BASE}),
    "LightGCN step": (lightgcn_step, {of: grown(of, **BASE) for of in BASE}),
    "SASRec step": (
        sasrec_step,
        {
            "items": grown("items", **BASE),
            "history": grown("length", length=25, users=200, items=2000, interactions=20_000),
        },
    ),
    "full ranking": (full_ranking, {of: grown(of, **BASE) for of in ("users", "items")}),
    "answer": (one_answer, {"items": grown("items", items=50_000)}),
    "LM step": (lm_step, {"history": grown("length", length=128), "layers": grown("layers", layers=4)}),
    "LM step, wider": (lm_step, {"width": grown("width", width=128, layers=4)}),
}


def measure(only: list[str]) -> list[tuple[str, str, list[int], list[float]]]:
    """Returns what, what grows, its three sizes, and the milliseconds of each."""
    curves = []
    for what, (function, growing) in GROWTH.items():
        if only and what.replace(" ", "_") not in only:
            continue
        for of, sizes in growing.items():
            times = [function(**given) for _, given in sizes]
            curves.append((what, of, [size for size, _ in sizes], times))
    return curves


def as_table(curves) -> str:
    rows = ["| what | what grows | sizes | ms | slopes |", "|---|---|---|---|---|"]
    for what, of, sizes, times in curves:
        slopes = [math.log2(after / before) for before, after in itertools.pairwise(times)]
        columns = (" · ".join(f"{value:{form}}" for value in values) for values, form in ((sizes, ","), (times, ".3g")))
        rows.append("| {} | {} | {} | {} | {} |".format(what, of, *columns, " · ".join(f"{s:.2f}" for s in slopes)))
    return "\n".join(rows)


def draw(curves, path: Path) -> None:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(what for what, *_ in curves))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3 * columns, 2.6 * rows), layout="constrained")
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(rows, columns, place, xscale="log", yscale="log")
        for what, of, _, times in curves:
            if what == name:
                axes.plot((1, 2, 4), np.divide(times, times[0]), "o-", label=of)
        axes.plot((1, 4), (1, 4), ":", color="grey", label="linear")
        axes.set(title=name, xticks=(1, 2, 4), yticks=(1, 2, 4, 8), xticklabels="124", yticklabels="1248")
        axes.minorticks_off()
        axes.legend(fontsize=7)
    figure.supxlabel("times as large")
    figure.supylabel("times as long")
    figure.savefig(path, dpi=110)


def main(words=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words_of = [what.replace(" ", "_") for what in GROWTH]
    parser.add_argument("--only", action="append", choices=words_of, help="these alone")
    parser.add_argument("--plot", type=Path, help="writes the curves there as a PNG")
    given = parser.parse_args(words)
    curves = measure(given.only)
    told = f"milliseconds, {timing.unit()}, least of {REPEATS}; {BASE} where nothing else is said"
    print(f"jax {jax.__version__}; {told}.\n")
    print(as_table(curves))
    if given.plot:
        draw(curves, given.plot)


if __name__ == "__main__":
    main()
