import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdlm_jax.lm import attention
from bdlm_jax.lm.attention import attend, attend_cached, attend_with_prefix
from bdlm_jax.lm.causal_lm import LMConfig, init_lm, lm_hidden
from bdlm_jax.types import InputError

B, L, G, R, K = 2, 5, 2, 3, 4
CONFIG = LMConfig(vocab_size=40, width=24, n_layers=1, n_heads=6, n_kv_heads=2, mlp_width=32)


@pytest.fixture(scope="module")
def qkv():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (B, L, G, R, K), (B, L, G, K), (B, L, G, K)
    return tuple(2 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes))


@pytest.fixture(scope="module")
def mask_BLL():
    segments = np.array([[0, 0, 1, 1, 1], [1, 1, 2, 2, 0]])
    return np.tril(np.ones((L, L), bool)) & (segments[:, :, None] == segments[:, None, :])


def dense(q, k, v, mask_BLL, softcap=None):
    """One query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, g, r in np.ndindex(B, L, G, R):
        scores = k[b, mask_BLL[b, t], g] @ q[b, t, g, r]
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[b, t, g, r] = weights @ v[b, mask_BLL[b, t], g] / weights.sum()
    return out


@pytest.mark.parametrize(("implementation", "softcap"), [("einsum", None), ("einsum", 1.5), ("xla", None)])
def test_attention_equals_a_loop_over_queries(qkv, mask_BLL, implementation, softcap):
    out = attend(*qkv, jnp.asarray(mask_BLL), implementation=implementation, softcap=softcap)
    np.testing.assert_allclose(out, dense(*qkv, mask_BLL, softcap), atol=1e-5)


@pytest.mark.parametrize(("block", "blocks"), [(2, 9), (1, 2), (4, 1)])
def test_blocks_of_queries_are_the_same_attention(monkeypatch, qkv, mask_BLL, block, blocks):
    monkeypatch.setattr(attention, "_BLOCK", block)
    monkeypatch.setattr(attention, "_BLOCKS", blocks)

    def total(*qkv):
        out = attend(*qkv, jnp.asarray(mask_BLL), implementation="einsum", softcap=None)
        return jnp.sum(out**2), out

    gradient, out = jax.jit(jax.grad(total, has_aux=True, argnums=(0, 1, 2)))(*qkv)
    np.testing.assert_allclose(out, dense(*qkv, mask_BLL), atol=1e-5)
    whole = jax.grad(lambda *x: jnp.sum(attend(*x, mask_BLL, implementation="xla", softcap=None) ** 2), (0, 1, 2))(*qkv)
    for got, expected in zip(gradient, whole):
        np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_prefix_and_a_cache_are_the_same_attention(qkv, softcap):
    q, k, v = qkv
    seen = np.array([[True] * 3, [False, True, True]])  # the second prefix is padded
    causal = np.tril(np.ones((L, L), bool))[None].repeat(B, 0)
    causal[:, 3:, :3] &= seen[:, None]
    whole = dense(q, k, v, causal, softcap)
    own = np.broadcast_to(np.tril(np.ones((2, 2), bool)), (B, 1, 2, 2))
    parts = attend_with_prefix(
        q[:, None, 3:], k[:, None, 3:], v[:, None, 3:], own, k[:, :3], v[:, :3], seen[:, None, None], softcap=softcap
    )
    np.testing.assert_allclose(parts[:, 0], whole[:, 3:], atol=1e-5)
    last = attend_cached(q[:, 4:], k, v, causal[:, 4], softcap=softcap)
    np.testing.assert_allclose(last, whole[:, 4:], atol=1e-5)


def test_the_decoder_gives_the_same_states_and_gradients_with_jaxs_attention():
    params = jax.tree.map(lambda x: x * 2, init_lm(jax.random.key(0), CONFIG))
    tokens, segments = np.arange(16).reshape(2, 8), np.array([[1] * 5 + [2] * 3, [1] * 6 + [0] * 2])

    @jax.jit
    def both(params):
        def loss(params, config):
            hidden = lm_hidden(params, config, tokens, np.arange(8)[None].repeat(2, 0), segments, None)
            return jnp.sum(jnp.where(segments[..., None] > 0, hidden**3, 0)), hidden

        grad = jax.grad(loss, has_aux=True)
        return grad(params, CONFIG), grad(params, dataclasses.replace(CONFIG, attention="xla"))

    ours, theirs = both(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max()), ours, theirs)


@pytest.mark.parametrize("local_layers", [None, (True,)])
def test_a_window_counts_the_position_itself(local_layers):
    config = dataclasses.replace(CONFIG, window=3, local_layers=local_layers)
    params = jax.tree.map(lambda x: x * 3, init_lm(jax.random.key(0), config))
    tokens = np.arange(8)[None]
    hidden = jax.jit(lambda t: lm_hidden(params, config, t, np.arange(8)[None], np.ones((1, 8), int), None))
    changed = np.abs(hidden(tokens) - hidden(np.where(np.arange(8) == 2, 30, tokens)))[0].max(axis=1)
    np.testing.assert_array_equal(changed > 1e-3, [False, False, True, True, True, False, False, False])


def test_a_window_in_some_layers_equals_none_in_none_of_them():
    params = init_lm(jax.random.key(0), CONFIG)
    row = np.arange(8)[None], np.arange(8)[None], np.ones((1, 8), int), None
    off = dataclasses.replace(CONFIG, window=3, local_layers=(False,))
    np.testing.assert_array_equal(lm_hidden(params, off, *row), lm_hidden(params, CONFIG, *row))


def test_cudnn_is_refused_where_it_does_not_fit(qkv, mask_BLL):
    with pytest.raises(InputError, match='needs dtype "bfloat16" and a head width that 8 divides, got "float32" and 4'):
        dataclasses.replace(CONFIG, attention="cudnn")
    with pytest.raises(InputError, match="cannot cap scores"):
        dataclasses.replace(CONFIG, attention="xla", attention_softcap=5.0)
    if jax.default_backend() == "cpu":
        with pytest.raises(InputError, match="needs an NVIDIA GPU"):
            attend(*qkv, mask_BLL, implementation="cudnn", softcap=None)
