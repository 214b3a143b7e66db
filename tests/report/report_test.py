"""Reports from a run directory built by hand, whose numbers are known."""

import json
import re

import numpy as np
import pytest
from made_run import make_run

from bdlm_jax.evaluation.statistics import bootstrap_interval
from bdlm_jax.report import __main__ as report
from bdlm_jax.report.finished_run import curve_notes, group_runs, phase_names, read_run, stage_seconds
from bdlm_jax.report.tables import group_lines
from bdlm_jax.runtime.files import damaged_file, write_checksums
from bdlm_jax.types import InputError
from experiments import defaults


def page_of(folder):
    report.write_report(folder)
    return (folder / "results.md").read_text(encoding="utf-8")


def row_of(text, *starts):
    (line,) = [line for line in text.splitlines() if line.startswith("| " + " | ".join(starts) + " |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_of_one_run_says_what_the_counts_say(tmp_path):
    folder = make_run(tmp_path / "run")
    text = page_of(folder)
    main = text.split("## All targets")[1].split("##")[0]
    assert row_of(main, "lightgcn")[1] == "0.200"
    assert row_of(main, "bdlm_lm")[1] == "**0.300**"
    assert row_of(main, "*chance*")[1] == "0.010"  # 1 / 100
    assert row_of(main, "*targets*")[1] == "100"
    margin = row_of(text, "bdlm_lm", "lightgcn", "hr@1/cand100")
    users = np.arange(100)[:, None]
    (low,), (high,) = bootstrap_interval(1.0 * (users < 30), 1.0 * (users < 20))
    # 10 users have 1 against 0: |Σ ±1| ≥ 10 in 2 of 2^10 flips; Holm over 2 arms, 3 metrics and 2, all the same.
    assert margin[3:5] + margin[5:8] == ["0.300", "0.200", "+50.0%", f"{low:+.1%} … {high:+.1%}", "one seed"]
    assert float(margin[8]) == pytest.approx(10 * 2 / 2**10, rel=0.4) and margin[9] == "higher, one seed"
    twins = text.split("## Slice twins")[1].split("##")[0]
    assert row_of(twins, "text_lm")[1:3] == ["0.000 ± 0.000", "0.500 ± 0.000"]  # chance is not marked
    assert row_of(twins, "*oracle that sees text*")[1:3] == ["0.000", "0.500"]
    assert row_of(twins, "*chance*")[1:3] == ["0.500", "0.500"]
    assert "`5a5a5a5a5a5a`, cand100 `c1c1c1c1`." in text  # of test alone
    assert "1 x cpu (cpu), 2 CPU cores" in text
    assert "Ties count against the model" in text
    assert "the LM arm after “round 1, LM” (3 of 3), ndcg@10/full 0.250" in text
    most = defaults.get_config().mutual.distill_epochs
    assert f"the domain arm after 10 of {most} epochs" in text  # two phases of 5 epochs
    assert row_of(text, "bdlm")[1] == "20 s"
    shown = re.findall(r"\]\((.*?)\)", text)
    assert shown == [f"plots/{name}.png" for name in ("models", "slices", "learning_curves")]
    for name in shown:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert (folder / name).stat().st_size < 100_000


def test_the_page_says_how_well_an_own_model_still_speaks(tmp_path):
    path = make_run(tmp_path / "run") / "results.json"
    results = json.loads(path.read_text())
    told = {"text": "the corpus", "tokens": 1234, "before": 20.0, "after": 21.0}
    path.write_text(json.dumps(results | {"language": told}))
    line = "perplexity on the corpus held out (1,234 tokens) is 21.00, and was 20.00 before BDLM (+5.0%).\n"
    assert line in page_of(path.parent)
    path.write_text(json.dumps(results | {"language": told | {"adapters": 30.0}}))
    assert f"{line[:-1]} With the adapters left on it would be 30.00.\n" in page_of(path.parent)


def test_the_page_is_called_by_the_data_and_begins_with_five_lines(tmp_path):
    folder = make_run(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"name": "some_experiment"}))
    title, empty, *lines = page_of(folder).splitlines()
    assert (title, empty) == ("# Results: twins, seed 0", "")
    assert [line.split(":**")[0] for line in lines[:5]] == [
        f"* **{word}" for word in ("Compared", "Won", "By how much", "On what", "How sure")
    ]
    assert lines[1].startswith("* **Won:** bdlm_domain (0.742), before bdlm_lm (0.742)") and lines[5:7] == [
        "",
        "## All targets",
    ]
    assert any(line.startswith("* Experiment: some_experiment. Seeds: 0.") for line in lines)
    run = read_run(folder)
    again = run._replace(config=run.config | {"name": "other", "seed": 1})
    assert list(group_runs([run, again])) == ["twins (some_experiment)", "twins (other)"]


