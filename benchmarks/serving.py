"""How fast a run answers: the domain arm a user, the LM arm by users at once, and HTTP requests of several clients.

    python benchmarks/serving.py [--workdir runs/ml1m | --users 6000 --items 3700 --lm-width 256 --lm-layers 4]

Without --workdir it serves random tables and a random language model of the sizes given, whose speed does not depend on
what they hold. Every answer is ten items to a known user, the seen ones left out, or to one who has just taken one
more; p50 and p99 are of single calls or requests. The server is a process of its own, as `python -m bdlm_jax.serving`
starts it; the clients share this one. `--large` asks tables of so many items, reads such a table once beside it, and
asks them by an approximate index where faiss is installed (`pip install "bdlm_jax[index]"`).
"""

import argparse
import contextlib
import importlib.util
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np
import timing

import bdlm_jax
from bdlm_jax.lm.causal_lm import init_lm
from bdlm_jax.lm.config import LMConfig
from bdlm_jax.lm.prompts import PromptOptions
from bdlm_jax.lm.vocabulary import Vocabulary, train_tokenizer
from bdlm_jax.serving import answers, artefact, index
from bdlm_jax.serving.artefact import ServedDomain, ServedLM
from bdlm_jax.serving.catalogue import Catalogue

WIDTH, HISTORY, LENGTH = 64, 50, 128
USERS = 200  # of a large catalogue


