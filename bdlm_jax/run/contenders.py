"""Who competes: every word of `config.models`, what it trains, and the rows of the table that it gives.

With `data.refit` a contender is trained twice, and what is tested is the second: see `Run.final`.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from bdlm_jax.data.splits import TRAIN
from bdlm_jax.domain.closed_form import CLOSED_FORM, interaction_matrix
from bdlm_jax.domain.models import MODELS
from bdlm_jax.evaluation import scorers
from bdlm_jax.evaluation.evaluate import CandidateScorer, CatalogueScorer
from bdlm_jax.lm.text_head import TextHead
from bdlm_jax.run import build, reading, served, stages, teachers
from bdlm_jax.run.build import Decoder, Run
from bdlm_jax.run.controls import CONTROLS, UNALIGNED
from bdlm_jax.run.glosses import with_glosses
from bdlm_jax.run.lifts import Lifted, Pair, is_lifted
from bdlm_jax.run.ranked import KNOWN
from bdlm_jax.runtime.files import write_json
from bdlm_jax.runtime.fit import Fitted
from bdlm_jax.types import Params

BEHIND = (1, 2, 5)  # items that a cached state has not read
POOL_WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)


class Served(NamedTuple):
    """What serving is handed of a row: under which name, of which kind ("domain" or "lm"), and its record's fields."""

    arm: str
    kind: str
    fields: Callable[[], dict]


class Entry(NamedTuple):
    """A row of the table: its scorer at test, made when it is asked for, and its protocols (None: the config's).

    served: None for what is there to be judged alone: BDLM's controls, sums, what needs no training.
    """

    name: str
    scorer: Callable[[], CandidateScorer | CatalogueScorer]
    protocols: tuple[str, ...] | None = None
    served: Served | None = None


class Bdlm(NamedTuple):
    """A trained BDLM: the run that is tested, what was chosen, what is tested (of a refit, another), the domain arm.

    texts: what their texts add to the LM's scores of items.
    """

    run: Run
    chosen: Fitted
    best: Fitted
    distilled: Fitted
    refreshed: Fitted
    texts: TextHead | None

    @property
    def chosen_in(self) -> Run:
        """The run whose validation chose it."""
        return self.run.first or self.run

    def reader(self, *, chosen: bool = False, behind: int = 0) -> reading.Reader:
        """Reads the LM arm for its test, or for the validation that chose it."""
        run, part = (self.chosen_in, "validation") if chosen else (self.run, "test")
        return reading.bdlm_reader(run, part, behind=behind, texts=self.texts)

    @property
    def lm(self) -> Params:
        return self.best.params["lm"]

    @property
    def domain(self) -> Params:
        """The domain arm as it is tested and served."""
        return self.refreshed.params["domain"]


def make_entries(run: Run, word: str, decoder: Callable[[], Decoder]) -> Iterator[Entry]:
    """Trains what a word of `config.models` needs and is not trained yet, and gives its rows."""
    if word in MODELS:
        yield from _domain_alone(run, word)
    else:
        yield from OTHERS[word](run, decoder)


def train_bdlm(run: Run, decoder: Callable[[], Decoder], word: str = "bdlm") -> Bdlm:
    """Trains BDLM or one of its controls: rounds, lessons, then the domain arm against its teacher at test time."""
    own = run if word == "bdlm" else run.variant(word, CONTROLS[word].settings(run.config))
    own = with_glosses(own, decoder())

    def alone(own: Run) -> Params:
        return stages.train_domain(run.final if own.first else run, own.config.domain.model).params["domain"]

    taught_by = {}
    chosen = teachers.learn_together(own, decoder(), alone, taught_by)
    last = taught_by["after"]
    distilled = stages.distill_domain(own, chosen.params["lm"], chosen.params["domain"], reader=last.read)
    best = chosen if own.final is own else teachers.learn_together(own.final, decoder(), alone, taught_by)
    refreshed = stages.refresh_domain(own.final, best.params["lm"], best.params["domain"], distilled, reader=last.read)
    return Bdlm(own.final, chosen, best, distilled, refreshed, last.texts)


