"""What trains of a language model, and how its rows and states meet the tables; `multi_device` has the steps."""

import jax
import numpy as np
import pytest
import small_bdlm

from bdlm_jax.mutual import lm_step, optimizer, options
from bdlm_jax.run import trained
from bdlm_jax.types import leaf_name

TREE = {
    "shared": {"user": 0, "item": 0},
    "domain": {"weights": 0},
    "lm": {
        "embedding": 0,
        "layers": {"mlp": {"up_proj": {"kernel": 0}}},
        "lora": {"alpha": 0, "layers": {"mlp": {"up_proj": {"kernel": {"a": 0, "b": 0}}}}},
        "bridge": {"into": 0, "out": 0},
    },
}
ADAPTERS = {f"lm/lora/layers/mlp/up_proj/kernel/{name}" for name in "ab"}
ALWAYS = {"lm/bridge/into", "lm/bridge/out"}
TABLES = {"shared/user", "shared/item"}


@pytest.mark.parametrize(
    ("trains", "own"),
    [("full", {"lm/embedding", "lm/layers/mlp/up_proj/kernel"}), ("lora", ADAPTERS), ("bridge", set())],
)
def test_one_word_says_what_trains(trains, own):
    for changes, tables in (({}, TABLES), ({"train_user": False}, {"shared/item"}), ({"train_shared": False}, set())):
        labels = optimizer.label_params(TREE, trained.lm_rules(trains, **{"train_shared": True} | changes))
        named = jax.tree_util.tree_flatten_with_path(labels)[0]
        found = {leaf_name(path) for path, label in named if label != optimizer.FROZEN}
        assert found == own | ALWAYS | tables


def test_rows_without_items_go_through_in_parts_too():
    arm, meeting = small_bdlm.make_arm(), small_bdlm.make_meeting()
    mover = small_bdlm.make_optimizer(shared=optimizer.FROZEN, domain=optimizer.FROZEN)
    weights = options.LMWeights(item=0.0, text=1.0)
    step = lm_step.make_lm_step(arm=arm, meeting=meeting, weights=weights, optimizer=mover, accumulate=2)
    batch = small_bdlm.make_rows().batch(0, batch_size=8, seed=0)
    batch |= {name: np.zeros((8, 0), np.int32) for name in ("item_index", "item_target", "card_index", "card_item")}
    state = jax.eval_shape(lambda: small_bdlm.make_state(small_bdlm.make_params(arm, meeting), mover))
    _, metrics = jax.eval_shape(step, state, batch, {}, small_bdlm.lm_constants())
    assert set(metrics) == {"text", "loss", "gradient_norm"}
