import csv
import json
import math
import sys
from pathlib import Path

import pytest

import bdlm_jax
from bdlm_jax import recommend as door
from bdlm_jax.serving import all_users, answers
from bdlm_jax.serving.catalogue import one_line


def test_command_line_prints_a_table_or_json(tiny_run, capsys):
    ask = ["--workdir", str(tiny_run[1]), "--user", "u000", "-k", "2"]
    assert door.main(ask) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["rank", "item", "score", "title"]
    assert door.main([*ask, "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["item"] for row in rows] == [line.split()[1] for line in table[1:]]


def test_the_lm_explains_in_generated_words(tiny_run, capsys):
    words = ["--workdir", str(tiny_run[1]), "--user", "u004", "--arm", "lm", "-k", "3", "--explain"]
    assert door.main(words) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    run = bdlm_jax.load(tiny_run[1])
    ask = (run.catalogue, run.arm("lm"))
    (rows,) = answers.recommend(*ask, users=["u004"], k=3, explain=True)
    (plain,) = answers.recommend(*ask, users=["u004"], k=3)
    assert [{name: row[name] for name in plain[0]} for row in rows] == plain
    told = "recommended: {item} {title} | in the LM's own words: {words}"
    assert lines == [told.format(**row | {"words": one_line(row["words"])}) for row in rows]
    assert "generated" in last
    texts = []
    for seed in ("1", "1", "2"):
        assert door.main([*words, "--temperature", "2", "--top_p", "0.9", "--format", "json", "--seed", seed]) == 0
        texts.append([row["words"] for row in json.loads(capsys.readouterr().out)])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--user nobody", "user 'nobody' is none of the 150"),
        ("--history wrong", "'wrong' is no item id"),
        ("--user u000 -k 0", "k is 0, but at least one item"),
        ("--user u004 --explain --arm domain", "a domain model has no words to explain with: ask a language model"),
        ("--user 1 --arm both", "arm 'both' is none of this run's: choose one of"),
        ("--all --out recs.txt", "--out recs.txt has no ending of .csv, .parquet"),
        ("--all --out /dev/null/recs.csv", "--out /dev/null/recs.csv cannot be written"),
        ("--user u004 --explain --arm lm --temperature -1", "temperature is -1.0"),
        ("--user u004 --explain --arm lm --top_p 2", "top_p is 2.0"),
        (f"--user u004 --explain --arm lm --seed {2**70}", "it must be at least 0 and below 2**32"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tiny_run, capsys, words, message):
    assert door.main(["--workdir", str(tiny_run[1]), *words.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("bdlm_jax: ") and message in err


@pytest.mark.parametrize("words", ["--user 1 --history 2", "", "--all", "--user 1 --out a.csv"])
def test_flags_that_exclude_each_other_exit_with_2(capsys, words):
    with pytest.raises(SystemExit) as stop:
        door.main(["--workdir", "w", *words.split()])
    assert stop.value.code == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize("arm", ["domain", "ids_lm"])
def test_every_user_goes_to_a_file(tiny_run, tmp_path, capsys, arm):
    out = tmp_path / "made" / "recs.csv"
    words = ["--workdir", str(tiny_run[1]), "--all", "--arm", arm, "-k", "3"]
    assert door.main([*words, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    with out.open(newline="", encoding="utf-8") as file:
        rows = [*csv.DictReader(file)]
    run = bdlm_jax.load(tiny_run[1])
    assert [row["user"] for row in rows[::3]] == run.users
    for user in (0, 77, 149):
        alone = run.recommend([run.users[user]], arm=arm, k=3).to_dict("records")
        for row, expected in zip(rows[3 * user : 3 * user + 3], alone, strict=True):
            assert math.isclose(float(row.pop("score")), expected.pop("score"), rel_tol=1e-4, abs_tol=1e-5)
            assert row == {name: str(value) for name, value in expected.items()}
    assert door.main([*words, "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert [path.name for path in out.parent.iterdir()] == ["recs.csv"]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_an_export_that_was_stopped_goes_on(tiny_run, tmp_path, capsys, monkeypatch, ending):
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    monkeypatch.setattr(all_users, "USERS_AT_ONCE", 64)  # 150 users: three parts
    recommend, asked = answers.recommend, []

    def stop_at(nth):
        def asks(catalogue, arm, **how):
            asked.append(len(how["users"]))
            if len(asked) == nth:
                raise KeyboardInterrupt
            return recommend(catalogue, arm, **how)

        monkeypatch.setattr(answers, "recommend", asks)

    words = ["--workdir", str(tiny_run[1]), "--all", "--arm", "domain", "-k", "2", "--out"]
    assert door.main([*words, str(tmp_path / f"whole.{ending}")]) == 0
    stop_at(2)
    out = str(tmp_path / f"recs.{ending}")
    with pytest.raises(KeyboardInterrupt):
        door.main([*words, out])
    assert not Path(out).exists()
    assert door.main([*words[:-2], "3", "--out", out]) == 2  # other parts are not mixed in
    assert f"recs.{ending}.parts holds parts of another export than this one: remove it" in capsys.readouterr().err
    stop_at(0)
    assert door.main([*words, out]) == 0
    assert asked == [64, 64, 64, 22]  # the first part was there
    assert Path(out).read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"recs.{ending}", f"whole.{ending}"]


def test_every_user_goes_to_parquet(tiny_run, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    assert door.main(["--workdir", str(tiny_run[1]), "--all", "--out", str(tmp_path / "recs.parquet")]) == 0
    run = bdlm_jax.load(tiny_run[1])
    found = parquet.read_table(tmp_path / "recs.parquet").to_pydict()
    expected = run.recommend(run.users).to_dict("list")
    assert found.pop("score") == pytest.approx(expected.pop("score"))
    assert found == expected


def test_without_pyarrow_parquet_is_refused_and_nothing_is_left(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert door.main(["--workdir", str(tiny_run[1]), "--all", "--out", str(tmp_path / "recs.parquet")]) == 2
    assert 'Parquet needs pyarrow: pip install "bdlm_jax[parquet]", or write a .csv.' in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
