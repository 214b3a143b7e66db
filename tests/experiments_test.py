"""Every experiment builds, passes the checks (paths aside), and so do its variations."""

import importlib
from pathlib import Path

import pytest

from bdlm_jax.data.splits import TRAIN
from bdlm_jax.run.checks import check_config, name_config
from bdlm_jax.run.prepare import prepare_data
from experiments import defaults

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.stem for path in (ROOT / "experiments").glob("*.py"))
ARGUMENTS = {"quickstart": ["whole", "no_pretrain"], "ml1m_llm": ["vicuna_7b", "qwen_0_5b"]}
CONFIGS = [(name, arg) for name in FILES for arg in ARGUMENTS.get(name, [None])]


def load(name):
    return importlib.import_module(f"experiments.{name}")


def make(name, arg, tmp_path):
    config = load(name).get_config(*([] if arg is None else [arg]))
    if config.data.path:
        config.data.path = str(tmp_path)
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
    data = prepare_data(config, tmp_path / "data")
    assert data.n_users == 6  # user 9 has one interaction of the three that are asked for
    assert len(data.split.edges(TRAIN)[0]) == 6 * (4 - 2)
    assert data.item_texts[0] == "Thing 0"
