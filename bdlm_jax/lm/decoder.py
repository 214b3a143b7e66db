"""The decoder itself: one Flax module whose options make it Llama, Mistral, Qwen, GPT-2 or Gemma.

Pre-norm residual layers, scanned over depth, with parameters named as in Hugging Face's Llama. What differs between
layers (windows, rotary bases) travels through the scan as flags. `causal_lm` and `generate` are its public functions.
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bdlm_jax.lm.attention import attend, attend_block, attend_with_prefix, rope_angles, rotate
from bdlm_jax.lm.config import LMConfig
from bdlm_jax.lm.lora import LORA
from bdlm_jax.runtime.sharding import split_rows
from bdlm_jax.types import Array

EMBEDDING_INIT = nn.initializers.normal(0.02)
_DROPOUT_LEVELS = 1 << 16  # dropout compares 16 random bits with a threshold: half the random words of a float
_UNROLLED_LAYERS = 12
_PRODUCT = "product"  # the name of what `lm.remat_keeps=dots` keeps
_ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": nn.gelu, "gelu": partial(nn.gelu, approximate=False)}
Masks = tuple[Array | None, Array | None]  # of the global layers, and of the local ones where these differ


class Decoder(nn.Module):
    """Reads tokens (..., L) and returns the states after the final norm, and the keys and values where kept."""

    config: LMConfig
    keep_kv: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        positions: Array,
        masks: Masks,
        id_rows_XM: Array | None,
        *,
        dropout_key_B: Array | None = None,
        prefix: tuple[Array, Array] | None = None,
        prefix_masks: Masks = (None, None),
        slot: Array | None = None,
    ) -> tuple[Array, tuple[Array, Array] | None]:
        """Runs the layers.

        Args:
            tokens: (..., L).
            positions: (..., L).
            masks: of `window_masks`.
            id_rows_XM: rows of the id tokens.
            dropout_key_B: one key a row; None turns dropout off.
            prefix: (keys, values), each (depth, B, P, G, K), that stand before the tokens; with `slot`, the cache.
            prefix_masks: of `window_masks`, for the prefix.
            slot: where in the cache the one token of each row is written; None where there is no cache.

        Returns:
            (states (..., L, M), (keys, values) stacked over depth or None).
        """
        c = self.config
        embedding_VM = self.param("embedding", EMBEDDING_INIT, (c.vocab_size, c.width))
        x = _embed(embedding_VM, id_rows_XM, tokens, c)
        if c.positions == "learned":
            table = self.param("position_embedding", EMBEDDING_INIT, (c.max_positions, c.width))
            x = x + jnp.take(table, positions, axis=0, mode="clip").astype(c.dtype)
        x = _dropout(x, dropout_key_B, c.dropout, 0)
        layers = nn.scan(
            _remat(c),
            variable_axes={"params": 0, LORA: 0},
            split_rngs={"params": True},
            in_axes=(0, *[nn.broadcast] * 5),
            length=c.n_layers,
            # A short stack runs a tenth faster without a loop on CPU; a deep one would take long to compile. What is to
            # be computed again needs the loop: without it the compiler finds that it has it already.
            unroll=1 if c.remat or c.n_layers > _UNROLLED_LAYERS else c.n_layers,
        )(c, self.keep_kv, name="layers")
        is_local = jnp.asarray(c.is_local) if len(set(c.is_local)) == 2 else None
        scanned = (jnp.arange(c.n_layers), is_local, prefix)
        x, kv = layers(split_rows(x), scanned, _ropes(c, positions), masks, prefix_masks, slot, dropout_key_B)
        return _Norm(c, name="final_norm")(x), kv


def window_masks(config: LMConfig, mask: Array, query_position: Array, key_position: Array) -> Masks:
    """Narrows a mask (..., queries, keys) for the layers with a window, by positions (..., queries) and (..., keys)."""
    if config.window is None:
        return mask, None
    return mask, mask & (query_position[..., :, None] - key_position[..., None, :] < config.window)


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
        c, rows = self.config, _rows(x)

        def heads(n, name):
            projected = _dense(c, n * c.head_dim, name=name, use_bias=c.attention_bias)(rows)
            return projected.reshape(*x.shape[:-1], n, c.head_dim)

        q, k, v = heads(c.n_heads, "q_proj"), heads(c.n_kv_heads, "k_proj"), heads(c.n_kv_heads, "v_proj")
        if c.qk_norm:
            q, k = _Norm(c, name="q_norm")(q), _Norm(c, name="k_norm")(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        scale = (c.head_dim if c.query_scalar is None else c.query_scalar) ** -0.5
        q = q.reshape(*x.shape[:-1], c.n_kv_heads, c.n_heads // c.n_kv_heads, c.head_dim) * scale
        if prefix is None:
            out = attend(q, k, v, mask, implementation=c.attention, softcap=c.attention_softcap)
        elif slot is None:
            out = attend_with_prefix(q, k, v, mask, prefix, prefix_mask, softcap=c.attention_softcap)
        else:
            k, v = (jax.lax.dynamic_update_slice_in_dim(old, new, slot, 1) for old, new in zip(prefix, (k, v)))
            out = attend_block(q, k, v, prefix_mask, c.attention_softcap)
        out = out.reshape(*x.shape[:-1], c.n_heads * c.head_dim).astype(x.dtype)
        return _dense(c, c.width, name="o_proj", residual=True, use_bias=c.output_bias)(out), (k, v)


class _MLP(nn.Module):
    config: LMConfig

    @nn.compact
    def __call__(self, x):
        c, rows = self.config, _rows(x)
        dense = partial(_dense, c, use_bias=c.mlp_bias)
        inner = _ACTIVATIONS[c.activation](dense(c.mlp_width, name="gate_proj" if c.gated else "up_proj")(rows))
        if c.gated:
            inner = inner * dense(c.mlp_width, name="up_proj")(rows)
        return dense(c.width, name="down_proj", residual=True)(inner).reshape(x.shape)


class _Layer(nn.Module):
    config: LMConfig
    keep_kv: bool = False

    @nn.compact
    def __call__(self, x, scanned, ropes, masks, prefix_masks, slot, dropout_key_B):
        c = self.config
        depth, is_local, prefix = scanned
        rope, mask, prefix_mask = (_choose(c, is_local, *pair) for pair in (ropes, masks, prefix_masks))
        normed = _Norm(c, name="input_layernorm")(x)
        out, kv = _Attention(c, name="self_attn")(normed, rope, mask, prefix, prefix_mask, slot)
        if c.post_norms:
            out = _Norm(c, name="post_attention_layernorm")(out)
        x = x + _dropout(out, dropout_key_B, c.dropout, depth + 1, 0)
        before_mlp = "pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"
        out = _MLP(c, name="mlp")(_Norm(c, name=before_mlp)(x))
        if c.post_norms:
            out = _Norm(c, name="post_feedforward_layernorm")(out)
        x = split_rows(x + _dropout(out, dropout_key_B, c.dropout, depth + 1, 1))
        return x, kv if self.keep_kv else None


def _remat(config):
    if not config.remat:
        return _Layer
    return nn.remat(_Layer, prevent_cse=False, policy=_keep_products if config.remat == "dots" else None)


def _keep_products(primitive, *avals, **params):
    """Keeps products with weights, and what cuDNN's attention returns, which costs as much and is as small."""
    return params.get("name") == _PRODUCT or primitive.name.startswith("dot_product_attention_fwd")


