"""The domain models by name: the only list of them, which the config's checks, a run and serving read."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from bdlm_jax.domain.arm import DomainArm, Inputs
from bdlm_jax.domain.itemgcn import itemgcn_arm
from bdlm_jax.domain.lightgcn import lightgcn_arm
from bdlm_jax.domain.mf import mf_arm
from bdlm_jax.domain.ncf import ncf_arm
from bdlm_jax.domain.sasrec import sasrec_arm
from bdlm_jax.types import InputError

MODELS: dict[str, Callable[..., DomainArm]] = {
    "lightgcn": lightgcn_arm,
    "mf": mf_arm,
    "ncf": ncf_arm,
    "sasrec": sasrec_arm,
    "itemgcn": itemgcn_arm,
}
# What a config says for every model, each taking those that its signature names; the rest of a signature are options.
SETTINGS = ("n_layers", "layer_weights", "backend")


def make_arm(name: str, inputs: Inputs, settings: Mapping[str, Any]) -> DomainArm:
    """Builds a model, handing it those of `settings` (SETTINGS and its own options) that it has."""
    check_options(name, {key: value for key, value in settings.items() if key not in SETTINGS})
    return MODELS[name](inputs, **{key: value for key, value in settings.items() if key in takes(name)})


def takes(name: str) -> list[str]:
    """The settings and options that a model's signature names."""
    return [key for key in inspect.signature(MODELS[name]).parameters if key != "inputs"]


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuses a model or an option of `config.domain.options` that does not exist."""
    if name not in MODELS:
        raise InputError(f"domain model {name!r} is unknown: choose one of {', '.join(MODELS)}.")
    known = [key for key in takes(name) if key not in SETTINGS]
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            meant = f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'none'}."
            raise InputError(f"{key} is no option of the domain model {name}; {meant}")
