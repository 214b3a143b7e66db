"""How far each model's rows of items without interactions are moved: chosen on validation, for every model alike."""

import functools
from collections.abc import Callable, Iterator

import numpy as np

from bdlm_jax.evaluation import scorers
from bdlm_jax.evaluation.evaluate import CatalogueScorer
from bdlm_jax.evaluation.lift import Lift, make_lift
from bdlm_jax.evaluation.metrics import case_metric
from bdlm_jax.run import stages
from bdlm_jax.run.build import Run
from bdlm_jax.run.controls import UNLIFTED
from bdlm_jax.runtime.files import write_json

LIFTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)  # tried; in deviations of a score
Pair = tuple[np.ndarray, np.ndarray]  # states (U, D) and rows (I, D), whose inner products are the scores


class Lifted:
    """A model whose scores are inner products, with its cold items' rows moved; each part is read once, when asked for.

    `at_validation` reads the model that was chosen, over the run that chose it; `at_test` the one that is tested.
    """

    def __init__(self, run: Run, name: str, *, at_validation: Callable[[], Pair], at_test: Callable[[], Pair]):
        self.run, self.name, self._at_validation = run, name, at_validation
        self.pair = functools.cache(at_test)

    @functools.cached_property
    def amount(self) -> float:
        """The lift that `config.select` chooses by `evaluate.cold_lift`; NAME_lift.json keeps what each reached."""
        run = self.run.first or self.run
        pair, by = self._at_validation(), run.config.evaluate.cold_lift
        reached = {amount: _worth(run, _scorer(pair, make_lift(*pair, ~run.warm_I, amount=amount))) for amount in LIFTS}
        amount = max(LIFTS, key=lambda amount: reached[amount][by])
        kept = {word: {str(a): worth[word] for a, worth in reached.items()} for word in reached[amount]}
        write_json(self.run.root / f"{self.name}_lift.json", {"lift": amount, "by": by, **kept})
        return amount

    @functools.cached_property
    def lift(self) -> Lift:
        """As it stands at test time: of the items without a training interaction then."""
        return make_lift(*self.pair(), ~self.run.warm_I, amount=self.amount)

    def scorers(self) -> Iterator[tuple[str, Callable[[], CatalogueScorer]]]:
        """(row of the table, its scorer): the model, and what it is without its lift."""
        yield self.name, lambda: _scorer(self.pair(), self.lift)
        yield f"{self.name}{UNLIFTED}", lambda: scorers.state_scorer(*self.pair())


def is_lifted(run: Run) -> bool:
    """Whether `evaluate.cold_lift` asks for it, and there is an item to lift."""
    return run.config.evaluate.cold_lift != "none" and not run.warm_I.all()


def _worth(run: Run, scorer: CatalogueScorer) -> dict[str, float]:
    """What `config.select` says of a scorer on validation, by the words of `evaluate.cold_lift`, and of each kind."""
    metric, _, protocol = run.config.select.partition("/")
    counts = stages.count_cases(run, scorer, "validation", protocol)
    value_N = case_metric(metric, counts.better, counts.equal, counts.others)
    warm_N = run.warm_I[counts.target]
    kinds = {kind: float(value_N[of_N].mean()) for kind, of_N in (("warm", warm_N), ("cold", ~warm_N)) if of_N.any()}
    return {"validation": float(value_N.mean()), "kinds": float(np.mean(list(kinds.values()))), **kinds}


def _scorer(pair: Pair, lift: Lift) -> CatalogueScorer:
    return scorers.state_scorer(pair[0], lift.move(pair[1]))