def write_random_run(folder: str, *, users: int, items: int, lm_width: int, lm_layers: int) -> None:
    """Writes both arms of a BDLM that has learnt nothing, with histories of `HISTORY` items."""
    draw = np.random.default_rng(0)
    titles = [f"Title number {item}" for item in range(items)]
    seen = np.concatenate([draw.permutation(items)[:HISTORY] for _ in range(users)])
    names = [f"u{user}" for user in range(users)], [f"i{item}" for item in range(items)], titles
    catalogue = Catalogue(*names, np.arange(users + 1) * HISTORY, seen)
    user_UD, item_ID = (draw.normal(size=(n, WIDTH)).astype(np.float32) for n in (users, items))
    artefact.write_arm(folder, "domain", ServedDomain("mf", user_UD, item_ID, np.ones(items)), catalogue)
    words = Vocabulary(train_tokenizer(titles[:100], 300), users, items)
    sizes = {"n_heads": lm_width // 64, "n_kv_heads": lm_width // 64, "mlp_width": 3 * lm_width}
    config = LMConfig(words.n_text, width=lm_width, n_layers=lm_layers, **sizes)
    id_rows_XM = draw.normal(size=(users + items, lm_width)).astype(np.float32)
    options = PromptOptions("ids", max_items=100, max_tokens=LENGTH)
    params = init_lm(jax.random.key(0), config)
    lm = ServedLM(params, config, id_rows_XM, words, words.encode_text(titles), None, options)
    artefact.write_arm(folder, "lm", lm, catalogue)


def call_for(seconds: float, call, *, clock=timing.clock) -> list[float]:
    """Calls again and again, two unmeasured times first, and returns what each call took."""
    call(), call()
    times, stop = [], clock() + seconds
    while clock() < stop:
        start = clock()
        call()
        times.append(clock() - start)
    return times


@contextlib.contextmanager
def server(workdir: str, arm: str):
    """Yields the address of a server once it is healthy."""
    import httpx

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "bdlm_jax.serving", "--workdir", workdir, "--arm", arm, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def request_for(seconds: float, address: str, users: list[str], *, clients: int) -> list[float]:
    """Asks for one user after the other from several threads, each with a connection of its own."""
    import httpx

    times: list[float] = []

    def ask(number: int) -> None:
        draw = np.random.default_rng(number)
        with httpx.Client(base_url=address, timeout=60) as client:

            def call():
                client.post("/recommend", json={"user": users[draw.integers(len(users))]}).raise_for_status()

            times.extend(call_for(seconds, call, clock=time.perf_counter))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def measure(workdir: str, *, seconds: float, batches: list[int], clients: list[int]) -> list[str]:
    """Returns the table's rows."""
    run, rows, draw = bdlm_jax.load(workdir), [], np.random.default_rng(0)

    def row(what: str, times: list[float], users_a_call: int, together: int = 1) -> None:
        p50, p99 = 1e3 * np.quantile(times, (0.5, 0.99))
        rate = users_a_call * together * len(times) / sum(times)
        rows.append(f"| {what} | {len(times):,} | {p50:.3g} | {p99:.3g} | {rate:,.0f} |")

    def ask(arm: str, n: int) -> None:
        users = [run.users[user] for user in draw.integers(len(run.users), size=n)]
        answers.recommend(run.catalogue, run.arm(arm), users=users)

    def click(arm: str) -> None:
        user, item = draw.integers(len(run.users)), draw.integers(len(run.items))
        had = [run.items.ids[one] for one in (*run.catalogue.history(user), item)]
        answers.recommend(run.catalogue, run.arm(arm), histories=[had], exact=True)

    for arm in run.arms:
        domain = isinstance(run.arm(arm), ServedDomain)
        for n in [1, *([] if domain else batches)]:
            row(f"{arm}, {n} at once", call_for(seconds, lambda arm=arm, n=n: ask(arm, n)), n)
        row(f"{arm}, 1 after a click", call_for(seconds, lambda arm=arm: click(arm)), 1)
        for n in clients:
            with server(workdir, arm) as address:
                row(f"{arm}, HTTP, {n} clients", request_for(seconds, address, run.users, clients=n), 1, n)
    return rows


def measure_large(n_items: int, *, seconds: float) -> list[str]:
    """The table's rows of a domain arm with many items: exact answers, its table read once (their bound), an index.

    The tables are drawn as trained ones are: variances that fall as (1 + d)^-¾ along the main axes, which leaves 58 %
    to the first quarter (52 to 63 in trained ones), and norms that vary by a fifth. They have no clusters.
    """
    draw, rows = np.random.default_rng(0), []
    names = [f"u{user}" for user in range(USERS)], [f"i{item}" for item in range(n_items)], [""] * n_items
    seen = draw.integers(n_items, size=USERS * HISTORY)
    catalogue = Catalogue(*names, np.arange(USERS + 1) * HISTORY, seen)
    axes = np.float32(1 + np.arange(WIDTH)) ** np.float32(-0.375)
    tables = [draw.standard_normal((n, WIDTH), np.float32) * axes for n in (USERS, n_items)]
    tables[1] *= np.exp(0.2 * draw.standard_normal((n_items, 1), np.float32))
    arm = ServedDomain("mf", *tables, np.ones(n_items))

    def row(what: str, call) -> None:
        times = call_for(seconds, call)
        p50, p99 = 1e3 * np.quantile(times, (0.5, 0.99))
        rows.append(f"| {what} | {len(times):,} | {p50:.3g} | {p99:.3g} | {len(times) / sum(times):,.0f} |")

    def ask(arm: ServedDomain) -> None:
        answers.recommend(catalogue, arm, users=[f"u{draw.integers(USERS)}"])

    row(f"domain, {n_items:,} items, 1 at once", lambda: ask(arm))
    row("the same table read once (its maximum)", tables[1].max)
    if importlib.util.find_spec("faiss"):
        start = timing.clock()
        indexed = index.with_index(arm)
        made, recall = timing.clock() - start, index.measure_recall(indexed)
        row(f"by an index (made in {made:.0f} s), recall@10 {recall:.3f}", lambda: ask(indexed))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", help="a run directory; without it, random tables")
    for name, size in (("users", 6000), ("items", 3700), ("lm-width", 256), ("lm-layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--batches", type=int, nargs="*", default=[8, 256], help="users at once, of a language model")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8], help="HTTP clients at once")
    parser.add_argument("--large", type=int, nargs="*", default=[], metavar="ITEMS", help="catalogues asked as well")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    given = parser.parse_args()
    sizes = {"users": given.users, "items": given.items, "lm_width": given.lm_width, "lm_layers": given.lm_layers}
    with tempfile.TemporaryDirectory() as folder:
        if not given.workdir:
            write_random_run(folder, **sizes)
        workdir = given.workdir or str(Path(folder))
        options = {"seconds": given.seconds, "batches": given.batches, "clients": given.clients}
        rows = measure(workdir, **options)
    for n_items in given.large:
        rows += measure_large(n_items, seconds=given.seconds)
    what = given.workdir or f"random, {sizes}, histories of {HISTORY} items"
    told = f"{timing.unit()}, HTTP by the clock" if given.clients else timing.unit()
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}; {told}; {what}\n")
    print("| what | calls | p50 (ms) | p99 (ms) | users a second |\n|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
