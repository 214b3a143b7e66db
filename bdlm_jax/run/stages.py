"""What each stage of a run trains: pretraining, the arms alone, and the mutual rounds. Each returns a `fit.Fitted`.

A stage names its arms, its phases and its validation, and hands them to the one loop in `runtime.fit`.
"""

import functools
from collections.abc import Callable
from typing import Any

from bdlm_jax.data.candidates import check_unchanged, draw_cases
from bdlm_jax.domain.arm import DomainArm
from bdlm_jax.evaluation import evaluate, scorers
from bdlm_jax.evaluation.evaluate import CandidateScorer, Counts
from bdlm_jax.lm.packing import Packed
from bdlm_jax.mutual import lessons, sharing
from bdlm_jax.mutual.optimizer import make_schedule
from bdlm_jax.mutual.options import DomainWeights, LMWeights, Meeting
from bdlm_jax.run import build, general, rates, rows
from bdlm_jax.run.build import DOT_ARM, Decoder, Run
from bdlm_jax.run.general import General
from bdlm_jax.run.prepare import training_setting
from bdlm_jax.run.ranked import KNOWN, PARTS, judged_cases
from bdlm_jax.run.reading import Reader, bdlm_reader, heeding, ids_reader
from bdlm_jax.runtime.fit import Arm, Fitted, Phase
from bdlm_jax.types import Params

_TEXT_ONLY, _ITEMS_ONLY = LMWeights(item=0.0, text=1.0), LMWeights(item=1.0, text=0.0)


