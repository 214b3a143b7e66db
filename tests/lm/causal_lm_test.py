import dataclasses
import json
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from scipy.special import log_softmax

from bdlm_jax.lm import causal_lm, decoder
from bdlm_jax.lm.causal_lm import LMConfig, init_lm, lm_hidden, text_logits
from bdlm_jax.lm.decoder import _dropout, _embed
from bdlm_jax.types import InputError

CONFIG = LMConfig(vocab_size=40, width=24, n_layers=2, n_heads=6, n_kv_heads=2, mlp_width=32)
ROWS_XM = jax.random.normal(jax.random.key(1), (7, CONFIG.width))  # of the id tokens 40…46
hidden_of = jax.jit(lm_hidden, static_argnames="config")


@pytest.fixture(scope="module")
def params():
    # Larger than at the start, so that attention is far from uniform and a wrong mask shows.
    return jax.tree.map(lambda x: x * 3, init_lm(jax.random.key(0), CONFIG))


def row(*segments, length=9):
    """One packed row of the given token lists: (tokens, positions, segments)."""
    packed, start = np.zeros((3, 1, length), np.int32), 0
    for number, tokens in enumerate(segments, 1):
        place = slice(start, start := start + len(tokens))
        packed[:, 0, place] = tokens, np.arange(len(tokens)), np.full(len(tokens), number)
    return packed


def test_parameters_are_stacked_float32_under_llama_names(params):
    assert params["embedding"].shape == (40, 24) and "head" not in params
    assert params["layers"]["self_attn"]["k_proj"]["kernel"].shape == (2, 24, 2 * 4)
    assert params["layers"]["mlp"]["down_proj"]["kernel"].shape == (2, 32, 24)
    assert params["final_norm"]["scale"].shape == (24,)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    kernels = params["layers"]["self_attn"]["q_proj"]["kernel"]
    assert not np.allclose(kernels[0], kernels[1]), "every layer is drawn on its own"