def _bdlm(run: Run, decoder, word: str) -> Iterator[Entry]:
    made = train_bdlm(run, decoder, word)
    model, kind = made.run.config.domain.model, made.run.config.prompts.kind
    lm = Served("lm", "lm", lambda: served.lm_fields(made.run, made.reader(), made.lm, kind=kind))
    domain = Served("domain", "domain", lambda: served.domain_fields(made.run, model, made.domain))
    own = word == "bdlm"

    def lm_pair(*, chosen: bool) -> Pair:
        reader = made.reader(chosen=chosen)
        return _lm_pair(made.chosen_in if chosen else made.run, reader, made.chosen.params["lm"] if chosen else made.lm)

    yield from _entries(
        made.run, Entry(f"{word}_lm", lambda: made.reader().scorer(made.run, made.lm), served=lm if own else None),
        at_validation=lambda: lm_pair(chosen=True), at_test=lambda: lm_pair(chosen=False),
    )  # fmt: skip
    yield from _entries(
        made.run,
        Entry(f"{word}_domain", lambda: _domain_scorer(made.run, model, made.domain), served=domain if own else None),
        at_validation=lambda: _domain_pair(made.chosen_in, model, made.distilled.params["domain"], part="validation"),
        at_test=lambda: _domain_pair(made.run, model, made.domain, part="test"),
    )
    if own:
        unrefreshed = made.distilled.params["domain"]
        yield Entry("bdlm_domain_unrefreshed", lambda: _domain_scorer(made.run, model, unrefreshed))


def _item_pop(run: Run, decoder) -> Iterator[Entry]:
    yield Entry("item_pop", lambda: scorers.popularity_scorer(run.data.split.degree(*KNOWN["test"])))


def _closed_form(run: Run, decoder, model: str) -> Iterator[Entry]:
    """Fitted on training, as what is trained by steps is; a user's history at test time has the validation item."""
    sizes = {"n_users": run.data.n_users, "n_items": run.data.n_items}

    def scorer() -> CatalogueScorer:
        edges = run.final.data.split.edges
        train_UI, known_UI = (interaction_matrix(*edges(*parts), **sizes) for parts in ((TRAIN,), KNOWN["test"]))
        return scorers.closed_form_scorer(known_UI, CLOSED_FORM[model](train_UI, **run.config[model].to_dict()))

    yield Entry(model, scorer)


def _domain_alone(run: Run, model: str) -> Iterator[Entry]:
    chosen, params = (fitted.params["domain"] for fitted in _train(run, lambda run: stages.train_domain(run, model)))
    tables = Served(model, "domain", lambda: served.domain_fields(run.final, model, params))
    yield from _entries(
        run.final, Entry(model, lambda: _domain_scorer(run.final, model, params), served=tables),
        at_validation=lambda: _domain_pair(run, model, chosen, part="validation"),
        at_test=lambda: _domain_pair(run.final, model, params, part="test"),
        dot=lambda: build.make_arm(run, model).dot,
    )  # fmt: skip


def _text_lm(run: Run, decoder) -> Iterator[Entry]:
    _, fitted = _train(run, lambda run: stages.train_text_lm(run, decoder()))
    lm = fitted.params["lm"]["lm"]
    yield Entry("text_lm", lambda: stages.text_lm_scorer(run, lm, "test"), run.config.evaluate.text_protocols)


def _ids_lm(run: Run, decoder) -> Iterator[Entry]:
    chosen, lm = (fitted.params["lm"] for fitted in _train(run, lambda run: stages.train_ids_lm(run, decoder())))
    own = Served("ids_lm", "lm", lambda: served.lm_fields(run, reading.ids_reader(run, "test"), lm, kind="ids"))
    yield from _entries(
        run.final, Entry("ids_lm", lambda: reading.ids_reader(run, "test").scorer(run, lm), served=own),
        at_validation=lambda: _lm_pair(run, reading.ids_reader(run, "validation"), chosen),
        at_test=lambda: _lm_pair(run, reading.ids_reader(run, "test"), lm),
    )  # fmt: skip


def _ids_lm_distilled(run: Run, decoder) -> Iterator[Entry]:
    """The domain model alone, taught by the ids-only LM as BDLM's domain arm is by its own at the end."""
    own, model = run.variant("ids_lm_distilled", UNALIGNED), run.config.domain.model

    def teacher_and_start(run: Run) -> tuple[Params, Params]:
        return stages.train_ids_lm(run, decoder()).params["lm"], stages.train_domain(run, model).params["domain"]

    distilled = stages.distill_domain(own, *teacher_and_start(run), reader=reading.ids_reader)
    pair = teacher_and_start(run.final)
    refreshed = stages.refresh_domain(own.final, *pair, distilled, reader=reading.ids_reader).params["domain"]
    yield Entry("ids_lm_distilled", lambda: _domain_scorer(own.final, model, refreshed))


def _cached(run: Run, decoder) -> Iterator[Entry]:
    made = train_bdlm(run, decoder)
    for behind in BEHIND:
        reader = functools.partial(made.reader, behind=behind)
        yield Entry(f"cached_{behind}", lambda reader=reader: reader().scorer(made.run, made.lm))


