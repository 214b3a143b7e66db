"""The decoder itself: one Flax module whose options make it Llama, Mistral, Qwen, GPT-2 or Gemma.

Pre-norm residual layers, scanned over depth, with parameters named as in Hugging Face's Llama. What differs between
layers (windows, rotary bases) travels through the scan as flags. `causal_lm` and `decoding` are its public functions.
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdlm_jax.lm.attention import attend, attend_cached, attend_with_prefix
from bdlm_jax.lm.config import LMConfig
from bdlm_jax.lm.lora import LORA
from bdlm_jax.lm.rotary import rope_angles, rotate
from bdlm_jax.runtime.sharding import split_rows

_DROPOUT_LEVELS = 1 << 16  # dropout compares 16 random bits with a threshold: half the random words of a float
_UNROLLED_LAYERS = 12
_ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": nn.gelu, "gelu": partial(nn.gelu, approximate=False)}


class Decoder(nn.Module):
    """Reads tokens (..., L) and returns the states after the final norm, and the keys and values where kept."""

    config: LMConfig
    keep_kv: bool = False

    @nn.compact
    def __call__(
        self, tokens, positions, mask, id_rows_XM, *, dropout_key_B=None, prefix=None, prefix_mask=None, slot=None
    ):
        """Runs the layers.

        Args:
            tokens: (..., L).
            positions: (..., L).
            mask: a pair as `window_masks` makes it.
            id_rows_XM: rows of the id tokens, or None.
            dropout_key_B: one key a row, or None.
            prefix: (keys, values), each (depth, B, P, G, K), that stand before the tokens; with `slot`, the cache.
            prefix_mask: a pair as `window_masks` makes it, for the prefix.
            slot: where in the cache the one token of each row is written; None where there is no cache.

        Returns:
            (states (..., L, M), (keys, values) stacked over depth or None).
        """
        c = self.config
        embedding_VM = self.param("embedding", normal(0.02), (c.vocab_size, c.width))
        x = _embed(embedding_VM, id_rows_XM, tokens, c)
        if c.positions == "learned":
            table = self.param("position_embedding", normal(0.02), (c.max_positions, c.width))
            x = x + jnp.take(table, positions, axis=0, mode="clip").astype(c.dtype)
        if dropout_key_B is not None:
            x = _dropout(x, _fold_in(dropout_key_B, 0), c.dropout)
        x = split_rows(x)
        layers = nn.scan(
            _remat(c),
            variable_axes={"params": 0, LORA: 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.n_layers,
            # A short stack runs a tenth faster without a loop on CPU; a deep one would take long to compile. What is to
            # be computed again needs the loop: without it the compiler finds that it has it already.
            unroll=1 if c.remat or c.n_layers > _UNROLLED_LAYERS else c.n_layers,
        )(c, self.keep_kv, name="layers")
        scanned = (jnp.arange(c.n_layers), prefix, jnp.asarray(c.is_local) if _mixed(c) else None)
        x, kv = layers(x, scanned, _ropes(c, positions), mask, prefix_mask, slot, dropout_key_B)
        return _Norm(c, name="final_norm")(x), kv


def window_masks(config: LMConfig, mask, distance):
    """Makes the masks of the global and of the local layers.

    Args:
        config: the decoder's shape.
        mask: bool, True where a query may see a key.
        distance: function without arguments, (query position - key position) in the mask's shape.

    Returns:
        (mask, narrower mask, or None where no layer has a window).
    """
    return mask, None if config.window is None else mask & (distance() < config.window)


class _Norm(nn.Module):
    config: LMConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        initial = nn.initializers.zeros if c.norm_offset else nn.initializers.ones
        scale = self.param("scale", initial, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        if c.norm == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + c.norm_eps)
        wide = wide * (1.0 + scale if c.norm_offset else scale)
        if c.norm == "layer":
            wide = wide + self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return wide.astype(x.dtype)


class _Attention(nn.Module):
    config: LMConfig

    @nn.compact
    def __call__(self, x, rope, mask, prefix, prefix_mask, slot):
        c = self.config
        dense = partial(_dense, c, use_bias=c.attention_bias)
        groups = c.n_heads // c.n_kv_heads
        q = dense(c.n_heads * c.head_dim, name="q_proj")(x).reshape(*x.shape[:-1], c.n_heads, c.head_dim)
        k = dense(c.n_kv_heads * c.head_dim, name="k_proj")(x).reshape(*x.shape[:-1], c.n_kv_heads, c.head_dim)
        v = dense(c.n_kv_heads * c.head_dim, name="v_proj")(x).reshape(*x.shape[:-1], c.n_kv_heads, c.head_dim)
        if c.qk_norm:
            q, k = _Norm(c, name="q_norm")(q), _Norm(c, name="k_norm")(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        scale = (c.head_dim if c.query_scalar is None else c.query_scalar) ** -0.5
        q = q.reshape(*x.shape[:-1], c.n_kv_heads, groups, c.head_dim) * scale
        if prefix is None:
            out = attend(q, k, v, mask, implementation=c.attention, softcap=c.attention_softcap)
        elif slot is None:
            out = attend_with_prefix(q, k, v, mask, *prefix, prefix_mask, softcap=c.attention_softcap)
        else:
            k, v = (jax.lax.dynamic_update_slice_in_dim(old, new, slot, 1) for old, new in zip(prefix, (k, v)))
            out = attend_cached(q, k, v, prefix_mask, softcap=c.attention_softcap)
        out = out.reshape(*x.shape[:-1], c.n_heads * c.head_dim).astype(x.dtype)
        return _dense(c, c.width, name="o_proj", residual=True, use_bias=c.output_bias)(out), (k, v)


class _MLP(nn.Module):
    config: LMConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        dense = partial(_dense, c, use_bias=c.mlp_bias)
        active = _ACTIVATIONS[c.activation]
        if c.gated:
            gate, up = dense(c.mlp_width, name="gate_proj")(x), dense(c.mlp_width, name="up_proj")(x)
            inner = active(gate) * up
        else:
            inner = active(dense(c.mlp_width, name="up_proj")(x))
        return dense(c.width, name="down_proj", residual=True)(inner)


class _Layer(nn.Module):
    config: LMConfig
    keep_kv: bool = False

    @nn.compact
    def __call__(self, x, scanned, ropes, masks, prefix_masks, slot, dropout_key_B):
        c = self.config
        depth, prefix, is_local = scanned
        rope, mask, prefix_mask = (_choose(c, is_local, pair) for pair in (ropes, masks, prefix_masks))
        keys = (None, None)
        if dropout_key_B is not None:
            layer_key_B = _fold_in(dropout_key_B, depth + 1)
            keys = _fold_in(layer_key_B, 0), _fold_in(layer_key_B, 1)
        normed = _Norm(c, name="input_layernorm")(x)
        out, kv = _Attention(c, name="self_attn")(normed, rope, mask, prefix, prefix_mask, slot)
        if c.post_norms:
            out = _Norm(c, name="post_attention_layernorm")(out)
        x = x + _dropout(out, keys[0], c.dropout)
        before_mlp = "pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"
        out = _MLP(c, name="mlp")(_Norm(c, name=before_mlp)(x))
        if c.post_norms:
            out = _Norm(c, name="post_feedforward_layernorm")(out)
        x = split_rows(x + _dropout(out, keys[1], c.dropout))
        return x, kv if self.keep_kv else None


def _remat(config):
    if not config.remat:
        return _Layer
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else None
    return nn.remat(_Layer, prevent_cse=False, policy=policy)


def _mixed(config):
    return len(set(config.is_local)) == 2


def _choose(config, is_local, pair):
    """The (global, local) pair's part for this layer; a part that is None is the same as the other."""
    if pair is None:
        return None
    general, local = pair
    if local is None:
        return general
    if is_local is None:  # all layers are alike
        return local if config.is_local[0] else general
    return jax.tree.map(lambda g, l: jnp.where(is_local, l, g), general, local)  # noqa: E741


