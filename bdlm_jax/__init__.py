"""BDLM in JAX: a LightGCN and a causal language model that teach each other through one shared embedding table.

    run = bdlm_jax.load("runs/quickstart")
    run.recommend(users=["u0007"], arm="domain", k=10)

What these need is imported when they are called, so that `import bdlm_jax` is quick.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from bdlm_jax.serving.served_run import ServedRun

__version__ = "0.1.0"


def load(workdir: str | os.PathLike) -> "ServedRun":
    """Opens a finished run: `.recommend(...)`, `.items.nearest(...)`, `.history(user)` and `.results` are tables.

    Raises:
        InputError: the folder holds no finished run.
    """
    from bdlm_jax.serving.served_run import ServedRun

    return ServedRun(workdir)


def train(config: "ConfigDict", workdir: str | os.PathLike = "runs/latest") -> "ServedRun":
    """Trains and evaluates every model of a config, as `python -m bdlm_jax.main` does, and opens the run.

    A run that `workdir` holds is continued where it was stopped; one of another config is refused (InputError).

    Args:
        config: of an experiment file's `get_config()`.
    """
    from bdlm_jax.runtime import malloc
    from bdlm_jax.story import train_together

    malloc.one_arena()
    train_together(config, os.fspath(workdir))
    return load(workdir)
