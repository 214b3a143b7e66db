"""Ranking metrics of one target among candidates, all derived from two integers per case.

`better` counts the candidates that score above the target, `equal` those that tie with it. Ties count against the
model: rank = 1 + better + equal. Only the AUC gives a tie its customary half.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bdlm_jax.types import Array

METRICS = ("hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr", "auc")


@jax.jit
def count_better(scores_BC: Array, target_B1: Array, counts_BC: Array) -> tuple[Array, Array]:
    """Counts the candidates above and level with the target, of those that `counts_BC` lets take part.

    A NaN anywhere counts as a loss for the model.
    """
    worse_BC = scores_BC < target_B1
    equal_BC = scores_BC == target_B1
    better_BC = ~(worse_BC | equal_BC)
    return tuple(jnp.sum(who_BC & counts_BC, axis=-1, dtype=jnp.int32) for who_BC in (better_BC, equal_BC))


@jax.jit
def count_catalogue(scores_BI: Array, closed_BI: Array, item_BT: Array) -> tuple[Array, Array, Array]:
    """Counts, for each of the T targets of a row, the items above it, level with it, and all others that are open.

    What `closed_BI` holds takes no part; the targets are open. A NaN anywhere counts as a loss for the model.
    """
    target_BT = jnp.take_along_axis(scores_BI, item_BT, axis=1)
    open_BI = jnp.where(closed_BI, jnp.nan, scores_BI)  # which is neither below nor level

    def count_row(row):
        def count(target):
            return tuple(jnp.sum(who_I, dtype=jnp.int32) for who_I in (scores_I < target, scores_I == target))

        scores_I, target_T = row
        return jax.lax.map(count, target_T)

    # Row by row, because XLA would write all (B, T, I) comparisons out before it sums them.
    worse_BT, equal_BT = jax.lax.map(count_row, (open_BI, target_BT))
    equal_BT -= ~jnp.isnan(target_BT)  # the target itself
    others_BT = jnp.broadcast_to(jnp.sum(~closed_BI, axis=1, keepdims=True, dtype=jnp.int32) - 1, item_BT.shape)
    return others_BT - worse_BT - equal_BT, equal_BT, others_BT


def case_metric(name: str, better_N: np.ndarray, equal_N: np.ndarray, others_N: np.ndarray) -> np.ndarray:
    """Computes one metric per case (one relevant item each): one of METRICS, or any "hr@k" and "ndcg@k".

    hr@k = [rank ≤ k]; ndcg@k = [rank ≤ k]/log2(rank + 1); mrr = 1/rank; auc = (others - better - equal/2)/others.
    Source: the field's standard definitions; `rax` is the oracle in the tests.
    """
    rank_N = 1 + better_N.astype(np.int64) + equal_N
    kind, _, cut = name.partition("@")
    if kind == "hr":
        return (rank_N <= int(cut)).astype(np.float64)
    if kind == "ndcg":
        return np.where(rank_N <= int(cut), 1.0 / np.log2(rank_N + 1.0), 0.0)
    if name == "mrr":
        return 1.0 / rank_N
    if name == "auc":
        return (others_N - better_N - 0.5 * equal_N) / np.maximum(others_N, 1)
    raise ValueError(f"metric {name!r} is none of {METRICS}")
