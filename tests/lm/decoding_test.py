from functools import partial

import jax
import numpy as np
import pytest

from bdlm_jax.lm.causal_lm import LMConfig, init_lm, lm_hidden
from bdlm_jax.lm.decoding import decode_token, prefill
from bdlm_jax.types import InputError

PLAIN = {"vocab_size": 40, "width": 24, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "mlp_width": 32}
CONFIGS = {
    "llama": LMConfig(**PLAIN),
    "gpt2": LMConfig(
        **{**PLAIN, "n_kv_heads": 6}, norm="layer", activation="gelu_tanh", gated=False, attention_bias=True,
        output_bias=True, mlp_bias=True, positions="learned", max_positions=12,
    ),
    "gemma": LMConfig(
        **PLAIN, norm_offset=True, post_norms=True, qk_norm=True, activation="gelu_tanh", window=3,
        local_layers=(True, False, True), local_rope_theta=50.0, rope_scaling=("linear", 8.0), attention_softcap=2.0,
        scale_embedding=True, query_scalar=8.0,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _looped_layers(monkeypatch):
    monkeypatch.setattr("bdlm_jax.lm.decoder._UNROLLED_LAYERS", 0)  # compiles one layer


@pytest.mark.parametrize(
    ("family", "side"), [("llama", "left"), ("gpt2", "right"), ("gemma", "left"), ("gemma", "right")]
)
def test_decoding_equals_the_whole_row_at_every_position(family, side):
    config = CONFIGS[family]
    params = jax.tree.map(lambda x: x * 3, init_lm(jax.random.key(0), config))
    rows_XM = jax.random.normal(jax.random.key(1), (5, 24))
    tokens_BL = np.random.default_rng(0).integers(0, 45, (2, 10))
    n_prompt = np.array([5, 2])
    prompts, mask = np.zeros((2, 5), int), np.zeros((2, 5), bool)
    for row, n in enumerate(n_prompt):
        at = slice(0, n) if side == "right" else slice(5 - n, 5)
        prompts[row, at], mask[row, at] = tokens_BL[row, :n], True
    places, ones = np.arange(10)[None].repeat(2, 0), np.ones((2, 10), int)
    expected = np.asarray(jax.jit(partial(lm_hidden, params, config))(tokens_BL, places, ones, rows_XM))

    state, cache = jax.jit(partial(prefill, params, config, length=10, id_rows_XM=rows_XM))(prompts, mask)
    step = jax.jit(partial(decode_token, params, config, id_rows_XM=rows_XM))
    unit = np.abs(expected).max()
    for n in range(5):
        np.testing.assert_allclose(state, expected[[0, 1], n_prompt + n - 1], rtol=0, atol=1e-4 * unit)
        state, cache = step(tokens_BL[[0, 1], n_prompt + n], cache)
    assert cache.slot == 10 and cache.mask_BS.sum(1).tolist() == [10, 7]


def test_a_cache_that_cannot_hold_the_rows_is_refused():
    config, tokens = CONFIGS["gpt2"], np.zeros((1, 4), int)
    params = jax.eval_shape(partial(init_lm, config=config), jax.random.key(0))
    with pytest.raises(InputError, match="3 slots cannot hold prompts of 4"):
        prefill(params, config, tokens, tokens == 0, length=3)
    with pytest.raises(InputError, match="12 learned positions"):
        prefill(params, config, tokens, tokens == 0, length=13)
    with pytest.raises(InputError, match="12 learned positions"):
        lm_hidden(params, config, np.zeros((1, 13), int), np.zeros((1, 13), int), np.ones((1, 13), int), None)
