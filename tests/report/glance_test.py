"""The first table of a page over several experiments, of runs whose numbers are known."""

from made_run import MODELS, make_run

from bdlm_jax.report import plots
from bdlm_jax.report.claims import page_claims
from bdlm_jax.report.finished_run import group_runs, read_run
from bdlm_jax.report.glance import glance_lines, standings

ROWS = MODELS | {
    "sasrec": (25, 0), "bdlm_warm_lm": (58, 0), "bdlm_text_lm": (30, 0), "bdlm_warm_domain": (90, 0), "pool": (95, 0),
}  # fmt: skip


def glance(runs):
    groups = group_runs([read_run(run) for run in runs])
    lines = glance_lines(groups, standings(groups, page_claims(groups)), lambda heading: heading.replace(" ", "-"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| [")]


def test_each_arm_stands_beside_the_strongest_of_both_kinds_and_what_hinders_a_claim(tmp_path):
    runs = [make_run(tmp_path / f"{seed}", seed=seed, wins=60, models=ROWS) for seed in (0, 1)]
    runs.append(make_run(tmp_path / "refit", wins=24, **{"data.refit": "validation"}))
    first, second = glance(runs)
    assert first[:3] == ["[twins](#twins)", "2", "ndcg@10/full"]
    # 60 of 100 beside 25 and 58, and beside 25 and 90; of 95, which the sum of both arms has, nothing is said. One
    # that is not first is second, whose NDCG is .6309: 60 + 40 · .6309 = 85.24 beside 72.32, 84.50 and 96.31.
    assert first[3:] == [
        "0.852", "+17.9% sasrec", "+0.9% bdlm_warm_lm (no claim)", "0.852", "+17.9% sasrec", "-11.5% bdlm_warm_domain",
    ]  # fmt: skip
    assert second[0] == "[twins with data.refit = validation](#twins-with-data.refit-=-validation), refit"
    assert second[3:] == ["0.720", "+2.1% lightgcn (no claim, one seed)", ""] * 2


def test_the_picture_has_each_margin_at_its_place_and_hollow_what_is_no_claim(tmp_path, monkeypatch):
    runs = [make_run(tmp_path / f"{seed}", seed=seed, wins=60, models=ROWS) for seed in (0, 1)]
    groups = group_runs([read_run(run) for run in (*runs, make_run(tmp_path / "a", wins=24, **{"mutual.rounds": 2}))])
    drawn, save = [], plots.Figure.savefig
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k)))
    line = plots.draw_glance(standings(groups, page_claims(groups)), tmp_path / "plots" / "g.png")
    assert line.endswith("(plots/g.png)") and (tmp_path / "plots" / "g.png").is_file()
    marks = [
        [
            (round(mark.get_xdata()[0], 3), mark.get_mfc() == "white")
            for mark in axes.lines
            if mark.get_marker() != "None"
        ]
        for axes in drawn[0].axes
    ]
    assert marks == [[(0.179, False), (0.179, False), (0.021, True), (0.021, True)], [(0.009, True), (-0.115, False)]]


def test_one_experiment_needs_no_such_table(tmp_path):
    assert glance([make_run(tmp_path / "run")]) == []


def test_an_experiment_without_bdlm_is_named_alone(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", models={"lightgcn": (20, 0)}, **{"mutual.rounds": 2})]
    assert glance(runs)[1][3:] == [""] * 6


def test_baselines_alone_are_a_list(tmp_path):
    runs = [make_run(tmp_path / f"{n}", models={"lightgcn": (20, 0)}, **{"mutual.rounds": n}) for n in (1, 2)]
    groups = group_runs([read_run(run) for run in runs])
    found = standings(groups, page_claims(groups))
    assert glance_lines(groups, found, str.upper)[0] == "* [twins](#TWINS)"
    assert plots.draw_glance(found, tmp_path / "glance.png") == "" and not (tmp_path / "glance.png").exists()
