import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

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


ROW = [np.random.default_rng(3).integers(0, 16, (2, 7)), np.arange(7)[None].repeat(2, 0), np.ones((2, 7), int)]


def squares(adapters, base, config, merged):
    lm = {**base, lora.LORA: adapters}
    lm = lora.merge(lm) if merged else lora.merge_tables(lm)
    hidden = causal_lm.lm_hidden(lm, config, *ROW, None)
    return (causal_lm.text_logits(lm, config, hidden) ** 2).sum(), hidden


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (".*_proj/kernel", {}),
        ("layers/.*/(q|down)_proj/kernel|embedding|head", {"tie_embeddings": False, "n_layers": 5, "remat": True}),
        ("embedding|position_embedding", {"positions": "learned", "max_positions": 8, "n_layers": 1}),
    ],
)
def test_adapters_beside_the_weights_are_adapters_within_them(targets, options):
    # x·(W + s·A·B) = x·W + s·(x·A)·B: the states, and the adapters' gradients.
    config = dataclasses.replace(CONFIG, **options)
    base = causal_lm.init_lm(jax.random.key(0), config)
    adapters = fill(with_lora(base, targets=targets, rank=3, alpha=1.5)["lora"])
    run = jax.jit(jax.value_and_grad(squares, has_aux=True), static_argnums=(2, 3))
    (_, beside), grads = run(adapters, base, config, False)
    (_, within), wanted = run(adapters, base, config, True)
    np.testing.assert_allclose(beside, within, rtol=1e-5, atol=1e-5)
    for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(wanted)):
        largest = np.abs(want).max()
        assert largest > 0, path
        np.testing.assert_allclose(got / largest, want / largest, atol=2e-5, err_msg=jax.tree_util.keystr(path))


def products(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape[-2:]
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


@pytest.mark.parametrize("merged", [False, True])
def test_no_product_is_as_large_as_a_weight(params, merged):
    # Neither A·B nor the gradient of W: with 14 tokens, rank 2 and widths 8 and 12 those alone are 8 by 12.
    lm = with_lora(params, targets="layers/mlp/(up|gate)_proj/kernel")
    jaxpr = jax.make_jaxpr(jax.grad(lambda a: squares(a, params, CONFIG, merged)[0]))(lm["lora"])
    large = [shape for shape in products(jaxpr.jaxpr) if sorted(shape) == [8, 12]]
    assert bool(large) == merged


def test_scored_continuations_read_the_adapters(params):
    lm = with_lora(params, targets=".*_proj/kernel|embedding")
    lm["lora"] = fill(lm["lora"])
    continuation = np.random.default_rng(4).integers(0, 16, (2, 3, 2))
    arguments = (*ROW[::2], continuation, np.ones_like(continuation))
    run = jax.jit(causal_lm.continuation_log_likelihood, static_argnums=1)
    got, wanted, base = (run(tree, CONFIG, *arguments) for tree in (lm, lora.merge(lm), params))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)
    assert np.abs(got - base).max() > 0.1


def test_what_has_no_adapters_is_left_as_it_is(params):
    lm = with_lora(params)
    assert lora.variables(params)["params"] is params and set(lora.variables(params)) == {"params"}
    assert lora.merge_tables(params) is params and lora.merge_tables(lm) is lm
    assert set(lora.variables(lm)["lora"]) == {"layers"} and "lora" not in lora.variables(lm)["params"]


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
