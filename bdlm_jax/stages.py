"""What each stage of a run trains: pretraining, the arms alone, and the mutual rounds. Each returns a `fit.Fitted`.

A stage builds its arms (model, loss weights, optimiser groups, batches, view), its phases and its validation, and hands
them to the one loop in `fit`.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from bdlm_jax import evaluate, lm_rows, models, mutual, optimizers, sharing
from bdlm_jax.data.splits import TRAIN, check_training_edges
from bdlm_jax.domain import graph, lightgcn, mf, ncf, sampling, sasrec
from bdlm_jax.domain.arm import DomainArm
from bdlm_jax.fit import Arm, Fitted, Phase, fit
from bdlm_jax.lm import causal_lm
from bdlm_jax.mutual import Bridge, DomainWeights, LMWeights
from bdlm_jax.prepare import KNOWN, Data
from bdlm_jax.runtime import parallel
from bdlm_jax.types import Params


class Run(NamedTuple):
    """What the stages of one run share."""

    config: ml_collections.ConfigDict
    folder: Path
    data: Data
    texts: lm_rows.Texts
    stop: Any
    key: jax.Array

    def stage_key(self, name: str) -> jax.Array:
        """A key of its own for each stage, whatever stages run before it."""
        return jax.random.fold_in(self.key, sum(ord(c) * 131**i for i, c in enumerate(name)) % (2**31))

    def fit(self, stage: str, **arguments) -> Fitted:
        runtime = self.config.runtime
        return fit(
            self.folder / stage,
            stage=stage,
            key=self.stage_key(stage),
            stop=self.stop,
            checkpoint_seconds=runtime.checkpoint_seconds,
            tensorboard=None if runtime.tensorboard else False,
            **arguments,
        )


def lm_config(run: Run) -> causal_lm.LMConfig:
    """The decoder's shape from the config and the vocabulary."""
    c = run.config.lm
    return causal_lm.LMConfig(
        vocab_size=run.texts.vocabulary.n_text,
        width=c.width,
        n_layers=c.n_layers,
        n_heads=c.n_heads,
        n_kv_heads=c.n_kv_heads,
        mlp_width=c.mlp_width,
        tie_embeddings=c.tie_embeddings,
        dtype=c.dtype,
        remat=c.remat,
        dropout=c.dropout,
    )


def make_bridge(run: Run, *, reads: str) -> Bridge:
    """The static facts of how the arms meet."""
    vocabulary, m = run.texts.vocabulary, run.config.mutual
    return Bridge(
        lm=lm_config(run),
        user_capacity=vocabulary.user_capacity,
        item_capacity=vocabulary.item_capacity,
        reads=reads,
        align=m.align,
        temperature=m.temperature,
    )


def make_arm(run: Run, model: str, *, parts: tuple[int, ...] = (TRAIN,)) -> DomainArm:
    """Builds a domain model over the interactions of some parts (training: TRAIN alone, which is checked)."""
    data, c = run.data, run.config.domain
    user_E, item_E = data.split.edges(*parts)
    check_training_edges(data.split, user_E, item_E, allowed=parts)
    sizes = {"n_users": data.n_users, "n_items": data.n_items}
    if model == "lightgcn":
        made = graph.make_graph(user_E, item_E, **sizes)
        propagate = graph.make_propagate(made, **sizes, backend=c.backend)
        return lightgcn.lightgcn_arm(propagate, n_layers=c.n_layers, layer_weights=c.layer_weights)
    if model == "mf":
        return mf.mf_arm()
    if model == "ncf":
        return ncf.ncf_arm(width=run.config.shared.width)
    history = sasrec.recent_history(*data.split.histories(*parts), length=run.config.prompts.max_items)
    return sasrec.sasrec_arm(history, width=run.config.shared.width)


