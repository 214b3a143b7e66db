"""A causal decoder used as pure functions on a parameter tree.

`LMConfig` says which decoder (`lm_config`), `decoder` is its Flax module. The rows of <uid> and <iid> are no parameter
of it: they are an argument, so that the shared table stays one leaf.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import optax

from bdlm_jax.lm import lora
from bdlm_jax.lm.config import LMConfig
from bdlm_jax.lm.decoder import Decoder, normal, window_masks
from bdlm_jax.types import Array, InputError, Params

__all__ = [
    "LMConfig", "continuation_log_likelihood", "gather_positions", "init_lm", "lm_hidden", "text_logits",
]  # fmt: skip


def init_lm(key: Array, config: LMConfig) -> Params:
    """Draws the parameters of a decoder.

    Args:
        key: a JAX key.
        config: the decoder's shape.

    Returns:
        {"embedding": (V, M), "final_norm": {"scale": (M,)}, "layers": {...}} and, untied, "head": (V, M). Layers are
        stacked over depth: layers/input_layernorm/scale, layers/self_attn/{q,k,v,o}_proj/kernel (depth, in, out)
        [and bias], layers/post_attention_layernorm/scale, layers/mlp/{gate,up,down}_proj/kernel. All float32. Options
        add position_embedding (positions, M), layers/self_attn/{q,k}_norm/scale,
        layers/{pre,post}_feedforward_layernorm/scale, and a bias beside LayerNorm's scale.
    """
    tokens_BL = jnp.zeros((1, 1), jnp.int32)
    mask_BLL = jnp.ones((1, 1, 1), bool)
    # Shapes do not depend on how attention is computed, and cuDNN would need its device.
    module = Decoder(dataclasses.replace(config, attention="einsum"))
    masks = window_masks(config, mask_BLL, lambda: tokens_BL[:, None])
    params = jax.jit(partial(module.init, id_rows_XM=None))(key, tokens_BL, tokens_BL, masks)["params"]
    if not config.tie_embeddings:
        params = dict(params, head=normal(0.02)(jax.random.fold_in(key, 1), (config.vocab_size, config.width)))
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
        params: the tree of `init_lm`, with or without adapters.
        config: the decoder's shape.
        tokens_BL: (B, L) integer tokens.
        positions_BL: (B, L) rotary positions, restarting in each segment.
        segments_BL: (B, L) segment numbers; 0 is padding.
        id_rows_XM: (X, M) rows of the id tokens (users, then items), or None for text only.
        dropout_key_B: (B,) typed keys, one for each row, so that no number depends on how a batch is split over
            devices; None turns dropout off.

    Returns:
        (B, L, M) states in the compute dtype, after the final norm.
    """
    hidden_BLM, _ = Decoder(config).apply(
        lora.variables(params),
        tokens_BL,
        positions_BL,
        segment_masks(config, positions_BL, segments_BL),
        id_rows_XM,
        dropout_key_B=dropout_key_B,
    )
    return hidden_BLM


def segment_masks(config: LMConfig, positions_BL: Array, segments_BL: Array) -> tuple[Array, Array | None]:
    """Makes the masks of packed rows: a position sees what stands before it in its segment, and itself.

    Args:
        config: the decoder's shape.
        positions_BL: (B, L) positions.
        segments_BL: (B, L) segment numbers.

    Returns:
        ((B, L, L) bool of the global layers, and of the local ones or None).

    Raises:
        InputError: a row is longer than the learned positions.
    """
    length = positions_BL.shape[1]
    if config.positions == "learned" and length > config.max_positions:
        raise InputError(
            f"a row of {length} tokens is longer than the {config.max_positions} learned positions of the language "
            "model: shorten prompts.length."
        )
    causal_LL = jnp.tril(jnp.ones((length, length), bool))
    mask_BLL = causal_LL & (segments_BL[:, :, None] == segments_BL[:, None, :])
    return window_masks(config, mask_BLL, lambda: positions_BL[:, :, None] - positions_BL[:, None, :])


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
    logits = jnp.einsum(
        "...m,vm->...v", hidden.astype(dtype), table_VM.astype(dtype), preferred_element_type=jnp.float32
    )
    return logits if config.logit_softcap is None else config.logit_softcap * jnp.tanh(logits / config.logit_softcap)


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
        params: the tree of `init_lm`, with or without adapters.
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
    masks = segment_masks(config, position_BP, prefix_mask_BP)
    params = lora.merge_tables(params)
    variables = lora.variables(params)
    prefix_BPM, kv = Decoder(config, keep_kv=True).apply(variables, prefix_BP, position_BP, masks, id_rows_XM)

    length = continuation_BCT.shape[2]
    position_BCT = jnp.broadcast_to(n_prefix_B[:, None, None] + jnp.arange(length), continuation_BCT.shape)
    mask_BCTT = jnp.tril(jnp.ones((length, length), bool)) & continuation_mask_BCT[:, :, None, :]
    before_BCTP = lambda: position_BCT[..., None] - position_BP[:, None, None]  # noqa: E731
    hidden_BCTM, _ = Decoder(config).apply(
        variables,
        continuation_BCT,
        position_BCT,
        window_masks(config, mask_BCTT, lambda: position_BCT[..., :, None] - position_BCT[..., None, :]),
        id_rows_XM,
        prefix=kv,
        prefix_mask=window_masks(config, prefix_mask_BP[:, None, None], before_BCTP),
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
