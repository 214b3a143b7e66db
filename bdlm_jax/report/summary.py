"""What a page says before its tables, in five lines: what was compared, who won, by how much, on what, how sure."""

from collections.abc import Mapping, Sequence

from bdlm_jax.report.claims import ARMS, CONTROL_METRIC, LEVEL, Claim
from bdlm_jax.report.finished_run import (
    Finished,
    above_chance,
    chance_of,
    is_control,
    mean_and_spread,
    n_targets,
    sorted_models,
    tuned_on,
)
from bdlm_jax.report.tables import number


def summary_lines(runs: Sequence[Finished], claims: Sequence[Claim], *, family: int) -> list[str]:
    """The five lines in Markdown."""
    return [f"* **{word}:** {text}" for word, text in five_lines(runs, claims, family=family).items()]


def main_metric(runs: Sequence[Finished], claims: Sequence[Claim]) -> str:
    """The metric of the head and of the picture of margins: the selected one, where claims are made in it."""
    claimed = [claim.metric for claim in claims] or [key[2] for key in runs[0].cells if key[1] == "all"]
    wanted = (runs[0].config["select"], CONTROL_METRIC, *claimed)
    return next((metric for metric in wanted if metric in claimed), wanted[0])


def five_lines(runs: Sequence[Finished], claims: Sequence[Claim], *, family: int) -> dict[str, str]:
    """What was compared, who won, by how much, on what and how sure, in plain words.

    `family` is how many claims the whole page makes.
    """
    first, data, metric = runs[0], runs[0].data, main_metric(runs, claims)
    means = {m: mean for m in sorted_models(runs) if (mean := mean_and_spread(runs, (m, "all", metric))[0]) >= 0}
    ranked = sorted(means, key=lambda model: -means[model])
    others, protocol = first.config["data"]["candidates"], metric.split("/")[-1]
    among = f"{others[protocol]} others" if protocol in others else "all items that are new to the user"
    n_controls = sum(map(is_control, means))
    controls = f", and {n_controls} of BDLM's controls" if n_controls else ""
    refit = first.config["data"].get("refit") == "validation"
    trained = " Every model was trained once more, with the validation part, as long as that chose." if refit else ""
    return {
        "Compared": f"{len(means)} models by {metric}: {', '.join(m for m in means if not is_control(m))}{controls}.",
        "Won": _won(runs, ranked, means, metric),
        "By how much": _by_how_much(ranked, [claim for claim in claims if claim.metric == metric], first.domain_model),
        "On what": f"{data['name']}: {data['users']:,} users, {data['items']:,} items, {data['interactions']:,} "
        f"interactions, split {first.config['data']['split']}; {n_targets(runs, 'all', metric):,} held-out items, each "
        f"among {among}.{trained}",
        "How sure": _how_sure(runs, claims, family),
    }


def _won(runs: Sequence[Finished], ranked: Sequence[str], means: Mapping[str, float], metric: str) -> str:
    if not ranked:
        return "No model has this metric."
    chance = chance_of(runs[0], metric)
    best, *behind = (f"{model} ({number(means[model])})" for model in ranked[:4])
    if chance is None:
        return f"{best}, before {', '.join(behind)}."
    if not above_chance(runs, (ranked[0], "all", metric)):
        return f"No model: the best is {best}, not told from a ranking at random, which has {number(chance)}."
    return (
        f"{best}" + (f", before {', '.join(behind)}" if behind else "") + f"; a ranking at random has {number(chance)}."
    )


def _by_how_much(ranked: Sequence[str], claims: Sequence[Claim], domain_model: str) -> str:
    """The better arm of BDLM (or the best model) against the strongest it is held against, and its domain model."""
    judged = [claim for claim in claims if claim.judged]
    arm = min((c.model for c in judged), key=lambda model: (model not in ARMS, ranked.index(model)), default=None)
    held = sorted((c for c in judged if c.model == arm), key=lambda claim: -claim.theirs)
    if not held:
        return "No arm was held against a model that is better than chance." if claims else "No margin was tested."
    said = []
    for claim in dict.fromkeys([held[0], *(claim for claim in held if claim.against == domain_model)]):
        what = "the strongest of the rest" if claim is held[0] else "its domain model alone"
        size = f"{abs(claim.margin.value):.1%} {'above' if claim.margin.value > 0 else 'below'}"
        sure = claim.verdict.startswith(("higher", "lower"))
        words = f"{size} {claim.against}" if sure else f"not told apart from {claim.against}"
        said.append(f"{words}, {what} ({claim.margin.low:+.1%} to {claim.margin.high:+.1%})")
    return f"{arm} is {'; '.join(said)}."


def _how_sure(runs: Sequence[Finished], claims: Sequence[Claim], family: int) -> str:
    judged = [claim for claim in claims if claim.judged]
    hold = sum(claim.verdict.startswith(("higher", "lower")) for claim in judged)
    seeds = ", ".join(str(run.seed) for run in runs)
    said = f"One seed ({seeds}), one run: no claim, for another training may differ"
    if len(runs) > 1:
        said = f"{len(runs)} seeds ({seeds})"
    if judged:
        users = min(claim.users for claim in judged)
        said += f"; over {users:,} users, {hold} of {len(judged)} margins have p < {LEVEL} after Holm's correction "
        said += f"over the {family} of this page, paired by user"
        said += ", alike in every seed" if len(runs) > 1 else ""
    return f"{said}.{_seen(runs)}"


def _seen(runs: Sequence[Finished]) -> str:
    seeds = tuned_on(runs)
    if not seeds:
        return ""
    said = f" The settings were tuned with the test table of seed {', '.join(map(str, seeds))} in view: "
    inside = any(run.seed in seeds for run in runs)
    return said + ("what follows is no clean evidence." if inside else "it is left out here.")
