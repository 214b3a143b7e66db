"""What comes with the package and is asked for by name: experiments, and data sets that are fetched where they are not.

Experiments lie beside the package in a checkout, and within it where it was installed (setup.py puts them there).
"""

import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from bdlm_jax.types import InputError

_PACKAGE = Path(__file__).resolve().parents[1]


def experiments_folder() -> Path | None:
    """The folder of the shipped experiments, None where there is none."""
    places = (_PACKAGE / "shipped" / "experiments", _PACKAGE.parent / "experiments")
    return next((place for place in places if (place / "defaults.py").is_file()), None)


def experiment_names() -> list[str]:
    folder = experiments_folder()
    return sorted(path.stem for path in folder.glob("*.py") if path.stem != "defaults") if folder else []


def find_experiment(given: str) -> str:
    """The path of an experiment, with its argument: what is no file may be a name, as `quickstart:no_pretrain`."""
    name, colon, argument = given.partition(":")
    if name in experiment_names() and not Path(name).is_file():
        return f"{experiments_folder() / name}.py{colon}{argument}"
    return given


def no_experiment(file: str | Path) -> str:
    """What to say of a --config that is none."""
    names = ", ".join(experiment_names())
    return f"--config: {file} is no file; give an experiment file" + (f", or one of {names}." if names else ".")


def default_config() -> ConfigDict | None:
    """What get_config() of the shipped defaults.py returns, None where it is not at hand."""
    folder = experiments_folder()
    return runpy.run_path(str(folder / "defaults.py"))["get_config"]() if folder else None


class Dataset(NamedTuple):
    """A published data set: the experiment for it, the settings that read it, and how its folder is filled."""

    experiment: str
    settings: dict[str, object]
    fetch: Callable[[Path], object]


def _movielens(experiment: str, name: str) -> Dataset:
    def fetch(folder: Path) -> None:
        from bdlm_jax.data import download

        # One's own copy is left alone; of a fetched one the archive stays, and is compared with its checksum.
        if not folder.is_dir() or (folder.parent / f"{name}.zip").exists():
            download.fetch_movielens(name, folder.parent)

    settings = {"data.kind": "movielens", "data.path": f"data/{name}", "data.item_fields": ("title", "genres")}
    return Dataset(experiment, settings, fetch)


def _beauty(folder: Path) -> None:
    from bdlm_jax.data import download

    download.fetch_amazon("Beauty", 2014, folder)


DATASETS = {
    "ml-100k": _movielens("ml100k", "ml-100k"),
    "ml-latest-small": _movielens("ml100k", "ml-latest-small"),
    "ml-1m": _movielens("ml1m", "ml-1m"),
    "ml-20m": _movielens("ml1m", "ml-20m"),
    "amazon-beauty": Dataset("beauty", {"data.kind": "amazon", "data.path": "data/beauty"}, _beauty),
}


def dataset_words(name: str, given: Sequence[str]) -> list[str]:
    """The words of a command line that a data set's name stands for; `given` are the names of the other flags.

    Raises:
        InputError: no such data set, or one whose place is given too.
    """
    if name not in DATASETS:
        raise InputError(f"--dataset: there is no {name!r}; choose of {', '.join(DATASETS)}, or leave it out.")
    experiment, settings, _ = DATASETS[name]
    if twice := [key for key in ("data.kind", "data.path") if f"config.{key}" in given]:
        raise InputError(f"--dataset {name} says where its data are; leave out --config.{twice[0]}, or --dataset.")
    words = [f"--config.{key}={value}" for key, value in settings.items() if f"config.{key}" not in given]
    return words if "config" in given else [f"--config={experiment}", *words]


def fetch_dataset(name: str, folder: str) -> None:
    """Fills the folder of a data set that is not there yet; what is fetched is compared with its checksum."""
    DATASETS[name].fetch(Path(folder))
