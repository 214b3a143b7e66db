"""The README's claim: jit, pmap and mesh train both arms to the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_bdlm

from bdlm_jax.mutual import domain_epoch
from bdlm_jax.mutual.losses import ALIGN
from bdlm_jax.mutual.optimizer import FROZEN
from bdlm_jax.runtime.parallel import compile_step

LM_OPTIMIZER = small_bdlm.make_optimizer(domain=FROZEN)
DOMAIN_OPTIMIZER = small_bdlm.make_optimizer(lm=FROZEN)


def contrast(shared, domain, user_B, item_B, weight_B, key):
    """A domain model's own loss that draws, and compares the rows of the batch with each other."""
    user_BD = shared["user"][user_B] + jax.random.uniform(key, (len(user_B), small_bdlm.D))
    rows_B = jax.nn.logsumexp(user_BD @ shared["item"][item_B].T, axis=1)
    return jnp.sum(weight_B * rows_B), jnp.sum(weight_B)


ARM = small_bdlm.make_arm()._replace(auxiliary=contrast)


def train_lm(parallel, meeting, params, view, **options):
    drawn = 6 if meeting.align == "infonce" else 0
    step = small_bdlm.make_lm_step(ARM, meeting, optimizer=LM_OPTIMIZER, softmax_items=drawn)
    compiled = compile_step(step, parallel=parallel, **options)
    rows, state = small_bdlm.make_rows(), small_bdlm.make_state(params, LM_OPTIMIZER)
    batches = [rows.batch(number, batch_size=8, seed=0) for number in range(4)]
    constants = small_bdlm.lm_constants() | {"warm_item_W": np.delete(np.arange(small_bdlm.N_ITEMS), small_bdlm.COLD)}
    return small_bdlm.run_steps(compiled, state, batches, view, constants)


def train_domain(parallel, meeting, params, view):
    epoch = small_bdlm.make_domain_epoch(
        ARM, meeting, optimizer=DOMAIN_OPTIMIZER, kl_items=6 if meeting.align == "cosine" else 0
    )
    compiled, state = compile_step(epoch, parallel=parallel), small_bdlm.make_state(params, DOMAIN_OPTIMIZER)
    batches = [domain_epoch.make_slots(batch_size=16, kl_users=8)] * 2
    return small_bdlm.run_steps(compiled, state, batches, view, small_bdlm.domain_constants())


# "infonce" alone gathers over the devices; a case costs three compilations of four seconds.
QUICK = [(train_lm, "infonce"), (train_domain, "cosine")]
SLOW = [(train, align) for align in ALIGN for train in (train_lm, train_domain) if (train, align) not in QUICK]


@pytest.mark.parametrize(("train", "align"), QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW])
def test_three_ways_train_to_the_same_numbers(train, align):
    meeting = small_bdlm.make_meeting(align=align, dropout=0.2)
    params = small_bdlm.make_params(ARM, meeting)
    view = small_bdlm.make_views(ARM, meeting, params)[0 if train is train_lm else 1]
    wanted, wanted_metrics = train("jit", meeting, params, view)
    assert {"align_user", "align_item", "kl"} < set(wanted_metrics[0])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), wanted.params["shared"], params["shared"])
    assert min(jax.tree.leaves(moved)) > 1e-3
    ways = [("pmap", {}), ("mesh", {})]
    if train is train_lm:
        ways[1] = ("mesh", {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}})
    for parallel, options in ways:
        state, metrics = train(parallel, meeting, params, view, **options)
        for mine, theirs in zip(metrics, wanted_metrics):
            for name, value in theirs.items():
                np.testing.assert_allclose(mine[name], value, rtol=1e-4, err_msg=f"{parallel} {name}")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), state.params, wanted.params)
