"""A Hugging Face model of either shape, trained in each way, learns the same on one device, four replicas, a mesh."""

import jax
import numpy as np
import own_lm
import pytest
import small_bdlm

OWN = {"lm/embedding", "lm/layers", "lm/final_norm"}
MOVES = {
    ("full", "gpt2"): OWN | {"lm/position_embedding"}, ("full", "llama"): OWN | {"lm/head"},
    ("lora", "gpt2"): {"lm/lora"}, ("lora", "llama"): {"lm/lora"},
    ("bridge", "gpt2"): set(), ("bridge", "llama"): set(),
}  # fmt: skip
# A case compiles three ways, a whole round with every loss and the domain arm six programs: minutes in all.
CASES = [("lora", "llama", False)] + [
    (trains, shape, True) for trains in ("full", "lora", "bridge") for shape in own_lm.SHAPES
]


@pytest.mark.slow
@pytest.mark.parametrize(("trains", "shape", "domain"), CASES)
def test_three_ways_train_a_users_model_to_the_same_losses(tmp_path, trains, shape, domain):
    arm, meeting, params = own_lm.make_bdlm(tmp_path / "model", own_lm.SHAPES[shape], trains)
    options = {"domain": domain, "weights": small_bdlm.LM_ALL if domain else own_lm.FEW}
    wanted, losses = own_lm.train_round(arm, meeting, params, trains, **options)
    others = {"lm/bridge", "shared/user", "shared/item"} | ({"domain/layer_weights"} if domain else set())
    assert moved(params, wanted) == others | MOVES[trains, shape]
    assert len({metrics["loss"] for metrics in losses}) == len(losses)
    # In parts too: rows have unequal numbers of targets, so a mean of the parts' means would be another step.
    batch = small_bdlm.make_rows().batch(0, batch_size=8, seed=0)
    assert len({(np.asarray(batch["item_target"])[part::2] >= 0).sum() for part in range(2)}) == 2
    for parallel in ("pmap", "mesh"):
        trained, seen = own_lm.train_round(arm, meeting, params, trains, parallel=parallel, accumulate=2, **options)
        assert len(seen) == len(losses)
        for mine, theirs in zip(seen, losses):
            assert set(mine) == set(theirs)
            for name, value in theirs.items():
                # A small divergence is a difference of large numbers: 1e-7 of them is rounding.
                np.testing.assert_allclose(mine[name], value, rtol=1e-4, atol=5e-7, err_msg=f"{parallel} {name}")
        jax.tree_util.tree_map_with_path(assert_close, trained, wanted)


def moved(before, after):
    """Subtrees of params in which some number moved."""
    found = set()
    for (path, old), new in zip(jax.tree_util.tree_flatten_with_path(before)[0], jax.tree.leaves(after)):
        if not np.array_equal(old, new):
            found.add("/".join(part.key for part in path[:2]))
    return found


def assert_close(path, mine, theirs):
    # The softmax does not see a bias of the keys: its gradient is rounding alone, which Adam makes a whole step of.
    if "k_proj" not in jax.tree_util.keystr(path) or path[-1].key != "bias":
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=2e-5, err_msg=jax.tree_util.keystr(path))
