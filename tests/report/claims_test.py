"""What pages claim, and what they must not."""

import uuid

import numpy as np
import pytest
from made_run import MODELS, make_run

from bdlm_jax.evaluation.statistics import Margin
from bdlm_jax.report import __main__ as report
from bdlm_jax.report.claims import Claim, correct, make_claims, page_claims
from bdlm_jax.report.finished_run import group_runs, read_run, sorted_models
from bdlm_jax.report.tables import control_word, group_lines
from bdlm_jax.run.controls import ANSWERS
from bdlm_jax.types import InputError
from experiments import defaults

HIGHER = ("bdlm_lm", "lightgcn", "hr@1/cand100")


def read(tmp_path, *, seeds=(0,), **settings):
    return [read_run(make_run(tmp_path / f"{seed}", seed=seed, **settings)) for seed in seeds]


@pytest.mark.parametrize(
    ("value", "by_seed", "adjusted", "chance", "verdict"),
    [
        (0.2, (0.1, 0.3), 0.01, False, "higher"),
        (-0.2, (-0.1, -0.3), 0.01, False, "lower"),
        (0.2, (0.2,), 0.01, False, "higher, one seed"),
        (0.2, (-0.1, 0.5), 0.01, False, "no claim"),  # the seeds disagree
        (0.2, (0.1, 0.3), 0.06, False, "no claim"),
        (0.2, (0.2,), 0.06, False, "no claim, one seed"),
        (0.2, (0.1, 0.3), 0.01, True, "none: mf is at chance"),
        (None, (), 0.01, False, "none: the baseline is 0"),
    ],
)
def test_the_verdict(value, by_seed, adjusted, chance, verdict):
    assert Claim("bdlm_lm", "mf", "mrr/full", 0.3, 0.2, Margin(value), by_seed, 9, chance, adjusted).verdict == verdict


def test_holm_counts_every_claim_of_a_page_and_nothing_else():
    made = [Claim("a", "b", "mrr/full", 0.3, 0.2, Margin(0.5, p=p), (0.5,), 9, False) for p in (0.01, 0.02)]
    none = [made[0]._replace(chance=True), made[0]._replace(margin=Margin(None, p=0.01))]
    assert [claim.adjusted for claim in correct([made[0], *none, made[1]])] == pytest.approx([0.02, 1.0, 1.0, 0.02])


def test_users_are_averaged_over_seeds_before_they_are_compared(tmp_path):
    runs = read(tmp_path, seeds=(0, 1), wins=30)
    lucky = runs[1]._replace(counts={**runs[1].counts, "bdlm_lm": runs[1].counts["lightgcn"]})
    (claim,) = make_claims([runs[0], lucky], [HIGHER])
    assert claim.margin.value == pytest.approx(((30 + 20) / 2) / 20 - 1)
    assert claim.users == 100
    other_world = runs[1]._replace(data=runs[1].data | {"sha256": "another"})
    (claim,) = make_claims([runs[0], other_world], [HIGHER])
    assert claim.users == 200  # who was generated anew is another person
    (claim,) = make_claims([runs[0], runs[1]._replace(counts={})], [HIGHER])
    assert claim.margin.value == pytest.approx(30 / 20 - 1)


def test_models_that_were_tested_on_other_users_are_not_compared(tmp_path):
    (run,) = read(tmp_path)
    counts = run.counts["lightgcn"]["cand100"]
    others = {**run.counts, "lightgcn": {"cand100": counts._replace(user=counts.user + 1)}}
    with pytest.raises(InputError, match="bdlm_lm and lightgcn were tested on different users in hr@1/cand100"):
        make_claims([run._replace(counts=others)], [HIGHER])
    with pytest.raises(InputError, match="the seeds of lightgcn in hr@1/cand100 were tested on different users"):
        make_claims([run, run._replace(counts=others, config={**run.config, "seed": 1})], [HIGHER])


