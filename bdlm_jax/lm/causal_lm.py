"""A Llama-shaped causal decoder in Flax linen, used as pure functions on a parameter tree.

RMSNorm, rotary positions, grouped-query attention and SwiGLU (Touvron et al., arXiv 2302.13971; names as in Hugging
Face's Llama). The rows of <uid> and <iid> are no parameter of this module: they are an argument, so that the shared
table stays one leaf.
"""

import dataclasses
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from bdlm_jax.types import Array, InputError, Params

_MASKED = -1e30  # finite: a row of padding must not become NaN
_DROPOUT_LEVELS = 1 << 16  # dropout compares 16 random bits with a threshold: half the random words of a float
_UNROLLED_LAYERS = 4


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """Shape and numerics of a decoder: hashable, so that it can be a static argument of a jitted function.

    Args:
        vocab_size: V, rows of the text embedding (`Vocabulary.n_text`).
        width: M, width of the residual stream.
        n_layers: number of decoder layers.
        n_heads: H, query heads.
        n_kv_heads: key and value heads; divides `n_heads`.
        mlp_width: inner width of SwiGLU.
        head_width: K, width of one head; None is `width // n_heads`.
        rope_theta: base of the rotary frequencies.
        rope_scaling: None, or Llama 3's ("llama3", factor, low_freq_factor, high_freq_factor, original_max_position).
        norm_eps: epsilon of RMSNorm.
        attention_bias: biases on the query, key and value projections (Qwen 2).
        tie_embeddings: the output head is the text embedding.
        dtype: compute dtype, "float32" or "bfloat16"; parameters are float32 in both cases.
        remat: recompute each layer in the backward pass.
        dropout: rate on the embedding and on both residual branches.

    Raises:
        InputError: if the sizes do not fit together.
    """

    vocab_size: int
    width: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlp_width: int
    head_width: int | None = None
    rope_theta: float = 1e4
    rope_scaling: tuple | None = None
    norm_eps: float = 1e-5
    attention_bias: bool = False
    tie_embeddings: bool = True
    dtype: str = "float32"
    remat: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        if min(self.vocab_size, self.width, self.n_layers, self.n_heads, self.n_kv_heads, self.mlp_width) < 1:
            raise InputError(f"every size of the language model must be at least 1, got {self}.")
        if self.head_width is None and self.width % self.n_heads:
            raise InputError(
                f"width {self.width} is no multiple of n_heads {self.n_heads}: change one, or set head_width."
            )
        if self.n_heads % self.n_kv_heads:
            raise InputError(
                f"n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}: change one of them."
            )
        if self.head_dim % 2:
            raise InputError(f"the head width {self.head_dim} is odd, rotary positions need it even: change n_heads.")
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f'dtype is "{self.dtype}", write "float32" or "bfloat16".')
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}, it must be at least 0 and below 1.")
        if self.rope_scaling is not None and (len(self.rope_scaling) != 5 or self.rope_scaling[0] != "llama3"):
            raise InputError(
                f'rope_scaling {self.rope_scaling} is not known: only None and ("llama3", four numbers) are.'
            )

    @property
    def head_dim(self) -> int:
        """K, the width of one attention head."""
        return self.width // self.n_heads if self.head_width is None else self.head_width


def init_lm(key: Array, config: LMConfig) -> Params:
    """Draws the parameters of a decoder.

    Args:
        key: a JAX key.
        config: the decoder's shape.

    Returns:
        {"embedding": (V, M), "final_norm": {"scale": (M,)}, "layers": {...}} and, untied, "head": (V, M). Layers are
        stacked over depth: layers/input_layernorm/scale, layers/self_attn/{q,k,v,o}_proj/kernel (depth, in, out)
        [and bias], layers/post_attention_layernorm/scale, layers/mlp/{gate,up,down}_proj/kernel. All float32.
    """
    tokens_BL = jnp.zeros((1, 1), jnp.int32)
    mask_BLL = jnp.ones((1, 1, 1), bool)
    params = jax.jit(partial(_Decoder(config).init, id_rows_XM=None))(key, tokens_BL, tokens_BL, mask_BLL)["params"]
    if not config.tie_embeddings:
        params = dict(params, head=_normal(0.02)(jax.random.fold_in(key, 1), (config.vocab_size, config.width)))
    return params