def test_nothing_is_bold_at_chance(tmp_path):
    """Of 100 targets 4 are hit where chance is .01: ± .038, so that .04 is not told from it."""
    for hits, bold in ((4, False), (9, True)):
        models = {"lightgcn": (hits, 0), "text_lm": (1, 0)}
        text = page_of(make_run(tmp_path / str(hits), models=models, select="hr@1/cand100"))
        cell = row_of(text.split("## All targets")[1].split("##")[0], "lightgcn")[1]
        assert cell == (f"**{hits / 100:.3f}**" if bold else f"{hits / 100:.3f}")
        assert ("**Won:** No model" in text) == (not bold)


def test_what_a_reader_of_the_curves_wonders_at_is_explained(tmp_path):
    """LightGCN alone has .25, the domain arm .2 after the LM's first phase, and .2 in its distillation."""
    run = read_run(make_run(tmp_path / "run", **{"mutual.distill_epochs": 40}))
    below = "below lightgcn alone: the LM's steps move the table that both arms read"
    assert curve_notes(run) == {"bdlm": below}
    run.facts["curves"]["distill"]["domain"] = [0.2, 0.3]
    assert curve_notes(run)["distill"].endswith("stands still and teaches for 40 epochs (a round has 5)")
    run.config["shared"]["trained_by"] = "domain"
    assert list(curve_notes(run)) == ["distill"]
    report.write_report(tmp_path / "run")
    assert "Below lightgcn alone" in (tmp_path / "run" / "report.html").read_text()


def test_a_page_says_where_drawn_cases_stand_for_all(tmp_path):
    folder = make_run(tmp_path / "run")
    assert "fixed draw" not in page_of(folder)
    results = json.loads((folder / "results.json").read_text())
    results["data"]["judged"] = {"test": 40}
    (folder / "results.json").write_text(json.dumps(results))
    assert "Judged on a fixed draw of the cases: 40 of 100 of test." in page_of(folder)


def test_metrics_of_few_targets_are_counted_and_not_shown(tmp_path):
    pages = [page_of(make_run(tmp_path / f"{n}", twins=n)) for n in (20, 19)]
    enough, few = (page.split("## Slice twins")[1].split("##")[0] for page in pages)
    assert row_of(enough, "model")[1:] == ["hr@1/pair", "auc/pair", "hr@1/cand100"]
    assert row_of(few, "model")[1:] == ["hr@1/cand100"]
    assert "Too few" not in enough
    assert "Too few targets to say anything (under 20): hr@1/pair (19), auc/pair (19)." in few
    assert (tmp_path / "20" / "plots" / "slices.png").exists()
    assert not (tmp_path / "19" / "plots" / "slices.png").exists()


@pytest.mark.parametrize(("others", "told"), [(3, "19 other such items. Here there are 3."), (19, "other such items.")])
def test_a_slice_of_few_items_says_how_many_there_are(tmp_path, others, told):
    run = read_run(make_run(tmp_path / "run", models={"lightgcn": (20, 0)}))
    counts = run.counts["lightgcn"]
    counts["cold20"] = counts["cand100"]._replace(others=np.full(100, others))
    run.cells["lightgcn", "cold", "hr@1/cold20"] = (0.2, 100)
    lines = group_lines([run], {}, [], family=1)
    assert lines[lines.index("## Slice cold") + 2].endswith(told)


def test_where_a_page_went_is_told(tmp_path, capsys):
    page = str(tmp_path / "page.md")
    assert report.main(["--collect", str(make_run(tmp_path / "run")), "--out", page]) == 0
    assert capsys.readouterr().out == f"{page}\n"


def test_phases_are_named_as_the_stage_runs_them():
    config = defaults.get_config().to_dict()
    config["mutual"] |= {"rounds": 2, "lm_epochs": 1.0, "domain_epochs_a_round": 0, "lm_epochs_a_round": 1.0}
    assert phase_names(config) == ["LM first", "round 1\nLM", "round 2\nLM"]
    config["mutual"] |= {"lm_epochs": 0.0, "domain_epochs_a_round": 1}
    assert phase_names(config)[:2] == ["round 1\ndomain", "round 1\nLM"]
    config["mutual"]["taught"] = {"rounds": 2, "lm_epochs": 5.0, "domain_epochs": 0}
    assert phase_names(config, "taught") == ["lesson 1\nLM", "lesson 2\nLM"]