def _ropes(config, positions):
    if config.positions == "learned":
        return None
    general = rope_angles(positions, width=config.head_dim, theta=config.rope_theta, scaling=config.rope_scaling)
    if config.local_rope_theta is None:
        return general, None
    return general, rope_angles(positions, width=config.head_dim, theta=config.local_rope_theta, scaling=None)


def _embed(embedding_VM, id_rows_XM, tokens, config):
    # An index out of range reads zeros and drops its gradient: clipping would pile all of the other table's on one row.
    n_text = embedding_VM.shape[0]
    text = jnp.take(embedding_VM, tokens, axis=0, mode="fill", fill_value=0)
    if config.scale_embedding:
        text = text.astype(config.dtype) * jnp.asarray(math.sqrt(config.width), config.dtype)
    if id_rows_XM is None:
        return text.astype(config.dtype)
    row = jnp.where(tokens >= n_text, tokens - n_text, id_rows_XM.shape[0])
    return (text + jnp.take(id_rows_XM, row, axis=0, mode="fill", fill_value=0).astype(text.dtype)).astype(config.dtype)


def _fold_in(key_B, number):
    return jax.vmap(jax.random.fold_in, (0, None))(key_B, number)


def _dropout(x, key_B, rate):
    if key_B is None or not rate:
        return x
    kept_levels = round((1 - rate) * _DROPOUT_LEVELS)
    length, width = x.shape[1:]
    words = jax.vmap(lambda key: jax.random.bits(key, (length, -(-width // 2)), jnp.uint32))(key_B)
    levels = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*x.shape[:2], -1)[..., :width]
    return jnp.where(levels < kept_levels, x * (_DROPOUT_LEVELS / kept_levels), 0).astype(x.dtype)


def normal(std: float):
    """Initialiser of embeddings."""
    return nn.initializers.normal(std)


class _Dense(nn.Dense):
    """x·W, and beside it (x·A)·B where the kernel has adapters: no merged copy, and no gradient as large as W."""

    @nn.compact
    def __call__(self, x):
        # As one matrix: the gradient of a product with two leading axes is copied, transposed, first (a fifth on CPU).
        rows = x.reshape(-1, x.shape[-1])
        out = super().__call__(rows)
        if self.has_variable(LORA, "kernel"):
            adapters = self.get_variable(LORA, "kernel")
            a, b = (adapters[name].astype(out.dtype) for name in "ab")
            out = out + (rows.astype(out.dtype) @ a) @ b
        return out.reshape(*x.shape[:-1], -1)


def _dense(config, features, *, name, residual=False, use_bias=False):
    # Residual branches start small, so that the stream's variance does not grow with depth (GPT-2's rule).
    scale = 1 / (2 * config.n_layers) if residual else 1.0
    init = nn.initializers.variance_scaling(scale, "fan_in", "normal")
    return _Dense(features, use_bias=use_bias, dtype=config.dtype, kernel_init=init, name=name)
