import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_golden

from bdlm_jax.lm.causal_lm import LMConfig, init_lm, lm_hidden, text_logits
from bdlm_jax.lm.generate import decode_token, generate, keep_top_p, prefill
from bdlm_jax.lm.hf_config import lm_config_from_hf
from bdlm_jax.lm.hf_weights import load_lm
from bdlm_jax.types import InputError

V, EOS, PAD = 24, 1, 0
CONFIG = LMConfig(vocab_size=V, width=16, n_layers=2, n_heads=4, n_kv_heads=2, mlp_width=24)
ROWS_XM = jax.random.normal(jax.random.key(1), (5, 16))


def pad_prompts(rows, side):
    tokens, mask = np.full((len(rows), 5), PAD), np.zeros((len(rows), 5), bool)
    for n, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(5 - len(row), 5)
        tokens[n, at], mask[n, at] = row, True
    return tokens, mask


@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma2", "gemma3"])
def test_decoding_equals_the_whole_row_at_every_position(case):
    config = lm_config_from_hf(make_golden.HERE / case)
    params, rows_XM = load_lm(make_golden.HERE / case, config), jax.random.normal(jax.random.key(1), (9, 24))
    tokens_BL, n_prompt = np.random.default_rng(0).integers(0, config.vocab_size + 9, (4, 10)), np.array([5, 2, 3, 4])
    row = tokens_BL, np.arange(10)[None].repeat(4, 0), np.ones((4, 10), int), rows_XM
    expected = np.asarray(jax.jit(partial(lm_hidden, params, config))(*row))

    prompts = [row[:n] for row, n in zip(tokens_BL, n_prompt)]
    padded = [np.concatenate(x) for x in zip(pad_prompts(prompts[:2], "left"), pad_prompts(prompts[2:], "right"))]
    state, cache = jax.jit(partial(prefill, params, config, max_new=5))(*padded, rows_XM)
    step, atol = jax.jit(partial(decode_token, params, config)), 1e-4 * np.abs(expected).max()
    for place_B in (n_prompt + n for n in range(5)):
        np.testing.assert_allclose(state, expected[range(4), place_B - 1], rtol=0, atol=atol)
        state, cache = step(tokens_BL[range(4), place_B], rows_XM, cache)
    assert cache.slot == 10 and cache.mask_BS.sum(1).tolist() == [10, 7, 8, 9]


@pytest.fixture(scope="module")
def lm():
    """A model and prompts of which the last token is an id token's."""
    params, text = init_lm(jax.random.key(0), CONFIG), np.random.default_rng(0).integers(2, V, (3, 4))
    prompts = [[*text[row, : n - 1], V + row] for row, n in enumerate((5, 2, 3))]
    return jax.tree.map(lambda x: x * 6, params), prompts


def write(lm, side="left", **options):
    options = {"max_new": 8, "eos": EOS, "pad": PAD, "id_rows_XM": ROWS_XM} | options
    return np.asarray(generate(lm[0], CONFIG, *pad_prompts(lm[1], side), **options))


@pytest.fixture(scope="module")
def logits(lm):
    """The logits behind a sequence, by a pass over the whole of it; one compilation for all lengths up to 16."""

    @jax.jit
    def run(tokens, n):
        row = tokens[None], jnp.arange(16)[None], (jnp.arange(16) < n)[None]
        return text_logits(lm[0], CONFIG, lm_hidden(lm[0], CONFIG, *row, ROWS_XM)[0, n - 1])

    return lambda tokens: np.asarray(run(np.pad(tokens, (0, 16 - len(tokens))), len(tokens)))


@pytest.mark.parametrize(("side", "allowed"), [("right", None), ("left", np.isin(np.arange(V), [EOS, 3, 4, 6, 9]))])
def test_greedy_is_the_likeliest_token_of_whole_passes(lm, logits, side, allowed):
    for prompt, written in zip(lm[1], write(lm, side, allowed_V=allowed)):
        expected = []
        while len(expected) < 8 and EOS not in expected:
            logits_V = logits([*prompt, *expected])
            expected.append(int(np.argmax(logits_V if allowed is None else np.where(allowed, logits_V, -np.inf))))
        assert written.tolist() == expected + [PAD] * (8 - len(expected))


def test_generation_stops_at_the_end_token_row_by_row(lm):
    """Whatever token a row writes second is made the end token: it then stops there, and the others go on."""
    free = write(lm, eos=V + 100).tolist()
    end = free[0][1]
    stops = [row.index(end) + 1 if end in row else 8 for row in free]
    assert write(lm, eos=end).tolist() == [row[:n] + [PAD] * (8 - n) for row, n in zip(free, stops)]
    assert min(stops) < max(stops)


def test_drawn_tokens_follow_the_key_and_the_distribution(lm, logits):
    prompt, n = [3, 7, V + 1], 4000
    draw = partial(write, (lm[0], [prompt] * n), max_new=1, temperature=2.0, top_p=0.8)
    drawn = draw(key=jax.random.key(3))[:, 0]
    expected_V = np.asarray(jax.nn.softmax(keep_top_p(logits(prompt) / 2, 0.8)))
    drawn_V = np.bincount(drawn, minlength=V) / n
    assert set(np.flatnonzero(drawn_V)) <= set(np.flatnonzero(expected_V)), "top-p cuts the rest"
    np.testing.assert_allclose(drawn_V, expected_V, atol=5 * np.sqrt(0.25 / n))
    assert (draw(key=jax.random.key(4))[:, 0] != drawn).any()


def test_top_p_keeps_the_fewest_likeliest_tokens():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))
    for top_p, kept in ((0.3, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 2, 3]), (1.0, [0, 1, 2, 3])):
        assert np.flatnonzero(keep_top_p(logits, top_p) > -jnp.inf).tolist() == kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 1.0}, "give a key"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"max_new": 0}, "max_new is 0"),
    ],
)
def test_impossible_options_are_said(lm, options, message):
    with pytest.raises(InputError, match=message):
        write(lm, **options)


def test_rows_longer_than_the_learned_positions_are_refused():
    config, row_1L = dataclasses.replace(CONFIG, positions="learned", max_positions=10), np.ones((1, 11), int)
    params = jax.eval_shape(partial(init_lm, config=config), jax.random.key(0))
    with pytest.raises(InputError, match="11 tokens is longer than the 10 learned positions"):
        prefill(params, config, row_1L[:, :4], row_1L[:, :4], None, max_new=7)
    with pytest.raises(InputError, match="10 learned positions"):
        lm_hidden(params, config, row_1L, row_1L, row_1L, None)
