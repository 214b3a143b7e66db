import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdlm_jax.lm import causal_lm, lora
from bdlm_jax.lm.causal_lm import LMConfig
from bdlm_jax.types import InputError

CONFIG = LMConfig(vocab_size=16, width=8, n_layers=2, n_heads=2, n_kv_heads=1, mlp_width=12)


@pytest.fixture(scope="module")
def params():
    return causal_lm.init_lm(jax.random.key(0), CONFIG)


def with_lora(params, **options):
    options = {"rank": 2, "targets": ".*_proj/kernel", "alpha": 8.0} | options
    return {**params, lora.LORA: lora.init_lora(jax.random.key(1), params, **options)}


def fill(tree, seed=2):
    """Adapters as training leaves them: B is no longer zero."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(generator.normal(size=x.shape), x.dtype) if x.ndim else x, tree)


def test_adapters_lie_like_their_weights_and_change_nothing_at_first(params):
    lm = with_lora(params, targets="layers/self_attn/(q|v)_proj/kernel")
    adapters = lm["lora"]["layers"]["self_attn"]
    assert set(adapters) == {"q_proj", "v_proj"} and set(lm["lora"]["layers"]) == {"self_attn"}
    assert adapters["v_proj"]["kernel"]["a"].shape == (2, 8, 2)
    assert adapters["v_proj"]["kernel"]["b"].shape == (2, 2, 4)
    a = np.asarray(adapters["q_proj"]["kernel"]["a"])
    assert 0.5 < np.abs(a).max() * 8**0.5 <= 1 and not np.array_equal(a[0], a[1])
    merged = lora.merge(lm)
    assert "lora" not in merged
    jax.tree.map(np.testing.assert_array_equal, merged, params)
    assert lora.merge(params) is params


def test_merged_weights_are_the_sum_and_the_base_stays(params):
    lm = with_lora(params)
    lm["lora"] = fill(lm["lora"])
    before = jax.tree.map(np.array, lm)
    merged = jax.jit(lora.merge)(lm)
    for block, name in (("self_attn", "o_proj"), ("mlp", "down_proj")):
        adapters = before["lora"]["layers"][block][name]["kernel"]
        wanted = before["layers"][block][name]["kernel"] + 8.0 / 2 * adapters["a"] @ adapters["b"]
        np.testing.assert_allclose(merged["layers"][block][name]["kernel"], wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(merged["embedding"], params["embedding"])
    jax.tree.map(np.testing.assert_array_equal, lm, before)


def test_the_decoder_with_adapters_is_the_decoder_plus_two_thin_products(params):
    # x·(W + s·A·B) = x·W + s·(x·A)·B, of one projection alone.
    lm = with_lora(params, targets="layers/mlp/up_proj/kernel", rank=3, alpha=1.5)
    lm["lora"] = fill(lm["lora"])
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    a, b = (np.asarray(lm["lora"]["layers"]["mlp"]["up_proj"]["kernel"][name])[1] for name in "ab")
    merged = np.asarray(lora.merge(lm)["layers"]["mlp"]["up_proj"]["kernel"])[1]
    base = np.asarray(params["layers"]["mlp"]["up_proj"]["kernel"])[1]
    np.testing.assert_allclose(x @ merged, x @ base + 1.5 / 3 * (x @ a) @ b, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["float32", "bfloat16"]), st.integers(1, 3), st.sampled_from([(3, 5), (2, 4, 3)]),
    st.floats(1e-3, 1e3), st.integers(0, 99),
)  # fmt: skip
def test_unmerging_merged_weights_costs_no_more_than_two_roundings(dtype, rank, shape, size, seed):
    generator = np.random.default_rng(seed)
    base = jnp.asarray(generator.normal(size=shape) * size, dtype)
    adapters = {
        "a": jnp.asarray(generator.normal(size=(*shape[:-1], rank)), jnp.float32),
        "b": jnp.asarray(generator.normal(size=(*shape[:-2], rank, shape[-1])), jnp.float32),
    }
    tree = {"w": {"kernel": base}, "lora": {"alpha": jnp.float32(4.0), "w": {"kernel": adapters}}}
    merged = lora.merge(tree)
    back = lora.unmerge(merged, tree["lora"])
    assert merged["w"]["kernel"].dtype == base.dtype and back["lora"] is tree["lora"]
    largest = np.maximum(np.abs(np.asarray(base, np.float64)), np.abs(np.asarray(merged["w"]["kernel"], np.float64)))
    delta = np.abs(np.asarray(4.0 / rank * adapters["a"] @ adapters["b"], np.float64))
    # Half an ulp of the dtype for each stored sum, one of float32 for the sums themselves.
    bound = largest * float(jnp.finfo(dtype).eps) + (largest + delta) * 2 * np.finfo(np.float32).eps
    error = np.abs(np.asarray(back["w"]["kernel"], np.float64) - np.asarray(base, np.float64))
    assert (error <= bound).all()


def test_unmerging_is_exact_where_the_sum_is():
    base = jnp.asarray([[1.0, -2.0], [0.5, 3.0]])
    adapters = {"a": jnp.asarray([[1.0], [2.0]]), "b": jnp.asarray([[0.25, -4.0]])}
    tree = {"w": base, "lora": {"alpha": jnp.float32(2.0), "w": adapters}}
    merged = lora.merge(tree)
    np.testing.assert_array_equal(merged["w"], [[1.0 + 2 * 0.25, -2.0 - 2 * 4.0], [0.5 + 4 * 0.25, 3.0 - 4 * 4.0]])
    np.testing.assert_array_equal(lora.unmerge(merged, tree["lora"])["w"], base)


@pytest.mark.parametrize(
    ("targets", "words"),
    [("self_attn/q_proj", "matches no leaf of the decoder"), (".*layernorm/scale", r"of shape \(2, 8\), .* no matrix")],
)
def test_targets_that_fit_nothing_are_refused(params, targets, words):
    with pytest.raises(InputError, match=words):
        with_lora(params, targets=targets)
