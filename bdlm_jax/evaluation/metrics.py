"""Ranking metrics of one target among candidates, all derived from two integers per case.

`better` counts the candidates that score above the target, `equal` those that tie with it. Ties count against the
model: rank = 1 + better + equal. Only the AUC gives a tie its customary half.
"""

import jax.numpy as jnp
import numpy as np

from bdlm_jax.types import Array

METRICS = ("hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr", "auc")


def count_better(scores_BC: Array, target_B1: Array, counts_BC: Array) -> tuple[Array, Array]:
    """Counts candidates above and level with the target.

    Args:
      scores_BC: (B, C) scores of the candidates, the target itself not counted.
      target_B1: (B, 1) the target's score; a NaN anywhere counts as a loss for the model.
      counts_BC: (B, C) bool, which candidates take part.

    Returns:
      (better (B,), equal (B,)) int32.
    """
    worse_BC = scores_BC < target_B1
    equal_BC = scores_BC == target_B1
    better_BC = ~(worse_BC | equal_BC)
    return (
        jnp.sum(better_BC & counts_BC, axis=-1, dtype=jnp.int32),
        jnp.sum(equal_BC & counts_BC, axis=-1, dtype=jnp.int32),
    )


def case_metric(name: str, better_N: np.ndarray, equal_N: np.ndarray, others_N: np.ndarray) -> np.ndarray:
    """Computes one metric per case (one relevant item each).

    hr@k = [rank ≤ k]; ndcg@k = [rank ≤ k]/log2(rank + 1); mrr = 1/rank; auc = (others - better - equal/2)/others.

    Args:
      name: one of METRICS, or any "hr@k" and "ndcg@k".
      better_N: (N,) candidates above the target.
      equal_N: (N,) candidates level with the target.
      others_N: (N,) candidates beside the target.

    Returns:
      (N,) float64 values. Source: the field's standard definitions; `rax` is the oracle in the tests.
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


def top_k_metrics(top_NK: np.ndarray, relevant: list[np.ndarray], *, k: int) -> dict[str, np.ndarray]:
    """Computes per-user recall, NDCG and hit rate of top-k lists against several relevant items each.

    recall@k = hits/|relevant|; hr@k = [hits > 0];
    ndcg@k = Σ hit_r/log2(r + 1) / Σ_{r ≤ min(k, |relevant|)} 1/log2(r + 1).

    Args:
      top_NK: (N, K ≥ k) recommended item indices, best first.
      relevant: N arrays of held-out item indices, none empty.
      k: the cut.

    Returns:
      {"recall@k", "ndcg@k", "hr@k"}: (N,) float64 each. Source: the LightGCN paper's protocol.
    """
    discount_K = 1.0 / np.log2(np.arange(k) + 2.0)
    hit_NK = np.stack([np.isin(row[:k], items) for row, items in zip(top_NK, relevant)]).astype(np.float64)
    size_N = np.array([len(items) for items in relevant])
    ideal_N = np.cumsum(discount_K)[np.minimum(size_N, k) - 1]
    return {
        f"recall@{k}": hit_NK.sum(1) / size_N,
        f"ndcg@{k}": hit_NK @ discount_K / ideal_N,
        f"hr@{k}": (hit_NK.sum(1) > 0).astype(np.float64),
    }
