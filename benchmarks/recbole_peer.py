"""RecBole as a peer, where it is installed (`pip install recbole`; the project does not depend on it).

A model is made, fed and trained by RecBole's own dataset, loaders and trainer; only the number of batches is ours.
"""

import contextlib
import itertools
import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

NAME = "peer"


def installed() -> bool:
    """Whether RecBole can be imported here."""
    with contextlib.suppress(ImportError):
        import recbole  # noqa: F401

        return True
    return False


def make_trainer(model: str, user_E, item_E, *, split: dict, **settings):
    """Returns (RecBole's trainer of a model, its training loader).

    Args:
        split: RecBole's word for what is held out: {"LS": "valid_and_test"} is each user's last two.
        settings: of RecBole's configuration, beside its defaults.
    """
    import scipy.sparse
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    # RecBole 1.2.1 was written for NumPy 1 and SciPy 1.13, and JAX needs newer ones: what it misses is given to it.
    for old, new in {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_}.items():
        setattr(np, old, new)
    if not hasattr(scipy.sparse.dok_matrix, "_update"):
        scipy.sparse.dok_matrix._update = lambda self, entries: self._dict.update(entries)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), _quiet():  # it writes logs where it is
        _write_atomic(Path(folder, NAME), user_E, item_E)
        split = {"split": split, "order": "TO", "group_by": "user", "mode": "full"}
        own = {"data_path": folder, "checkpoint_dir": folder, "use_gpu": False, "show_progress": False, "seed": 0}
        columns = {"inter": ["user_id", "item_id", "timestamp"]}
        config = Config(model, NAME, config_dict={**own, "load_col": columns, "eval_args": split, **settings})
        init_seed(config["seed"], config["reproducibility"])
        loader, *_ = data_preparation(config, create_dataset(config))
        network = get_model(model)(config, loader.dataset)
        trainer = get_trainer(config["MODEL_TYPE"], model)(config, network)
    return trainer, loader


class Some:
    """The first batches of a loader, each pass drawn anew."""

    def __init__(self, loader, n_batches: int):
        self.loader, self.n_batches = loader, n_batches

    def __iter__(self):
        return itertools.islice(iter(self.loader), self.n_batches)


def train(trainer, loader, n_batches: int) -> float:
    """Runs RecBole's training loop over so many batches and returns their mean loss."""
    with _quiet():
        return trainer._train_epoch(Some(loader, n_batches), 0) / n_batches


def _write_atomic(folder, user_E, item_E):
    folder.mkdir()
    # Our order as the time: RecBole sorts by it, and people rate several films in one second.
    columns = {"user_id:token": user_E, "item_id:token": item_E, "timestamp:float": np.arange(len(user_E))}
    pd.DataFrame(columns).to_csv(folder / f"{NAME}.inter", sep="\t", index=False)


@contextlib.contextmanager
def _quiet():
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):  # of what newer libraries will do another way
            yield
    finally:
        logging.disable(before)
