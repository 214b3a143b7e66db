"""LightGCN's propagation and training epoch: ours against the method of gusye1234/LightGCN-PyTorch, side by side.

    python benchmarks/lightgcn_epoch.py --data ml-1m=movielens=DIR --data gowalla=adjacency=DIR [--batches 20]

The peer is written anew here after that repository's method and settings (see `TorchLightGCN`). Both train on the same
edges on the same device kind, in alternating order, in one process; the table on stdout is markdown. Where RecBole is
installed, its own LightGCN, fed and trained by its loaders and trainer, takes turns with them.
"""

import argparse
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import recbole_peer
import timing
import torch

from bdlm_jax.data import splits
from bdlm_jax.data.interactions import Interactions
from bdlm_jax.data.readers import load_source
from bdlm_jax.domain import graph, lightgcn
from bdlm_jax.domain.arm import Inputs
from bdlm_jax.mutual import domain_epoch, options, sharing
from bdlm_jax.types import TrainState

WIDTH, LAYERS, REGULARISATION, LEARNING_RATE = 64, 3, 1e-4, 1e-3


class TorchLightGCN:
    """The peer's method: one (N, N) sparse COO matrix, torch.sparse.mm a layer, Adam 1e-3, the Python sampler.

    Its sampler draws E users with replacement each epoch, then for each a positive and negatives until one is unseen,
    in a Python loop over numpy arrays. The repository also has a C++ one (sources/sampling.cpp, used where it builds):
    the column "without sampling" bounds what any sampler could reach.
    """

    def __init__(self, user_E, item_E, n_users, n_items, device):
        self.n_users, self.n_items, self.device = n_users, n_items, device
        self.n_edges = user_E.size
        g = graph.make_graph(user_E, item_E, n_users=n_users, n_items=n_items)
        index = torch.from_numpy(np.stack([g.receivers, g.senders]).astype(np.int64))
        size = (n_users + n_items, n_users + n_items)
        self.matrix = (
            torch.sparse_coo_tensor(index, torch.from_numpy(g.edges), size, check_invariants=False)
            .coalesce()
            .to(device)
        )
        order = np.argsort(user_E, kind="stable")
        starts = np.cumsum(np.bincount(user_E, minlength=n_users))[:-1]
        self.positives = np.split(item_E[order], starts)
        self.user = torch.nn.Parameter(0.1 * torch.randn(n_users, WIDTH, device=device))
        self.item = torch.nn.Parameter(0.1 * torch.randn(n_items, WIDTH, device=device))
        self.optimizer = torch.optim.Adam([self.user, self.item], lr=LEARNING_RATE)

    def encode(self):
        rows = torch.cat([self.user, self.item])
        layers = [rows]
        for _ in range(LAYERS):
            layers.append(torch.sparse.mm(self.matrix, layers[-1]))
        return torch.split(torch.stack(layers, dim=1).mean(dim=1), [self.n_users, self.n_items])

    def propagate_both_ways(self):
        self.optimizer.zero_grad()
        user, item = self.encode()
        (user.square().sum() + item.square().sum()).backward()
        return _torch_ready(self.device)

    def sample(self, n):
        triples = []
        for user in np.random.randint(0, self.n_users, n):
            positives = self.positives[user]
            if len(positives) == 0:
                continue
            positive = positives[np.random.randint(0, len(positives))]
            while True:
                negative = np.random.randint(0, self.n_items)
                if negative not in positives:
                    break
            triples.append([user, positive, negative])
        triples = np.array(triples)
        return torch.from_numpy(triples[np.random.permutation(len(triples))]).to(self.device)

    def epoch(self, n, batch_size):
        """Trains on n fresh triples; returns (seconds of sampling, seconds of training)."""
        start = timing.clock()
        triples = self.sample(n)
        sampled = timing.clock()
        for batch in torch.split(triples, batch_size):
            u, i, j = batch.T
            user, item = self.encode()
            own = self.user[u], self.item[i], self.item[j]
            loss = torch.nn.functional.softplus((user[u] * item[j]).sum(1) - (user[u] * item[i]).sum(1)).mean()
            loss = loss + REGULARISATION * 0.5 * sum(rows.square().sum() for rows in own) / len(batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()  # the peer reads every step's loss
        _torch_ready(self.device)
        return sampled - start, timing.clock() - sampled


class OurLightGCN:
    """The package's LightGCN arm with the same width, depth, optimiser and regularisation."""

    def __init__(self, user_E, item_E, n_users, n_items, backend):
        chosen = graph.choose_backend(n_users=n_users, n_items=n_items, n_edges=user_E.size)
        self.backend = chosen if backend == "auto" else backend
        inputs = Inputs(WIDTH, n_users, n_items, user_E, item_E)
        self.arm = lightgcn.lightgcn_arm(inputs, n_layers=LAYERS, backend=self.backend)
        self.constants = domain_epoch.make_epoch_constants(user_E, item_E, n_users=n_users, n_items=n_items)
        self.user_E, self.item_E = user_E, item_E
        shared = sharing.init_shared(jax.random.key(0), n_users=n_users, n_items=n_items, width=WIDTH)
        self.params = {"shared": shared, "domain": {}}

        def square(shared):
            return sum(jnp.sum(jnp.square(rows)) for rows in self.arm.encode(shared, {}))

        self.gradient = jax.jit(jax.grad(square))

    def propagate_both_ways(self):
        jax.block_until_ready(self.gradient(self.params["shared"]))

    def make_epoch(self, n, batch_size):
        """Compiles an epoch over n random edges and returns a function that runs it once more and gives its seconds."""
        optimizer = optax.adam(LEARNING_RATE)
        pick = np.random.default_rng(0).permutation(self.user_E.size)[:n]
        weights = options.DomainWeights(regularisation=REGULARISATION)
        step = domain_epoch.make_domain_step(arm=self.arm, meeting=None, weights=weights, optimizer=optimizer)
        epoch = jax.jit(domain_epoch.make_domain_epoch(step, batch_size=batch_size), donate_argnums=0)
        # Every interaction is seen, but only n of them are gone through.
        constants = self.constants | {
            "edge_user_E": jnp.asarray(self.user_E[pick]), "edge_item_E": jnp.asarray(self.item_E[pick])
        }  # fmt: skip
        slots = domain_epoch.make_slots(batch_size=batch_size)
        params = jax.tree.map(jnp.copy, self.params)
        state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), jax.random.key(1))
        state, _ = epoch(state, slots, {}, constants)
        jax.block_until_ready(state)

        def run():
            nonlocal state
            start = timing.clock()
            state, metrics = epoch(state, slots, {}, constants)
            jax.block_until_ready((state, metrics))
            return timing.clock() - start

        return run


