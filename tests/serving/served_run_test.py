"""`bdlm_jax.load` and what a run answers, as tables."""

import base64
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bdlm_jax
from bdlm_jax.types import InputError
from experiments import tiny


@pytest.fixture(scope="module")
def run(tiny_run):
    return bdlm_jax.load(tiny_run[1])


def test_every_trained_model_answers_for_known_and_new_users(run):
    assert set(run.arms) == {"domain", "lm", "lightgcn", "mf", "ids_lm"}
    seen = {*run.history("u004")["item"]}
    assert seen == {run.items.ids[i] for i in run.catalogue.history(4)}
    firsts = set()
    for arm in run.arms:
        found = run.recommend(["u004", "u001"], arm=arm, k=6)
        assert [*found.columns] == ["user", "rank", "item", "title", "score"]
        assert [*found["user"]] == ["u004"] * 6 + ["u001"] * 6
        found = found[:6]
        assert [*found["rank"]] == [1, 2, 3, 4, 5, 6] and not seen & {*found["item"]}
        assert [*found["title"]] == [run.items.titles[run.items.ids.index(item)] for item in found["item"]]
        assert found["score"].is_monotonic_decreasing
        firsts.add(tuple(found["item"]))
        assert len(run.recommend("u004", arm=arm, k=10_000)) == len(run.items) - len(seen)
        new = run.recommend(histories=["i03;i07,i11", ["i01"]], arm=arm, k=5)
        assert [*new["history"]] == [0] * 5 + [1] * 5
        assert not {"i03", "i07", "i11"} & {*new["item"][:5]}
    assert len(firsts) == len(run.arms), "each is a model of its own"
    assert run.recommend("u004").equals(run.recommend("u004", arm="domain"))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ({}, "either users or histories"),
        ({"users": ["u004"], "histories": [["i01"]]}, "either users or histories"),
        ({"users": ["u004", "nobody"]}, "user 'nobody' is none of the 150"),
        ({"users": "u004", "arm": "both"}, "arm 'both' is none of this run's"),
        ({"users": "u004", "k": 0}, "k is 0"),
        ({"users": "u004", "k": 2.5}, "k is 2.5, but .* a whole number"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(run, ask, message):
    with pytest.raises(InputError, match=message):
        run.recommend(**ask)


def test_the_report_holds_its_pictures(run, tmp_path):
    page = run.report
    shown = page._repr_markdown_()
    pictures = [base64.b64decode(found) for found in re.findall(r"\]\(data:image/png;base64,([^)]+)\)", shown)]
    assert sorted(pictures) == sorted(path.read_bytes() for path in (run.folder / "plots").glob("*.png"))
    assert "](plots/" not in shown and "| bdlm_lm |" in shown
    assert repr(page) == page == (run.folder / "results.md").read_text(encoding="utf-8")
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(InputError, match=r"results\.md cannot be read .*No such file.* write it by python -m"):
        _ = bdlm_jax.load(tmp_path).report


def test_nobody_gets_an_empty_table_with_its_columns(run):
    assert [*run.recommend([]).columns] == ["user", "rank", "item", "title", "score"]


def test_near_items_point_where_the_item_does(run):
    found, rows = run.items.nearest("i03", k=4), run.arm("domain").item_ID
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = unit @ unit[3]
    others = sorted(set(range(len(rows))) - {3}, key=lambda item: -cosine[item])
    assert [*found["item"]] == [run.items.ids[item] for item in others[:4]]
    np.testing.assert_allclose(found["score"], cosine[others[:4]], rtol=1e-5)
    assert not run.items.nearest("i03", arm="lm", k=4).equals(found)


def test_audience_ranks_an_item_against_what_each_user_has_not_had(run):
    group = run.items.same_titles()[0]
    assert len(group) == 2 and len({run.items.titles[run.items.ids.index(item)] for item in group}) == 1
    found = run.items.audience(group[0], k=3)
    assert found["rank"].is_monotonic_increasing
    for user, rank in zip(found["user"], found["rank"]):
        listed = run.recommend(user, k=10_000)
        (score,) = listed["score"][listed["item"] == group[0]]
        assert rank == 1 + np.sum(listed["score"] > score)


def test_results_are_those_of_the_run(run, tiny_run):
    assert run.results.to_dict("records") == [
        {name: row[name] for name in ("model", "slice", "metric", "value", "users")} for row in tiny_run[2]["rows"]
    ]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[]", "holds no JSON object"),
        (b'{"rows": 3}', "holds no results"),
        (b'{"rows": [{"model": 1}]}', "holds no results"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_what_holds_no_results_is_one_sentence(tiny_run, tmp_path, content, told):
    shutil.copytree(Path(tiny_run[1]) / "serving", tmp_path / "serving")
    for name in ("results.json", "results.md"):
        (tmp_path / name).write_bytes(content)
    run = bdlm_jax.load(tmp_path)
    with pytest.raises(InputError, match=told):
        run.results  # noqa: B018
    if told == "cannot be read":
        with pytest.raises(InputError, match=r"results\.md cannot be read"):
            run.report  # noqa: B018


@pytest.mark.parametrize("name", ["results.json", "results.md"])
def test_results_that_are_not_as_they_were_written_are_refused(tiny_run, tmp_path, name):
    for kept in ("results.json", "results.md", "SHA256SUMS"):
        shutil.copy(Path(tiny_run[1]) / kept, tmp_path)
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(text.replace("0.1", "0.9"))
    assert text != (tmp_path / name).read_text()
    run = bdlm_jax.load(tmp_path)
    with pytest.raises(InputError, match=r"its checksum differs"):
        run.results if name == "results.json" else run.report  # noqa: B018


def test_training_returns_the_run(tmp_path):
    config = tiny.get_config()
    config.models = ("item_pop",)
    run = bdlm_jax.train(config, tmp_path)
    assert {*run.results["model"]} == {"item_pop"} and run.arms == ()


def test_what_needs_no_training_is_measured_and_not_served(tmp_path, tiny_run):
    shutil.copy(tiny_run[1] / "results.json", tmp_path)
    run = bdlm_jax.load(tmp_path)
    assert run.arms == () and len(run.results)
    with pytest.raises(InputError, match="no finished run that recommends"):
        run.recommend("u004")
    with pytest.raises(InputError, match="no finished run that recommends"):
        bdlm_jax.load(tmp_path / "nothing")


def test_a_question_to_the_domain_arm_needs_no_jax(tiny_run):
    ask = f"len(bdlm_jax.load({str(tiny_run[1])!r}).recommend('u004'))"
    program = f"import sys, bdlm_jax\nprint({ask}, 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["10", "False"], done.stderr
