"""Every experiment builds, passes the checks (paths aside), and so do its variations."""

import dataclasses
import gzip
import importlib
import json
from pathlib import Path

import own_lm
import pytest

from bdlm_jax.data.splits import TEST, TRAIN, VALIDATION
from bdlm_jax.run.checks import check_config, name_config
from bdlm_jax.run.prepare import prepare_data
from bdlm_jax.types import InputError
from experiments import defaults

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.stem for path in (ROOT / "experiments").glob("*.py"))
ARGUMENTS = {
    "quickstart": ["whole", "no_pretrain"],
    "ml1m_llm": ["vicuna_7b", "qwen_0_5b"],
    "ml1m_own_lm": ["short", "base"],
    "own_data": ["short", "long"],
    "own_lm": ["short", "long", "merged"],
    "tuned": ["ml100k", "beauty", "ml1m"],
    **{name: ["short", "table"] for name in ("beauty", "beauty_itemgcn", "ml100k", "ml1m", "ml1m_pool", "ml1m_wide")},
}
CONFIGS = [(name, arg) for name in FILES for arg in ARGUMENTS.get(name, [None])]


def load(name):
    return importlib.import_module(f"experiments.{name}")


def make(name, arg, tmp_path):
    config = load(name).get_config(*([] if arg is None else [arg]))
    if config.data.path:
        config.data.path = str(tmp_path)
    if config.lm.path:
        config.lm.path = str(tmp_path / "model")
        own_lm.write_model(tmp_path / "model", dataclasses.replace(own_lm.LLAMA, max_positions=256))
    return config


@pytest.mark.parametrize(("name", "arg"), CONFIGS)
def test_it_builds_and_passes_the_checks(name, arg, tmp_path):
    check_config(make(name, arg, tmp_path))
    assert make(name, arg, tmp_path) is not make(name, arg, tmp_path)
    assert load(name).__doc__


@pytest.mark.parametrize("name", [name for name in FILES if hasattr(load(name), "get_hyper")])
def test_every_variation_is_another_config_that_passes_the_checks(name, tmp_path):
    seen = []
    for overrides in load(name).get_hyper():
        config = make(name, None, tmp_path)
        config.update_from_flattened_dict(overrides)
        check_config(config)
        seen.append(config.to_json())
    assert len(set(seen)) == len(seen) > 1


def test_a_variant_that_is_none_is_refused():
    with pytest.raises(ValueError, match="'qwen' is none of vicuna_7b, qwen_0_5b"):
        load("ml1m_llm").get_config("qwen")


@pytest.mark.parametrize("name", ["own_lm", "ml1m_own_lm"])
def test_an_own_model_must_be_named(name, tmp_path):
    config = load(name).get_config()
    config.data.path = str(tmp_path) if config.data.path else ""
    with pytest.raises(InputError, match=r"config\.lm\.path is not given: --config\.lm\.path=FOLDER"):
        check_config(config)


def test_sweeps_are_multiplied():
    seeds, align = defaults.sweep("seed", range(2)), defaults.sweep("mutual.align", ["mse"])
    assert defaults.product(align, seeds) == [{"mutual.align": "mse", "seed": 0}, {"mutual.align": "mse", "seed": 1}]


def test_a_name_holds_the_argument():
    assert name_config(defaults.get_config(), "experiments/ml1m_llm.py:qwen_0_5b").name == "ml1m_llm_qwen_0_5b"
    assert name_config(defaults.get_config(), "tiny.py").name == "tiny"


