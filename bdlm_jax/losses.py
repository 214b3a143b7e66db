"""The losses of both arms, named after the method: BPR, next-token cross-entropy, and the `align` family.

Every loss returns (sum over rows, weight of rows): the caller divides by the weight summed over all devices, so that
splitting a batch changes no number. `sg` in the formulas is a stop-gradient, applied by the caller.
"""

import jax
import jax.numpy as jnp
import optax

from bdlm_jax.types import Array

ALIGNMENTS = ("mse", "cosine", "infonce")


def bpr_loss(positive_B: Array, negative_B: Array, weight_B: Array) -> tuple[Array, Array]:
    """Returns Σ w·softplus(s⁻ - s⁺) and Σ w over a batch of scores (B,). Source: Rendle et al. 2009, equation 4."""
    return jnp.sum(weight_B * jax.nn.softplus(negative_B - positive_B)), jnp.sum(weight_B)


def cross_entropy_loss(logits: Array, target: Array) -> tuple[Array, Array]:
    """Returns the summed cross-entropy of logits (..., C) at targets (...), -1 meaning "no target", and their count."""
    where = target >= 0
    values = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(target, 0))
    return jnp.sum(jnp.where(where, values, 0.0)), jnp.sum(where).astype(jnp.float32)


def align_loss(
    student_ND: Array, teacher_ND: Array, weight_N: Array, *, kind: str, temperature: float = 0.1, axis_name=None
) -> tuple[Array, Array]:
    """Pulls one arm's representations towards the other's (METHOD `align`; the paper's exact form is unknown: ours).

    mse: mean over dimensions of (s - t)²; cosine: 1 - cos(s, t); infonce: cross-entropy of cos(s, t)/temperature with
    the other rows' teachers of the whole batch as negatives.

    Args:
      student_ND: (N, D) representations that receive the gradient.
      teacher_ND: (N, D) targets; the caller has stopped their gradient.
      weight_N: (N,) row weights; 0 leaves a row out, as a negative too.
      kind: "mse", "cosine" or "infonce".
      temperature: of infonce only.
      axis_name: the mapped axis over which infonce gathers its negatives, or None.

    Returns:
      (weighted sum over rows, sum of weights).
    """
    if kind == "mse":
        rows_N = jnp.mean(jnp.square(student_ND - teacher_ND), axis=-1)
    elif kind == "cosine":
        rows_N = 1.0 - jnp.sum(_unit(student_ND) * _unit(teacher_ND), axis=-1)
    elif kind == "infonce":
        negatives, allowed = _unit(teacher_ND), weight_N > 0
        offset = 0
        if axis_name is not None:
            negatives = jax.lax.all_gather(negatives, axis_name, tiled=True)
            allowed = jax.lax.all_gather(allowed, axis_name, tiled=True)
            offset = jax.lax.axis_index(axis_name) * student_ND.shape[0]
        logits = _unit(student_ND) @ negatives.T / temperature
        own = jnp.arange(student_ND.shape[0]) + offset
        allowed = allowed[None, :] | (own[:, None] == jnp.arange(negatives.shape[0])[None, :])
        rows_N = optax.softmax_cross_entropy_with_integer_labels(jnp.where(allowed, logits, -1e9), own)
    else:
        raise ValueError(f"align kind {kind!r} is none of {ALIGNMENTS}")
    return jnp.sum(weight_N * rows_N), jnp.sum(weight_N)


def kl_loss(student_NC: Array, teacher_NC: Array, weight_N: Array, *, temperature: float) -> tuple[Array, Array]:
    """Deep mutual learning on scores: T²·KL(softmax(teacher/T) ‖ softmax(student/T)) over the same candidates.

    Args:
      student_NC: (N, C) logits that receive the gradient.
      teacher_NC: (N, C) logits of the other arm; the caller has stopped their gradient.
      weight_N: (N,) row weights.
      temperature: T; the factor T² keeps the gradient's size independent of it (Hinton et al. 2015, section 2.1).

    Returns:
      (weighted sum over rows, sum of weights). Source: Zhang et al. 2018 (deep mutual learning), equation 2.
    """
    student = jax.nn.log_softmax(student_NC / temperature)
    teacher = jax.nn.log_softmax(teacher_NC / temperature)
    rows_N = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    return temperature**2 * jnp.sum(weight_N * rows_N), jnp.sum(weight_N)


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)
