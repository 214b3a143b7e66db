"""How well a language model still speaks: its perplexity on plain text."""

import math
from functools import partial

import jax
import numpy as np

from bdlm_jax.lm.causal_lm import lm_hidden
from bdlm_jax.lm.config import LMConfig
from bdlm_jax.lm.packing import Packed
from bdlm_jax.mutual.lm_step import TEXT_CHUNK, states_at
from bdlm_jax.mutual.losses import text_loss
from bdlm_jax.runtime import sharding
from bdlm_jax.types import Params

_FIELDS = ("tokens", "positions", "segments", "text_index", "text_target")


def perplexity(lm: Params, config: LMConfig, packed: Packed, *, batch_rows: int) -> float:
    """Returns exp(mean over the text targets of packed rows of -log p(token | what stands before it in its segment)).

    The tree may hold adapters and a bridge. Rows run `batch_rows` at a time, the last ones filled up by rows without
    targets, so that a number of rows compiles once.
    """
    total = count = 0.0
    for start in range(0, len(packed), batch_rows):
        row_B = np.arange(start, start + batch_rows)
        batch = packed.rows(np.minimum(row_B, len(packed) - 1))
        batch["text_target"] = np.where(row_B[:, None] < len(packed), batch["text_target"], -1)
        batch = sharding.spread_rows({name: batch[name] for name in _FIELDS}, lm["embedding"])
        sums = _losses(lm, config, *(batch[name] for name in _FIELDS))
        total, count = total + float(sums[0]), count + float(sums[1])
    return math.exp(min(total / count, 700.0)) if count else math.nan  # beyond it no float is large enough


@partial(jax.jit, static_argnames="config")
def _losses(lm, config, tokens_BL, positions_BL, segments_BL, index_BT, target_BT):
    hidden_BLM = lm_hidden(lm, config, tokens_BL, positions_BL, segments_BL, None)
    return text_loss(lm, config, states_at(hidden_BLM, index_BT), target_BT.reshape(-1), chunk=TEXT_CHUNK)
