"""Numbers from outside on Gowalla's official split, which anyone can compute: what we rank by is the published method.

    BDLM_GOWALLA=DIR pytest -m slow tests/golden            # DIR holds train.txt and test.txt

Sources: the BARS benchmark (reczoo/BARS, matching, gowalla_m1) for the models without training; the README of
gusye1234/LightGCN-PyTorch for LightGCN.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bdlm_jax.data.readers import read_adjacency
from bdlm_jax.data.splits import TEST, TRAIN
from bdlm_jax.domain.arm import DomainArm, Inputs
from bdlm_jax.domain.closed_form import ease, interaction_matrix, item_knn
from bdlm_jax.domain.graph import make_graph, make_propagate
from bdlm_jax.domain.models import make_arm
from bdlm_jax.evaluation.evaluate import CatalogueScorer, evaluate_full
from bdlm_jax.evaluation.metrics import case_metric
from bdlm_jax.evaluation.scorers import closed_form_scorer, domain_scorer, popularity_scorer
from bdlm_jax.mutual import domain_epoch
from bdlm_jax.mutual.options import DomainWeights
from bdlm_jax.types import TrainState

FOLDER = os.environ.get("BDLM_GOWALLA", "")
ON_CPU = jax.default_backend() == "cpu"
WIDTH, LAYERS, BATCH = 64, 3, 2048

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="BDLM_GOWALLA names no folder with train.txt and test.txt"),
]


@pytest.fixture(scope="module", autouse=True)
def optimized():
    """The suite compiles quickly; here it is the running that takes long."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def split():
    made = read_adjacency(FOLDER)
    assert made.counts()["train"] == 810_128 and made.counts()["test"] == 217_242
    return made


@pytest.fixture(scope="module")
def sizes(split):
    return {"n_users": split.interactions.n_users, "n_items": split.interactions.n_items}


@pytest.fixture(scope="module")
def matrix_UI(split, sizes):
    return interaction_matrix(*split.edges(TRAIN), **sizes)


def measured(split, scorer) -> dict[str, float]:
    """recall@20, ndcg@20 and hr@20 as the benchmarks have them: means over users, of several targets each."""
    counts = evaluate_full(scorer, *split.cases(TEST), split.histories(TRAIN))
    hit_N, gain_N = (case_metric(m, counts.better, counts.equal, counts.others) for m in ("hr@20", "ndcg@20"))
    _, user_N = np.unique(counts.user, return_inverse=True)
    n_U, hit_U, gain_U = (np.bincount(user_N, weights) for weights in (None, hit_N, gain_N))
    # A user's gain is divided by that of a list that begins with their targets.
    best_U = np.cumsum(1 / np.log2(np.arange(20) + 2))[np.minimum(n_U, 20) - 1]
    found = {"recall@20": hit_U / n_U, "ndcg@20": gain_U / best_U, "hr@20": hit_U > 0}
    return {name: float(np.mean(value)) for name, value in found.items()}


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def test_item_pop_equals_the_benchmark(split):
    found = measured(split, popularity_scorer(split.degree(TRAIN)))
    assert rounded(found) == {"recall@20": 0.0416, "ndcg@20": 0.0317, "hr@20": 0.2038}


def test_item_knn_equals_the_benchmark(split, matrix_UI):
    """BARS: cosine, 100 neighbours, each item's similarities sum to 1, and an item's mean is kept out of the sum."""
    weights_II = item_knn(matrix_UI, neighbours=100)
    weights_II = weights_II.multiply(1 / np.maximum(weights_II.sum(axis=0), 1e-12)).tocsr()
    mean_I = np.asarray(matrix_UI.mean(axis=0)).ravel()
    plain = closed_form_scorer(matrix_UI, weights_II)
    centred = CatalogueScorer(lambda user_B: plain.score(user_B) + jnp.asarray(mean_I - mean_I @ weights_II))
    found = measured(split, centred)
    assert found == pytest.approx({"recall@20": 0.156994, "ndcg@20": 0.121364, "hr@20": 0.509445}, rel=0.002)


def test_ease_equals_the_benchmark(split, matrix_UI):
    """BARS: l2 = 80. The matrix takes 6.7 GB and some minutes."""
    found = measured(split, closed_form_scorer(matrix_UI, ease(matrix_UI, l2=80.0)))
    assert found == pytest.approx({"recall@20": 0.176493, "ndcg@20": 0.146657, "hr@20": 0.572677}, rel=0.002)