def lm_hidden(
    params: Params,
    config: LMConfig,
    tokens_BL: Array,
    positions_BL: Array,
    segments_BL: Array,
    id_rows_XM: Array | None,
    *,
    dropout_key_B: Array | None = None,
) -> Array:
    """Runs the decoder and returns its last-layer states.

    Token t < V reads the text embedding, token V + x reads `id_rows_XM[x]`. A position attends to itself and to what
    stands before it in its own segment; segment 0 is padding and reaches no other segment.

    Args:
        params: the tree of `init_lm`.
        config: the decoder's shape.
        tokens_BL: (B, L) integer tokens.
        positions_BL: (B, L) rotary positions, restarting in each segment.
        segments_BL: (B, L) segment numbers; 0 is padding.
        id_rows_XM: (X, M) rows of the id tokens (users, then items, each up to capacity), or None for text only.
        dropout_key_B: (B,) typed keys, one for each row, so that no number depends on how a batch is split over
            devices; None turns dropout off.

    Returns:
        (B, L, M) states in the compute dtype, after the final norm.
    """
    causal_LL = jnp.tril(jnp.ones((tokens_BL.shape[1],) * 2, bool))
    mask_BLL = causal_LL & (segments_BL[:, :, None] == segments_BL[:, None, :])
    hidden_BLM, _ = _Decoder(config).apply(
        {"params": params}, tokens_BL, positions_BL, mask_BLL, id_rows_XM, dropout_key_B=dropout_key_B
    )
    return hidden_BLM


def text_logits(params: Params, config: LMConfig, hidden: Array) -> Array:
    """Scores every text token from states.

    Args:
        params: the tree of `init_lm`.
        config: the decoder's shape.
        hidden: (..., M) states after the final norm.

    Returns:
        (..., V) float32 logits; the tied head is the text embedding itself.
    """
    table_VM = params["embedding"] if config.tie_embeddings else params["head"]
    dtype = jnp.dtype(config.dtype)
    return jnp.einsum("...m,vm->...v", hidden.astype(dtype), table_VM.astype(dtype), preferred_element_type=jnp.float32)


def continuation_log_likelihood(
    params: Params,
    config: LMConfig,
    prefix_BP: Array,
    prefix_mask_BP: Array,
    continuation_BCT: Array,
    continuation_mask_BCT: Array,
    *,
    id_rows_XM: Array | None = None,
) -> Array:
    """Scores C continuations of each prefix by sum_t log p(token t | prefix, tokens before t).

    The prefix runs once; its keys and values are shared by its C continuations without a copy.

    Args:
        params: the tree of `init_lm`.
        config: the decoder's shape.
        prefix_BP: (B, P) tokens, padded on either side; every prefix has at least one token.
        prefix_mask_BP: (B, P) bool, True at tokens.
        continuation_BCT: (B, C, T) text tokens (t < V), padded on the right.
        continuation_mask_BCT: (B, C, T) bool, True at tokens.
        id_rows_XM: (X, M) rows of the id tokens, where a prefix holds some.

    Returns:
        (B, C) float32 log-likelihoods; 0 for an empty continuation.
    """
    prefix_mask_BP, continuation_mask_BCT = prefix_mask_BP.astype(bool), continuation_mask_BCT.astype(bool)
    n_prefix_B = prefix_mask_BP.sum(axis=1)
    position_BP = jnp.maximum(jnp.cumsum(prefix_mask_BP, axis=1) - 1, 0)
    n_tokens = prefix_BP.shape[1]
    mask_BPP = jnp.tril(jnp.ones((n_tokens, n_tokens), bool)) & prefix_mask_BP[:, None, :]
    variables = {"params": params}
    prefix_BPM, kv = _Decoder(config, keep_kv=True).apply(variables, prefix_BP, position_BP, mask_BPP, id_rows_XM)

    length = continuation_BCT.shape[2]
    position_BCT = jnp.broadcast_to(n_prefix_B[:, None, None] + jnp.arange(length), continuation_BCT.shape)
    mask_BCTT = jnp.tril(jnp.ones((length, length), bool)) & continuation_mask_BCT[:, :, None, :]
    hidden_BCTM, _ = _Decoder(config).apply(
        variables, continuation_BCT, position_BCT, mask_BCTT, id_rows_XM, prefix=kv, prefix_mask_BP=prefix_mask_BP
    )
    last_B = n_tokens - 1 - jnp.argmax(prefix_mask_BP[:, ::-1], axis=1)
    start_BM = jnp.take_along_axis(prefix_BPM, last_B[:, None, None], axis=1)[:, 0]

    def score_row(row):  # one row at a time: the (C, T, V) logits are the largest array of all
        start_M, hidden_CTM, target_CT, mask_CT = row
        first_C1M = jnp.broadcast_to(start_M, (hidden_CTM.shape[0], 1, start_M.shape[0]))
        logits_CTV = text_logits(params, config, jnp.concatenate([first_C1M, hidden_CTM[:, :-1]], axis=1))
        nll_CT = optax.softmax_cross_entropy_with_integer_labels(logits_CTV, target_CT)
        return -jnp.where(mask_CT, nll_CT, 0).sum(axis=1)

    return jax.lax.map(score_row, (start_BM, hidden_BCTM, continuation_BCT, continuation_mask_BCT))


