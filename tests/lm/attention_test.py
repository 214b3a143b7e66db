import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdlm_jax.lm import attention
from bdlm_jax.lm.attention import attend, attend_block, attend_with_prefix
from bdlm_jax.lm.causal_lm import LMConfig, init_lm, lm_hidden
from bdlm_jax.types import InputError

B, L, G, R, K = 2, 5, 2, 3, 4
CONFIG = LMConfig(vocab_size=40, width=24, n_layers=1, n_heads=6, n_kv_heads=2, mlp_width=32)
SEGMENTS = np.array([[0, 0, 1, 1, 1], [1, 1, 2, 2, 0]])
MASK_BLL = np.tril(np.ones((L, L), bool)) & (SEGMENTS[:, :, None] == SEGMENTS[:, None, :])


SHAPES = (B, L, G, R, K), (B, L, G, K), (B, L, G, K)
QKV = [2 * jax.random.normal(key, shape) for key, shape in zip(jax.random.split(jax.random.key(0), 3), SHAPES)]


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
def test_attention_equals_a_loop_over_queries(implementation, softcap):
    out = attend(*QKV, MASK_BLL, implementation=implementation, softcap=softcap)
    np.testing.assert_allclose(out, dense(*QKV, MASK_BLL, softcap), atol=1e-5)


@pytest.mark.parametrize(("block", "blocks"), [(2, 9), (1, 2), (4, 1)])
def test_blocks_of_queries_are_the_same_attention(monkeypatch, block, blocks):
    monkeypatch.setattr(attention, "_BLOCK", block)
    monkeypatch.setattr(attention, "_BLOCKS", blocks)

    @jax.jit
    def gradients(*qkv):
        def total(*qkv, implementation):
            out = attend(*qkv, MASK_BLL, implementation=implementation, softcap=None)
            return jnp.sum(out**2), out

        grad = jax.grad(total, argnums=(0, 1, 2), has_aux=True)
        return grad(*qkv, implementation="einsum"), grad(*qkv, implementation="xla")[0]

    (ours, out), whole = gradients(*QKV)
    np.testing.assert_allclose(out, dense(*QKV, MASK_BLL), atol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), ours, whole)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_prefix_and_a_cache_are_the_same_attention(softcap):
    q, k, v = QKV
    seen = np.array([[True] * 3, [False, True, True]])  # the second prefix is padded
    causal = np.tril(np.ones((L, L), bool))[None].repeat(B, 0)
    causal[:, 3:, :3] &= seen[:, None]
    whole = dense(q, k, v, causal, softcap)
    own = np.broadcast_to(np.tril(np.ones((2, 2), bool)), (B, 1, 2, 2))
    later, prefix = (x[:, None, 3:] for x in QKV), (k[:, :3], v[:, :3])
    parts = attend_with_prefix(*later, own, prefix, seen[:, None, None], softcap=softcap)
    np.testing.assert_allclose(parts[:, 0], whole[:, 3:], atol=1e-5)
    last = attend_block(q[:, 4:], k, v, causal[:, 4:], softcap)
    np.testing.assert_allclose(last, whole[:, 4:], atol=1e-5)


def test_a_window_counts_the_position_itself_and_holds_in_local_layers_alone():
    params = jax.tree.map(lambda x: x * 2, init_lm(jax.random.key(0), CONFIG))
    hidden_of, row = jax.jit(lm_hidden, static_argnums=1), (np.arange(8)[None], np.ones((1, 8), int), None)
    tokens = np.arange(8)[None], np.where(np.arange(8) == 2, 30, np.arange(8))[None]
    for local_layers in (None, (True,)):
        config = dataclasses.replace(CONFIG, window=3, local_layers=local_layers)
        before, after = (hidden_of(params, config, t, *row)[0] for t in tokens)
        changed = np.abs(before - after).max(axis=1) > 1e-3
        np.testing.assert_array_equal(changed, [False, False, True, True, True, False, False, False])
    none = dataclasses.replace(CONFIG, window=3, local_layers=(False,))
    np.testing.assert_array_equal(*(hidden_of(params, config, tokens[0], *row) for config in (none, CONFIG)))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="cuDNN is there")
def test_cudnn_is_refused_without_its_device():
    with pytest.raises(InputError, match="needs an NVIDIA GPU, and JAX runs on"):
        attend(*QKV, MASK_BLL, implementation="cudnn", softcap=None)