def test_id_tokens_read_their_rows(params):
    whole = dict(params, embedding=jnp.concatenate([params["embedding"], ROWS_XM]))
    expected = hidden_of(whole, dataclasses.replace(CONFIG, vocab_size=47), *row([1, 40, 46, 3]), None)
    np.testing.assert_allclose(hidden_of(params, CONFIG, *row([1, 40, 46, 3]), ROWS_XM), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scaling_the_embedding_scales_text_rows_alone(params, dtype):
    config = dataclasses.replace(CONFIG, scale_embedding=True, dtype=dtype)
    text_M, id_M = _embed(params["embedding"], ROWS_XM, jnp.array([3, 41]), config)
    np.testing.assert_array_equal(text_M, params["embedding"][3].astype(dtype) * jnp.asarray(math.sqrt(24), dtype))
    np.testing.assert_array_equal(id_M, ROWS_XM[1].astype(dtype))


def test_gradients_reach_the_rows_that_stand_in_the_prompt_and_no_others(params):
    def total(embedding, rows):
        hidden = lm_hidden(dict(params, embedding=embedding), CONFIG, *row([1, 40, 46, 3], length=4), rows)
        return (hidden * jnp.arange(24)).sum()

    text, rows = jax.jit(jax.grad(total, (0, 1)))(params["embedding"], ROWS_XM)
    assert set(np.flatnonzero(np.abs(text).sum(1))) == {1, 3}
    assert set(np.flatnonzero(np.abs(rows).sum(1))) == {0, 6}


def assert_same(left, right):
    # Two programs of other shapes sum in another order, so the unit is the largest number. Measured on jax 0.10 and
    # 0.12: at most 2e-6 in float32, at most 1e-15 with the same decoder in float64.
    np.testing.assert_allclose(left, right, rtol=0, atol=1e-5 * np.abs(right).max())


def test_packing_and_padding_change_nothing(params):
    first, second = [1, 40, 5, 9], [1, 45, 7, 3]
    packed = hidden_of(params, CONFIG, *row(first, second), ROWS_XM)
    alone = [hidden_of(params, CONFIG, *row(part, length=4), ROWS_XM) for part in (first, second)]
    assert_same(packed[:, :8], np.concatenate(alone, axis=1))
    assert np.isfinite(packed).all()


def test_no_position_sees_what_stands_behind_it(params):
    rows = row([1, 40, 5, 9, 2, 11]), row([1, 40, 5, 20, 2, 11])
    before, after = (hidden_of(params, CONFIG, *r, ROWS_XM)[0, :6] for r in rows)
    np.testing.assert_array_equal(before[:3], after[:3])
    assert (np.abs(before - after)[3:].max(axis=1) > 1e-3).all()


def test_eager_equals_jit_and_neither_remat_nor_jaxs_attention_changes_a_gradient(params):
    rows = (*row([1, 40, 5, 9], [1, 3]), ROWS_XM)
    assert_same(lm_hidden(params, CONFIG, *rows), hidden_of(params, CONFIG, *rows))
    gradient = jax.jit(jax.grad(lambda params, config: (lm_hidden(params, config, *rows) ** 3).sum()), static_argnums=1)
    # As drawn: three times as large, float32 leaves a gradient 1e-4 from float64's, and programs differ by 1.2e-5.
    drawn = init_lm(jax.random.key(0), CONFIG)
    plain = gradient(drawn, CONFIG)
    for option in ({"remat": True}, {"remat": "dots"}, {"attention": "xla"}):
        again = gradient(drawn, dataclasses.replace(CONFIG, **option))
        jax.tree.map(assert_same, again, plain)


def test_the_heads_gradient_is_a_product_in_the_compute_type(params):
    narrow = dataclasses.replace(CONFIG, dtype="bfloat16")
    states = jax.random.normal(jax.random.key(2), (5, CONFIG.width))

    def gradient(config):
        return jax.grad(lambda p, x: jnp.sum(jnp.sin(text_logits(p, config, x))), argnums=(0, 1))

    def plain(p, x):
        return jnp.sum(jnp.sin(jnp.einsum("nm,vm->nv", x, p["embedding"], precision="highest")))

    jax.tree.map(assert_same, gradient(CONFIG)(params, states), jax.grad(plain, argnums=(0, 1))(params, states))
    text = str(jax.make_jaxpr(gradient(narrow))(params, states))
    products = re.findall(r":(\w+)\[[\d,]+\] = dot_general", text)
    assert sorted(products) == ["bf16", "bf16", "f32"]  # the logits alone are float32


def test_products_kept_are_attentions_too():
    """By the name that each product with weights bears, adapters' in it; plan_test has all that a layer keeps."""
    product, kernel = map(core.Primitive, ("name", "dot_product_attention_fwd_wrapper"))
    assert decoder._keep_products(product, name="product") and decoder._keep_products(kernel)
    assert not decoder._keep_products(product, name="another")
    assert not decoder._keep_products(jax.lax.exp_p)
    assert not decoder._keep_products(jax.lax.dot_general_p, dimension_numbers=(((2,), (1,)), ((0,), (0,))))


def test_remat_keeps_less_of_a_short_stack_too(monkeypatch):
    monkeypatch.setattr("bdlm_jax.lm.decoder._UNROLLED_LAYERS", 4)
    config = LMConfig(vocab_size=16, width=16, n_layers=4, n_heads=2, n_kv_heads=2, mlp_width=64)
    params = jax.eval_shape(partial(init_lm, config=config), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)

    def temporaries(**options):
        chosen = dataclasses.replace(config, **options)
        loss = jax.jit(jax.grad(lambda p, t: jnp.sum(lm_hidden(p, chosen, t, t, t, None) ** 2)))
        return loss.lower(params, tokens).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(remat=True) < 0.5 * temporaries()


def test_a_loop_over_layers_equals_the_unrolled_stack(params, monkeypatch):
    looped = hidden_of(params, CONFIG, *row([1, 40, 5, 9]), ROWS_XM)
    monkeypatch.setattr("bdlm_jax.lm.decoder._UNROLLED_LAYERS", CONFIG.n_layers)
    unrolled = jax.jit(partial(lm_hidden, params, CONFIG))(*row([1, 40, 5, 9]), ROWS_XM)
    np.testing.assert_allclose(looped, unrolled, atol=1e-5)


def test_bfloat16_is_near_float32():
    params, config = init_lm(jax.random.key(3), CONFIG), dataclasses.replace(CONFIG, dtype="bfloat16")
    low, high = (hidden_of(params, c, *row([1, 40, 5, 9, 12]), ROWS_XM) for c in (config, CONFIG))
    assert low.dtype == jnp.bfloat16
    assert text_logits(params, config, low).dtype == jnp.float32
    np.testing.assert_allclose(low[:, :5].astype(np.float32), high[:, :5], atol=0.1)


def test_dropout_of_a_row_does_not_depend_on_the_other_rows(params):
    config = dataclasses.replace(CONFIG, dropout=0.3)
    rows = (*row([1, 40, 5, 9], length=4).repeat(4, axis=1), ROWS_XM)
    key_B, order = jax.random.split(jax.random.key(5), 4), jnp.array([2, 3, 0, 0])
    whole = hidden_of(params, config, *rows, dropout_key_B=key_B)
    turned = hidden_of(params, config, *rows, dropout_key_B=key_B[order])
    np.testing.assert_allclose(whole[order], turned, atol=1e-5)
    assert np.abs(whole[0] - whole[1]).max() > 1e-2, "two keys, two masks"


def test_dropout_keeps_the_share_and_the_mean():
    ones = jnp.ones((4, 100, 51))
    assert _dropout(ones, None, 0.2) is ones
    key_B = jax.random.split(jax.random.key(0), 4)
    dropped = np.asarray(_dropout(ones, key_B, 0.2))
    kept = dropped != 0
    deviation = math.sqrt(0.2 * 0.8 / kept.size)
    assert abs(kept.mean() - 0.8) < 5 * deviation
    np.testing.assert_allclose(dropped[kept], 1 / 0.8, rtol=1e-4)
    for other in (kept[1], np.asarray(_dropout(ones, key_B, 0.2, 3))[0] != 0):  # of another row, of another place
        assert abs(np.corrcoef(kept[0].ravel(), other.ravel())[0, 1]) < 5 / math.sqrt(other.size)


UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)
WINDOWED = dataclasses.replace(
    CONFIG, window=3, local_layers=(True, False), local_rope_theta=50.0, attention_softcap=4.0, logit_softcap=8.0,
    scale_embedding=True,
)  # fmt: skip


