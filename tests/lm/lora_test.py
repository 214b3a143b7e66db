import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from bdlm_jax.lm import causal_lm, lora
from bdlm_jax.lm.causal_lm import LMConfig
from bdlm_jax.types import InputError

CONFIG = LMConfig(vocab_size=16, width=8, n_layers=2, n_heads=2, n_kv_heads=1, mlp_width=12)
ROW = [np.random.default_rng(3).integers(0, 16, (2, 7)), np.arange(7)[None].repeat(2, 0), np.ones((2, 7), int)]


@pytest.fixture(scope="module")
def params():
    return causal_lm.init_lm(jax.random.key(0), CONFIG)


def with_lora(params, *, trained=False, **options):
    """Adapters as they are drawn, or as training leaves them: B is no longer zero."""
    options = {"rank": 2, "targets": ".*_proj/kernel", "alpha": 8.0} | options
    adapters, generator = lora.init_lora(jax.random.key(1), params, **options), np.random.default_rng(2)
    if trained:
        adapters = jax.tree.map(lambda x: generator.normal(size=x.shape).astype(x.dtype) if x.ndim else x, adapters)
    return {**params, lora.LORA: adapters}


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_are_the_sum_in_their_dtype_and_the_base_stays(params, dtype):
    lm = with_lora(jax.tree.map(lambda x: x.astype(dtype), params), trained=True)
    before = jax.tree.map(np.array, lm)
    merged = jax.jit(lora.merge)(lm)
    for block, name in (("self_attn", "o_proj"), ("mlp", "down_proj")):
        adapters, kernel = before["lora"]["layers"][block][name]["kernel"], merged["layers"][block][name]["kernel"]
        wanted = before["layers"][block][name]["kernel"].astype(np.float32) + 8.0 / 2 * adapters["a"] @ adapters["b"]
        assert kernel.dtype == dtype
        np.testing.assert_allclose(kernel.astype(np.float32), wanted, rtol=float(jnp.finfo(dtype).eps), atol=1e-5)
    np.testing.assert_array_equal(merged["embedding"], before["embedding"])
    jax.tree.map(np.testing.assert_array_equal, lm, before)


def squares(adapters, base, config, merged):
    lm = {**base, lora.LORA: adapters}
    lm = lora.merge(lm) if merged else lora.merge_tables(lm)
    hidden = causal_lm.lm_hidden(lm, config, *ROW, None)
    return (causal_lm.text_logits(lm, config, hidden) ** 2).sum(), hidden


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (".*_proj/kernel", {}),
        ("layers/.*/(q|down)_proj/kernel|embedding|head", {"tie_embeddings": False, "remat": True}),
        ("embedding|position_embedding", {"positions": "learned", "max_positions": 8, "n_layers": 1}),
    ],
)
def test_adapters_beside_the_weights_are_adapters_within_them(targets, options):
    # x·(W + s·A·B) = x·W + s·(x·A)·B: the states, and the adapters' gradients.
    config = dataclasses.replace(CONFIG, **options)
    base = causal_lm.init_lm(jax.random.key(0), config)
    adapters = with_lora(base, trained=True, targets=targets, rank=3, alpha=1.5)["lora"]
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
    assert any(sorted(shape) == [8, 12] for shape in products(jaxpr.jaxpr)) == merged


def test_scored_continuations_read_the_adapters(params):
    lm = with_lora(params, trained=True, targets=".*_proj/kernel|embedding")
    continuation = np.random.default_rng(4).integers(0, 16, (2, 3, 2))
    arguments = (*ROW[::2], continuation, np.ones_like(continuation))
    run = jax.jit(causal_lm.continuation_log_likelihood, static_argnums=1)
    got, wanted = (run(tree, CONFIG, *arguments) for tree in (lm, lora.merge(lm)))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)
    assert np.abs(got - run(params, CONFIG, *arguments)).max() > 0.1


def test_without_adapters_the_model_is_what_it_was(params):
    lm = with_lora({**params, "bridge": {}}, trained=True, targets=".*_proj/kernel|embedding")
    bare = lora.without(lm)
    assert bare.keys() == {*params, "bridge"} and lora.LORA in lm
    assert all(bare[name] is params[name] for name in params)


def test_what_has_no_adapters_is_left_as_it_is(params):
    lm = with_lora(params)
    assert lora.without(params) is params
    assert lora.merge(params) is params
    assert lora.variables(params)["params"] is params and set(lora.variables(params)) == {"params"}
    assert lora.merge_tables(params) is params and lora.merge_tables(lm) is lm
    assert set(lora.variables(lm)["lora"]) == {"layers"} and "lora" not in lora.variables(lm)["params"]


@pytest.mark.parametrize(
    ("targets", "words"),
    [("self_attn/q_proj", "matches no leaf of the decoder"), (".*layernorm/scale", r"of shape \(2, 8\), .* no matrix")],
)
def test_targets_that_fit_nothing_are_refused(params, targets, words):
    with pytest.raises(InputError, match=words):
        with_lora(params, targets=targets)