def test_seeds_become_one_section_with_deviations_and_other_settings_another(tmp_path):
    runs = [make_run(tmp_path / f"s{seed}", seed=seed, wins=wins) for seed, wins in ((0, 28), (1, 30), (2, 32))]
    runs.append(make_run(tmp_path / "other", wins=20, **{"mutual.align": "cosine"}))
    out = tmp_path / "docs" / "results.md"
    (tmp_path / "bench.md").write_text("| benchmark | 3.1 |\n")
    (tmp_path / "said.md").write_text("In words.\n")
    more = ["--out", str(out), "--title", "All", "--include", str(tmp_path / "bench.md")]
    more += ["--head", str(tmp_path / "said.md")]
    assert report.main(["--collect", *map(str, runs), *more]) == 0
    text = out.read_text(encoding="utf-8")
    assert text.startswith("<!-- generated, do not edit: python -m bdlm_jax.report --collect ")
    assert text.splitlines()[1:4] == ["# All", "", "In words."]
    assert re.findall(r"^## (.*)", text, re.M) == ["twins", "twins with mutual.align = cosine"]
    first, second = text.split("## twins with mutual.align = cosine\n")
    main = first.split("### All targets")[1]
    assert row_of(main.split("###")[0], "bdlm_lm")[1] == "**0.300** ± 0.020"  # .28, .30, .32
    # 28/20 - 1, 30/20 - 1 and 32/20 - 1
    margin = row_of(first, "bdlm_lm", "lightgcn", "hr@1/cand100")
    assert [margin[5], margin[7], margin[9]] == ["+50.0%", "± 10.0% (n = 3)", "higher"]
    margin = row_of(second, "bdlm_lm", "lightgcn", "hr@1/cand100")
    assert margin[5:] == ["+0.0%", "+0.0% … +0.0%", "one seed", "1.0000", "no claim, one seed"]
    assert "* Experiment: twins. Seeds: 0, 1, 2." in first
    assert re.findall(r"^\* \*\*(.*?):\*\*", first, re.M) == ["Compared", "Won", "By how much", "On what", "How sure"]
    assert text.rstrip().endswith("| benchmark | 3.1 |")
    for name in re.findall(r"\]\((plots.*?)\)", text):
        assert (out.parent / name).is_file()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_pause_is_none_of_a_stages_time(tmp_path):
    """A stage of two processes, the second a minute after the first: 10 + 25 s in one, 5 + 30 in the other."""
    rows = [(110, 100), (135, 100), (200, 195), (230, 195)]
    (tmp_path / "mf").mkdir()
    lines = [json.dumps({"stage": "mf", "step": i, "time": t, "since": s}) for i, (t, s) in enumerate(rows)]
    (tmp_path / "mf" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert stage_seconds(tmp_path) == {"mf": 10 + 25 + 5 + 30}


def test_time_leaves_pauses_out(tmp_path):
    for stage, times in (("a", (100, 110)), ("b", (130, 5000, 5020))):
        (tmp_path / stage).mkdir()
        lines = [json.dumps({"stage": stage, "step": i, "time": t}) for i, t in enumerate(times)]
        (tmp_path / stage / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert stage_seconds(tmp_path) == {"a": 110 - 100, "b": (130 - 110) + (5020 - 5000)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--workdir {0}/none", "config.json is not there: "),
        ("--collect {0}/run --out {0}/page.md --include {0}/none.md", "none.md is no file to include"),
    ],
)
def test_what_cannot_be_reported_is_one_sentence(tmp_path, capsys, words, message):
    make_run(tmp_path / "run")
    assert report.main(words.format(tmp_path).split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("bdlm_jax: ") and message in err


def test_a_damaged_config_is_named_with_what_to_do_and_an_edited_page_is_written_again(tmp_path):
    run = make_run(tmp_path / "run")
    write_checksums(run, ["config.json", "results.json"])
    report.write_report(run)
    page = (run / "results.md").read_text()
    (run / "results.md").write_text("mine")
    assert damaged_file(run, "results.md")
    report.write_report(run)
    assert (run / "results.md").read_text() == page and damaged_file(run) is None
    (run / "config.json").write_text((run / "config.json").read_text() + " ")
    with pytest.raises(InputError, match=r"config\.json is damaged or gone, .*; delete it if the settings are the old"):
        report.write_report(run)


def test_a_run_of_controls_alone_has_a_page_too(tmp_path):
    run = make_run(tmp_path / "run", models={"bdlm_warm_lm": (25, 0), "bdlm_warm_domain": (30, 0)})
    report.write_report(run)
    assert "bdlm_warm_lm" in (run / "results.md").read_text() and (run / "plots" / "models.png").is_file()


def test_a_model_may_lack_a_metric(tmp_path):
    """As the text LM lacks the full ranking; here it is the only LM, and so the last row."""
    folder = make_run(tmp_path / "run")
    results = json.loads((folder / "results.json").read_text())
    rows = [row for row in results["rows"] if not row["model"].startswith("bdlm")]
    results["rows"] = [row for row in rows if (row["model"], row["metric"]) != ("text_lm", "hr@1/cand100")]
    (folder / "results.json").write_text(json.dumps(results))
    main = page_of(folder).split("## All targets")[1].split("##")[0]
    at = row_of(main, "model").index("hr@1/cand100")
    assert [row_of(main, name)[at] for name in ("lightgcn", "text_lm", "*targets*")] == ["**0.200**", "", "100"]