def training_edges(kind: str, path: str):
    """Reads a data set and returns (user_E, item_E, U, I) of its training part; leave-one-out where it has no split."""
    data = load_source(kind, path)
    split = splits.leave_one_out(data) if isinstance(data, Interactions) else data
    user_E, item_E = (np.asarray(x, np.int64) for x in split.edges(splits.TRAIN))
    return user_E, item_E, split.interactions.n_users, split.interactions.n_items


def measure(name: str, edges, arguments) -> list[str]:
    """Times both on one data set and returns the table's rows."""
    user_E, item_E, n_users, n_items = edges
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    ours = OurLightGCN(user_E, item_E, n_users, n_items, arguments.backend)
    peer = TorchLightGCN(user_E, item_E, n_users, n_items, device)
    batch, large = arguments.batch_size, arguments.large_batch_size
    steps = -(-user_E.size // batch)
    timed = min(steps, arguments.batches or steps)
    n, scale = min(timed * batch, user_E.size), steps / timed
    run, whole = ours.make_epoch(n, batch), ours.make_epoch(user_E.size, large)

    if recbole_peer.installed():
        settings = {
            "embedding_size": WIDTH,
            "n_layers": LAYERS,
            "reg_weight": REGULARISATION,
            "train_batch_size": batch,
        }
        settings |= {"learning_rate": LEARNING_RATE, "split": {"RS": [0.998, 0.001, 0.001]}}  # it asks for some
        theirs = recbole_peer.make_trainer("LightGCN", user_E, item_E, **settings)
        recbole_peer.train(*theirs, 1)

    times = {"propagation": ([], []), "epoch": ([], []), "train": [], "recbole": []}
    for _ in range(2):
        ours.propagate_both_ways(), peer.propagate_both_ways()
    for turn in range(arguments.repeats):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            for _ in range(3):
                seconds = timing.seconds((ours, peer)[side].propagate_both_ways)
                times["propagation"][side].append(1000 * seconds)
    for turn in range(arguments.repeats):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            if side == 0:
                times["epoch"][0].append(scale * run())
            else:
                drawn, trained = peer.epoch(n, batch)
                times["epoch"][1].append(scale * (drawn + trained))
                times["train"].append(scale * trained)
        if recbole_peer.installed():
            times["recbole"].append(scale * timing.seconds(lambda: recbole_peer.train(*theirs, timed)))
    own_batch = [whole() for _ in range(arguments.repeats)]
    label = f"{name} ({n_users:,} × {n_items:,}, {user_E.size:,} edges, backend {ours.backend})"
    rows = [
        _row(label, f"propagation, {LAYERS} layers, forward + backward (ms)", *times["propagation"]),
        _row(label, f"epoch, batch {batch:,} (s)", *times["epoch"]),
        _row(label, f"epoch, batch {batch:,}, peer without sampling (s)", times["epoch"][0], times["train"]),
        _row(label, f"epoch, ours with batch {large:,} (s)", own_batch, times["epoch"][1]),
    ]
    if times["recbole"]:
        rows.append(_row(label, f"epoch, batch {batch:,}, RecBole's LightGCN (s)", times["epoch"][0], times["recbole"]))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", required=True, metavar="NAME=KIND=PATH", help="kinds of load_source")
    parser.add_argument("--batches", type=int, default=0, help="time this many batches and scale to the epoch; 0: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=2048, help="the peer's")
    parser.add_argument("--large-batch-size", type=int, default=131072, help="the one we train ML-1M with")
    parser.add_argument("--backend", default="auto", choices=graph.BACKENDS)
    arguments = parser.parse_args()
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(timing.cores())
    rows = []
    for entry in arguments.data:
        name, kind, path = entry.split("=", 2)
        rows += measure(name, training_edges(kind, path), arguments)
    scaled = f"{arguments.batches} batches scaled to the epoch" if arguments.batches else "whole epochs"
    print(
        f"jax {jax.__version__} on {jax.devices()[0].device_kind}; {timing.unit()};"
        f" torch {torch.__version__} with {torch.get_num_threads()} threads;"
        f" d={WIDTH}, Adam {LEARNING_RATE}, λ={REGULARISATION}; {scaled};"
        f" {arguments.repeats} repeats in alternating order; median (min–max). Peer: LightGCN-PyTorch's method, COO"
        " propagation and its Python sampler.\n"
    )
    print("| data | what | ours | peer | peer / ours |\n|---|---|---|---|---|")
    print("\n".join(rows))


def _row(label, what, ours, peer):
    ratio = statistics.median(peer) / statistics.median(ours)
    return f"| {label} | {what} | {timing.spread(ours)} | {timing.spread(peer)} | {ratio:.1f} |"


def _torch_ready(device):
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
