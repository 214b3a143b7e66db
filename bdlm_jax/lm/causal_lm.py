"""A causal decoder as pure functions on the tree of `init_lm`, with or without adapters (`lora`).

The rows of <uid> and <iid> are no parameter of it: they are an argument, so that the shared table stays one leaf. Token
t < V reads the text embedding, token V + x reads `id_rows_XM[x]`: users, then items; None for text only.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import optax

from bdlm_jax.lm import lora
from bdlm_jax.lm.attention import soft_cap
from bdlm_jax.lm.config import LMConfig
from bdlm_jax.lm.decoder import EMBEDDING_INIT, Decoder, Masks, window_masks
from bdlm_jax.types import Array, InputError, Params


def init_lm(key: Array, config: LMConfig) -> Params:
    """Draws the parameters of a decoder.

    Returns:
        {"embedding": (V, M), "final_norm": {"scale": (M,)}, "layers": {...}} and, untied, "head": (V, M). Layers are
        stacked over depth: layers/input_layernorm/scale, layers/self_attn/{q,k,v,o}_proj/kernel (depth, in, out)
        [and bias], layers/post_attention_layernorm/scale, layers/mlp/{gate,up,down}_proj/kernel. All float32. Options
        add position_embedding (positions, M), layers/self_attn/{q,k}_norm/scale,
        layers/{pre,post}_feedforward_layernorm/scale, and a bias beside LayerNorm's scale.
    """
    # Shapes do not depend on how attention is computed, and cuDNN would need its device.
    init = Decoder(dataclasses.replace(config, attention="einsum")).init
    tokens_BL = jnp.zeros((1, 1), jnp.int32)
    masks = segment_masks(config, tokens_BL, tokens_BL)
    params = jax.jit(partial(init, id_rows_XM=None))(key, tokens_BL, tokens_BL, masks)["params"]
    if not config.tie_embeddings:
        params = dict(params, head=EMBEDDING_INIT(jax.random.fold_in(key, 1), (config.vocab_size, config.width)))
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
    """Runs the decoder on packed rows and returns its states (B, L, M) after the final norm, in the compute dtype.

    Args:
        positions_BL: restarting in each segment.
        segments_BL: a position attends to itself and to what stands before it in its own segment; 0 is padding.
        dropout_key_B: typed keys, one for each row, so that no number depends on how a batch is split over devices;
            None turns dropout off.
    """
    row = (tokens_BL, positions_BL, segment_masks(config, positions_BL, segments_BL), id_rows_XM)
    return Decoder(config).apply(lora.variables(params), *row, dropout_key_B=dropout_key_B)[0]


def segment_masks(config: LMConfig, positions_BL: Array, segments_BL: Array) -> Masks:
    """Makes the (B, L, L) masks of packed rows: a position sees what stands before it in its segment, and itself."""
    length = positions_BL.shape[1]
    check_length(config, length)
    causal_LL = jnp.tril(jnp.ones((length, length), bool))
    mask_BLL = causal_LL & (segments_BL[:, :, None] == segments_BL[:, None, :])
    return window_masks(config, mask_BLL, positions_BL, positions_BL)


def check_length(config: LMConfig, length: int) -> None:
    """Refuses rows that are longer than the learned positions."""
    if config.positions == "learned" and length > config.max_positions:
        raise InputError(
            f"a row of {length} tokens is longer than the {config.max_positions} learned positions of the language "
            "model: shorten prompts.length, or what is generated."
        )


def text_logits(params: Params, config: LMConfig, hidden: Array) -> Array:
    """Scores every text token from states (..., M) after the final norm: (..., V) float32 logits.

    The tied head is the text embedding itself.
    """
    table_VM = params["embedding"] if config.tie_embeddings else params["head"]
    dtype = jnp.dtype(config.dtype)
    return soft_cap(wide_product(hidden.astype(dtype), table_VM.astype(dtype)), config.logit_softcap)


@jax.custom_vjp
def wide_product(state: Array, table_VM: Array) -> Array:
    """state (..., M)·tableᵀ, summed in float32 and left so; its gradient comes back in the dtype of its arguments.

    Left to itself a bfloat16 product with a float32 result has float32 products as its gradient: on an H200 two of 3.3
    ms where the product itself takes 1.4 (docs/performance/h200/variants.txt).
    """
    return jnp.einsum("...m,vm->...v", state, table_VM, preferred_element_type=jnp.float32)


def _wide_product_backward(arguments, gradient):
    state, table_VM = arguments
    gradient = gradient.astype(state.dtype)
    return jnp.einsum("...v,vm->...m", gradient, table_VM), jnp.einsum("...v,...m->vm", gradient, state)


wide_product.defvjp(lambda *arguments: (wide_product(*arguments), arguments), _wide_product_backward)


def read_prefix(
    params: Params, config: LMConfig, prefix_BP: Array, mask_BP: Array, id_rows_XM: Array | None
) -> tuple[Array, Array, tuple[Array, Array]]:
    """Runs prefixes that are padded on either side, each of at least one token.

    Returns:
        (states (B, M) at each last token, positions (B, P), (keys, values) stacked over depth).
    """
    position_BP = jnp.maximum(jnp.cumsum(mask_BP, axis=1) - 1, 0)
    masks = segment_masks(config, position_BP, mask_BP)
    decoder = Decoder(config, keep_kv=True)
    hidden_BPM, kv = decoder.apply(lora.variables(params), prefix_BP, position_BP, masks, id_rows_XM)
    last_B = mask_BP.shape[1] - 1 - jnp.argmax(mask_BP[:, ::-1], axis=1)
    return gather_positions(hidden_BPM, last_B[:, None])[:, 0], position_BP, kv


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

    The prefix, of at least one token, runs once; its keys and values are shared by its C continuations without a copy.
    A prefix is padded on either side, a continuation of text tokens (t < V) on the right; masks are True at tokens.
    Returns (B, C) float32; 0 for an empty continuation.
    """
    prefix_mask_BP, continuation_mask_BCT = prefix_mask_BP.astype(bool), continuation_mask_BCT.astype(bool)
    params = lora.merge_tables(params)
    start_BM, position_BP, kv = read_prefix(params, config, prefix_BP, prefix_mask_BP, id_rows_XM)

    length = continuation_BCT.shape[2]
    position_BCT = prefix_mask_BP.sum(axis=1)[:, None, None] + jnp.arange(length)
    position_BCT = jnp.broadcast_to(position_BCT, continuation_BCT.shape)
    mask_BCTT = jnp.tril(jnp.ones((length, length), bool)) & continuation_mask_BCT[:, :, None, :]
    hidden_BCTM, _ = Decoder(config).apply(
        lora.variables(params),
        continuation_BCT,
        position_BCT,
        window_masks(config, mask_BCTT, position_BCT, position_BCT),
        id_rows_XM,
        prefix=kv,
        prefix_masks=window_masks(config, prefix_mask_BP[:, None, None], position_BCT, position_BP[:, None]),
    )

    def score_row(row):  # one row at a time: the (C, T, V) logits are the largest array of all
        start_M, hidden_CTM, target_CT, mask_CT = row
        first_C1M = jnp.broadcast_to(start_M, (hidden_CTM.shape[0], 1, start_M.shape[0]))
        logits_CTV = text_logits(params, config, jnp.concatenate([first_C1M, hidden_CTM[:, :-1]], axis=1))
        nll_CT = optax.softmax_cross_entropy_with_integer_labels(logits_CTV, target_CT)
        return -jnp.where(mask_CT, nll_CT, 0).sum(axis=1)

    return jax.lax.map(score_row, (start_BM, hidden_BCTM, continuation_BCT, continuation_mask_BCT))


def gather_positions(hidden_BLM: Array, index_BT: Array) -> Array:
    """Takes the states (B, T, M) at some positions of each row."""
    return jnp.take_along_axis(hidden_BLM, index_BT[:, :, None], axis=1)
