"""What a page claims: margins of models, paired by user over seeds, each judged beside all others of the page."""

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bdlm_jax.evaluation.metrics import case_metric
from bdlm_jax.evaluation.statistics import Margin, beats, case_chance, holm, paired_margins
from bdlm_jax.report.finished_run import Finished, is_control, sorted_models
from bdlm_jax.run.controls import UNLIFTED
from bdlm_jax.types import InputError

ARMS = ("bdlm_domain", "bdlm_lm")
MARGIN_METRICS = ("hr@1/cand100", "ndcg@10/cand100", "ndcg@10/full")
CONTROL_METRIC = "ndcg@10/full"  # one, so that a page makes no more claims than it has questions
LEVEL = 0.05


class Claim(NamedTuple):
    """The margin of `model` over `against` on all targets, paired by user; each user's values are means over seeds.

    by_seed: the margin in each seed that has both models; adjusted: p after Holm's correction over the page; chance:
    whether the baseline is no better than a ranking at random, so that nothing is claimed.
    """

    model: str
    against: str
    metric: str
    ours: float
    theirs: float
    margin: Margin
    by_seed: tuple[float, ...]
    users: int
    chance: bool
    adjusted: float = 1.0

    @property
    def spread(self) -> float | None:
        return statistics.stdev(self.by_seed) if len(self.by_seed) > 1 else None

    @property
    def judged(self) -> bool:
        return not self.chance and self.margin.value is not None

    @property
    def verdict(self) -> str:
        """higher, lower or no claim: by the adjusted p, and the same in every seed; one seed is said."""
        if self.chance:
            return f"none: {self.against} is at chance"
        if self.margin.value is None:
            return "none: the baseline is 0"
        up = self.margin.value > 0
        sure = self.adjusted < LEVEL and all((value > 0) == up for value in self.by_seed)
        return (("higher" if up else "lower") if sure else "no claim") + (", one seed" if len(self.by_seed) < 2 else "")


def main_pairs(runs: Sequence[Finished]) -> list[tuple[str, str, str]]:
    """(arm, baseline, metric): both arms against every model that has nothing of BDLM, but for popularity."""
    rows = sorted_models(runs)
    none = ("item_pop", *(row for row in rows if row.endswith(UNLIFTED)))  # a weaker form of the baseline is none
    baselines = [row for row in rows if row not in none and not is_control(row) and not row.startswith("bdlm_")]
    return [pair for pair in itertools.product(ARMS, baselines, MARGIN_METRICS) if pair[0] in rows]


def control_pairs(runs: Sequence[Finished]) -> list[tuple[str, str, str]]:
    """(row of BDLM, control, metric): every control against the same arm of the whole BDLM."""
    rows = sorted_models(runs)
    return [(ours, row, CONTROL_METRIC) for row in rows if is_control(row) for ours in _counterparts(row, rows)]


def make_claims(runs: Sequence[Finished], pairs: Iterable[tuple[str, str, str]]) -> list[Claim]:
    """Judges pairs (model, against, metric) of runs that differ in the seed, over the seeds that both have.

    Rows without a seed in common, or without the metric, have no claim.
    """
    pairs = list(pairs)
    values = {at: _user_values(runs, *at) for at in {(row, metric) for *rows, metric in pairs for row in rows}}
    batches: dict[tuple, list[tuple[str, str, str]]] = {}
    for model, against, metric in pairs:
        if data := sorted(values[model, metric].keys() & values[against, metric].keys()):
            batches.setdefault((metric.split("/")[1], *data), []).append((model, against, metric))
    claims = {}
    for (_, *data), batch in batches.items():
        user, ours, theirs, chance = [], [], [], []
        for model, against, metric in batch:
            both = [_over_seeds(values[row, metric], data, f"{row} in {metric}") for row in (model, against)]
            user += [np.concatenate([v.user_U for v in side]) for side in both]
            if not np.array_equal(user[-1], user[-2]) or not np.array_equal(user[-1], user[0]):
                raise InputError(f"{model} and {against} were tested on different users in {metric}; test both again.")
            ours.append(np.concatenate([v.sum_U for v in both[0]]))
            theirs.append(np.concatenate([v.sum_U for v in both[1]]))
            chance.append(not beats(theirs[-1], np.concatenate([v.chance_U for v in both[1]])))
        margins = paired_margins(np.stack(ours, axis=1), np.stack(theirs, axis=1))
        for pair, margin, at_chance in zip(batch, margins, chance):
            claims[pair] = _claim(runs, pair, margin, len(user[0]), at_chance)
    return [claims[pair] for pair in pairs if pair in claims]