def pretrain_lm(run: Run) -> Params | None:
    """Trains the decoder on the corpus; returns its params, or None where there is no corpus."""
    config = run.config
    rows = lm_rows.corpus_rows(config, run.data, run.texts)
    if rows is None or config.pretrain.epochs <= 0:
        return None
    steps = max(1, round(config.pretrain.epochs * rows.n_steps(config.lm.batch_rows)))
    bridge = make_bridge(run, reads="layer0")
    c = config.pretrain
    rate = optax.warmup_cosine_decay_schedule(0.0, c.learning_rate, max(1, steps // 20), steps, c.learning_rate / 10)
    lm_arm = _lm_arm(run, rows, bridge, LMWeights(item=0.0, text=1.0), rate=rate, train_shared=False)
    fitted = run.fit(
        "pretrain",
        phases=[Phase("lm", steps, "next token")],
        arms={"lm": lm_arm},
        params=lambda: _init_params(run, DOT_ARM, "pretrain", reads="layer0"),
        validate=lambda arm, params: {"done": 1.0},
        select="done",
        judged=("lm",),
    )
    return fitted.params["lm"]["lm"]


def train_domain(run: Run, model: str, *, learning_rate: float, regularisation: float, epochs: int, stage: str) -> Fitted:
    """Trains a domain model alone by BPR, judged on validation every `evaluate_every` epochs."""
    c = run.config.domain
    arm = make_arm(run, model)
    weights = DomainWeights(regularisation=regularisation)
    every = min(c.evaluate_every, epochs)
    phases = [Phase("domain", min(every, epochs - done), "BPR epochs") for done in range(0, epochs, every)]
    return run.fit(
        stage,
        phases=phases,
        arms={"domain": _domain_arm(run, arm, None, weights, rate=learning_rate, view=lambda params: {})},
        params=lambda: _init_domain_params(run, arm, stage),
        validate=lambda _, params: validation_metrics(run, models.domain_scorer(arm, params)),
        select=run.config.select,
        judged=("domain",),
    )


def train_text_lm(run: Run, pretrained: Params | None) -> Fitted:
    """Trains the text-only LM: histories as titles, nothing else. It is judged by its loss on validation titles."""
    config = run.config
    rows = lm_rows.mix(
        [
            (lm_rows.training_rows(config, run.data, run.texts, kind="text"), 1),
            *_replay(run, share_of=None),
        ],
        seed=config.seed,
    )
    phases = _lm_phases(rows, config, [config.lm_alone.text_epochs], name="titles")
    bridge = make_bridge(run, reads="layer0")
    lm_arm = _lm_arm(run, rows, bridge, LMWeights(item=0.0, text=1.0), rate=_rate(config, phases), train_shared=False)
    scorer = lambda params: text_lm_scorer(run, params, "validation")  # noqa: E731
    return run.fit(
        "text_lm",
        phases=phases,
        arms={"lm": lm_arm},
        params=lambda: _init_params(run, DOT_ARM, "text_lm", reads="layer0", pretrained=pretrained),
        validate=lambda _, params: validation_metrics(run, scorer(params["lm"]), protocol="cand20"),
        select=config.select.split("/")[0] + "/cand20",
        judged=("lm",),
    )


def train_ids_lm(run: Run, pretrained: Params | None) -> Fitted:
    """Trains the ids-only LM: the same decoder, the same steps in all, its own random table of ids, no titles."""
    config = run.config
    rows = lm_rows.training_rows(config, run.data, run.texts, kind="ids")
    phases = _lm_phases(rows, config, _lm_epochs(config), name="ids")
    bridge = make_bridge(run, reads="layer0")
    lm_arm = _lm_arm(run, rows, bridge, LMWeights(item=1.0, text=0.0), rate=_rate(config, phases))
    reading = lm_rows.reading_rows(config, run.data, run.texts, kind="ids", parts=KNOWN["validation"])
    return run.fit(
        "ids_lm",
        phases=phases,
        arms={"lm": lm_arm},
        params=lambda: _init_params(run, DOT_ARM, "ids_lm", reads="layer0", pretrained=pretrained),
        validate=lambda _, params: validation_metrics(run, lm_scorer(run, params, DOT_ARM, bridge, reading)),
        select=config.select,
        judged=("lm",),
    )


def train_bdlm(run: Run, pretrained: Params | None, domain_params: Params) -> Fitted:
    """Runs the mutual rounds: the LM's first phase, then domain and LM phases in turn, each against the other's view."""
    config, m = run.config, run.config.mutual
    arm, bridge = make_arm(run, config.domain.model), make_bridge(run, reads=m.reads)
    own = lm_rows.training_rows(config, run.data, run.texts, kind=config.prompts.kind)
    titled = None
    if config.prompts.kind == "ids" and config.prompts.titled_share:
        titled = lm_rows.training_rows(config, run.data, run.texts, kind="ids_titles")
    copies = config.prompts.card_copies
    rows = lm_rows.mix(
        [
            (own, 1),
            (titled, config.prompts.titled_share),
            (lm_rows.card_rows(config, run.texts), copies),
            (lm_rows.card_rows(config, run.texts, named=True), copies / 8),
            *_replay(run, share_of=own),
        ],
        seed=config.seed,
    )
    lm_phases = _lm_phases(rows, config, _lm_epochs(config), name="LM")
    phases = [lm_phases[0]]
    for r in range(m.rounds):
        phases.append(Phase("domain", m.domain_epochs_a_round, f"round {r + 1}, domain"))
        phases.append(lm_phases[r + 1]._replace(name=f"round {r + 1}, LM"))
    phases = [phase for phase in phases if phase.units]
    reading = lm_rows.reading_rows(config, run.data, run.texts, kind=config.prompts.kind, parts=KNOWN["validation"])
    cards = lm_rows.card_rows(config, run.texts)

    def read(params):
        return _read(run, params, arm, bridge, reading), _read(run, params, arm, bridge, cards)

    def validate(name, params):
        if name == "domain":
            return validation_metrics(run, models.domain_scorer(arm, params))
        return validation_metrics(run, lm_scorer(run, params, arm, bridge, reading))

    params = lambda: _init_params(  # noqa: E731
        run, arm, "bdlm", reads=m.reads, pretrained=pretrained, domain_params=domain_params
    )
    trained_by = config.shared.trained_by
    cold_I = ~_warm_items(run.data)

    def write_back(params):
        z_item_ID = sharing.bridge_out(params["lm"]["bridge"], _read(run, params, arm, bridge, cards)["item"])
        return {**params, "shared": sharing.write_back(params["shared"], z_item_ID, cold_I)}

    shared_at_start = params()
    table_std = _table_std(run, shared_at_start["shared"], shared_at_start["domain"], arm, m.reads)
    writes = m.domain.align_item and trained_by != "none" and cold_I.any()
    lm_weights = LMWeights(**m.lm.to_dict())
    domain_weights = DomainWeights(regularisation=config.domain.regularisation, **m.domain.to_dict())
    arms = {
        "lm": _lm_arm(
            run, rows, bridge, lm_weights, arm=arm, rate=_rate(config, lm_phases), table_std=table_std,
            train_shared=trained_by in ("both", "lm"), view=lambda params: models.domain_view(arm, params),
            finish=write_back if writes else lambda params: params,
        ),
        "domain": _domain_arm(
            run, arm, bridge, domain_weights, rate=m.domain_learning_rate,
            train_shared=trained_by in ("both", "domain"), view=lambda params: models.lm_view(params, *read(params)),
        ),
    }  # fmt: skip
    return run.fit(
        "bdlm", phases=phases, arms=arms, params=params, validate=validate, select=config.select, judged=("domain", "lm")
    )


def distill_domain(run: Run, fitted: Fitted, *, part: str, epochs: int | None = None) -> Fitted:
    """Lets the chosen domain arm learn from the chosen LM at length: the LM no longer has to follow (ours).

    On "validation" the epochs are judged every `evaluate_every`. On "test" the same work is repeated for the number of
    epochs chosen there, from the same start, against LM states that know the validation item, and nothing is selected.

    Args:
      run: the run.
      fitted: of `train_bdlm`.
      part: "validation" or "test".
      epochs: how many on "test".

    Returns:
      Fitted of the arm "domain".
    """
    config, m = run.config, run.config.mutual
    trained_on, bridge = make_arm(run, config.domain.model), make_bridge(run, reads=m.reads)
    arm = make_test_arm(run) if part == "test" else trained_on
    reading = lm_rows.reading_rows(config, run.data, run.texts, kind=config.prompts.kind, parts=KNOWN[part])
    cards = lm_rows.card_rows(config, run.texts)
    lm_params = fitted.params["lm"]

    def view(_):
        read = lambda rows: _read(run, lm_params, trained_on, bridge, rows)  # noqa: E731
        return models.lm_view(lm_params, read(reading), read(cards))

    if part == "test":
        phases, validate, select = [Phase("domain", epochs, "refresh")], lambda *_: {"done": 1.0}, "done"
    else:
        every = min(config.domain.evaluate_every, m.distill_epochs)
        done = range(0, m.distill_epochs, every)
        phases = [Phase("domain", min(every, m.distill_epochs - d), f"distillation from epoch {d}") for d in done]
        validate = lambda _, params: validation_metrics(run, models.domain_scorer(arm, params))  # noqa: E731
        select = config.select
    weights = DomainWeights(regularisation=config.domain.regularisation, **m.domain.to_dict())
    return run.fit(
        "distill" if part == "validation" else "refresh",
        phases=phases,
        arms={"domain": _domain_arm(run, arm, bridge, weights, rate=m.distill_learning_rate, view=view, parts=KNOWN[part])},
        params=lambda: fitted.params["domain"],
        validate=validate,
        select=select,
        judged=("domain",),
    )


def make_test_arm(run: Run) -> DomainArm:
    """The domain model as it stands at test time: propagated over what may be known then."""
    parts = KNOWN["test"] if run.config.domain.test_graph == "train+validation" else KNOWN["validation"]
    return make_arm(run, run.config.domain.model, parts=parts)


def lm_scorer(run: Run, params: Params, arm: DomainArm, bridge: Bridge, reading) -> evaluate.CatalogueScorer:
    """The LM arm as a scorer: one forward pass a user."""
    states = _read(run, params, arm, bridge, reading)
    return models.state_scorer(states["user"], states["rows_item"])


def text_lm_scorer(run: Run, lm_params: Params, part: str) -> evaluate.CandidateScorer:
    """The text-only LM as a scorer for a part."""
    prefixes = lm_rows.text_prefixes(run.config, run.data, run.texts, parts=KNOWN[part])
    return models.text_scorer(lm_params, lm_config(run), prefixes, lm_rows.title_continuations(run.texts))


def validation_metrics(run: Run, scorer, *, protocol: str | None = None) -> dict[str, float]:
    """Metrics of a scorer on validation, under the protocol of `config.select` and cand20."""
    made = {}
    for name in dict.fromkeys([protocol or run.config.select.split("/")[1]]):
        if name == "full":
            user_N, item_N = run.data.split.cases(1)
            counts = evaluate.evaluate_full(
                scorer, user_N, item_N, run.data.split.histories(*KNOWN["validation"]), chunk=run.config.evaluate.chunk
            )
        else:
            candidates = run.data.candidates["validation"][name]
            counts = evaluate.evaluate_candidates(scorer, candidates, chunk=run.config.evaluate.chunk)
        for metric in ("hr@1", "ndcg@10"):
            made[f"{metric}/{name}"] = evaluate.mean_metric(counts, metric)
    return made


DOT_ARM = mf.mf_arm()  # stands in where no domain model takes part


def _read(run: Run, params, arm, bridge, rows) -> dict[str, np.ndarray]:
    return models.read_states(
        params, rows, arm=arm, bridge=bridge, n_users=run.data.n_users, n_items=run.data.n_items,
        batch_rows=run.config.lm.batch_rows,
    )  # fmt: skip


def _tables_shape(run: Run) -> dict:
    return {"n_users": run.data.n_users, "n_items": run.data.n_items, "width": run.config.shared.width}


def _init_domain_params(run: Run, arm: DomainArm, stage: str) -> Params:
    shared_key, domain_key = jax.random.split(run.stage_key(stage + "/init"))
    shared = sharing.init_shared(shared_key, **_tables_shape(run), std=run.config.shared.std)
    return {"shared": shared, "domain": arm.init(domain_key)}


def _init_params(run: Run, arm, stage: str, *, reads: str, pretrained=None, domain_params=None) -> Params:
    keys = jax.random.split(run.stage_key(stage + "/init"), 4)
    shared = sharing.init_shared(keys[0], **_tables_shape(run), std=run.config.shared.std)
    domain = arm.init(keys[1])
    if domain_params is not None:
        domain = domain_params.get("domain", domain)
        if run.config.shared.initial == "domain":
            shared = domain_params["shared"]
    lm = pretrained if pretrained is not None else causal_lm.init_lm(keys[2], lm_config(run))
    gain = run.config.lm.row_std / _table_std(run, shared, domain, arm, reads)
    bridge = sharing.init_bridge(
        keys[3], width=run.config.shared.width, lm_width=run.config.lm.width, gain=gain,
        out_std=_table_std(run, shared, domain, arm, "propagated"),
    )  # fmt: skip
    return {"shared": shared, "domain": domain, "lm": {**{k: v for k, v in lm.items() if k != "bridge"}, "bridge": bridge}}


def _table_std(run: Run, shared, domain, arm, reads: str) -> float:
    """Standard deviation of the rows that the LM reads of items with interactions."""
    _, item_ID = sharing.read_tables(shared, domain, encode=arm.encode, reads=reads)
    return float(jnp.std(item_ID[jnp.asarray(_warm_items(run.data))]))


def _warm_items(data: Data) -> np.ndarray:
    return data.split.degree(TRAIN) > 0


def _lm_arm(run, rows, bridge, weights, *, arm=None, rate, table_std=None, train_shared=True, view=lambda params: {}, finish=lambda p: p) -> Arm:
    config = run.config
    arm, table_std = arm or DOT_ARM, table_std or config.shared.std
    c, vocabulary = config.lm, run.texts.vocabulary
    rules = [
        (r"shared/.*", "shared" if train_shared and weights.item else optimizers.FROZEN),
        (r"domain/.*", optimizers.FROZEN),
        (r"lm/.*", "lm"),
    ]
    # The bridge shrinks or stretches the tables to the LM's scale; their step is stretched back, so that a row moves as
    # fast as one of an LM with its own table would.
    scale = c.learning_rate_shared / c.learning_rate * table_std / c.row_std
    if bridge.reads == "propagated":
        scale *= config.domain.n_layers + 1  # a row answers to its own layer 0 by that share only
    groups = {
        "lm": {"learning_rate": rate, "weight_decay": c.weight_decay},
        "shared": {"learning_rate": lambda step: scale * rate(step)},
    }
    optimizer = optimizers.make_optimizer(rules=rules, groups=groups, clip_norm=c.clip_norm)
    step = mutual.make_lm_step(arm=arm, bridge=bridge, weights=weights, optimizer=optimizer)
    compiled = parallel.compile_step(step, parallel=config.parallel)
    constants = {"warm_I": jnp.asarray(_warm_items(run.data))}
    if weights.kl:
        constants["seen_UI"] = _seen(run, (TRAIN,))

    def batch(number):
        return rows.batch(
            number,
            batch_size=c.batch_rows,
            seed=config.seed,
            max_text_targets=c.max_text_targets,
            uid_dropout=config.prompts.user_dropout,
            user_tokens=vocabulary.user_tokens,
            unnamed_user=vocabulary.unnamed_user,
        )

    return Arm(compiled=compiled, optimizer=optimizer, batch=batch, view=view, constants=constants, finish=finish)


def _domain_arm(run, arm, bridge, weights, *, rate, view, train_shared=True, parts=(TRAIN,)) -> Arm:
    config, data = run.config, run.data
    c, m = config.domain, config.mutual
    user_E, item_E = data.split.edges(TRAIN)
    warm_W = np.flatnonzero(_warm_items(data))
    rank_I = np.full(data.n_items, -1)
    rank_I[warm_W] = np.arange(len(warm_W))
    kl_users = min(m.kl_users, data.n_users) if weights.kl or weights.align_user else 0
    constants = {
        "edge_user_E": jnp.asarray(user_E),
        "edge_item_E": jnp.asarray(item_E),
        "warm_item_W": jnp.asarray(warm_W),
        "warm_I": jnp.asarray(rank_I >= 0),
        "text_weight_I": jnp.asarray(1.0 / (1.0 + data.split.degree(TRAIN)), jnp.float32),
        # Negatives come from the items with interactions: a cold item is not everybody's negative.
        "seen": sampling.make_seen(user_E, rank_I[item_E], data.n_users, len(warm_W)),
    }
    if weights.kl:
        constants["seen_UI"] = _seen(run, parts)
    rules = [
        (r"shared/.*", "domain" if train_shared else optimizers.FROZEN),
        (r"domain/.*", "domain"),
        (r"lm/.*", optimizers.FROZEN),
    ]
    optimizer = optimizers.make_optimizer(rules=rules, groups={"domain": {"learning_rate": rate}})
    step = mutual.make_domain_step(arm=arm, bridge=bridge, weights=weights, optimizer=optimizer)
    batch_size = min(c.batch_size, len(user_E))
    epoch = mutual.make_domain_epoch(step, batch_size=batch_size, kl_users=kl_users, kl_items=m.kl_items if weights.kl else 0)
    compiled = parallel.compile_step(epoch, parallel=config.parallel)
    slots = mutual.make_slots(batch_size=batch_size, kl_users=kl_users)
    return Arm(compiled=compiled, optimizer=optimizer, batch=lambda number: slots, view=view, constants=constants)


def _seen(run: Run, parts) -> jax.Array:
    everyone = np.arange(run.data.n_users)
    return jnp.asarray(evaluate.seen_mask(run.data.split.histories(*parts), everyone, run.data.n_items))


def _replay(run: Run, share_of) -> list:
    """Rows of the corpus that keep the pretrained words alive, as a share of the histories' rows."""
    rows, share = lm_rows.corpus_rows(run.config, run.data, run.texts), run.config.pretrain.replay_share
    if rows is None or not share:
        return []
    size = len(share_of) if share_of is not None else run.data.n_users // 4
    return [(rows, share * size / len(rows))]


def _lm_epochs(config) -> list[float]:
    m = config.mutual
    return [m.lm_epochs] + [m.lm_epochs_a_round] * m.rounds


def _lm_phases(rows, config, epochs: list[float], *, name: str) -> list[Phase]:
    return [Phase("lm", max(1, round(e * rows.n_steps(config.lm.batch_rows))) if e else 0, name) for e in epochs]


def _rate(config, phases):
    """The LM's learning rate over all its phases: a warm-up, then a cosine down to a tenth."""
    steps, c = sum(phase.units for phase in phases), config.lm
    return optax.warmup_cosine_decay_schedule(
        0.0, c.learning_rate, min(c.warmup_steps, steps // 2), steps, c.learning_rate / 10
    )
