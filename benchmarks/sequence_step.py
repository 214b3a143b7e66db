"""Next-item training of a small sequence model: ours, a plain torch SASRec and RecBole's, by targets learned a second.

    taskset -c 0 python benchmarks/sequence_step.py --data ml-1m=movielens=DIR [--steps 4 --repeats 5]

All have the same width, blocks, heads, dropout and loss: cross-entropy over the catalogue. Ours and plain torch learn
an item at every place of a window (their losses from the same weights are compared first); RecBole, whose own loaders
and trainer run here, makes a row of every prefix of a history and learns one item from each. In turns, in one process.
"""

import argparse
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import recbole_peer
import timing
import torch
import torch.nn.functional as F

from bdlm_jax.data import splits
from bdlm_jax.data.readers import load_source
from bdlm_jax.data.splits import TRAIN
from bdlm_jax.domain.arm import Inputs
from bdlm_jax.domain.sasrec import sasrec_arm
from bdlm_jax.mutual import domain_epoch, options, sharing
from bdlm_jax.mutual.losses import catalogue_loss
from bdlm_jax.mutual.optimizer import make_optimizer
from bdlm_jax.run import trained
from bdlm_jax.types import TrainState

BLOCKS, HEADS, DROPOUT, RATE, STD = 2, 2, 0.2, 1e-3, 0.02


class OurSASRec:
    """The package's arm and its compiled epoch, over as many windows as the steps take."""

    def __init__(self, split, *, width, length, batch, steps):
        sizes = {"n_users": split.interactions.n_users, "n_items": split.interactions.n_items}
        edges, histories = split.edges(TRAIN), split.histories(TRAIN)
        inputs = Inputs(width, *sizes.values(), *edges)
        self.arm = sasrec_arm(inputs, length=length, n_blocks=BLOCKS, n_heads=HEADS, dropout=DROPOUT)
        whole_WL = self.arm.windows(*histories)
        self.per_window = np.mean(np.sum(whole_WL >= 0, axis=1))
        some = np.random.default_rng(0).permutation(len(whole_WL))[: steps * batch]
        self.window_WL, self.batch = whole_WL[some], batch
        self.constants = domain_epoch.make_epoch_constants(*edges, **sizes) | {"window_WL": jnp.asarray(self.window_WL)}
        rules = trained.domain_rules(self.arm, train_shared=True)
        optimizer = make_optimizer(rules=rules, groups={"domain": {"learning_rate": RATE, "weight_decay": 0.0}})
        how = {"arm": self.arm, "meeting": None, "weights": options.DomainWeights(), "optimizer": optimizer}
        epoch = domain_epoch.make_domain_epoch(domain_epoch.make_domain_step(**how, rules=rules), batch_size=batch)
        self.epoch, self.slots = jax.jit(epoch, donate_argnums=0), domain_epoch.make_slots(batch_size=batch)
        shared = sharing.init_shared(jax.random.key(0), **sizes, width=width, std=STD)
        self.params = {"shared": shared, "domain": self.arm.init(jax.random.key(1))}
        own = jax.tree.map(jnp.copy, self.params)
        self.state = TrainState(own, optimizer.init(own), jnp.int32(0), jax.random.key(2))

    def run(self) -> int:
        """Learns from all windows once and returns how many targets that were."""
        self.state, metrics = self.epoch(self.state, self.slots, {}, self.constants)
        jax.block_until_ready(metrics)
        return int(np.sum(self.window_WL >= 0))

    def first_loss(self) -> float:
        """The mean loss of the first batch under the first parameters, without dropout."""

        @jax.jit
        def loss(shared, domain, window_BL):
            item_ID = shared["item"]
            state_ND = self.arm.states_before(shared, domain, window_BL, None).reshape(-1, item_ID.shape[1])
            return catalogue_loss(state_ND, item_ID, jnp.zeros(len(item_ID)), window_BL.reshape(-1), skip=True)

        total, count = loss(**self.params, window_BL=jnp.asarray(self.window_WL[: self.batch]))
        return float(total / count)