def test_only_seeds_that_both_models_have_are_held_against_each_other(tmp_path):
    first, second = read(tmp_path, seeds=(0, 1))
    counts = {model: made for model, made in second.counts.items() if model != "lightgcn"}
    cells = {key: cell for key, cell in second.cells.items() if key[0] != "lightgcn"}
    worse = counts["bdlm_lm"]["cand100"]
    counts["bdlm_lm"] = {**counts["bdlm_lm"], "cand100": worse._replace(better=worse.better + 1)}
    alone = make_claims([first], [HIGHER])
    apart = first._replace(counts={"lightgcn": first.counts["lightgcn"]})  # the same seed, in a run of its own
    apart = apart._replace(cells={key: cell for key, cell in first.cells.items() if key[0] == "lightgcn"})
    ours = first._replace(counts={"bdlm_lm": first.counts["bdlm_lm"]})
    ours = ours._replace(cells={key: cell for key, cell in first.cells.items() if key[0] == "bdlm_lm"})
    for runs in ([first, second._replace(counts=counts, cells=cells)], [apart, ours]):
        assert make_claims(runs, [HIGHER]) == alone
    assert make_claims([second._replace(counts=counts, cells=cells)], [HIGHER]) == []


def test_nothing_is_claimed_against_a_model_at_chance(tmp_path):
    runs = read(tmp_path, models=MODELS | {"lightgcn": (2, 0)})  # .02 where chance is .01: ± .027
    claims = {(c.model, c.against, c.metric): c for c in page_claims(group_runs(runs))["twins"]}
    assert claims[HIGHER].verdict == "none: lightgcn is at chance"
    text = "\n".join(group_lines(runs, {}, list(claims.values()), family=4))
    assert "| bdlm_lm | lightgcn | hr@1/cand100 | 0.300 | 0.020 |  |  |  |  | none: lightgcn is at chance |" in text


def test_every_control_stands_beside_the_same_arm_of_bdlm_with_what_it_answers(tmp_path):
    controls = {
        "bdlm_warm_lm": (30, 0), "bdlm_warm_domain": (10, 0), "bdlm_by_lm_lm": (20, 0), "cached_2": (12, 0),
        "ids_lm_distilled": (14, 0), "pool": (40, 0),
    }  # fmt: skip
    runs = read(tmp_path, models=MODELS | controls)
    assert sorted_models(runs)[-2:] == ["bdlm_domain", "bdlm_lm"]
    claims = page_claims(group_runs(runs))["twins"]
    beside = {(c.against, c.model): c.verdict for c in claims if c.against in controls}
    assert beside == {
        ("bdlm_warm_lm", "bdlm_lm"): "no claim, one seed",
        ("bdlm_warm_domain", "bdlm_domain"): "higher, one seed",
        ("bdlm_by_lm_lm", "bdlm_lm"): "higher, one seed",
        ("cached_2", "bdlm_domain"): "higher, one seed",
        ("ids_lm_distilled", "bdlm_domain"): "higher, one seed",
        ("pool", "bdlm_domain"): "lower, one seed",
        ("pool", "bdlm_lm"): "lower, one seed",
    }
    words = {control_word(control) for control in controls}
    assert words == {"bdlm_warm", "bdlm_by_lm", "cached", "ids_lm_distilled", "pool"}
    text = "\n".join(group_lines(runs, {}, claims, family=9))
    for word in words:
        assert text.count(ANSWERS[word]) == 1
    assert "| bdlm_warm_domain |" in text.split("beside its controls")[1]
    assert "| bdlm_warm_domain |" not in text.split("All targets")[1].split("Margins")[0]


def test_a_model_without_its_lift_is_a_control_of_that_model_and_no_baseline(tmp_path):
    unlifted = {"bdlm_lm_unlifted": (10, 0), "bdlm_domain_unlifted": (20, 0), "lightgcn_unlifted": (5, 0)}
    runs = read(tmp_path, models=MODELS | unlifted)
    claims = page_claims(group_runs(runs))["twins"]
    pairs = {(claim.model, claim.against) for claim in claims if claim.against in unlifted}
    assert pairs == {("bdlm_lm", "bdlm_lm_unlifted"), ("bdlm_domain", "bdlm_domain_unlifted")}
    assert "\n".join(group_lines(runs, {}, claims, family=9)).count(ANSWERS["unlifted"]) == 1


