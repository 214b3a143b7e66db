"""The first table of a page with several experiments: each arm of BDLM beside its strongest baseline and control."""

from collections.abc import Callable, Mapping, Sequence

from bdlm_jax.report.claims import ARMS, Claim
from bdlm_jax.report.finished_run import Finished, is_control, mean_and_spread
from bdlm_jax.report.summary import main_metric
from bdlm_jax.report.tables import grid, number

NOTE = (
    "The strongest is the one over which the arm's margin is smallest, in the seeds that both have; in brackets stands "
    "what is in the way of a claim. A control is BDLM without an ingredient, or with another in its place (`pool`, the "
    "sum of both arms, is none here). Refit: every model was trained once more, with the validation part."
)


def glance_lines(
    groups: Mapping[str, Sequence[Finished]], claims: Mapping[str, Sequence[Claim]], anchor: Callable[[str], str]
) -> list[str]:
    """A row for each group of runs, by the metric that its settings were chosen by; none for less than two groups.

    `claims` are those of each heading, corrected together; `anchor` names a heading's place on the page. Where no group
    has an arm of BDLM, a list of the headings.
    """
    if len(groups) < 2:
        return []
    if not any(claim.model in ARMS for made in claims.values() for claim in made):
        return [*(f"* [{heading}](#{anchor(heading)})" for heading in groups), ""]
    rows = []
    for heading, runs in groups.items():
        metric = main_metric(runs, claims[heading])
        refit = ", refit" if runs[0].config["data"].get("refit") == "validation" else ""
        cells = [f"[{heading}](#{anchor(heading)}){refit}", str(len(runs)), metric]
        for arm in reversed(ARMS):
            mean, _ = mean_and_spread(runs, (arm, "all", metric))
            held = [c for c in claims[heading] if (c.model, c.metric) == (arm, metric) and c.judged]
            controls = [c for c in held if is_control(c.against) and c.against != "pool"]
            baselines = [c for c in held if not is_control(c.against)]
            cells += [number(mean) if mean >= 0 else "", _nearest(baselines), _nearest(controls)]
        rows.append(cells)
    against = ["against its strongest baseline", "against its strongest control"]
    head = ["experiment", "seeds", "metric", "LM arm", *against, "domain arm", *against]
    return [*grid(head, rows), "", NOTE, ""]


def _nearest(claims: Sequence[Claim]) -> str:
    if not claims:
        return ""
    claim = min(claims, key=lambda claim: claim.margin.value)
    missing = claim.verdict.removeprefix("higher").removeprefix("lower").removeprefix(", ")
    return f"{claim.margin.value:+.1%} {claim.against}" + (f" ({missing})" if missing else "")
