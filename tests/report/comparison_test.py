import json
import re

import pytest
from made_run import MODELS, make_run

from bdlm_jax import compare


def compared(capsys, *words, code=0):
    assert compare.main([*map(str, words)]) == code
    out, err = capsys.readouterr()
    return err if code else out


def claims(text, *starts):
    return [line.split(" | ")[-1] for line in text.splitlines() if line.startswith(f"| {' | '.join(starts)} |")]


def test_all_models_stand_beside_lightgcn_ids_lm_and_the_best_control(tmp_path, capsys):
    controls = {"ids_lm": (25, 0), "bdlm_warm_lm": (29, 0), "bdlm_text_lm": (18, 0)}
    runs = [make_run(tmp_path / f"{seed}", seed=seed, models=MODELS | controls) for seed in (0, 1)]
    text = compared(capsys, *runs, "--out", tmp_path / "page.md")
    assert "Only 100 users have a test case" in text and "Seeds 0, 1;" in text
    against = {match[1] for match in re.finditer(r"^\| \S+ \| (\S+) \| ndcg@10/full", text, re.M)}
    assert against == {"lightgcn", "ids_lm", "bdlm_warm_lm"}
    assert claims(text, "bdlm_lm", "lightgcn") == ["higher |"]
    assert claims(text, "bdlm_lm", "bdlm_warm_lm") == ["no claim |"]
    assert (tmp_path / "page.md").read_text().endswith(text)
    text = compared(capsys, *runs, "--metric", "hr@1/cand100", "--baseline", "text_lm")
    assert claims(text, "lightgcn", "text_lm") == ["no claim |"]


def test_experiments_on_the_same_data_are_told_apart_where_they_differ(tmp_path, capsys):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", wins=45, **{"mutual.align": "cosine"})]
    text = compared(capsys, *runs)
    assert len(re.findall(r"^\| lightgcn \| 0.200", text, re.M)) == 1
    name = r"bdlm_lm [mutual.align = cosine]"
    assert claims(text, name, "lightgcn") == ["higher, one seed |"]
    assert claims(text, "bdlm_lm", name) == [] or claims(text, "bdlm_lm", name) == ["lower, one seed |"]


def spoil(folder, change):
    path = folder / "results.json"
    results = json.loads(path.read_text())
    change(results["data"])
    path.write_text(json.dumps(results))


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        (lambda data: data.update(sha256="other"), (), "hold other data"),
        (lambda data: data["candidates"].update({"test/cand100": "x"}), (), "other candidates of test/cand100"),
        (None, ("--metric", "hr@1/none"), "no run has hr@1/none; they have auc/cand100"),
        (None, ("--baseline", "sasrec"), "sasrec has no ndcg@10/full here; choose of lightgcn"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(tmp_path, capsys, change, words, said):
    runs = [make_run(tmp_path / f"{seed}", seed=seed) for seed in (0, 1)]
    if change:
        spoil(runs[1], change)
    assert said in compared(capsys, *runs, *words, code=2)


def test_the_same_run_twice_is_refused(tmp_path, capsys):
    run = make_run(tmp_path / "a")
    assert "give one of them" in compared(capsys, run, run, code=2)