class TorchSASRec(torch.nn.Module):
    """The same model as a careful hand writes it in torch: fused attention, logits only where a target is."""

    def __init__(self, ours: OurSASRec):
        super().__init__()
        domain, item_ID = (jax.tree.map(np.asarray, ours.params[name]) for name in ("domain", "shared"))
        item_ID = item_ID["item"]
        self.window_WL, self.batch, self.width = torch.from_numpy(ours.window_WL).long(), ours.batch, item_ID.shape[1]
        self.item, self.start, self.position = map(_parameter, (item_ID, domain["start"], domain["position"]))
        norms = [f"LayerNorm_{n}" for n in range(2 * BLOCKS + 1)]
        self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(self.width, eps=1e-6) for _ in norms])
        _fill(self.norms, [(domain[name]["scale"], domain[name]["bias"]) for name in norms])
        attention = [domain[f"MultiHeadDotProductAttention_{n}"] for n in range(BLOCKS)]
        square = (self.width, self.width)
        into = [
            np.concatenate([a[w]["kernel"].reshape(square) for w in ("query", "key", "value")], 1) for a in attention
        ]
        self.into = torch.nn.ModuleList([torch.nn.Linear(self.width, 3 * self.width, bias=False) for _ in into])
        self.out = torch.nn.ModuleList([torch.nn.Linear(*square, bias=False) for _ in attention])
        self.dense = torch.nn.ModuleList([torch.nn.Linear(*square) for _ in range(2 * BLOCKS)])
        _fill(self.into, [(kernel.T,) for kernel in into])
        _fill(self.out, [(a["out"]["kernel"].reshape(square).T,) for a in attention])
        dense = [domain[f"Dense_{n}"] for n in range(2 * BLOCKS)]
        _fill(self.dense, [(layer["kernel"].T, layer["bias"]) for layer in dense])
        self.optimizer = torch.optim.Adam(self.parameters(), lr=RATE)

    def loss(self, window_BL):
        n_rows, length = window_BL.shape
        item_BLD = F.embedding(window_BL[:, :-1].clamp(min=0), self.item) * self.width**0.5
        start_B1D = self.start.expand(n_rows, 1, self.width)
        x = self.drop(torch.cat([start_B1D, item_BLD], 1) + self.position)
        for n in range(BLOCKS):
            heads = self.into[n](self.norms[2 * n](x)).view(n_rows, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            read = F.scaled_dot_product_attention(*heads, is_causal=True)
            x = x + self.drop(self.out[n](read.transpose(1, 2).reshape(n_rows, length, -1)))
            y = F.relu(self.dense[2 * n](self.norms[2 * n + 1](x)))
            x = x + self.drop(self.dense[2 * n + 1](y))
        there_BL = window_BL >= 0
        state_ND = self.norms[-1](x[there_BL])
        return F.cross_entropy(state_ND @ self.item.T, window_BL[there_BL])

    def drop(self, x):
        return F.dropout(x, DROPOUT, self.training)

    def run(self) -> int:
        self.train()
        for window_BL in torch.split(self.window_WL, self.batch):
            self.optimizer.zero_grad()
            loss = self.loss(window_BL)
            loss.backward()
            self.optimizer.step()
        return int((self.window_WL >= 0).sum())

    def first_loss(self) -> float:
        self.eval()
        with torch.no_grad():
            return float(self.loss(self.window_WL[: self.batch]))


class RecBoleSASRec:
    """RecBole's SASRec with the same sizes, trained by RecBole."""

    def __init__(self, interactions, *, width, length, rows, steps):
        sizes = {"hidden_size": width, "inner_size": width, "n_layers": BLOCKS, "n_heads": HEADS}
        rates = {"hidden_dropout_prob": DROPOUT, "attn_dropout_prob": 0.0, "learning_rate": RATE, "hidden_act": "relu"}
        how = {"loss_type": "CE", "train_neg_sample_args": None, "train_batch_size": rows}
        self.rows, self.steps = rows, steps
        how |= {"split": {"LS": "valid_and_test"}, "MAX_ITEM_LIST_LENGTH": length}
        edges = interactions.user_E, interactions.item_E
        self.trainer, self.loader = recbole_peer.make_trainer("SASRec", *edges, **sizes, **rates, **how)

    def run(self) -> int:
        recbole_peer.train(self.trainer, self.loader, self.steps)
        return self.rows * self.steps


def measure(name: str, kind: str, path: str, given) -> list[str]:
    """Times all of them on one data set and returns the table's rows."""
    split = splits.leave_one_out(load_source(kind, path))
    sizes = {"width": given.width, "length": given.length}
    ours = OurSASRec(split, **sizes, batch=given.batch_size, steps=given.steps)
    torchs = TorchSASRec(ours)
    first = ours.first_loss(), torchs.first_loss()
    if abs(first[0] - first[1]) > 1e-4 * first[0]:
        raise SystemExit(f"the two are not the same model: their first losses are {first[0]} and {first[1]}.")
    sides = {"bdlm_jax": ours, "torch, the same model": torchs}
    if recbole_peer.installed() and given.peer_rows:
        rows = {"rows": given.peer_rows, "steps": given.peer_steps}
        sides["RecBole's SASRec"] = RecBoleSASRec(split.interactions, **sizes, **rows)
    rates = {who: [] for who in sides}
    for side in sides.values():
        side.run()  # compiles, and warms
    for turn in range(given.repeats):
        for who, side in list(sides.items())[:: 1 if turn % 2 == 0 else -1]:
            start = timing.clock()
            targets = side.run()
            rates[who].append(targets / (timing.clock() - start))
    best, lines = statistics.median(rates["bdlm_jax"]), []
    label = f"{name}, {split.interactions.n_users:,} users, {split.interactions.n_items:,} items"
    for who, values in rates.items():
        middle = statistics.median(values)
        lines.append(f"| {label} | {who} | {timing.spread(values, ',.0f')} | {best / middle:.2f} |")
    return lines


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", required=True, metavar="NAME=KIND=PATH", help="kinds of load_source")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--length", type=int, default=50, help="items of a history that are read")
    parser.add_argument("--batch-size", type=int, default=128, help="windows, of ours and of plain torch")
    parser.add_argument("--steps", type=int, default=4, help="of both, timed together")
    parser.add_argument("--peer-rows", type=int, default=2048, help="RecBole's batch; 0 leaves it out")
    parser.add_argument("--peer-steps", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args(words)
    torch.manual_seed(0)
    torch.set_num_threads(timing.cores())
    rows = [row for entry in given.data for row in measure(*entry.split("=", 2), given)]
    peer = ""
    if recbole_peer.installed():
        import recbole

        peer = f", recbole {recbole.__version__}"
    print(
        f"jax {jax.__version__}, torch {torch.__version__}{peer}; width {given.width}, {BLOCKS} blocks, {HEADS} heads,"
        f" histories of {given.length}, dropout {DROPOUT}; batches of {given.batch_size} windows, RecBole's of"
        f" {given.peer_rows:,} rows; {timing.unit()}, {given.repeats} repeats in alternating order; median (min–max).\n"
    )
    print("| data | what | targets a second | bdlm_jax / it |\n|---|---|---:|---:|")
    print("\n".join(rows))


def _parameter(value):
    return torch.nn.Parameter(torch.tensor(np.asarray(value)))


def _fill(modules, values):
    with torch.no_grad():
        for module, arrays in zip(modules, values):
            for parameter, value in zip(module.parameters(), arrays):
                parameter.copy_(torch.tensor(np.asarray(value)))


if __name__ == "__main__":
    main()
