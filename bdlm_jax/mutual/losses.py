"""The losses of both arms, named after the method: BPR, cross-entropy, and the `align` family with KL.

Every loss returns a sum over rows and their weight: the caller divides by the weight summed over all devices, so that
splitting a batch changes no number. `sg` in the formulas is a stop-gradient, applied by the caller.
"""

import jax
import jax.numpy as jnp
import optax

from bdlm_jax.lm.causal_lm import text_logits
from bdlm_jax.lm.config import LMConfig
from bdlm_jax.types import Array, Params

NEVER = -1e9  # the logit of an item that cannot be the answer
MOST_NEGATIVES = 1024  # rows of a batch that a row is told apart from by InfoNCE
Term = tuple[Array, Array]  # (sum, weight)


def bpr_loss(positive_B: Array, negative_B: Array, weight_B: Array) -> Term:
    """Returns Σ w·softplus(s⁻ - s⁺) and Σ w over a batch of scores. Source: Rendle et al. 2009, equation 4."""
    return jnp.sum(weight_B * jax.nn.softplus(negative_B - positive_B)), jnp.sum(weight_B)


def catalogue_loss(
    state_NM: Array, rows_IM: Array, bias_I: Array, target_N: Array, *, chunk_entries=3_000_000, skip: bool = False
) -> Term:
    """Σ -log softmax(state·rowsᵀ + bias)[target] over all item rows, `chunk_entries` logits held at a time.

    On a CPU that is more than twice as fast too, because a chunk stays in the cache. A very negative bias takes an item
    out of the softmax; target -1 is none. `skip` is for rows of which many have none: they cost nothing then.
    """

    def nll(state_SM, target_S):
        logits_SI = state_SM @ rows_IM.T + bias_I
        # Not gathered from the logits: the gradient of that is a scatter into all of them.
        own_S = jnp.sum(state_SM * rows_IM[target_S], axis=-1) + bias_I[target_S]
        highest_S1 = jax.lax.stop_gradient(logits_SI.max(axis=-1, keepdims=True))
        return jnp.log(jnp.sum(jnp.exp(logits_SI - highest_S1), axis=-1)) + highest_S1[:, 0] - own_S

    n = len(state_NM)
    n_chunks = -(-n // max(1, min(n, chunk_entries // len(rows_IM))))
    if skip:
        state_NM, target_N = targets_first(state_NM, target_N)
    return _sum_in_chunks(nll, state_NM, target_N, size=-(-n // n_chunks), skip=skip)


def sampled_loss(state_NM: Array, rows_IM: Array, target_N: Array, drawn_S: Array, *, among: int) -> Term:
    """Σ -log softmax over the target and the items `drawn_S`, different ones out of `among` that may be the answer.

    Each drawn logit gets log(among / S), so that the sum estimates the whole catalogue's; a target that is drawn
    counts once. Source: Jean et al. 2015, section 3.2, for uniform draws.
    """
    rows_SM, times = rows_IM[drawn_S], among / len(drawn_S)

    def nll(state_PM, target_P):
        own_P = jnp.sum(state_PM * rows_IM[target_P], axis=-1)
        logits_PS = jnp.where(target_P[:, None] == drawn_S, NEVER, state_PM @ rows_SM.T + jnp.log(times))
        return jax.nn.logsumexp(jnp.concatenate([own_P[:, None], logits_PS], axis=1), axis=1) - own_P

    size = max(1, min(len(state_NM), 3_000_000 // len(drawn_S)))
    return _sum_in_chunks(nll, *targets_first(state_NM, target_N), size=size, skip=True)


def targets_first(state_NM: Array, target_N: Array) -> tuple[Array, Array]:
    """Moves the rows with a target to the front, in their order."""
    order_N = jnp.argsort(target_N < 0, stable=True)
    return state_NM[order_N], target_N[order_N]


def text_loss(
    params: Params,
    config: LMConfig,
    state_NM: Array,
    target_N: Array,
    *,
    chunk: int | None = None,
    skip: bool = False,
) -> Term:
    """Σ -log p(target | state) over text tokens, with the logits of `chunk` targets at a time; target -1 is none.

    `skip` as in `catalogue_loss`.
    """

    def nll(state_SM, target_S):
        return optax.softmax_cross_entropy_with_integer_labels(text_logits(params, config, state_SM), target_S)

    size = chunk if chunk and chunk < len(target_N) else None
    if skip and size:
        state_NM, target_N = targets_first(state_NM, target_N)
    return _sum_in_chunks(nll, state_NM, target_N, size=size, skip=skip)


def _sum_in_chunks(nll, state_NM: Array, target_N: Array, *, size: int | None, skip: bool = False) -> Term:
    """Sums nll over the rows with a target, `size` at a time and again in the backward pass; None: all, and kept.

    With `skip` a chunk without a target is left out.
    """

    def total(state_SM, target_S):
        return jnp.sum(jnp.where(target_S >= 0, nll(state_SM, jnp.maximum(target_S, 0)), 0.0))

    count = jnp.sum(target_N >= 0).astype(jnp.float32)
    if size is None:
        return total(state_NM, target_N), count
    pad = -len(target_N) % size
    states = jnp.pad(state_NM, ((0, pad), (0, 0))).reshape(-1, size, state_NM.shape[1])
    targets = jnp.pad(target_N, (0, pad), constant_values=-1).reshape(-1, size)

    def part_sum(state_SM, target_S):
        if not skip:
            return total(state_SM, target_S)
        return jax.lax.cond(jnp.any(target_S >= 0), total, lambda *_: 0.0, state_SM, target_S)

    add = jax.checkpoint(lambda so_far, part: (so_far + part_sum(*part), None))
    return jax.lax.scan(add, jnp.zeros(()), (states, targets))[0], count


def mse_align(student_ND: Array, teacher_ND: Array, **_) -> Array:
    """Mean over dimensions of (s - t)²."""
    return jnp.mean(jnp.square(student_ND - teacher_ND), axis=-1)


def cosine_align(student_ND: Array, teacher_ND: Array, **_) -> Array:
    """1 - cos(s, t)."""
    return 1.0 - jnp.sum(_unit(student_ND) * _unit(teacher_ND), axis=-1)


def infonce_align(
    student_ND: Array, teacher_ND: Array, *, weight_N: Array, axis_name: str | None = None, temperature: float = 0.1
) -> Array:
    """Cross-entropy of cos(s, t)/temperature, the negatives the teachers of all devices' other rows above weight 0.

    Of a batch of more than `MOST_NEGATIVES` rows every second, third, … is a negative, for all rows alike: what it
    costs would grow with the square of the batch.
    """
    students, negatives, allowed, offset = _unit(student_ND), _unit(teacher_ND), weight_N > 0, 0
    own_N = jnp.sum(students * negatives, axis=-1) / temperature
    if axis_name is not None:
        negatives = jax.lax.all_gather(negatives, axis_name, tiled=True)
        allowed = jax.lax.all_gather(allowed, axis_name, tiled=True)
        offset = jax.lax.axis_index(axis_name) * student_ND.shape[0]
    row_M = jnp.arange(0, len(negatives), -(-len(negatives) // MOST_NEGATIVES))
    others_NM = allowed[row_M] & (row_M != jnp.arange(len(students))[:, None] + offset)
    logits_NM = jnp.where(others_NM, students @ negatives[row_M].T / temperature, NEVER)
    return jax.nn.logsumexp(jnp.concatenate([own_N[:, None], logits_NM], axis=1), axis=1) - own_N


# Each gives a loss for every row, (student_ND, teacher_ND, *, weight_N, axis_name) -> (N,).
ALIGN = {"mse": mse_align, "cosine": cosine_align, "infonce": infonce_align}
WHOLE_BATCH = frozenset({"infonce"})  # those that compare a row with the other rows of the batch


def align_loss(
    student_ND: Array, teacher_ND: Array, weight_N: Array, *, kind: str, table: Array, axis_name: str | None = None
) -> Term:
    """Pulls one arm's representations towards the other's, in units of the deviation of the domain arm's `table`.

    So a weight means the same for every table. METHOD `align`; the paper's exact form is unknown: ours. A row of weight
    0 is left out, as a negative too.
    """
    unit = jax.lax.stop_gradient(jnp.std(table)) + 1e-6
    rows_N = ALIGN[kind](student_ND / unit, teacher_ND / unit, weight_N=weight_N, axis_name=axis_name)
    return jnp.sum(weight_N * rows_N), jnp.sum(weight_N)


def kl_loss(student_NC: Array, teacher_NC: Array, weight_N: Array, *, temperature: float) -> Term:
    """Deep mutual learning on scores: T²·KL(softmax(teacher/T) ‖ softmax(student/T)) over the same candidates.

    The factor T² keeps the gradient's size independent of T (Hinton et al. 2015, section 2.1). Source: Zhang et al.
    2018 (deep mutual learning), equation 2.
    """
    student = jax.nn.log_softmax(student_NC / temperature)
    teacher = jax.nn.log_softmax(teacher_NC / temperature)
    rows_N = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    return temperature**2 * jnp.sum(weight_N * rows_N), jnp.sum(weight_N)


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)