def pretrain_lm(run: Run) -> Decoder:
    """Trains the decoder on the corpus, where there is one.

    A decoder of `lm.path` comes as it is, unless `pretrain.corpus` is set: then it goes on from there (domain-adaptive
    pretraining), with whatever `lm.trains` lets train.
    """
    config, c = run.config, run.config.pretrain
    packed = None
    if c.epochs > 0 and (c.corpus or not config.lm.path):
        packed = rows.corpus_rows(run)
    if packed is None:
        return build.make_decoder(run, build.load_decoder(run))
    steps = max(1, round(c.epochs * packed.n_steps(config.lm.batch_rows)))
    peak = c.learning_rate or rates.decoder_rate(run)
    rate = make_schedule(config.lm.schedule, peak, warmup=max(1, steps // 20), steps=steps)
    fitted = _train_lm(
        run, "pretrain", packed, [Phase("lm", steps, "next token")], _TEXT_ONLY, rates.lm_rates(rate),
        decoder=lambda: build.make_decoder(run, build.load_decoder(run)),
        trains=config.lm.trains if config.lm.path else "full", keep={"lm": 0},
    )  # fmt: skip
    return build.make_decoder(run, fitted.params["lm"]["lm"])


def train_text_lm(run: Run, decoder: Decoder) -> Fitted:
    """Trains the text-only LM: histories as titles, nothing else. It is judged by its ranking of validation titles."""
    config = run.config
    histories = rows.training_rows(run, kind="text")
    n_rows = len(histories) if config.lm.path else run.data.n_users // 4
    replayed = _replay(run, general.general_text(run, decoder), n_rows)
    packed = rows.mix([(histories, 1), *replayed], seed=config.seed)
    # A frozen decoder has nothing to learn from text alone: it is judged as it came.
    phases = _lm_phases(run, packed, [0.0 if config.lm.trains == "bridge" else config.lm_alone.text_epochs], "titles")
    moves = rates.lm_rates(rates.schedule(run, phases))
    return _train_lm(
        run, "text_lm", packed, phases, _TEXT_ONLY, moves, decoder=lambda: decoder, parents=decoder,
        validate=lambda params: validate(run, text_lm_scorer(run, params["lm"], "validation"), protocol="cand20"),
        select=config.select.split("/")[0] + "/cand20",
    )  # fmt: skip


def train_ids_lm(run: Run, decoder: Decoder) -> Fitted:
    """Trains the ids-only LM: the same decoder, its own random table of ids, no titles, judged as often as BDLM.

    Its rows have a scale of their own (`lm_alone.row_std`), so that what suits BDLM's is not forced on it.
    """
    config = run.config
    decoder = build.make_decoder(run, decoder.params, row_std=config.lm_alone.row_std)
    packed = rows.training_rows(run, kind="ids")
    phases = _lm_phases(run, packed, [config.lm_alone.ids_times * epochs for epochs in _lm_epochs(config)], "ids")
    std, rate = config.shared.std, config.lm.learning_rate
    bridge = rates.bridge_rate(run, decoder, read_std=std, given=rate)  # as fast as the decoder, where that is given
    shared = rates.shared_rate(run, decoder, read_std=std, reads="layer0")
    moves = rates.lm_rates(rates.schedule(run, phases), bridge=bridge, shared=shared)
    reader = ids_reader(run, "validation")
    return _train_lm(
        run, "ids_lm", packed, phases, _ITEMS_ONLY, moves,
        decoder=lambda: decoder, parents=decoder, validate=lambda params: validate(run, reader.scorer(run, params)),
        select=config.select,
    )  # fmt: skip


def train_domain(run: Run, model: str) -> Fitted:
    """Trains a domain model alone, judged on validation every `evaluate_every` epochs."""
    c, arm = functools.partial(training_setting, run.config, model), build.make_arm(run, model)
    weights = DomainWeights(regularisation=c("regularisation"))
    return _fit_domain(
        run, model, arm,
        build.make_domain_arm(run, model, arm, None, weights, rate=c("learning_rate"), epochs=c("epochs")),
        phases=_domain_phases(c("epochs"), "epochs alone", every=c("evaluate_every")),
        params=lambda: build.init_tables(run, model, arm, std=c("std")),
        parents=build.content(run, model),
    )  # fmt: skip


def train_bdlm(run: Run, decoder: Decoder, domain_params: Params) -> Fitted:
    """Runs the mutual rounds: the LM's first phase, then domain and LM phases in turn."""
    config, m = run.config, run.config.mutual
    text = general.general_text(run, decoder)
    reader, packed = bdlm_reader(run, "validation"), _bdlm_rows(run, text)
    arm, meeting = reader.arm, reader.meeting
    lm_phases = _lm_phases(run, packed, _lm_epochs(config), "LM")
    phases = lm_phases[:1]
    for number, phase in enumerate(lm_phases[1:], 1):
        phases.append(Phase("domain", m.domain_epochs_a_round, f"round {number}, domain"))
        phases.append(phase._replace(name=f"round {number}, LM"))
    tables = build.measure_tables(run, arm, build.init_tables(run, "bdlm", arm, trained=domain_params), reads=m.reads)
    lm_arm = _bdlm_lm_arm(run, reader, packed, LMWeights(**m.lm.to_dict()), lm_phases, decoder, tables)
    lm_arm = lm_arm._replace(view=lambda params: scorers.domain_view(arm, params))
    domain_arm = _taught_arm(run, arm, meeting, rate=m.domain_learning_rate)
    return run.fit(
        "bdlm",
        parents=(decoder, domain_params),
        phases=[phase for phase in phases if phase.units],
        arms={"lm": lm_arm, "domain": domain_arm._replace(view=lambda params: reader.view(run, params))},
        params=lambda: build.init_params(run, "bdlm", tables, decoder),
        validate=_judge_both(run, reader, text),
        select=config.select,
        judged=("domain", "lm"),
    )


def teach_both(run: Run, decoder: Decoder, start: Params, domain_params: Params, reader: Reader) -> Fitted:
    """Lets both arms learn in turn from the teacher that `reader` makes of the LM as it starts here (ours).

    Both hear it of users alone, at the end of a history; the table that they share stays one, and each phase begins
    with what the other arm has made of it. A teacher made anew of an LM whose table the domain arm has just moved is
    a worse one (docs/experiments.md). Source: knowledge distillation from an ensemble that learns with its
    members (ONE, Lan et al. 2018; KDCL, Guo et al. 2020).

    With `mutual.taught.lm` "afresh" the LM begins again as it first began, and hears the teacher at every place of a
    history, beside all that it learnt from before: there the LM as it was and its head (`lessons`), not the domain
    model's own rows of users. Source: born-again networks (Furlanello et al. 2018), with a head beside the teacher.
    """
    c, m = run.config.mutual.taught, run.config.mutual
    text = general.general_text(run, decoder)
    arm, packed = reader.arm, _bdlm_rows(run, text)
    lm_phases = _lm_phases(run, packed, [c.lm_epochs] * c.rounds, "LM")
    phases = []
    for number, phase in enumerate(lm_phases, 1):
        phases.append(phase._replace(name=f"lesson {number}, LM"))
        phases.append(Phase("domain", c.domain_epochs, f"lesson {number}, domain"))
    tables = build.measure_tables(run, arm, build.init_tables(run, "bdlm", arm, trained=domain_params), reads=m.reads)
    teach = functools.cache(lambda: reader.view(run, start))
    begin, weights, view = lambda: start, LMWeights(item=m.lm.item, text=m.lm.text, kl=c.kl), lambda _: teach()
    if c.lm == "afresh":
        begin = functools.partial(build.init_params, run, "bdlm", tables, decoder)
        weights, view = LMWeights(**(m.lm.to_dict() | {"kl": c.kl})), _at_every_place(run, reader, start)
    arms = {
        "lm": _bdlm_lm_arm(run, reader, packed, weights, lm_phases, decoder, tables)._replace(view=view),
        "domain": _taught_arm(run, arm, reader.meeting, rate=m.distill_learning_rate)._replace(view=lambda _: teach()),
    }
    return run.fit(
        "taught",
        parents=(start, domain_params, reader.texts, *([reader.beside] if reader.beside else [])),
        phases=[phase for phase in phases if phase.units],
        arms=arms,
        params=begin,
        validate=_judge_both(run, reader, text),
        select=run.config.select,
        judged=("domain", "lm"),
    )


def distill_domain(
    run: Run, lm: Params, start: Params, *, reader: Callable[[Run, str], Reader] = bdlm_reader
) -> Fitted:
    """Lets a domain arm learn from an LM, which `reader` reads, at length: the LM no longer has to follow (ours)."""
    phases = _domain_phases(run.config.mutual.distill_epochs, "distillation", every=run.config.domain.evaluate_every)
    arm = build.make_arm(run, run.config.domain.model)
    return _distill(run, "distill", reader(run, "validation"), lm, start, arm, phases)


def refresh_domain(
    run: Run, lm: Params, start: Params, distilled: Fitted, *, reader: Callable[[Run, str], Reader] = bdlm_reader
) -> Fitted:
    """Repeats `distill_domain` from the same start against LM states that know the validation item, for test (ours).

    It has as many epochs as were chosen there; nothing is selected.
    """
    c = run.config
    epochs = min((distilled.phase["domain"] + 1) * c.domain.evaluate_every, c.mutual.distill_epochs)
    arm = build.make_arm(run, c.domain.model, parts=build.parts_at_test(c))
    phases = [Phase("domain", epochs, "refresh")]
    return _distill(run, "refresh", reader(run, "test"), lm, start, arm, phases, part="test", keep={"domain": 0})


def text_lm_scorer(run: Run, lm_params: Params, part: str) -> CandidateScorer:
    """The text-only LM as a scorer for a part."""
    prefixes = rows.text_prefixes(run, part=part)
    return scorers.text_scorer(lm_params, run.lm, prefixes, rows.title_continuations(run), heed=heeding(run))


def count_cases(run: Run, scorer, part: str, protocol: str, *, progress: Callable = iter) -> Counts:
    """Ranks every case of a part among the candidates of a protocol, or among the whole catalogue ("full").

    Of large data a drawn part is tested (`ranked.judged_cases`), and of validation's under "full"
    `evaluate.validation_users` at most: the same ones for every model and seed.
    """
    chunk = evaluate.chunk_users(run.config.evaluate.chunk, run.data.n_items)
    options = {"chunk": chunk, "progress": lambda chunks: heeding(run)(progress(chunks))}
    if protocol != "full":
        candidates = run.data.candidates[part][protocol]
        check_unchanged(candidates, run.data.fingerprint["candidates"][f"{part}/{protocol}"])
        return evaluate.evaluate_candidates(scorer, candidates, **options)
    user_N, item_N = run.data.split.cases(PARTS[part])
    if part == "test":
        case_M = judged_cases(run.config, run.data.split, part)
    else:
        most = run.config.evaluate.validation_users or len(user_N)
        case_M = draw_cases(len(user_N), most, seed=run.config.data.candidates_seed)
    if case_M is not None:
        user_N, item_N = user_N[case_M], item_N[case_M]
    return evaluate.evaluate_full(scorer, user_N, item_N, run.data.split.histories(*KNOWN[part]), **options)


def validate(run: Run, scorer, *, protocol: str | None = None) -> dict[str, float]:
    """Metrics of a scorer on validation, under the protocol of `config.select` unless another is named."""
    metric, _, selected = run.config.select.partition("/")
    protocol = protocol or selected
    counts = count_cases(run, scorer, "validation", protocol)
    return {f"{name}/{protocol}": evaluate.mean_metric(counts, name) for name in {"hr@1", "ndcg@10", metric}}


def _train_lm(
    run, stage, packed, phases, weights, rates, *, decoder, parents=None, validate=None, trains=None, **choice
) -> Fitted:
    """An LM without a domain model: its own tables, if it reads any; `choice` is `select` or `keep` of `fit`."""
    arm = build.make_lm_arm(run, packed, Meeting(run.lm), weights, rates, trains=trains)

    def params():
        tables = build.measure_tables(run, DOT_ARM, build.init_tables(run, stage, DOT_ARM), reads="layer0")
        return build.init_params(run, stage, tables, decoder(), trains=trains)

    return run.fit(
        stage,
        parents=parents,
        phases=phases,
        arms={"lm": arm},
        params=params,
        validate=lambda _, params: validate(params),
        judged=("lm",),
        **choice,
    )


def _bdlm_lm_arm(run: Run, reader: Reader, packed: Packed, weights: LMWeights, phases, decoder: Decoder, tables):
    """BDLM's LM arm, without a view yet; `tables` are those with which its first stage began."""
    m, trained_by = run.config.mutual, run.config.shared.trained_by
    shared = rates.shared_rate(run, decoder, read_std=tables.read_std, reads=m.reads)
    bridge = rates.bridge_rate(run, decoder, read_std=tables.read_std, given=m.learning_rate_bridge)
    moves = rates.lm_rates(
        rates.schedule(run, phases), bridge=bridge, shared=shared if trained_by in ("both", "lm") else None
    )

    def write_back(params):
        states = reader.read(run, params, reader.cards)["item"]
        z_item_ID = sharing.bridge_out(params["lm"]["bridge"], states)
        return {**params, "shared": sharing.write_back(params["shared"], z_item_ID, ~run.warm_I)}

    made = build.make_lm_arm(run, packed, reader.meeting, weights, moves, arm=reader.arm)
    if m.domain.align_item and trained_by != "none" and not run.warm_I.all():
        made = made._replace(finish=write_back)
    return made


def _at_every_place(run: Run, reader: Reader, start: Params) -> Callable[[Params], Params]:
    """What an LM that begins afresh hears: the domain arm, and the teacher that `mutual.teacher` names."""
    who, options = run.config.mutual.teacher, {"arm": reader.arm, "meeting": reader.meeting}

    @functools.cache
    def teacher():
        texts = None if who == "lm" else reader.texts
        return lessons.make_teacher(start, texts, reads_lm=who != "domain", **options)

    return lambda params: scorers.domain_view(reader.arm, params) | {"teacher": teacher()}


def _judge_both(run: Run, reader: Reader, text: General) -> Callable[[str, Params], dict[str, float]]:
    def validate_arm(name, params):
        spoken = general.spoken(run, text, params["lm"]) if name == "lm" else {}
        scorer = scorers.domain_scorer(reader.arm, params) if name == "domain" else reader.scorer(run, params)
        return spoken | validate(run, scorer)

    return validate_arm


def _taught_arm(run: Run, arm: DomainArm, meeting: Meeting, *, rate: float, part: str = "validation"):
    """BDLM's domain arm: it learns from interactions and from the LM, without a view yet."""
    c = run.config
    regularisation = training_setting(c, c.domain.model, "regularisation")
    weights = DomainWeights(regularisation=regularisation, **c.mutual.domain.to_dict())
    trains = c.shared.trained_by in ("both", "domain")
    return build.make_domain_arm(run, c.domain.model, arm, meeting, weights, rate=rate, train_shared=trains, part=part)


def _distill(
    run: Run,
    stage: str,
    reader: Reader,
    lm: Params,
    start: Params,
    arm: DomainArm,
    phases,
    *,
    part="validation",
    **choice,
) -> Fitted:
    taught = _taught_arm(run, arm, reader.meeting, rate=run.config.mutual.distill_learning_rate, part=part)
    taught = taught._replace(view=lambda _: reader.view(run, lm))
    parents = lm, start, reader.texts, *([reader.beside] if reader.beside else [])
    return _fit_domain(run, stage, arm, taught, phases=phases, parents=parents, params=lambda: start, **choice)


def _fit_domain(
    run: Run, stage: str, arm: DomainArm, trained: Arm, *, phases, params, parents: Any = None, **choice
) -> Fitted:
    """Trains the domain arm by itself; `choice` is `keep` of `fit`, or nothing."""
    return run.fit(
        stage,
        parents=parents,
        phases=phases,
        arms={"domain": trained},
        params=params,
        validate=lambda _, params: validate(run, scorers.domain_scorer(arm, params)),
        select=run.config.select,
        judged=("domain",),
        **choice,
    )


def _bdlm_rows(run: Run, text: General) -> Packed:
    """Histories, a share of them with titles, cards of items without and with their names, and some of the corpus."""
    c = run.config.prompts
    own = rows.training_rows(run, kind=c.kind)
    titled = None
    if c.kind == "ids" and c.titled_share:
        titled = rows.training_rows(run, kind="ids_titles")
    cards, named = (rows.card_rows(run, named=named) for named in (False, True))
    parts = [(own, 1), (titled, c.titled_share), (cards, c.card_copies), (named, c.card_copies / 8)]
    # An own model has more to lose than a small corpus taught: its share is of all other rows.
    whole = sum(copies * len(packed) for packed, copies in parts if packed)
    replayed = _replay(run, text, whole if run.config.lm.path else len(own))
    return rows.mix([*parts, *replayed], seed=run.config.seed)


def _replay(run: Run, text: General, n_rows: int) -> list:
    """Rows of general text that keep the pretrained words alive, as a share of so many."""
    packed, share = text.replay, run.config.pretrain.replay_share
    return [] if packed is None or not share else [(packed, share * n_rows / len(packed))]


def _lm_epochs(config) -> list[float]:
    return [config.mutual.lm_epochs] + [config.mutual.lm_epochs_a_round] * config.mutual.rounds


def _lm_phases(run: Run, packed: Packed, epochs: list[float], name: str) -> list[Phase]:
    steps = packed.n_steps(run.config.lm.batch_rows)
    return [Phase("lm", max(1, round(e * steps)) if e else 0, name) for e in epochs]


def _domain_phases(epochs: int, name: str, *, every: int) -> list[Phase]:
    every = min(every, epochs)
    return [Phase("domain", min(every, epochs - done), name) for done in range(0, epochs, every)]