@pytest.mark.parametrize(("side", "config"), [("left", UNTIED), ("right", WINDOWED)])
def test_continuation_log_likelihood_equals_the_full_forward_pass(side, config):
    params = jax.tree.map(lambda x: x * 3, init_lm(jax.random.key(4), config))
    prefixes, continuations = [[1, 5, 9, 30], [1, 7]], [[[3, 4, 2], [8], [6, 6]], [[2], [11, 12, 13], []]]
    prefix, prefix_mask = np.zeros((2, 6), np.int32), np.zeros((2, 6), bool)
    texts, mask = np.zeros((2, 3, 4), np.int32), np.zeros((2, 3, 4), bool)
    for b, tokens in enumerate(prefixes):
        at = slice(0, len(tokens)) if side == "right" else slice(6 - len(tokens), 6)
        prefix[b, at], prefix_mask[b, at] = tokens, True
        for c, text in enumerate(continuations[b]):
            texts[b, c, : len(text)], mask[b, c, : len(text)] = text, True
    rows = [row(prefixes[b] + continuations[b][c]) for b, c in np.ndindex(2, 3)]
    hidden = hidden_of(params, config, *np.concatenate(rows, axis=1), None)
    log_p = log_softmax(text_logits(params, config, hidden), axis=-1).reshape(2, 3, 9, -1)
    expected = np.zeros((2, 3))
    for b, c in np.ndindex(2, 3):
        places = range(len(prefixes[b]) - 1, 9)
        expected[b, c] = sum(log_p[b, c, t, token] for t, token in zip(places, continuations[b][c]))
    score = jax.jit(causal_lm.continuation_log_likelihood, static_argnames="config")
    np.testing.assert_allclose(score(params, config, prefix, prefix_mask, texts, mask), expected, atol=1e-4, rtol=1e-5)
    assert expected[1, 2] == 0 and expected.min() < -3


def test_gather_positions():
    found = causal_lm.gather_positions(jnp.arange(2 * 3 * 2).reshape(2, 3, 2), jnp.array([[2, 0], [1, 1]]))
    np.testing.assert_array_equal(found, [[[4, 5], [0, 1]], [[8, 9], [8, 9]]])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"n_heads": 5}, "multiple of n_heads"),
        ({"n_kv_heads": 4}, "n_kv_heads"),
        ({"head_width": 3}, "odd"),
        ({"dtype": "float16"}, "dtype"),
        ({"dropout": 1.0}, "dropout"),
        ({"n_layers": 0}, "at least 1"),
        ({"rope_scaling": ("yarn", 4.0)}, r'rope_scaling .* only None, \("llama3", factor, low_freq_factor, '),
        ({"rope_scaling": ("ntk",)}, "rope_scaling"),
        ({"norm": "batch"}, 'norm is .batch., write one of "rms", "layer"'),
        ({"remat": "all"}, 'write one of False, True, "dots"'),
        ({"window": 0}, "window is 0"),
        ({"local_layers": (True,)}, "1 entries for n_layers 2"),
        ({"positions": "learned"}, "need max_positions"),
        ({"attention": "cudnn"}, 'needs dtype "bfloat16" and a head width that 8 divides, got "float32" and 4'),
        ({"attention": "xla", "attention_softcap": 5.0}, "cannot cap scores"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_sentence(change, word):
    with pytest.raises(InputError, match=word):
        dataclasses.replace(CONFIG, **change)


def test_a_config_read_from_json_is_the_same():
    config = dataclasses.replace(CONFIG, rope_scaling=("linear", 2.0), window=3, local_layers=(True, False))
    again = LMConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config and hash(again) == hash(config)
