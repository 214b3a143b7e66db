"""Every experiment builds, passes the checks (paths aside), and imports nothing but configs."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

from bdlm_jax.data.splits import TRAIN
from bdlm_jax.run.checks import check_config
from bdlm_jax.run.prepare import prepare_data

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem != "__init__")


def load(name):
    return importlib.import_module(f"experiments.{name}")


@pytest.mark.parametrize("name", NAMES)
def test_it_builds_and_passes_the_checks(name, tmp_path):
    config = load(name).get_config()
    if config.data.path:
        config.data.path = str(tmp_path)
    for part, key in (("tokenizer", "path"), ("pretrain", "corpus")):
        if config[part][key]:
            (tmp_path / key).write_text("")
            config[part][key] = str(tmp_path / key)
    check_config(config)
    assert load(name).get_config() is not load(name).get_config()
    assert load(name).__doc__


@pytest.mark.parametrize("name", NAMES)
def test_it_imports_only_configs_and_neighbours(name):
    for node in ast.walk(ast.parse((ROOT / "experiments" / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            tops = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            tops = {(node.module or "experiments").split(".")[0]}
        else:
            continue
        assert tops <= {"ml_collections", "experiments"} | set(sys.stdlib_module_names)


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