def test_a_seed_whose_table_was_in_view_is_left_out(tmp_path):
    runs = read(tmp_path, seeds=(0, 1, 2), tuned_on=(0,))
    assert [run.seed for run in group_runs(runs)["twins"]] == [1, 2]
    pages = []
    for folders in (["0", "1", "2"], ["0"]):
        out = tmp_path / "page.md"
        assert report.main(["--collect", *(str(tmp_path / f) for f in folders), "--out", str(out)]) == 0
        pages.append(out.read_text())
    assert " Seeds: 1, 2. " in pages[0] and "seed 0 in view: it is left out here." in pages[0]
    assert "seed 0 in view: what follows is no clean evidence." in pages[1]


def test_runs_of_one_seed_join_their_models_and_the_same_run_twice_is_refused(tmp_path, capsys):
    settings = {"seed": 0, "wins": 30}
    first = make_run(tmp_path / "first", **settings)
    more = make_run(tmp_path / "more", models={"lightgcn": (20, 0), "ease": (25, 0)}, **settings)
    other = make_run(tmp_path / "other", models={"lightgcn": (21, 0)}, **settings)
    (joined,) = group_runs([read_run(first), read_run(more)])["twins"]
    assert joined.counts.keys() == {*MODELS, "ease"}
    for pair, said in (((first, first), "give one of them"), ((first, other), "yet not the same")):
        assert report.main(["--collect", *map(str, pair), "--out", str(tmp_path / "page.md")]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()


def test_what_a_run_does_not_have_keeps_no_other_from_joining_it(tmp_path):
    def group(*changes):
        made = [make_run(tmp_path / str(uuid.uuid4()), models=models, **settings) for models, settings in changes]
        return group_runs(map(read_run, made))

    sasrec, ease = {"sasrec": (20, 0)}, {"ease": (25, 0)}
    assert len(group((sasrec, {"sasrec.length": 7}), (ease, {"sasrec.length": 8}))) == 1
    assert len(group((sasrec, {"sasrec.length": 7}), (ease, {}), (sasrec, {"sasrec.length": 8, "seed": 1}))) == 2
    assert len(group((ease, {"sasrec.length": 7, "domain.model": "sasrec"}), ({"bdlm_on_sasrec_lm": (9, 0)}, {}))) == 2


def test_a_setting_that_an_older_run_does_not_know_is_at_its_default(tmp_path):
    older = read_run(make_run(tmp_path / "0"))
    older = older._replace(config={name: value for name, value in older.config.items() if name != "lm_alone"})
    newer = [read_run(make_run(tmp_path / f"{n}", seed=n, **{"lm_alone.ids_times": 1.0 + n})) for n in (1, 2)]
    assert defaults.get_config().lm_alone.ids_times == 2.0
    assert [[run.seed for run in group] for group in group_runs([older, *newer]).values()] == [[0, 1], [2]]


def test_rows_of_fewer_seeds_say_so(tmp_path):
    runs = [read_run(make_run(tmp_path / "0", seed=0, models=MODELS | {"ease": (25, 0)}))]
    runs += [read_run(make_run(tmp_path / "1", seed=1))]
    claims = page_claims(group_runs(runs))["twins"]
    text = "\n".join(group_lines(runs, {}, claims, family=9))
    assert "| ease (n = 1) | 0.250" in text and "| lightgcn | 0.200" in text
    assert {c.verdict.endswith("one seed") for c in claims if c.against == "ease"} == {True}
    assert {c.verdict.endswith("one seed") for c in claims if c.against == "lightgcn"} == {False}
    assert np.isfinite([c.margin.low for c in claims]).all()