def gather_positions(hidden_BLM: Array, index_BT: Array) -> Array:
    """Takes the states at some positions of each row.

    Args:
        hidden_BLM: (B, L, M) states.
        index_BT: (B, T) positions in 0…L-1.

    Returns:
        (B, T, M) states.
    """
    return jnp.take_along_axis(hidden_BLM, index_BT[:, :, None], axis=1)


class _RMSNorm(nn.Module):
    config: LMConfig

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.config.norm_eps)
        return (wide * scale).astype(x.dtype)


class _Attention(nn.Module):
    config: LMConfig

    @nn.compact
    def __call__(self, x, rope, mask, prefix, prefix_mask):
        c = self.config
        dense = partial(_dense, c, use_bias=c.attention_bias)
        groups = c.n_heads // c.n_kv_heads
        q = dense(c.n_heads * c.head_dim, name="q_proj")(x).reshape(*x.shape[:-1], c.n_heads, c.head_dim)
        k = dense(c.n_kv_heads * c.head_dim, name="k_proj")(x).reshape(*x.shape[:-1], c.n_kv_heads, c.head_dim)
        v = dense(c.n_kv_heads * c.head_dim, name="v_proj")(x).reshape(*x.shape[:-1], c.n_kv_heads, c.head_dim)
        q, k = _rotate(q, rope), _rotate(k, rope)
        q = q.reshape(*x.shape[:-1], c.n_kv_heads, groups, c.head_dim) * (c.head_dim**-0.5)
        out = _attend(q, k, v, mask) if prefix is None else _attend_with_prefix(q, k, v, mask, *prefix, prefix_mask)
        out = out.reshape(*x.shape[:-1], c.n_heads * c.head_dim).astype(x.dtype)
        return _dense(c, c.width, name="o_proj", residual=True)(out), (k, v)


class _MLP(nn.Module):
    config: LMConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        gate, up = _dense(c, c.mlp_width, name="gate_proj")(x), _dense(c, c.mlp_width, name="up_proj")(x)
        return _dense(c, c.width, name="down_proj", residual=True)(nn.silu(gate) * up)


class _Layer(nn.Module):
    config: LMConfig
    keep_kv: bool = False

    @nn.compact
    def __call__(self, x, scanned, rope, mask, prefix_mask, dropout_key_B):
        c = self.config
        depth, prefix = scanned
        keys = (None, None)
        if dropout_key_B is not None:
            layer_key_B = _fold_in(dropout_key_B, depth + 1)
            keys = _fold_in(layer_key_B, 0), _fold_in(layer_key_B, 1)
        normed = _RMSNorm(c, name="input_layernorm")(x)
        out, kv = _Attention(c, name="self_attn")(normed, rope, mask, prefix, prefix_mask)
        x = x + _dropout(out, keys[0], c.dropout)
        out = _MLP(c, name="mlp")(_RMSNorm(c, name="post_attention_layernorm")(x))
        x = x + _dropout(out, keys[1], c.dropout)
        return x, kv if self.keep_kv else None


