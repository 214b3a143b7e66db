"""Reports from a run directory built by hand, whose numbers are known."""

import json
import math
import re

import numpy as np
import pytest

from bdlm_jax.evaluation.evaluate import Counts, result_rows, save_counts
from bdlm_jax.evaluation.statistics import chance_level, relative_margin
from bdlm_jax.report import __main__ as report
from bdlm_jax.report import finished_run as finished
from bdlm_jax.report import plots
from bdlm_jax.report.finished_run import phase_names, read_run, stage_seconds
from bdlm_jax.types import InputError
from experiments import defaults


def counts_of(better, others, *, equal=None):
    n = len(better)
    return Counts(
        user=np.arange(n), target=np.zeros(n, np.int32), better=np.asarray(better),
        equal=np.zeros(n, int) if equal is None else np.asarray(equal), others=np.full(n, others),
    )  # fmt: skip


def make_run(folder, *, seed=0, wins=30, rounds=1, twins=100, **settings):
    """A run of 100 users: LightGCN first for 20 of them, each BDLM arm for `wins`, text LM tied with the twin."""
    folder.mkdir(parents=True)
    config = defaults.get_config()
    config.seed, config.mutual.rounds = seed, rounds
    config.update_from_flattened_dict(settings)
    with config.unlocked():
        config.name = "twins"
    (folder / "config.json").write_text(config.to_json())
    (folder / "environment.json").write_text(
        json.dumps({"devices": "1 x cpu (cpu), jax 1.2.3", "cores": 2, "jax": "1.2.3", "git": "abc"})
    )
    first = lambda n: np.where(np.arange(100) < n, 0, 1)  # noqa: E731
    models = {"lightgcn": first(20), "bdlm_domain": first(wins), "bdlm_lm": first(wins)}
    counts = {m: {"cand100": counts_of(b, 99), "pair": counts_of(b, 1)} for m, b in models.items()}
    counts["text_lm"] = {
        "cand100": counts_of(first(20), 99),
        "pair": counts_of(np.zeros(100, int), 1, equal=np.ones(100, int)),
    }
    rows = []
    for model, by_protocol in counts.items():
        save_counts(folder / "per_user" / f"{model}.npz", by_protocol)
        rows += result_rows(model, by_protocol, {"all": np.ones(1, bool), "twins": np.ones(1, bool)})
    for row in rows:
        if row["slice"] == "twins" and row["metric"].endswith("/pair"):
            row["users"] = twins
    data = {
        "name": "twins", "users": 100, "items": 120, "interactions": 1234, "parts": {"train": 1034, "test": 100},
        "sha256": "5a" * 32, "candidates": {"test/cand100": "c1" * 32, "validation/cand100": "d2" * 32},
    }  # fmt: skip
    ceiling = {"oracle": "text", "slice": "twins", "protocol": "pair", "users": 100, "hr@1": 0.0, "auc": 0.5}
    results = {"data": data, "rows": rows, "ceilings": [ceiling]}
    (folder / "results.json").write_text(json.dumps(results))
    log = []
    for stage, arms, phases in (
        ("lightgcn", ("domain",), 2),
        ("bdlm", ("domain", "lm"), 3),
        ("distill", ("domain",), 2),
    ):
        (folder / stage).mkdir()
        values = {arm: {"phase": phases - 1, "value": 0.25} for arm in arms}
        (folder / stage / "done.json").write_text(json.dumps({"best": values, "units": 1}))
        rows = []
        for phase in range(phases):
            log.append(1000.0 + 10 * len(log))
            rows += [
                {
                    "stage": stage,
                    "step": phase,
                    "time": log[-1],
                    f"validation/{arm}/ndcg@10/cand100": 0.2 + 0.01 * phase,
                }
                for arm in arms
            ]
        (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def row_of(text, *starts):
    (line,) = [line for line in text.splitlines() if line.startswith("| " + " | ".join(starts) + " |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_of_one_run_says_what_the_counts_say(tmp_path):
    folder = make_run(tmp_path / "run")
    report.write_report(folder)
    text = (folder / "results.md").read_text(encoding="utf-8")
    main = text.split("## All targets")[1].split("##")[0]
    assert row_of(main, "lightgcn")[1] == "0.200"
    assert row_of(main, "bdlm_lm")[1] == "**0.300**"
    assert row_of(main, "*chance*")[1] == "0.010"  # 1 / 100
    assert row_of(main, "*targets*")[1] == "100"
    margin = row_of(text, "bdlm_lm", "lightgcn", "hr@1/cand100")
    # 10 of 100 users have 1 against 0, the baseline's mean is .2; residuals ours - 1.5·theirs: 10 × 1 and 20 × -.5.
    spread = 1.96 * math.sqrt(100 / 99 * (10 * 1**2 + 20 * 0.5**2)) / 20
    assert margin[3:] == ["0.300", "0.200", "+50.0%", f"{0.5 - spread:+.1%} … {0.5 + spread:+.1%}", "higher"]
    twins = text.split("## Slice twins")[1].split("##")[0]
    assert row_of(twins, "text_lm")[1:3] == ["0.000 ± 0.000", "**0.500** ± 0.000"]
    assert row_of(twins, "*oracle that sees text*")[1:3] == ["0.000", "0.500"]
    assert row_of(twins, "*chance*")[1:3] == ["0.500", "0.500"]
    assert "5a5a5a5a5a5a" in text
    assert "cand100 `c1c1c1c1`" in text
    assert "d2d2" not in text  # of validation
    assert "1 x cpu (cpu), 2 CPU cores" in text
    assert "Ties count against the model" in text
    for name in re.findall(r"\]\((.*?)\)", text):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert (folder / name).stat().st_size < 100_000
    assert {path.name for path in (folder / "plots").iterdir()} == {"learning_curves.png", "models.png", "slices.png"}


def test_metrics_of_few_targets_are_counted_and_not_shown(tmp_path):
    report.write_report(make_run(tmp_path / "enough", twins=20))
    report.write_report(make_run(tmp_path / "few", twins=19))
    enough, few = (
        (tmp_path / name / "results.md").read_text(encoding="utf-8").split("## Slice twins")[1].split("##")[0]
        for name in ("enough", "few")
    )
    assert row_of(enough, "model")[1:] == ["hr@1/pair", "auc/pair", "hr@1/cand100"]
    assert row_of(few, "model")[1:] == ["hr@1/cand100"]
    assert "Too few" not in enough
    assert "Too few targets to say anything (under 20): hr@1/pair (19), auc/pair (19)." in few
    assert (tmp_path / "enough" / "plots" / "slices.png").exists()
    assert not (tmp_path / "few" / "plots" / "slices.png").exists()


def test_chosen_rounds_are_named(tmp_path):
    folder = make_run(tmp_path / "run")
    report.write_report(folder)
    text = (folder / "results.md").read_text(encoding="utf-8")
    assert "the LM arm after “round 1, LM” (3 of 3), ndcg@10/cand100 0.250" in text
    most = defaults.get_config().mutual.distill_epochs
    assert f"the domain arm after 10 of {most} epochs" in text  # two phases of 5 epochs


def test_phases_are_named_as_the_stage_runs_them():
    config = defaults.get_config().to_dict()
    config["mutual"] |= {"rounds": 2, "lm_epochs": 1.0, "domain_epochs_a_round": 0, "lm_epochs_a_round": 1.0}
    assert phase_names(config) == ["LM first", "round 1\nLM", "round 2\nLM"]
    config["mutual"] |= {"lm_epochs": 0.0, "domain_epochs_a_round": 1}
    assert phase_names(config)[:2] == ["round 1\ndomain", "round 1\nLM"]


def test_seeds_become_one_section_with_deviations_and_other_settings_another(tmp_path):
    runs = [make_run(tmp_path / f"s{seed}", seed=seed, wins=wins) for seed, wins in ((0, 28), (1, 30), (2, 32))]
    other = make_run(tmp_path / "other", wins=20, **{"mutual.align": "cosine"})
    out = tmp_path / "docs" / "results.md"
    (tmp_path / "bench.md").write_text("| benchmark | 3.1 |\n")
    words = [
        "--collect",
        *map(str, [*runs, other]),
        "--out",
        str(out),
        "--title",
        "All",
        "--include",
        str(tmp_path / "bench.md"),
    ]
    assert report.main(words) == 0
    text = out.read_text(encoding="utf-8")
    assert text.startswith("<!-- generated, do not edit: python -m bdlm_jax.report --collect ")
    assert text.splitlines()[1] == "# All"
    assert re.findall(r"^## (.*)", text, re.M) == ["twins", "twins with mutual.align = cosine"]
    first, second = text.split("## twins with mutual.align = cosine\n")
    main = first.split("### All targets")[1]
    assert row_of(main.split("###")[0], "bdlm_lm")[1] == "**0.300** ± 0.020"  # .28, .30, .32
    # 28/20 - 1, 30/20 - 1 and 32/20 - 1
    assert row_of(first, "bdlm_lm", "lightgcn", "hr@1/cand100")[5:] == ["+50.0%", "± 10.0% (n = 3)", "higher"]
    assert row_of(second, "bdlm_lm", "lightgcn", "hr@1/cand100")[5:] == ["+0.0%", "+0.0% … +0.0%", "no claim"]
    assert "* Seeds: 0, 1, 2." in first
    assert text.rstrip().endswith("| benchmark | 3.1 |")
    for name in re.findall(r"\]\((plots.*?)\)", text):
        assert (out.parent / name).is_file()
    assert not list(tmp_path.rglob("*.partial"))


def test_one_seed_without_a_claim_is_no_claim_for_all():
    sure, unsure = finished.Margin(0.5, 0.1, 0.9), finished.Margin(0.2, -0.1, 0.5)
    from bdlm_jax.report.tables import _margin_cells

    assert _margin_cells([sure, sure])[2] == "higher"
    assert _margin_cells([sure, unsure])[2] == "no claim"
    assert _margin_cells([finished.Margin(-0.5, -0.9, -0.1)])[2] == "lower"
    assert _margin_cells([sure, finished.Margin(None)])[1] == "the baseline is 0"


def test_the_interval_agrees_with_a_paired_bootstrap():
    rng = np.random.default_rng(0)
    theirs = (rng.random(4000) < 0.3).astype(float)
    ours = np.where(rng.random(4000) < 0.8, theirs, rng.random(4000) < 0.5).astype(float)
    margin = relative_margin(np.arange(4000), ours, theirs)
    drawn = rng.integers(0, 4000, (1000, 4000))
    low, high = np.quantile(ours[drawn].sum(1) / theirs[drawn].sum(1) - 1, [0.025, 0.975])
    assert margin.value == pytest.approx(ours.sum() / theirs.sum() - 1)
    assert (margin.low, margin.high) == pytest.approx((low, high), abs=0.15 * (high - low))


def test_cases_of_one_user_count_as_one():
    ours, theirs = np.array([1.0, 0.0, 1.0, 1.0]), np.array([1.0, 0.0, 0.0, 1.0])
    alone = relative_margin(np.arange(4), ours, theirs)
    doubled = relative_margin(np.repeat(np.arange(4), 2), np.repeat(ours, 2), np.repeat(theirs, 2))
    assert doubled == pytest.approx(alone)
    assert relative_margin(np.arange(4), ours, np.zeros(4)).value is None


def test_chance_is_what_a_random_ranking_reaches():
    assert chance_level("hr@1", np.array([19, 19])) == pytest.approx(1 / 20)
    assert chance_level("hr@10", np.array([4, 19])) == pytest.approx((1 + 10 / 20) / 2)
    assert chance_level("mrr", np.array([2])) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert chance_level("ndcg@2", np.array([2])) == pytest.approx((1 + 1 / math.log2(3)) / 3)
    assert chance_level("auc", np.array([7])) == 0.5


def test_time_leaves_pauses_out(tmp_path):
    for stage, times in (("a", (100, 110)), ("b", (130, 5000, 5020))):
        (tmp_path / stage).mkdir()
        lines = [json.dumps({"stage": stage, "step": i, "time": t}) for i, t in enumerate(times)]
        (tmp_path / stage / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert stage_seconds(tmp_path) == {"a": 110 - 100, "b": (130 - 110) + (5020 - 5000)}


def test_what_is_no_finished_run_is_refused(tmp_path, capsys):
    with pytest.raises(InputError, match=r"config\.json is not there: .* holds no finished run"):
        read_run(tmp_path)
    assert report.main(["--workdir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("bdlm_jax: ")
    folder = make_run(tmp_path / "run")
    words = ["--collect", str(folder), "--out", str(tmp_path / "page.md"), "--include", str(tmp_path / "none.md")]
    assert report.main(words) == 2
    assert "none.md is no file to include" in capsys.readouterr().err


def test_a_panel_may_lack_a_model(tmp_path):
    panels = [
        plots.Bars("a", {"mf": (0.1, 0.0), "bdlm_lm": (0.3, 0.02)}, 0.05),
        plots.Bars("b", {"bdlm_lm": (0.0, 0.0)}, None),
    ]
    plots.plot_bars(tmp_path / "made" / "bars.png", panels, title="t")
    assert (tmp_path / "made" / "bars.png").stat().st_size > 5000
