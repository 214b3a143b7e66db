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

    def total(rows_IM, row, given, constants):
        (state_SM, own_SM), (target_S,), (bias_I,) = row, given, constants
        logits_SI = state_SM @ rows_IM.T + bias_I
        # Not gathered from the logits: the gradient of that is a scatter into all of them.
        own_S = jnp.sum(state_SM * own_SM, axis=-1) + bias_I[target_S]
        highest_S1 = jax.lax.stop_gradient(logits_SI.max(axis=-1, keepdims=True))
        nll_S = jnp.log(jnp.sum(jnp.exp(logits_SI - highest_S1), axis=-1)) + highest_S1[:, 0] - own_S
        return jnp.sum(jnp.where(target_S >= 0, nll_S, 0.0))

    if skip:
        state_NM, target_N = targets_first(state_NM, target_N)
    n = len(state_NM)
    size = -(-n // -(-n // max(1, min(n, chunk_entries // len(rows_IM)))))
    own_NM = rows_IM[jnp.maximum(target_N, 0)]
    row, given = (_chunks(state_NM, size), _chunks(own_NM, size)), (_chunks(target_N, size, -1),)
    return _sum_in_one_pass(total, rows_IM, row, given, (bias_I,), skip=skip), _count(target_N)


def sampled_loss(state_NM: Array, rows_IM: Array, target_N: Array, drawn_S: Array, *, among: int) -> Term:
    """Σ -log softmax over the target and the items `drawn_S`, different ones out of `among` that may be the answer.

    Each drawn logit gets log(among / S), so that the sum estimates the whole catalogue's; a target that is drawn
    counts once. Source: Jean et al. 2015, section 3.2, for uniform draws.
    """
    times = among / len(drawn_S)

    def total(rows_SM, row, given, constants):
        (state_PM, own_PM), (target_P,), (drawn_S,) = row, given, constants
        own_P = jnp.sum(state_PM * own_PM, axis=-1)
        logits_PS = jnp.where(target_P[:, None] == drawn_S, NEVER, state_PM @ rows_SM.T + jnp.log(times))
        nll_P = jax.nn.logsumexp(jnp.concatenate([own_P[:, None], logits_PS], axis=1), axis=1) - own_P
        return jnp.sum(jnp.where(target_P >= 0, nll_P, 0.0))

    size = max(1, min(len(state_NM), 3_000_000 // len(drawn_S)))
    state_NM, target_N = targets_first(state_NM, target_N)
    own_NM = rows_IM[jnp.maximum(target_N, 0)]
    row, given = (_chunks(state_NM, size), _chunks(own_NM, size)), (_chunks(target_N, size, -1),)
    return _sum_in_one_pass(total, rows_IM[drawn_S], row, given, (drawn_S,), skip=True), _count(target_N)


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

    count = _count(target_N)
    if size is None:
        return total(state_NM, target_N), count
    states, targets = _chunks(state_NM, size), _chunks(target_N, size, -1)

    def part_sum(state_SM, target_S):
        if not skip:
            return total(state_SM, target_S)
        return jax.lax.cond(jnp.any(target_S >= 0), total, lambda *_: 0.0, state_SM, target_S)

    add = jax.checkpoint(lambda so_far, part: (so_far + part_sum(*part), None))
    return jax.lax.scan(add, jnp.zeros(()), (states, targets))[0], count


def _sum_in_one_pass(total, table_SM: Array, rows, given, constants, *, skip: bool = False) -> Array:
    """Adds up total(table, row, given, constants) over chunks, with its gradient by the table and by the rows.

    `rows` and `given`, its targets first, are tuples of arrays (chunks, ...). The gradients are taken while a chunk's
    logits are at hand, so that none are computed again in the backward pass, of which a product with one number is
    left. With `skip` a chunk without a target is left out. Source: the fused linear cross-entropy of Liger Kernel takes
    its gradient in the forward pass too.
    """

    def add_up(part, table_SM, rows, given, constants):
        first = jax.tree.map(lambda x: x[0], (rows, given))
        made = jax.eval_shape(part, table_SM, *first, constants)
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), made)

        def add(so_far, chunk):
            arguments = table_SM, *chunk, constants
            if skip:
                summed, kept = jax.lax.cond(jnp.any(chunk[1][0] >= 0), part, lambda *_: nothing, *arguments)
            else:
                summed, kept = part(*arguments)
            return jax.tree.map(jnp.add, so_far, summed), kept

        return jax.lax.scan(add, nothing[0], (rows, given))

    @jax.custom_vjp
    def value(*arguments):
        return add_up(lambda *chunk: (total(*chunk), ()), *arguments)[0]

    def with_gradient(*arguments):
        def part(*chunk):
            summed, (by_table, by_rows) = jax.value_and_grad(total, argnums=(0, 1))(*chunk)
            return (summed, by_table), by_rows

        (summed, by_table), by_rows = add_up(part, *arguments)
        return summed, (by_table, by_rows)

    def scale(kept, cotangent):
        return *jax.tree.map(lambda gradient: (cotangent * gradient).astype(gradient.dtype), kept), None, None

    value.defvjp(with_gradient, scale)
    return value(table_SM, rows, given, constants)


def _chunks(array, size: int, fill=0):
    """Cuts (N, ...) into (chunks, size, ...), the last one filled up."""
    wide = jnp.pad(array, ((0, -len(array) % size), *[(0, 0)] * (array.ndim - 1)), constant_values=fill)
    return wide.reshape(-1, size, *array.shape[1:])


def _count(target_N: Array) -> Array:
    return jnp.sum(target_N >= 0).astype(jnp.float32)


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


def catalogue_kl(
    state_BTM: Array,
    rows_IM: Array,
    teacher_BTN: Array,
    teacher_IN: Array,
    known_BT: Array,
    never_BI: Array,
    *,
    temperature: float,
) -> Term:
    """Sums `kl_loss` of a teacher's and a student's inner products over the T places of each row of a batch.

    An item of which `never` says so is no candidate in that row: there are the items that the row holds, whose next one
    the teacher has learnt by heart, and those without interactions. A row's logits are held at a time.
    """

    def total(rows_IM, row, given, constants):
        (state_TM,), (known_T, teacher_TN, never_I), (teacher_IN,) = row, given, constants
        pair = (jnp.where(never_I, NEVER, x) for x in (state_TM @ rows_IM.T, teacher_TN @ teacher_IN.T))
        return kl_loss(*pair, known_T, temperature=temperature)[0]

    given = known_BT, teacher_BTN, never_BI
    return _sum_in_one_pass(total, rows_IM, (state_BTM,), given, (teacher_IN,)), jnp.sum(known_BT)


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)
