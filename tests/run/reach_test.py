"""Which arm's loss reaches which shared table, in every shipped experiment: its settings on the tiny world."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdlm_jax.mutual import domain_epoch, lm_step
from bdlm_jax.run import build, stages
from bdlm_jax.types import TrainState
from experiments import tiny

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path.stem for path in (ROOT / "experiments").glob("*.py"))
BOTH, ITEMS = {"user", "item"}, {"item"}
# Of the LM's loss; the domain arm's reaches both tables, but where its model reads users from items.
REACHED = {
    "beauty": BOTH,  # <uid> is never shown, but an item's propagated row is made of its users' rows
    "beauty_itemgcn": ITEMS,  # users are read from items: neither arm has rows of theirs
    "cold_items": ITEMS,
    "defaults": BOTH,
    "ml100k": BOTH,
    "ml100k_pool": ITEMS,
    "ml1m": ITEMS,  # <uid> is never shown, and rows are read as they stand
    "ml1m_llm": ITEMS,
    "ml1m_own_lm": ITEMS,
    "ml1m_pool": ITEMS,
    "ml1m_wide": ITEMS,
    "own_data": ITEMS,
    "own_lm": ITEMS,
    "quickstart": BOTH,
    "tiny": BOTH,
    "tuned": BOTH,
}
SIZES = {"prompts": ("length", "max_title_tokens"), "shared": ("width",), "mutual": ("kl_users",),
         "domain": ("batch_size", "n_layers")}  # fmt: skip


def settings(name):
    """The experiment's way of sharing and teaching, on the world and with the sizes of experiments/tiny.py."""
    config, theirs = tiny.get_config(), importlib.import_module(f"experiments.{name}").get_config()
    for section, sizes in SIZES.items():
        kept = {size: config[section][size] for size in sizes}
        config[section].update(theirs[section])
        config[section].update(kept)
    config.lm.trains = theirs.lm.trains
    return config


def gradient_step(state, losses, batch, weights, optimizer, axis_name, **_):
    """In place of `update_state`: the whole gradient of the loss by the shared tables, as what it reaches."""

    def objective(shared):
        terms = losses(state.params | {"shared": shared}, batch)
        return sum(getattr(weights, name) * total / jnp.maximum(count, 1e-9) for name, (total, count) in terms.items())

    gradient = jax.grad(objective)(state.params["shared"])
    return state, {name: jnp.any(table != 0).astype(jnp.float32) for name, table in gradient.items()}


@pytest.mark.parametrize("name", FILES)
def test_the_losses_reach_the_tables_that_the_experiment_says(name, tmp_path, monkeypatch):
    for module in (lm_step, domain_epoch):
        monkeypatch.setattr(module, "update_state", gradient_step)
    monkeypatch.setattr(build.Run, "fit", lambda self, stage, **arguments: arguments)
    run = build.start_run(settings(name), tmp_path)
    model = run.config.domain.model
    start = build.init_tables(run, model, build.make_arm(run, model))
    made = stages.train_bdlm(run, build.make_decoder(run, None), start)
    params, reached = made["params"](), {}
    for which, arm in made["arms"].items():
        state = arm.compiled.place_state(TrainState(params, (), np.int32(0), jax.random.key(0)))
        _, tables = arm.compiled.run(state, arm.batch(0), arm.view(params), arm.constants)
        reached[which] = {table for table, does in tables.items() if does}
    assert reached == {"lm": REACHED[name], "domain": ITEMS if model == "itemgcn" else BOTH}
    said = (
        "Both losses reach both shared tables"
        if REACHED[name] == BOTH
        else "the LM's loss reaches the item table alone"
    )
    assert said in " ".join(importlib.import_module(f"experiments.{name}").__doc__.split())