def test_light_gcn_follows_the_reference_log(split):
    """EPOCH[5/1000], the sixth, of commit 7e962f0, whose graph still had every node among its own neighbours."""
    found = measured(split, train_light_gcn(split, n_epochs=6, self_loops=True))
    wanted = {"recall@20": 0.10711388, "ndcg@20": 0.08940792}
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=0.02)


@pytest.mark.accelerator
@pytest.mark.skipif(ON_CPU, reason="a thousand epochs need an accelerator")
def test_light_gcn_in_full_reaches_the_published_table(split):
    found = measured(split, train_light_gcn(split, n_epochs=1000))
    wanted = {"recall@20": 0.1824, "ndcg@20": 0.1547}
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=0.01)


def train_light_gcn(split, *, n_epochs: int, self_loops: bool = False, seed: int = 2020, after=None):
    """Our propagation, loss and epoch with the reference's start and draw.

    Its tables start uniform (Xavier), and an epoch draws as many users as there are interactions, each equally often,
    and one interaction of each, where ours goes through all interactions once.
    """
    n_users, n_items = split.interactions.n_users, split.interactions.n_items
    user_E, item_E = split.edges(TRAIN)
    indptr, item = split.histories(TRAIN)
    inputs = Inputs(WIDTH, n_users, n_items, user_E, item_E)
    arm = with_self_loops(inputs) if self_loops else make_arm("lightgcn", inputs, {"n_layers": LAYERS})
    optimizer, draws = optax.adam(1e-3), np.random.default_rng(seed)
    step = domain_epoch.make_domain_step(
        arm=arm, meeting=None, weights=DomainWeights(regularisation=1e-4), optimizer=optimizer
    )
    epoch = jax.jit(domain_epoch.make_domain_epoch(step, batch_size=BATCH), donate_argnums=0)
    constants = domain_epoch.make_epoch_constants(user_E, item_E, n_users=n_users, n_items=n_items)
    slots = domain_epoch.make_slots(batch_size=BATCH)
    xavier = jax.nn.initializers.xavier_uniform()
    keys = jax.random.split(jax.random.key(seed), 3)
    tables = {name: xavier(key, (n, WIDTH)) for name, key, n in zip(("user", "item"), keys, (n_users, n_items))}
    params = {"shared": tables, "domain": {}}
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), keys[2])
    for number in range(n_epochs):
        user_E = draws.integers(0, n_users, len(item))
        item_E = item[indptr[user_E] + draws.integers(0, np.diff(indptr)[user_E])]
        drawn = {"edge_user_E": jnp.asarray(user_E, jnp.int32), "edge_item_E": jnp.asarray(item_E, jnp.int32)}
        state, metrics = epoch(state, slots, {}, constants | drawn)
        if after:
            after(number, metrics, domain_scorer(arm, state.params))
    return domain_scorer(arm, state.params)


def with_self_loops(inputs: Inputs) -> DomainArm:
    """LightGCN over A + I in place of A: of Â = D^-½ A D^-½ that is s·Â(s·E) + E/(deg + 1) with s² = deg/(deg + 1)."""
    sizes = {"n_users": inputs.n_users, "n_items": inputs.n_items}
    propagate = make_propagate(make_graph(inputs.user_E, inputs.item_E, **sizes), **sizes)
    degrees = [
        np.bincount(rows, minlength=n) for rows, n in ((inputs.user_E, inputs.n_users), (inputs.item_E, inputs.n_items))
    ]
    scales = [jnp.sqrt(jnp.asarray(d / (d + 1), jnp.float32))[:, None] for d in degrees]

    def encode(shared, domain):
        tables = shared["user"], shared["item"]
        total = tables
        for _ in range(LAYERS):
            spread = propagate(*(s * table for s, table in zip(scales, tables)))
            tables = tuple(s * new + (1 - s * s) * old for s, new, old in zip(scales, spread, tables))
            total = tuple(a + b for a, b in zip(total, tables))
        return tuple(table / (LAYERS + 1) for table in total)

    return DomainArm(init=lambda key: {}, encode=encode)