class _Decoder(nn.Module):
    config: LMConfig
    keep_kv: bool = False

    @nn.compact
    def __call__(self, tokens, positions, mask, id_rows_XM, *, dropout_key_B=None, prefix=None, prefix_mask_BP=None):
        c = self.config
        embedding_VM = self.param("embedding", _normal(0.02), (c.vocab_size, c.width))
        x = _embed(embedding_VM, id_rows_XM, tokens).astype(c.dtype)
        if dropout_key_B is not None:
            x = _dropout(x, _fold_in(dropout_key_B, 0), c.dropout)
        layers = nn.scan(
            nn.remat(_Layer, prevent_cse=False) if c.remat else _Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.n_layers,
            # A short stack runs a fifth faster without a loop on CPU; a deep one would take long to compile.
            unroll=c.n_layers if c.n_layers <= _UNROLLED_LAYERS else 1,
        )(c, self.keep_kv, name="layers")
        x, kv = layers(x, (jnp.arange(c.n_layers), prefix), _rope(c, positions), mask, prefix_mask_BP, dropout_key_B)
        return _RMSNorm(c, name="final_norm")(x), kv


def _embed(embedding_VM, id_rows_XM, tokens):
    # An index out of range reads zeros and drops its gradient: clipping would pile all of the other table's on one row.
    n_text = embedding_VM.shape[0]
    text = jnp.take(embedding_VM, tokens, axis=0, mode="fill", fill_value=0)
    if id_rows_XM is None:
        return text
    row = jnp.where(tokens >= n_text, tokens - n_text, id_rows_XM.shape[0])
    return text + jnp.take(id_rows_XM, row, axis=0, mode="fill", fill_value=0).astype(text.dtype)


def _attend(q, k, v, mask):
    """softmax(q k) v for scaled q (B, L, G, R, K), R query heads on each of G key heads, and mask (B, L, L)."""
    # One matrix product for each key head, and the division after it: on CPU 10 % of a step less than the einsum on q's
    # own axes or jax.nn.dot_product_attention.
    b, length, g, r, width = q.shape
    q = q.transpose(0, 2, 3, 1, 4).reshape(b * g, r * length, width)
    k, v = (x.transpose(0, 2, 1, 3).reshape(b * g, length, width) for x in (k, v))
    scores = jnp.einsum("btk,bsk->bts", q, k, preferred_element_type=jnp.float32).reshape(b, g * r, length, length)
    scores = scores + jnp.where(mask, 0.0, _MASKED)[:, None]
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1).reshape(b * g, r * length, 1)
    weights = weights.astype(v.dtype).reshape(b * g, r * length, length)
    out = jnp.einsum("bts,bsk->btk", weights, v, preferred_element_type=jnp.float32) / total
    return out.reshape(b, g, r, length, width).transpose(0, 3, 1, 2, 4)


def _attend_with_prefix(q, k, v, mask, prefix_k, prefix_v, prefix_mask_BP):
    """As `_attend` for q (B, C, T, G, R, K); before its own keys, each continuation sees its prefix's (B, P, G, K)."""
    before = jnp.einsum("bctgrk,bpgk->bcgrtp", q, prefix_k, preferred_element_type=jnp.float32)
    before = jnp.where(prefix_mask_BP[:, None, None, None, None, :], before, _MASKED)
    own = jnp.einsum("bctgrk,bcsgk->bcgrts", q, k, preferred_element_type=jnp.float32)
    own = jnp.where(mask[:, :, None, None], own, _MASKED)
    weights = jax.nn.softmax(jnp.concatenate([before, own], axis=-1), axis=-1).astype(v.dtype)
    weights_before, weights_own = jnp.split(weights, [prefix_k.shape[1]], axis=-1)
    return jnp.einsum("bcgrtp,bpgk->bctgrk", weights_before, prefix_v) + jnp.einsum(
        "bcgrts,bcsgk->bctgrk", weights_own, v
    )


def _rope(config, positions):
    """(cos, sin) of the rotary angles, each (..., L, 1, K/2) float32 (Su et al., arXiv 2104.09864)."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_scaling is not None:
        _, factor, low, high, original = config.rope_scaling
        turns = original * frequency / (2 * math.pi)
        smooth = jnp.clip((turns - low) / (high - low), 0, 1)
        frequency = (1 - smooth) * frequency / factor + smooth * frequency
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def _rotate(x, rope):
    cos, sin = rope
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


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


def _normal(std):
    return nn.initializers.normal(std)


def _dense(config, features, *, name, residual=False, use_bias=False):
    # Residual branches start small, so that the stream's variance does not grow with depth (GPT-2's rule).
    scale = 1 / (2 * config.n_layers) if residual else 1.0
    init = nn.initializers.variance_scaling(scale, "fan_in", "normal")
    return nn.Dense(features, use_bias=use_bias, dtype=config.dtype, kernel_init=init, name=name)
