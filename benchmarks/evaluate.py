"""Full-ranking evaluation of a domain arm: ours beside a loop over users, as libraries such as RecBole rank on a CPU.

    python benchmarks/evaluate.py --data ml-1m=movielens=DIR --data gowalla=adjacency=DIR [--peer-users 2000]

Both rank every test case of the same histories from the same random tables of LightGCN: the time does not depend on
what a table holds. Where that would be more than 10^10 scores it is a fixed draw of the cases, as in a run, unless
`--cases 0` asks for all. Ours includes the propagation, the peer is given its result. Linux only (peak memory from
/proc).
"""

import argparse
import re
import statistics
from pathlib import Path

import jax
import numpy as np
import timing

from bdlm_jax.data import splits
from bdlm_jax.data.candidates import draw_cases
from bdlm_jax.data.interactions import Interactions
from bdlm_jax.data.readers import load_source
from bdlm_jax.data.splits import TEST, TRAIN, VALIDATION
from bdlm_jax.domain.arm import Inputs
from bdlm_jax.domain.models import make_arm
from bdlm_jax.evaluation import scorers
from bdlm_jax.evaluation.evaluate import chunk_users, evaluate_full
from bdlm_jax.mutual.sharing import init_shared
from bdlm_jax.run.ranked import MOST_SCORES

WIDTH = 64


def rank_user_by_user(user_UD, item_ID, user_N, target_N, seen) -> np.ndarray:
    """The peer: one user's scores, the seen ones at -inf, a full argsort, and the places of the user's targets."""
    indptr, item = seen
    order_N = np.argsort(user_N, kind="stable")
    rank_N = np.zeros(len(user_N), np.int64)
    for cases in np.split(order_N, np.flatnonzero(np.diff(user_N[order_N])) + 1):
        user = user_N[cases[0]]
        scores_I = item_ID @ user_UD[user]
        scores_I[item[indptr[user] : indptr[user + 1]]] = -np.inf
        place_I = np.empty(len(scores_I), np.int64)
        place_I[np.argsort(-scores_I)] = np.arange(len(scores_I))
        rank_N[cases] = place_I[target_N[cases]]
    return rank_N


def measure(name: str, kind: str, path: str, *, repeats: int, peer_users: int, chunk: int, cases: int) -> list[str]:
    """Times both on one data set and returns the table's rows."""
    data = load_source(kind, path)
    split = splits.leave_one_out(data) if isinstance(data, Interactions) else data
    n_users, n_items = split.interactions.n_users, split.interactions.n_items
    (user_N, target_N), seen = split.cases(TEST), split.histories(TRAIN, VALIDATION)
    whole, chunk = len(user_N), chunk_users(chunk, n_items)
    most = max(1, MOST_SCORES // n_items) if cases < 0 else cases or whole
    if whole > most:
        drawn = draw_cases(whole, most, seed=0, part=TEST)
        user_N, target_N = user_N[drawn], target_N[drawn]
    arm = make_arm("lightgcn", Inputs(WIDTH, n_users, n_items, *split.edges(TRAIN)), {})
    params = {"shared": init_shared(jax.random.key(0), n_users=n_users, n_items=n_items, width=WIDTH), "domain": {}}

    def ours():
        return evaluate_full(scorers.domain_scorer(arm, params), user_N, target_N, seen, chunk=chunk)

    def peer():
        return rank_user_by_user(user_UD, item_ID, user_N[some], target_N[some], seen)

    users = np.unique(user_N)
    some = np.isin(user_N, np.random.default_rng(0).permutation(users)[: peer_users or None])
    scale = len(users) / len(np.unique(user_N[some]))
    user_UD, item_ID = (np.asarray(scorers.domain_view(arm, params)[name]) for name in ("user", "item"))

    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    first, counts = _timed(ours)
    peak = int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9
    times = ([], [])
    for turn in range(repeats):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            if side == 0:
                times[0].append(_timed(ours)[0])
            else:
                seconds, rank_N = _timed(
                    lambda: rank_user_by_user(user_UD, item_ID, user_N[some], target_N[some], seen)
                )
                times[1].append(scale * seconds)
    # Two ways to sum 64 products differ in the last bits, which may exchange neighbours.
    moved = np.abs(rank_N - counts.better[some] - counts.equal[some])
    assert np.mean(moved > 2) < 1e-3, "the two do not rank alike"
    label = f"{name} ({len(users):,} users, {len(user_N):,} cases × {n_items:,} items)"
    label += f", drawn of {whole:,} cases" if len(user_N) < whole else ""
    ratio = statistics.median(times[1]) / statistics.median(times[0])
    return [
        f"| {label} | seconds | {timing.spread(times[0])} | {timing.spread(times[1])} | {ratio:.1f} |",
        f"| {label} | seconds, first call (it compiles) | {first:.3g} | | |",
        f"| {label} | peak memory of the process (GB) | {peak:.2f} | | |",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", required=True, metavar="NAME=KIND=PATH", help="kinds of load_source")
    parser.add_argument("--peer-users", type=int, default=0, help="time the peer on so many and scale; 0: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=512, help="users that ours scores at once")
    parser.add_argument("--cases", type=int, default=-1, help="so many at most; 0: all; -1: up to 10^10 scores")
    arguments = parser.parse_args()
    options = {name: getattr(arguments, name) for name in ("repeats", "peer_users", "chunk", "cases")}
    rows = [row for entry in arguments.data for row in measure(*entry.split("=", 2), **options)]
    scaled = f"timed on {arguments.peer_users:,} users and scaled" if arguments.peer_users else "over all users"
    print(
        f"jax {jax.__version__} on {jax.devices()[0].device_kind}; {timing.unit()}; numpy {np.__version__};"
        f" LightGCN, d={WIDTH}; {arguments.repeats} repeats in alternating order; median (min–max)."
        f" Peer: matvec, mask and argsort a user in numpy, {scaled}.\n"
    )
    print("| data | what | ours | peer | peer / ours |\n|---|---|---|---|---|")
    print("\n".join(rows))


def _timed(function):
    start = timing.clock()
    result = function()
    return timing.clock() - start, result


if __name__ == "__main__":
    main()
