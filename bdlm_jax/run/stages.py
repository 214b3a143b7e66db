"""What each stage of a run trains: pretraining, the arms alone, and the mutual rounds. Each returns a `fit.Fitted`.

A stage names its arms, its phases and its validation, and hands them to the one loop in `fit`.
"""

import numpy as np

from bdlm_jax.data.splits import VALIDATION
from bdlm_jax.domain.arm import DomainArm
from bdlm_jax.evaluation import evaluate
from bdlm_jax.evaluation import scorers as models
from bdlm_jax.mutual import optimizer as optimizers
from bdlm_jax.mutual import sharing
from bdlm_jax.mutual.options import Bridge, DomainWeights, LMWeights
from bdlm_jax.run import rows as lm_rows
from bdlm_jax.run.build import (
    DOT_ARM,
    Run,
    init_domain_params,
    init_params,
    lm_config,
    load_weights,
    make_arm,
    make_bridge,
    make_domain_arm,
    make_lm_arm,
    make_test_arm,
    row_std,
    table_std,
    warm_items,
)
from bdlm_jax.run.prepare import KNOWN
from bdlm_jax.runtime.fit import Fitted, Phase
from bdlm_jax.types import Params


def pretrain_lm(run: Run) -> Params | None:
    """Trains the decoder on the corpus; returns its params, or None where there is nothing to begin from.

    A decoder of `lm.path` comes as it is, unless `pretrain.corpus` is set: then it goes on from there (domain-adaptive
    pretraining), with whatever `lm.trains` lets train.
    """
    config = run.config
    if config.lm.path and not config.pretrain.corpus:
        return load_weights(run)
    rows = lm_rows.corpus_rows(config, run.data, run.texts)
    if rows is None or config.pretrain.epochs <= 0:
        return load_weights(run)
    steps = max(1, round(config.pretrain.epochs * rows.n_steps(config.lm.batch_rows)))
    bridge = make_bridge(run, reads="layer0")
    c = config.pretrain
    rate = optimizers.make_schedule(config.lm.schedule, c.learning_rate, warmup=max(1, steps // 20), steps=steps)
    trains = config.lm.trains if config.lm.path else "full"
    lm_arm = make_lm_arm(
        run, rows, bridge, LMWeights(item=0.0, text=1.0), rate=rate, train_shared=False, trains=trains, row_std=1.0
    )
    fitted = run.fit(
        "pretrain",
        phases=[Phase("lm", steps, "next token")],
        arms={"lm": lm_arm},
        params=lambda: init_params(
            run, DOT_ARM, "pretrain", reads="layer0", pretrained=load_weights(run), trains=trains
        ),
        validate=lambda arm, params: {"done": 1.0},
        select="done",
        judged=("lm",),
    )
    return fitted.params["lm"]["lm"]


def train_domain(
    run: Run, model: str, *, learning_rate: float, regularisation: float, epochs: int, stage: str
) -> Fitted:
    """Trains a domain model alone by BPR, judged on validation every `evaluate_every` epochs."""
    c = run.config.domain
    arm = make_arm(run, model)
    weights = DomainWeights(regularisation=regularisation)
    every = min(c.evaluate_every, epochs)
    phases = [Phase("domain", min(every, epochs - done), "BPR epochs") for done in range(0, epochs, every)]
    return run.fit(
        stage,
        phases=phases,
        arms={"domain": make_domain_arm(run, arm, None, weights, rate=learning_rate, view=lambda params: {})},
        params=lambda: init_domain_params(run, arm, stage),
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
    # A frozen decoder has nothing to learn from text alone: it is judged as it came.
    epochs = 0.0 if config.lm.trains == "bridge" else config.lm_alone.text_epochs
    phases = _lm_phases(rows, config, [epochs], name="titles")
    bridge = make_bridge(run, reads="layer0")
    lm_arm = make_lm_arm(
        run, rows, bridge, LMWeights(item=0.0, text=1.0), rate=_rate(config, phases), train_shared=False, row_std=1.0
    )
    scorer = lambda params: text_lm_scorer(run, params, "validation")  # noqa: E731
    return run.fit(
        "text_lm",
        phases=phases,
        arms={"lm": lm_arm},
        params=lambda: init_params(run, DOT_ARM, "text_lm", reads="layer0", pretrained=pretrained),
        validate=lambda _, params: validation_metrics(run, scorer(params["lm"]), protocol="cand20"),
        select=config.select.split("/")[0] + "/cand20",
        judged=("lm",),
    )


def train_ids_lm(run: Run, pretrained: Params | None) -> Fitted:
    """Trains the ids-only LM: the same decoder, its own random table of ids, no titles, judged as often as BDLM."""
    config = run.config
    rows = lm_rows.training_rows(config, run.data, run.texts, kind="ids")
    phases = _lm_phases(rows, config, [config.lm_alone.ids_times * e for e in _lm_epochs(config)], name="ids")
    bridge = make_bridge(run, reads="layer0")
    lm_arm = make_lm_arm(
        run, rows, bridge, LMWeights(item=1.0, text=0.0), rate=_rate(config, phases), row_std=row_std(run, pretrained)
    )
    reading = lm_rows.reading_rows(config, run.data, run.texts, kind="ids", parts=KNOWN["validation"])
    return run.fit(
        "ids_lm",
        phases=phases,
        arms={"lm": lm_arm},
        params=lambda: init_params(run, DOT_ARM, "ids_lm", reads="layer0", pretrained=pretrained),
        validate=lambda _, params: validation_metrics(run, lm_scorer(run, params, DOT_ARM, bridge, reading)),
        select=config.select,
        judged=("lm",),
    )


def train_bdlm(run: Run, pretrained: Params | None, domain_params: Params) -> Fitted:
    """Runs the mutual rounds: the LM's first phase, then domain and LM phases in turn."""
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

    params = lambda: init_params(  # noqa: E731
        run, arm, "bdlm", reads=m.reads, pretrained=pretrained, domain_params=domain_params
    )
    trained_by = config.shared.trained_by
    cold_I = ~warm_items(run.data)

    def write_back(params):
        z_item_ID = sharing.bridge_out(params["lm"]["bridge"], _read(run, params, arm, bridge, cards)["item"])
        return {**params, "shared": sharing.write_back(params["shared"], z_item_ID, cold_I)}

    start = params()
    rows_std = table_std(run, start["shared"], start["domain"], arm, m.reads)
    writes = m.domain.align_item and trained_by != "none" and cold_I.any()
    lm_weights = LMWeights(**m.lm.to_dict())
    domain_weights = DomainWeights(regularisation=config.domain.regularisation, **m.domain.to_dict())
    arms = {
        "lm": make_lm_arm(
            run, rows, bridge, lm_weights, arm=arm, rate=_rate(config, lm_phases), rows_std=rows_std,
            bridge_rate=m.learning_rate_bridge, row_std=row_std(run, pretrained),
            user_dropout=m.user_dropout,
            train_shared=trained_by in ("both", "lm"), view=lambda params: models.domain_view(arm, params),
            finish=write_back if writes else lambda params: params,
        ),
        "domain": make_domain_arm(
            run, arm, bridge, domain_weights, rate=m.domain_learning_rate,
            train_shared=trained_by in ("both", "domain"), view=lambda params: models.lm_view(params, *read(params)),
        ),
    }  # fmt: skip
    return run.fit(
        "bdlm",
        phases=phases,
        arms=arms,
        params=params,
        validate=validate,
        select=config.select,
        judged=("domain", "lm"),
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
        arms={
            "domain": make_domain_arm(
                run,
                arm,
                bridge,
                weights,
                rate=m.distill_learning_rate,
                view=view,
                parts=KNOWN[part],
                train_shared=config.shared.trained_by in ("both", "domain"),
            )
        },
        params=lambda: fitted.params["domain"],
        validate=validate,
        select=select,
        judged=("domain",),
    )


def lm_scorer(run: Run, params: Params, arm: DomainArm, bridge: Bridge, reading) -> evaluate.CatalogueScorer:
    """The LM arm as a scorer: one forward pass a user."""
    states = _read(run, params, arm, bridge, reading)
    return models.state_scorer(states["user"], states["rows_item"])


def text_lm_scorer(run: Run, lm_params: Params, part: str) -> evaluate.CandidateScorer:
    """The text-only LM as a scorer for a part."""
    prefixes = lm_rows.text_prefixes(run.config, run.data, run.texts, parts=KNOWN[part])
    return models.text_scorer(lm_params, lm_config(run), prefixes, lm_rows.title_continuations(run.texts))


def validation_metrics(run: Run, scorer, *, protocol: str | None = None) -> dict[str, float]:
    """Metrics of a scorer on validation, under the protocol of `config.select` unless another is named."""
    name, chunk = protocol or run.config.select.split("/")[1], run.config.evaluate.chunk
    if name == "full":
        user_N, item_N = run.data.split.cases(VALIDATION)
        counts = evaluate.evaluate_full(
            scorer, user_N, item_N, run.data.split.histories(*KNOWN["validation"]), chunk=chunk
        )
    else:
        counts = evaluate.evaluate_candidates(scorer, run.data.candidates["validation"][name], chunk=chunk)
    metrics = dict.fromkeys(("hr@1", "ndcg@10", run.config.select.split("/")[0]))
    return {f"{metric}/{name}": evaluate.mean_metric(counts, metric) for metric in metrics}


def _read(run: Run, params, arm, bridge, rows) -> dict[str, np.ndarray]:
    return models.read_states(
        params, rows, arm=arm, bridge=bridge, n_users=run.data.n_users, n_items=run.data.n_items,
        batch_rows=run.config.lm.batch_rows,
    )  # fmt: skip


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
    """The LM's learning rate over all its phases, as `lm.schedule` says."""
    steps, c = max(1, sum(phase.units for phase in phases)), config.lm
    return optimizers.make_schedule(c.schedule, c.learning_rate, warmup=min(c.warmup_steps, steps // 2), steps=steps)
