"""Experiments and data sets by name; nothing is fetched from outside."""

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bdlm_jax.data import download
from bdlm_jax.run import shipped
from bdlm_jax.types import InputError
from experiments import defaults

ROOT = Path(__file__).resolve().parents[2]


def test_an_experiment_is_found_by_its_name_and_a_path_stays_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = ROOT / "experiments"
    assert shipped.find_experiment("quickstart:no_pretrain") == f"{folder / 'quickstart.py'}:no_pretrain"
    for other in ("experiments/tiny.py", "tiny.py:arg", "defaults", "quickstrat", ""):
        assert shipped.find_experiment(other) == other
    (tmp_path / "tiny").write_text("a file of one's own")
    assert shipped.find_experiment("tiny") == "tiny"
    assert shipped.default_config() == defaults.get_config()
    assert "quickstart" in shipped.no_experiment("quickstrat") and "defaults" not in shipped.no_experiment("quickstrat")


def test_a_data_set_stands_for_settings_and_chooses_an_experiment():
    words = shipped.dataset_words("ml-1m", ["dataset", "workdir"])
    fields = "--config.data.item_fields=('title', 'genres')"
    assert words == ["--config=ml1m", "--config.data.kind=movielens", "--config.data.path=data/ml-1m", fields]
    assert shipped.dataset_words("ml-1m", ["config", "config.data.item_fields"]) == words[1:3]
    with pytest.raises(InputError, match="there is no 'ml-2m'; choose of ml-100k, "):
        shipped.dataset_words("ml-2m", [])
    with pytest.raises(InputError, match=r"leave out --config\.data\.path"):
        shipped.dataset_words("ml-1m", ["config.data.path"])
    for name, (experiment, settings, _) in shipped.DATASETS.items():
        assert experiment in shipped.experiment_names(), name
        config = defaults.get_config()
        config.update_from_flattened_dict(settings)


def test_it_is_fetched_once_and_ones_own_copy_is_left_alone(tmp_path, monkeypatch):
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        archive.writestr("ml-1m/ratings.dat", "1::2::5::978300760\n")
    asked = []

    def fetch(url, path, *, md5, progress):
        asked.append((url.rpartition("/")[2], md5))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body.getvalue())

    monkeypatch.setattr(download, "download", fetch)
    shipped.fetch_dataset("ml-1m", tmp_path / "data" / "ml-1m")
    assert (tmp_path / "data" / "ml-1m" / "ratings.dat").read_text().startswith("1::2")
    assert asked == [("ml-1m.zip", "c4d9eecfca2ab87c1945afe126590906")]
    (tmp_path / "own" / "ml-1m").mkdir(parents=True)
    shipped.fetch_dataset("ml-1m", tmp_path / "own" / "ml-1m")
    assert len(asked) == 1
    monkeypatch.setattr(download, "fetch_amazon", lambda *given: asked.append(given))
    shipped.fetch_dataset("amazon-beauty", "data/beauty")
    assert asked[1:] == [("Beauty", 2014, Path("data/beauty"))]


def test_what_is_installed_runs_an_experiment_by_its_name_from_anywhere(tmp_path):
    """What setup.py builds, with nothing of the checkout on the path."""
    pytest.importorskip("setuptools")
    built = tmp_path / "lib"
    words = ["-q", "build", "--build-base", tmp_path / "build", "build_py", "--build-lib", built]
    command = [sys.executable, "setup.py", *map(str, words)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert {path.name for path in (built / "bdlm_jax/shipped/experiments").iterdir()} >= {"defaults.py", "models"}
    assert (built / "bdlm_jax/py.typed").exists()  # else a reader of types takes none of ours
    environment = {**os.environ, "PYTHONPATH": str(built)}
    main = [sys.executable, "-m", "bdlm_jax.main", "--workdir", "run", "--config.models=('item_pop',)"]
    done = subprocess.run(
        [*main, "--config", "tiny"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "run" / "report.html").read_text()
    assert "Settings that differ from experiments/defaults.py" in text
    assert "max_title_tokens" in text.replace("<wbr>", "")  # where a long name may break
    done = subprocess.run(
        [*main, "--config", "tiny", "--dataset", "ml-2m"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("bdlm_jax: --dataset: there is no 'ml-2m'; ")