def page_claims(groups: Mapping[str, Sequence[Finished]]) -> dict[str, list[Claim]]:
    """All claims of a page by heading, corrected together."""
    made = {head: make_claims(runs, [*main_pairs(runs), *control_pairs(runs)]) for head, runs in groups.items()}
    corrected = iter(correct([claim for claims in made.values() for claim in claims]))
    return {head: [next(corrected) for _ in claims] for head, claims in made.items()}


def correct(claims: Sequence[Claim]) -> list[Claim]:
    """Fills in the p after Holm's correction over all these claims; what claims nothing does not count."""
    adjusted = iter(holm(np.array([claim.margin.p for claim in claims if claim.judged])))
    return [claim._replace(adjusted=float(next(adjusted))) if claim.judged else claim for claim in claims]


def n_judged(claims: Mapping[str, Sequence[Claim]]) -> int:
    return sum(claim.judged for made in claims.values() for claim in made)


class _Values(NamedTuple):
    """A metric summed over each user's cases, and what chance would give."""

    user_U: np.ndarray
    sum_U: np.ndarray
    chance_U: np.ndarray


def _user_values(runs: Sequence[Finished], row: str, metric: str) -> dict[tuple[str, int], _Values]:
    """By the data's hash and the seed."""
    name, protocol = metric.split("/")
    found = {}
    for run in runs:
        if (c := run.counts.get(row, {}).get(protocol)) is not None:
            user_U, index_N = np.unique(c.user, return_inverse=True)
            cases = (case_metric(name, c.better, c.equal, c.others), case_chance(name, c.others))
            sums = (np.bincount(index_N, values_N) for values_N in cases)
            found.setdefault((run.data["sha256"], run.seed), _Values(user_U, *sums))
    return found


def _over_seeds(values: dict[tuple[str, int], _Values], data: Sequence[tuple[str, int]], what: str) -> list[_Values]:
    """Averages over the seeds of the same data: users of a world that each seed generates anew are other people."""
    found: dict[str, list[_Values]] = {}
    for sha, seed in data:
        found.setdefault(sha, []).append(values[sha, seed])
    if any(not np.array_equal(v.user_U, made[0].user_U) for made in found.values() for v in made):
        raise InputError(f"the seeds of {what} were tested on different users; test them again.")

    def mean(made: list[_Values], field: str) -> np.ndarray:
        return np.mean([getattr(v, field) for v in made], axis=0)

    return [_Values(made[0].user_U, mean(made, "sum_U"), mean(made, "chance_U")) for made in found.values()]


def _claim(runs, pair: tuple[str, str, str], margin: Margin, users: int, chance: bool) -> Claim:
    model, against, metric = pair
    by_row = {row: {} for row in (model, against)}
    for run, (row, cells) in itertools.product(runs, by_row.items()):
        if (row, "all", metric) in run.cells:
            cells.setdefault(run.seed, run.cells[row, "all", metric][0])
    ours, theirs = by_row[model], by_row[against]
    seeds = sorted(ours.keys() & theirs.keys())
    means = [statistics.fmean(cells[seed] for seed in seeds) for cells in (ours, theirs)]
    by_seed = tuple(ours[seed] / theirs[seed] - 1 for seed in seeds if theirs[seed] > 0)
    return Claim(model, against, metric, *means, margin, by_seed, users, chance)


def _counterparts(control: str, rows: Sequence[str]) -> list[str]:
    """The rows of the whole BDLM that a control's row is held against: of the same arm, and of the same staleness."""
    if control.endswith(UNLIFTED):
        return [control.removesuffix(UNLIFTED)]
    arms = ARMS if control.startswith("pool") else ARMS[1:] if control.endswith("_lm") else ARMS[:1]
    if control == "cached_1":  # which has read no more than the LM that the unrefreshed domain arm learned from
        arms = ("bdlm_domain_unrefreshed", *arms)
    return [arm for arm in arms if arm in rows]
