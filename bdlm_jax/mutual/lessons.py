"""What a teacher says of the next item at every place of a history, for the LM that learns from it. Ours.

    score(item) at a place = h·row_item + last·(content of the item there · its own)
                             + mean·(mean over the items up to there of such products)

h is the state of the LM as it was; the rest is `lm.text_head`, read on what the row has of the history. At the end of a
history that fits into a row it is what that LM with that head serves.
"""

import jax.numpy as jnp

from bdlm_jax.domain.arm import DomainArm
from bdlm_jax.lm import causal_lm, lora
from bdlm_jax.lm.text_head import TextHead
from bdlm_jax.mutual import sharing
from bdlm_jax.mutual.options import Meeting
from bdlm_jax.types import Array, Params


def make_teacher(
    params: Params, texts: TextHead | None, *, arm: DomainArm, meeting: Meeting, reads_lm: bool = True
) -> Params:
    """Returns what `teach` reads: the LM's decoder and rows, if it teaches, and the content and weights of a head."""
    teacher = {}
    if reads_lm:
        rows_XM, head = sharing.id_rows_and_head(params, meeting=meeting, arm=arm)
        narrow = {} if head.narrow_MN is None else {"narrow_MN": head.narrow_MN}
        teacher |= {"decoder": lora.merge_tables(params["lm"]), "rows_XM": rows_XM, "rows_IN": head.rows_IN, **narrow}
    if texts is not None:
        teacher |= {"content_IC": jnp.asarray(texts.content_IC), "weights": jnp.array([texts.last, texts.mean])}
    return teacher


def teach(teacher: Params, batch, item_BL: Array, *, meeting: Meeting) -> tuple[Array, Array]:
    """Returns (B, T, N) and (I, N), whose products are the scores at a batch's places of targets.

    Args:
        teacher: of `make_teacher`.
        item_BL: the item that stands at each place, -1 where none does.
    """
    states, tables = [], []
    if "decoder" in teacher:
        row = batch["tokens"], batch["positions"], batch["segments"]
        hidden_BLM = causal_lm.lm_hidden(teacher["decoder"], meeting.lm, *row, teacher["rows_XM"])
        head = sharing.ItemHead(teacher["rows_IN"], teacher.get("narrow_MN"))
        states.append(head.read(causal_lm.gather_positions(hidden_BLM, batch["item_index"])))
        tables.append(head.rows_IN)
    if "content_IC" in teacher:
        said_BLC = _read_head(teacher["content_IC"], teacher["weights"], item_BL, batch["segments"])
        states.append(causal_lm.gather_positions(said_BLC, batch["item_index"]))
        tables.append(teacher["content_IC"])
    return jnp.concatenate(states, axis=-1), jnp.concatenate(tables, axis=-1)


def _read_head(content_IC: Array, weights: Array, item_BL: Array, segment_BL: Array) -> Array:
    is_item_BL = item_BL >= 0
    own_BLC = jnp.where(is_item_BL[..., None], content_IC[jnp.maximum(item_BL, 0)], 0.0)
    before_BLL = jnp.tril(segment_BL[:, :, None] == segment_BL[:, None, :]) & is_item_BL[:, None, :]
    count_BL = jnp.maximum(jnp.sum(before_BLL, axis=-1), 1)
    mean_BLC = before_BLL.astype(own_BLC.dtype) @ own_BLC / count_BL[..., None]
    return weights[0] * own_BLC + weights[1] * mean_BLC