def _choose(config, is_local, general, local):
    """What this layer reads of the two; a local part of None is the same as the general one."""
    if local is None:
        return general
    if is_local is None:  # all layers are alike
        return local if config.is_local[0] else general
    return jax.tree.map(partial(jnp.where, is_local), local, general)


def _ropes(config, positions):
    if config.positions == "learned":
        return None, None
    angles = partial(rope_angles, positions, width=config.head_dim)
    local = None if config.local_rope_theta is None else angles(theta=config.local_rope_theta, scaling=None)
    return angles(theta=config.rope_theta, scaling=config.rope_scaling), local


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


def _dropout(x, key_B, rate, *place):
    if key_B is None or not rate:
        return x
    for number in place:
        key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, number)
    kept_levels = round((1 - rate) * _DROPOUT_LEVELS)
    length, width = x.shape[1:]
    words = jax.vmap(partial(jax.random.bits, shape=(length, -(-width // 2)), dtype=jnp.uint32))(key_B)
    levels = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*x.shape[:2], -1)[..., :width]
    return jnp.where(levels < kept_levels, x * (_DROPOUT_LEVELS / kept_levels), 0).astype(x.dtype)


def _rows(x):
    """As one matrix, made once: what several products read is then kept once for the backward pass."""
    return x.reshape(-1, x.shape[-1])


class _Dense(nn.Dense):
    """x·W, and beside it (x·A)·B where the kernel has adapters: no merged copy, and no gradient as large as W."""

    @nn.compact
    def __call__(self, x):
        # As one matrix: the gradient of a product with two leading axes is copied, transposed, first (a fifth on CPU).
        rows = _rows(x)
        out = super().__call__(rows)
        if self.has_variable(LORA, "kernel"):
            adapters = self.get_variable(LORA, "kernel")
            a, b = (adapters[name].astype(out.dtype) for name in "ab")
            out = out + (rows.astype(out.dtype) @ a) @ b
        out = checkpoint_name(out, _PRODUCT)  # with its adapters': kept apart, the two would be twice as much
        return out.reshape(*x.shape[:-1], -1)


def _dense(config, features, *, name, residual=False, use_bias=False):
    # Residual branches start small, so that the stream's variance does not grow with depth (GPT-2's rule).
    scale = 1 / (2 * config.n_layers) if residual else 1.0
    init = nn.initializers.variance_scaling(scale, "fan_in", "normal")
    return _Dense(features, use_bias=use_bias, dtype=config.dtype, kernel_init=init, name=name)
