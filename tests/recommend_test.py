import json

import pytest

from bdlm_jax import recommend as door
from bdlm_jax.serving.answers import ARMS, audience, known_history, recommend, same_titles
from bdlm_jax.serving.artefact import load_catalogue
from bdlm_jax.serving.catalogue import one_line
from bdlm_jax.types import InputError


@pytest.mark.parametrize("arm", ARMS)
def test_known_and_new_users_on_both_arms(tiny_run, arm):
    workdir, catalogue = tiny_run[1], load_catalogue(tiny_run[1])
    seen = {row["item"] for row in known_history(workdir=workdir, user="u004")}
    assert seen == {catalogue.item_ids[i] for i in catalogue.history(4)}
    rows = recommend(workdir=workdir, user="u004", arm=arm, k=6)
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert not seen & {row["item"] for row in rows}
    scores = [row["score"] for row in rows]
    assert scores == sorted(scores, reverse=True)
    whole = recommend(workdir=workdir, user="u004", arm=arm, k=10_000)
    assert len(whole) == len(catalogue.item_ids) - len(seen)
    new = recommend(workdir=workdir, history="i03;i07,i11", arm=arm, k=5)
    assert len(new) == 5
    assert not {"i03", "i07", "i11"} & {row["item"] for row in new}


def test_audience_ranks_an_item_against_what_each_user_has_not_had(tiny_run):
    workdir, catalogue = tiny_run[1], load_catalogue(tiny_run[1])
    group = same_titles(workdir=workdir)[0]
    assert len(group) == 2
    assert len({catalogue.titles[catalogue.item_index[item]] for item in group}) == 1
    rows = audience(workdir=workdir, item=group[0], k=3)
    for row in rows:
        listed = recommend(workdir=workdir, user=row["user"], k=10_000)
        (own,) = [r for r in listed if r["item"] == group[0]]
        assert own["rank"] >= row["rank"]
        assert listed[row["rank"] - 1]["score"] == own["score"]
    assert [row["rank"] for row in rows] == sorted(row["rank"] for row in rows)


def test_command_line_prints_a_table_or_json(tiny_run, capsys):
    ask = ["--workdir", str(tiny_run[1]), "--user", "u000", "-k", "2"]
    assert door.main(ask) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["rank", "item", "score", "title"]
    assert door.main([*ask, "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["item"] for row in rows] == [line.split()[1] for line in table[1:]]


def test_the_lm_explains_in_generated_words(tiny_run, capsys):
    ask = ["--workdir", str(tiny_run[1]), "--user", "u004", "--arm", "lm", "-k", "3", "--explain"]
    assert door.main(ask) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    rows = recommend(workdir=tiny_run[1], user="u004", arm="lm", k=3, explain=True)
    plain = recommend(workdir=tiny_run[1], user="u004", arm="lm", k=3)
    assert [{name: row[name] for name in plain[0]} for row in rows] == plain
    told = "recommended: {item} {title} | in the LM's own words: {words}"
    assert lines == [told.format(**row | {"words": one_line(row["words"])}) for row in rows]
    assert "generated" in last
    texts = []
    for seed in ("1", "1", "2"):
        assert door.main([*ask, "--temperature", "2", "--top_p", "0.9", "--format", "json", "--seed", seed]) == 0
        texts.append([row["words"] for row in json.loads(capsys.readouterr().out)])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--user nobody", "user 'nobody' is none of the 150"),
        ("--history wrong", "'wrong' is no item id"),
        ("--user u000 -k 0", "k is 0, but at least one item"),
        ("--user u004 --explain --arm domain", "the domain arm has no words to explain with: ask the LM arm"),
        ("--user u004 --explain --arm lm --temperature -1", "temperature is -1.0"),
        ("--user u004 --explain --arm lm --top_p 2", "top_p is 2.0"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tiny_run, capsys, words, message):
    assert door.main(["--workdir", str(tiny_run[1]), *words.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("bdlm_jax: ") and message in err


@pytest.mark.parametrize("words", ["--user 1 --history 2", "", "--user 1 --arm both"])
def test_flags_that_exclude_each_other_exit_with_2(capsys, words):
    with pytest.raises(SystemExit) as stop:
        door.main(["--workdir", "w", *words.split()])
    assert stop.value.code == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("who", "message"),
    [
        ({}, "either a user or a history"),
        ({"user": "1", "history": "2"}, "either a user or a history"),
        ({"user": "1", "arm": "both"}, "arm 'both'"),
    ],
)
def test_the_python_call_is_refused_alike(who, message):
    with pytest.raises(InputError, match=message):
        recommend(workdir="w", **who)