def test_own_data_reads_the_folder_that_the_readme_describes(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    rows = [f"{user},{item},{10 * time + user}" for user in range(6) for time, item in enumerate((0, 1 + user, 7, 8))]
    (folder / "interactions.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n9,0,1\n")
    (folder / "items.csv").write_text("item_id,title\n" + "".join(f"{item},Thing {item}\n" for item in range(9)))
    config = load("own_data").get_config()
    config.data.path = str(folder)
    check_config(config)
    words = r"asks for \d+ others .* the data have 9. Set config\.evaluate\.protocols=\('full',\) and .*text_protocols="
    with pytest.raises(InputError, match=words):
        prepare_data(config, tmp_path / "data")
    config.evaluate.protocols, config.evaluate.text_protocols, config.models = ("full",), (), ("lightgcn", "bdlm")
    data = prepare_data(config, tmp_path / "data")
    assert not data.candidates["test"]  # so few items fill none
    assert data.n_users == 6  # user 9 has one interaction of the three that are asked for
    assert len(data.split.edges(TRAIN)[0]) == 6 * (4 - 2)
    assert data.item_texts[0] == "Thing 0"


def prepared(name, folder, **changes):
    config = load(name).get_config()
    config.data.path = str(folder)
    config.update_from_flattened_dict({"data.candidates": {"cand2": 1}, **changes})
    return prepare_data(config, folder.parent / f"{folder.name}_data")


def test_beauty_reads_the_papers_table_and_the_publishers_reviews_alike(tmp_path):
    """Reviews of one day stay in the order of the publisher's file, which goes by item."""
    days = {
        "ua": {"B1": 3, "B2": 1, "B3": 3, "B4": 2},
        "ub": {"B2": 5, "B3": 5, "B4": 5},
        "uc": {"B1": 1, "B4": 0, "B5": 1},
    }
    order = {"ua": ["B2", "B4", "B1", "B3"], "ub": ["B2", "B3", "B4"], "uc": ["B4", "B1", "B5"]}
    table, reviews = tmp_path / "table", tmp_path / "reviews"
    for folder in (table, reviews):
        folder.mkdir()
    rows = [f"{user},{item},{place}" for user, items in order.items() for place, item in enumerate(items)]
    titles = [f"B{n},{title}" for n, title in enumerate(["Soap", "Gel", "", "Oil", "Wax"], 1)]
    for name, head, lines in (("interactions", "user_id,item_id,order", rows), ("items", "item_id,title", titles)):
        (table / f"{name}.csv.gz").write_bytes(gzip.compress("\n".join([head, *lines]).encode()))
    records = [
        {"reviewerID": user, "asin": item, "overall": 2.0, "unixReviewTime": 86400 * days[user][item]}
        for item in ("B1", "B2", "B3", "B4", "B5")
        for user in ("uc", "ua", "ub")
        if item in days[user]
    ]
    about = [{"asin": line[:2], "title": line[3:]} for line in titles]
    for name, written in (("reviews_Beauty_5", records), ("meta_Beauty", about)):
        (reviews / f"{name}.json.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, written)).encode()))
    ours, theirs = prepared("beauty", table), prepared("beauty", reviews, **{"data.kind": "amazon"})
    assert ours.item_texts == theirs.item_texts == ["Soap", "Gel", "", "Oil", "Wax"]
    for part in (TRAIN, VALIDATION, TEST):
        assert [edges.tolist() for edges in ours.split.edges(part)] == [e.tolist() for e in theirs.split.edges(part)]
    assert [ours.split.interactions.item_ids[i] for i in ours.split.cases(TEST)[1]] == ["B3", "B4", "B5"]


def test_ml100k_reads_atomic_files_by_time_with_titles_and_genres(tmp_path):
    folder = tmp_path / "ml-100k"
    folder.mkdir()
    had = {1: (1, 2, 3), 2: (1, 2, 3), 3: (2, 3, 4)}
    rows = [f"{user}\t{item}\t3\t{100 - item}" for user, items in had.items() for item in items]
    (folder / "ml-100k.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + "\n".join(rows)
    )
    films = [f"{item}\tFilm {item}\t1995\tComedy Drama" for item in range(1, 5)]
    head = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    (folder / "ml-100k.item").write_text(head + "\n".join(films))
    data = prepared("ml100k", folder)
    assert data.split.interactions.time_kind == "timestamp"
    assert [data.split.interactions.item_ids[i] for i in data.split.cases(TEST)[1]] == ["1", "1", "2"]
    assert all(word in data.item_texts[0] for word in ("Film 1", "Comedy Drama"))
