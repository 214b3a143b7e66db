"""The losses of both arms, named after the method: BPR, next-token cross-entropy, and the `align` family.

Every loss returns (sum over rows, weight of rows): the caller divides by the weight summed over all devices, so that
splitting a batch changes no number. `sg` in the formulas is a stop-gradient, applied by the caller.
"""

import jax
import jax.numpy as jnp
import optax

from bdlm_jax.lm.causal_lm import LMConfig, gather_positions, lm_hidden, text_logits
from bdlm_jax.types import Array, Params

NEVER = -1e9  # the logit of an item that cannot be the answer


def bpr_loss(positive_B: Array, negative_B: Array, weight_B: Array) -> tuple[Array, Array]:
    """Returns Σ w·softplus(s⁻ - s⁺) and Σ w over a batch of scores (B,). Source: Rendle et al. 2009, equation 4."""
    return jnp.sum(weight_B * jax.nn.softplus(negative_B - positive_B)), jnp.sum(weight_B)


def catalogue_loss(
    state_NM: Array, rows_IM: Array, bias_I: Array, target_N: Array, *, chunk_entries: int = 3_000_000
) -> tuple[Array, Array]:
    """Computes the summed cross-entropy of states against all item rows, never holding the whole (N, I) logits.

    The states go through in chunks whose logits are computed again in the backward pass: less memory, and on a CPU
    more than twice as fast, because a chunk stays in the cache.

    Args:
      state_NM: (N, M) states.
      rows_IM: (I, M) output rows.
      bias_I: (I,) added to the logits; a very negative number takes an item out.
      target_N: (N,) item indices, -1 for no target.
      chunk_entries: logits held at a time.

    Returns:
      (sum, count of targets).
    """
    n, n_items = state_NM.shape[0], rows_IM.shape[0]
    size = max(1, min(n, chunk_entries // n_items))
    n_chunks = -(-n // size)
    size = -(-n // n_chunks)
    pad = n_chunks * size - n
    states = jnp.pad(state_NM, ((0, pad), (0, 0))).reshape(n_chunks, size, -1)
    targets = jnp.pad(target_N, (0, pad), constant_values=-1).reshape(n_chunks, size)

    @jax.checkpoint
    def add(total, part):
        state_SM, target_S = part
        logits_SI = state_SM @ rows_IM.T + bias_I
        highest_S1 = jax.lax.stop_gradient(logits_SI.max(axis=-1, keepdims=True))
        total_S = jnp.log(jnp.sum(jnp.exp(logits_SI - highest_S1), axis=-1)) + highest_S1[:, 0]
        own = jnp.maximum(target_S, 0)
        own_S = jnp.sum(state_SM * rows_IM[own], axis=-1) + bias_I[own]
        return total + jnp.sum(jnp.where(target_S >= 0, total_S - own_S, 0.0)), None

    total, _ = jax.lax.scan(add, jnp.zeros(()), (states, targets))
    return total, jnp.sum(target_N >= 0).astype(jnp.float32)


def text_cross_entropy(
    params: Params, config: LMConfig, hidden_BLM: Array, index_BT: Array, target_BT: Array, *, chunk: int | None = None
) -> tuple[Array, Array]:
    """Sums -log p(target | state) over the targets of a batch, with logits only where a target is.

    Args:
        params: the tree of `init_lm`.
        config: the decoder's shape.
        hidden_BLM: (B, L, M) states of `lm_hidden`.
        index_BT: (B, T) positions.
        target_BT: (B, T) text tokens to be predicted from there, -1 pads.
        chunk: compute the logits for this many targets at a time, and again in the backward pass: for a large V.

    Returns:
        (sum, count), two float32 scalars; the caller divides, after a psum where there are several devices.
    """
    states_NM = gather_positions(hidden_BLM, index_BT).reshape(-1, hidden_BLM.shape[-1])
    target_N = target_BT.reshape(-1)

    def total(states, target):
        nll = optax.softmax_cross_entropy_with_integer_labels(
            text_logits(params, config, states), jnp.maximum(target, 0)
        )
        return jnp.where(target >= 0, nll, 0).sum()

    count = (target_N >= 0).sum().astype(jnp.float32)
    if chunk is None or len(target_N) <= chunk:
        return total(states_NM, target_N), count
    n_pad = -len(target_N) % chunk
    states = jnp.pad(states_NM, ((0, n_pad), (0, 0))).reshape(-1, chunk, states_NM.shape[1])
    target = jnp.pad(target_N, (0, n_pad), constant_values=-1).reshape(-1, chunk)
    sums, _ = jax.lax.scan(lambda acc, part: (acc + jax.checkpoint(total)(*part), None), 0.0, (states, target))
    return sums, count


def text_loss(
    params: Params,
    config: LMConfig,
    batch: dict[str, Array],
    *,
    id_rows_XM: Array | None = None,
    dropout_key_B: Array | None = None,
    chunk: int | None = None,
) -> tuple[Array, Array]:
    """Computes the next-token loss of a batch: sum over its text targets of -log p(token | what stands before it).

    Args:
        params: the tree of `init_lm`.
        config: the decoder's shape.
        batch: of `Packed.batch`.
        id_rows_XM: (X, M) rows of the id tokens, where the batch holds some.
        dropout_key_B: (B,) typed keys; None: no dropout.
        chunk: as in `text_cross_entropy`.

    Returns:
        (sum, count), two float32 scalars: the mean loss is sum / count.
    """
    hidden_BLM = lm_hidden(
        params,
        config,
        batch["tokens"],
        batch["positions"],
        batch["segments"],
        id_rows_XM,
        dropout_key_B=dropout_key_B,
    )
    return text_cross_entropy(params, config, hidden_BLM, batch["text_index"], batch["text_target"], chunk=chunk)


def mse_align(student_ND: Array, teacher_ND: Array, **_) -> Array:
    """Mean over dimensions of (s - t)²."""
    return jnp.mean(jnp.square(student_ND - teacher_ND), axis=-1)


def cosine_align(student_ND: Array, teacher_ND: Array, **_) -> Array:
    """1 - cos(s, t)."""
    return 1.0 - jnp.sum(_unit(student_ND) * _unit(teacher_ND), axis=-1)


def infonce_align(
    student_ND: Array, teacher_ND: Array, *, weight_N: Array, axis_name: str | None = None, temperature: float = 0.1
) -> Array:
    """Cross-entropy of cos(s, t)/temperature, the negatives the teachers of all devices' other rows above weight 0."""
    negatives, allowed, offset = _unit(teacher_ND), weight_N > 0, 0
    if axis_name is not None:
        negatives = jax.lax.all_gather(negatives, axis_name, tiled=True)
        allowed = jax.lax.all_gather(allowed, axis_name, tiled=True)
        offset = jax.lax.axis_index(axis_name) * student_ND.shape[0]
    logits = _unit(student_ND) @ negatives.T / temperature
    own = jnp.arange(student_ND.shape[0]) + offset
    allowed = allowed[None, :] | (own[:, None] == jnp.arange(negatives.shape[0])[None, :])
    return optax.softmax_cross_entropy_with_integer_labels(jnp.where(allowed, logits, NEVER), own)


ALIGN = {"mse": mse_align, "cosine": cosine_align, "infonce": infonce_align}
WHOLE_BATCH = frozenset({"infonce"})  # those that compare a row with the other rows of the batch


def align_loss(
    student_ND: Array, teacher_ND: Array, weight_N: Array, *, kind: str, axis_name: str | None = None
) -> tuple[Array, Array]:
    """Pulls one arm's representations towards the other's, as ALIGN[kind] says for each row.

    METHOD `align`; the paper's exact form is unknown: ours. A row of weight 0 is left out, as a negative too.
    """
    rows_N = ALIGN[kind](student_ND, teacher_ND, weight_N=weight_N, axis_name=axis_name)
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


def table_scale(table: Array) -> Array:
    """The unit in which representations are compared, so that a weight means the same for every table (ours)."""
    return jax.lax.stop_gradient(jnp.std(table)) + 1e-6
