"""Several experiments on the same data as one table, with every model's margin over a few that it must beat."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bdlm_jax.report.claims import Claim, correct, make_claims
from bdlm_jax.report.finished_run import Finished, group_runs, is_control, mean_and_spread, sorted_models
from bdlm_jax.report.tables import MAIN_METRICS, claim_table, judged_by, model_table
from bdlm_jax.types import InputError

BASELINES = ("lightgcn", "ids_lm")  # and the best of BDLM's controls
FEW_USERS = 200


class Comparison(NamedTuple):
    """runs: one a seed, with the rows of all experiments; claims: every model against every baseline."""

    runs: list[Finished]
    claims: list[Claim]
    warnings: list[str]

    def lines(self) -> list[str]:
        """The comparison in Markdown."""
        metrics = dict.fromkeys((*MAIN_METRICS, *(claim.metric for claim in self.claims)))
        seeds = ", ".join(str(run.seed) for run in self.runs)
        lines = [f"Seeds {seeds}; ± is the standard deviation over seeds.", *self.warnings, ""]
        lines += [
            *model_table(self.runs, "all", list(metrics), sorted_models(self.runs)),
            "",
            *claim_table(self.claims),
            "",
        ]
        return [*lines, judged_by(sum(claim.judged for claim in self.claims))]


def compare_runs(runs: Sequence[Finished], *, metric: str, baselines: Sequence[str] = ()) -> Comparison:
    """Compares what may be compared: the same data and candidates, no run twice."""
    for run in runs[1:]:
        _check_same_data(runs[0], run)
    merged = merge_groups(group_runs(runs))
    rows = [row for row in sorted_models(merged) if any((row, "all", metric) in run.cells for run in merged)]
    if not rows:
        known = ", ".join(sorted({key[2] for run in merged for key in run.cells if key[1] == "all"}))
        raise InputError(f"--metric: no run has {metric}; they have {known}.")
    if unknown := [name for name in baselines if name not in rows]:
        raise InputError(f"--baseline: {unknown[0]} has no {metric} here; choose of {', '.join(rows)}.")
    if not baselines:
        controls = sorted(filter(is_control, rows), key=lambda row: mean_and_spread(merged, (row, "all", metric))[0])
        baselines = [row for row in (*BASELINES, *controls[-1:]) if row in rows] or rows[:1]
    pairs = [(row, name, metric) for n, name in enumerate(baselines) for row in rows if row not in baselines[: n + 1]]
    claims = correct(make_claims(merged, pairs))
    few, warnings = min((claim.users for claim in claims), default=0), []
    if few < FEW_USERS:
        warnings.append(f"Only {few} users have a test case: margins that matter may stay without a claim.")
    return Comparison(merged, claims, warnings)


def merge_groups(groups: dict[str, list[Finished]]) -> list[Finished]:
    """One run a seed of several experiments; a row that an earlier one has otherwise is named with its experiment."""
    (first, runs), *others = groups.items()
    merged = {run.seed: run for run in runs}
    for heading, members in others:
        said, clash = heading.removeprefix(f"{first} with "), _disagreeing(members, merged.values())
        for run in members:
            before = merged.get(run.seed, run._replace(cells={}, counts={}))
            names = {row: f"{row} [{said}]" if row in clash else row for row in {at[0] for at in run.cells}}
            cells = {(names[row], *at): value for (row, *at), value in run.cells.items()}
            counts = {names[row]: made for row, made in run.counts.items() if row in names}
            merged[run.seed] = before._replace(cells=before.cells | cells, counts=before.counts | counts)
    return [merged[seed] for seed in sorted(merged)]


def _disagreeing(members: Iterable[Finished], merged: Iterable[Finished]) -> set[str]:
    """Rows that both sides have, and not with the same numbers in some seed that both have."""
    ours, theirs = (
        {(run.seed, *at): cell for run in runs for at, cell in run.cells.items()} for runs in (members, merged)
    )
    both = {at[1] for at in ours} & {at[1] for at in theirs}
    same = {at[1] for at in ours.keys() & theirs.keys()}
    return (both - same) | {at[1] for at in ours.keys() & theirs.keys() if ours[at] != theirs[at]}


def _check_same_data(run: Finished, other: Finished) -> None:
    where = f"{run.folder} and {other.folder}"
    if run.data["sha256"] != other.data["sha256"]:
        raise InputError(f"{where} hold other data, whose hashes differ; compare runs of one split.")
    ours, theirs = run.data["candidates"], other.data["candidates"]
    for name in sorted(ours.keys() & theirs.keys()):
        if name.startswith("test/") and ours[name] != theirs[name]:
            raise InputError(f"{where} have other candidates of {name}; run them with one config.data.candidates_seed.")
