"""What a page with several experiments begins with: each arm of BDLM beside its strongest baseline and control."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from bdlm_jax.report.claims import ARMS, Claim
from bdlm_jax.report.finished_run import Finished, is_control, mean_and_spread
from bdlm_jax.report.summary import main_metric
from bdlm_jax.report.tables import grid, number

NOTE = (
    "The strongest is the one over which the arm's margin is smallest, in the seeds that both have; in brackets stands "
    "what is in the way of a claim. A control is BDLM without an ingredient, or with another in its place (`pool`, the "
    "sum of both arms, is none here). Refit: every model was trained once more, with the validation part."
)


class Standing(NamedTuple):
    """One arm in one group of runs, by the metric that its settings were chosen by; None where nothing was judged."""

    heading: str
    arm: str
    metric: str
    baseline: Claim | None
    control: Claim | None


def standings(
    groups: Mapping[str, Sequence[Finished]], claims: Mapping[str, Sequence[Claim]]
) -> dict[str, list[Standing]]:
    """Both arms by heading, the LM arm first; `claims` are those of each heading, corrected together."""
    found = {}
    for heading, runs in groups.items():
        metric = main_metric(runs, claims[heading])
        found[heading] = []
        for arm in reversed(ARMS):
            held = [c for c in claims[heading] if (c.model, c.metric) == (arm, metric) and c.judged]
            controls = [c for c in held if is_control(c.against) and c.against != "pool"]
            baselines = [c for c in held if not is_control(c.against)]
            found[heading].append(Standing(heading, arm, metric, _nearest(baselines), _nearest(controls)))
    return found


def glance_lines(
    groups: Mapping[str, Sequence[Finished]],
    found: Mapping[str, Sequence[Standing]],
    anchor: Callable[[str], str],
    picture: str = "",
) -> list[str]:
    """A row for each group of runs; none for less than two groups, and a list where none has an arm of BDLM.

    `anchor` names a heading's place on the page, `picture` is a line that stands before the table.
    """
    if len(groups) < 2:
        return []
    if not any(standing.baseline or standing.control for both in found.values() for standing in both):
        return [*(f"* [{heading}](#{anchor(heading)})" for heading in groups), ""]
    rows = []
    for heading, runs in groups.items():
        refit = ", refit" if runs[0].config["data"].get("refit") == "validation" else ""
        cells = [f"[{heading}](#{anchor(heading)}){refit}", str(len(runs)), found[heading][0].metric]
        for standing in found[heading]:
            mean, _ = mean_and_spread(runs, (standing.arm, "all", standing.metric))
            cells += [number(mean) if mean >= 0 else "", _said(standing.baseline), _said(standing.control)]
        rows.append(cells)
    against = ["against its strongest baseline", "against its strongest control"]
    head = ["experiment", "seeds", "metric", "LM arm", *against, "domain arm", *against]
    return [picture, "", *grid(head, rows), "", NOTE, ""]


def _nearest(claims: Sequence[Claim]) -> Claim | None:
    return min(claims, key=lambda claim: claim.margin.value, default=None)


def _said(claim: Claim | None) -> str:
    if claim is None:
        return ""
    missing = claim.verdict.removeprefix("higher").removeprefix("lower").removeprefix(", ")
    return f"{claim.margin.value:+.1%} {claim.against}" + (f" ({missing})" if missing else "")
