import json

import numpy as np
import pytest

from bdlm_jax import recommend
from bdlm_jax.serving import artefact as serving
from bdlm_jax.serving.catalogue import Catalogue, find_items, find_user, one_line
from bdlm_jax.types import InputError

TITLES = ["The Good, the Bad and the Ugly", "Alien", "Aliens", "Heat; and Dust", "Shoe", "shoe", "12 Monkeys", "Bad"]


@pytest.fixture
def catalogue():
    item_ids = [str(100 + i) for i in range(len(TITLES))]
    return Catalogue(["ann", "bob"], item_ids, TITLES, np.array([0, 1, 1]), np.array([0]))


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ("100", [0]),
        ("102, 101;100", [2, 1, 0]),
        ("alien", [1]),  # exact before part: also in Aliens
        ("the good, the bad and the ugly, Aliens", [0, 2]),  # the longest title, not "Bad" and its pieces
        ("Good, the Bad; 101", [0, 1]),  # part of one title, across a comma
        ("Heat; and Dust;Bad", [3, 7]),
        ("monkeys", [6]),
        (" ,; 101 ;, ", [1]),
        ("101, Alien, 101", [1]),
        (["Heat; and Dust", "103", "102"], [3, 2]),
    ],
)
def test_histories_are_read_by_id_and_title(catalogue, history, expected):
    assert find_items(catalogue, history).tolist() == expected


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ("Shoe", r"'Shoe' names 2 items, such as 104 \(Shoe\), 105 \(shoe\): give the id of one"),
        ("lie", r"'lie' names 2 items, such as 101 \(Alien\), 102 \(Aliens\)"),
        ("Alein", r"'Alein' is no item id and no part of a title: did you mean Alien \(101\); Aliens \(102\)"),
        ("101; qqqqqq", r"'qqqqqq' is no item id and no part of a title: give an id"),
        ("", "the history is empty"),
        (" ; ", "the history is empty"),
        ([], "the history is empty"),
        ([""], "'' is no item id"),
    ],
)
def test_what_is_unknown_or_ambiguous_is_said_with_suggestions(catalogue, history, message):
    with pytest.raises(InputError, match=message):
        find_items(catalogue, history)


def test_an_unknown_user_is_said_with_ids_that_look_alike(catalogue):
    assert find_user(catalogue, " bob ") == 1
    with pytest.raises(InputError, match=r"user 'anne' is none of the 2 of this run \(known are ann"):
        find_user(catalogue, "anne")


def test_a_title_cannot_drive_the_terminal():
    row = {"rank": 1, "item": "7", "title": "\x1b[31mred\nline\u202e", "score": 0.5}
    assert recommend._table([row]).splitlines()[1:] == ["   1  7        0.5000  [31mred line"]


def test_known_user_on_both_arms(tiny_run):
    _, workdir, _ = tiny_run
    seen = {row["item"] for row in recommend.known_history(workdir=workdir, user="u004")}
    catalogue = serving.load_catalogue(workdir)
    assert seen == {catalogue.item_ids[i] for i in catalogue.history(4)}
    for arm in recommend.ARMS:
        rows = recommend.recommend(workdir=workdir, user="u004", arm=arm, k=6)
        assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert not seen & {row["item"] for row in rows}
        scores = [row["score"] for row in rows]
        assert scores == sorted(scores, reverse=True)
    whole = recommend.recommend(workdir=workdir, user="u004", k=10_000)
    assert len(whole) == len(catalogue.item_ids) - len(seen)


def test_new_user_on_both_arms(tiny_run):
    _, workdir, _ = tiny_run
    for arm in recommend.ARMS:
        rows = recommend.recommend(workdir=workdir, history="i03;i07,i11", arm=arm, k=5)
        assert len(rows) == 5
        assert not {"i03", "i07", "i11"} & {row["item"] for row in rows}


def test_audience_ranks_an_item_against_what_each_user_has_not_had(tiny_run):
    _, workdir, _ = tiny_run
    group = recommend.same_titles(workdir=workdir)[0]
    catalogue = serving.load_catalogue(workdir)
    titles = {catalogue.titles[catalogue.item_index[item]] for item in group}
    assert len(group) == 2
    assert len(titles) == 1
    rows = recommend.audience(workdir=workdir, item=group[0], k=3)
    for row in rows:
        listed = recommend.recommend(workdir=workdir, user=row["user"], k=10_000)
        assert next(r["rank"] for r in listed if r["item"] == group[0]) >= row["rank"]
        assert listed[row["rank"] - 1]["score"] == next(r["score"] for r in listed if r["item"] == group[0])
    assert [row["rank"] for row in rows] == sorted(row["rank"] for row in rows)


def test_command_line_prints_a_table_or_json(tiny_run, capsys):
    _, workdir, _ = tiny_run
    assert recommend.main(["--workdir", str(workdir), "--user", "u000", "-k", "2"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["rank", "item", "score", "title"]
    assert recommend.main(["--workdir", str(workdir), "--user", "u000", "-k", "2", "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["item"] for row in rows] == [line.split()[1] for line in table[1:]]


def test_the_lm_explains_in_generated_words(tiny_run, capsys):
    _, workdir, _ = tiny_run
    ask = ["--workdir", str(workdir), "--user", "u004", "--arm", "lm", "-k", "3", "--explain"]
    assert recommend.main(ask) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    rows = recommend.recommend(workdir=workdir, user="u004", arm="lm", k=3, explain=True)
    plain = recommend.recommend(workdir=workdir, user="u004", arm="lm", k=3)
    assert [{name: row[name] for name in plain[0]} for row in rows] == plain
    assert lines == [
        f"recommended: {row['item']} {row['title']} | in the LM's own words: {one_line(row['words'])}" for row in rows
    ]
    assert "generated" in last
    drawn = [*ask, "--temperature", "2", "--top_p", "0.9", "--format", "json"]
    texts = []
    for seed in ("1", "1", "2"):
        assert recommend.main([*drawn, "--seed", seed]) == 0
        texts.append([row["words"] for row in json.loads(capsys.readouterr().out)])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--arm", "domain"], "the domain arm has no words to explain with: ask the LM arm"),
        (["--arm", "lm", "--temperature", "-1"], "temperature is -1.0"),
        (["--arm", "lm", "--top_p", "2"], "top_p is 2.0"),
    ],
)
def test_what_cannot_be_explained_is_one_sentence(tiny_run, capsys, more, message):
    _, workdir, _ = tiny_run
    assert recommend.main(["--workdir", str(workdir), "--user", "u004", "--explain", *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--user", "nobody"], ["--history", "no such title"], ["--user", "u000", "-k", "0"]]
)
def test_bad_input_is_one_sentence_and_exit_code_2(tiny_run, capsys, arguments):
    _, workdir, _ = tiny_run
    assert recommend.main(["--workdir", str(workdir), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bdlm_jax: ")
    assert err.count("\n") == 1


def test_flags_that_exclude_each_other_exit_with_2(tmp_path, capsys):
    for arguments in (["--user", "1", "--history", "2"], [], ["--user", "1", "--arm", "both"]):
        with pytest.raises(SystemExit) as stop:
            recommend.main(["--workdir", str(tmp_path), *arguments])
        assert stop.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_the_python_call_wants_one_of_user_and_history(tmp_path):
    for who in ({}, {"user": "1", "history": "2"}):
        with pytest.raises(InputError, match="either a user or a history"):
            recommend.recommend(workdir=tmp_path, **who)
    with pytest.raises(InputError, match="arm 'both'"):
        recommend.recommend(workdir=tmp_path, user="1", arm="both")