def _pool(run: Run, decoder) -> Iterator[Entry]:
    """BDLM's two arms, summed."""
    made, model = train_bdlm(run, decoder), run.config.domain.model

    def at_validation():
        yield made.reader(chosen=True).scorer(run, made.chosen.params["lm"])
        yield scorers.domain_scorer(build.make_arm(run, model), made.distilled.params["domain"])

    def at_test():
        yield made.reader().scorer(made.run, made.lm)
        yield _domain_scorer(made.run, model, made.domain)

    yield _weighted(run, "pool", at_validation, at_test)


def _pool_alone(run: Run, decoder) -> Iterator[Entry]:
    """The ids-only LM and the domain model, neither of which knows the other, summed."""
    model = run.config.domain.model

    def trained(run: Run) -> tuple[Params, Params]:
        return stages.train_ids_lm(run, decoder()).params["lm"], stages.train_domain(run, model).params["domain"]

    chosen, tested = trained(run), trained(run.final)

    def at_validation():
        yield reading.ids_reader(run, "validation").scorer(run, chosen[0])
        yield scorers.domain_scorer(build.make_arm(run, model), chosen[1])

    def at_test():
        yield reading.ids_reader(run.final, "test").scorer(run.final, tested[0])
        yield _domain_scorer(run.final, model, tested[1])

    yield _weighted(run, "pool_alone", at_validation, at_test)


def _weighted(run: Run, name: str, at_validation, at_test) -> Entry:
    """Chooses the weight of the second of two scorers on validation, and notes it with what each weight reached."""

    def scorer() -> CatalogueScorer:
        pair = tuple(at_validation())
        reached = {w: stages.validate(run, scorers.pool_scorer(*pair, w))[run.config.select] for w in POOL_WEIGHTS}
        weight = max(POOL_WEIGHTS, key=reached.get)
        write_json(
            run.folder / f"{name}.json", {"weight": weight, "validation": {str(w): v for w, v in reached.items()}}
        )
        return scorers.pool_scorer(*at_test(), weight)

    return Entry(name, scorer)


def _train(run: Run, train: Callable[[Run], Fitted]) -> tuple[Fitted, Fitted]:
    """Trains where the choice is made and, where another run is tested, there; returns what is chosen and tested."""
    fitted = train(run)
    return fitted, fitted if run.final is run else train(run.final)


def _entries(
    run: Run, entry: Entry, *, at_validation: Callable[[], Pair], at_test: Callable[[], Pair], dot=lambda: True
) -> Iterator[Entry]:
    """A model's row or, with `evaluate.cold_lift`, that of the model with its cold items lifted and that without.

    `dot()` says whether its scores are inner products.
    """
    if not (is_lifted(run) and dot()):
        yield entry
        return
    lifted, own = Lifted(run, entry.name, at_validation=at_validation, at_test=at_test), entry.served
    if own:
        own = own._replace(fields=lambda: entry.served.fields() | {"lift": lifted.lift})
    for (name, scorer), its in zip(lifted.scorers(), (own, None)):
        yield Entry(name, scorer, served=its)


def _domain_pair(run: Run, model: str, params: Params, *, part: str) -> Pair:
    parts = KNOWN["validation"] if part == "validation" else build.parts_at_test(run.config)
    view = scorers.domain_view(build.make_arm(run, model, parts=parts), params)
    return np.asarray(view["user"]), np.asarray(view["item"])


def _lm_pair(run: Run, reader: reading.Reader, params: Params) -> Pair:
    return reader.widen(reader.read(run, params, reader.users))


def _domain_scorer(run: Run, model: str, params: Params) -> CatalogueScorer:
    return scorers.domain_scorer(build.make_arm(run, model, parts=build.parts_at_test(run.config)), params)


# Each trains what it needs of (run, pretrained decoder), and gives its rows; a domain model's word is its name.
OTHERS: dict[str, Callable[[Run, Callable[[], Decoder]], Iterator[Entry]]] = {
    **{word: functools.partial(_closed_form, model=word) for word in CLOSED_FORM},
    "item_pop": _item_pop,
    "text_lm": _text_lm,
    "ids_lm": _ids_lm,
    "ids_lm_distilled": _ids_lm_distilled,
    "cached": _cached,
    "pool": _pool,
    "pool_alone": _pool_alone,
    **{word: functools.partial(_bdlm, word=word) for word in ("bdlm", *CONTROLS)},
}
