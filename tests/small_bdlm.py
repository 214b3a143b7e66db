"""A BDLM of a few hundred numbers for the tests of steps: 9 users, 10 items of which the last is cold, one layer."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_softmax

from bdlm_jax.domain import lightgcn, negatives
from bdlm_jax.domain.arm import Inputs
from bdlm_jax.evaluation import scorers
from bdlm_jax.lm import causal_lm, packing, prompts
from bdlm_jax.lm.vocabulary import Vocabulary
from bdlm_jax.mutual import domain_epoch, lm_step, optimizer, sharing
from bdlm_jax.mutual.options import DomainWeights, LMWeights, Meeting
from bdlm_jax.types import TrainState

N_USERS, N_ITEMS, N_TEXT, D, M = 9, 10, 16, 4, 8
COLD = 9
HISTORIES = [[0, 1, 2], [1, 2, 3, 4], [5], [6, 0, 8], [3, 1, 5, 6, 2], [4, 0, 6], [2, 5], [7, 3, 6, 1], [8, 7]]
TITLES = [np.array([5 + i % 5, 10 + i % 6][: 1 + i % 2], np.int32) for i in range(N_ITEMS)]
LM_ALL = LMWeights(item=1.0, text=0.3, align_user=0.2, align_item=0.4, kl=0.5)
HIDDEN = jax.jit(causal_lm.lm_hidden, static_argnums=1)
DOMAIN_ALL = DomainWeights(bpr=1.0, regularisation=1e-2, align_user=0.2, align_item=0.4, kl=0.5)


def make_vocabulary() -> Vocabulary:
    """Numbers the tokens without a tokenizer."""
    made = Vocabulary(None, N_USERS, N_ITEMS)
    made.__dict__.update(n_text=N_TEXT, pad=0, bos=1, eos=2, unnamed_user=3, unnamed_item=4)
    return made


def make_meeting(*, reads="propagated", align="mse", dropout=0.0) -> Meeting:
    sizes = {"vocab_size": N_TEXT, "width": M, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "mlp_width": 12}
    return Meeting(causal_lm.LMConfig(**sizes, dropout=dropout), reads=reads, align=align, temperature=1.5)


def make_edges():
    return np.repeat(np.arange(N_USERS), [len(h) for h in HISTORIES]), np.concatenate(HISTORIES)


def make_arm():
    inputs = Inputs(D, N_USERS, N_ITEMS, *make_edges())
    return lightgcn.lightgcn_arm(inputs, n_layers=2, layer_weights="learned", backend="dense")


def make_params(arm, meeting, lm=None):
    keys = jax.random.split(jax.random.key(3), 4)
    return {
        "shared": sharing.init_shared(keys[0], n_users=N_USERS, n_items=N_ITEMS, width=D, std=0.5),
        "domain": arm.init(keys[1]),
        "lm": {
            **(lm or causal_lm.init_lm(keys[2], meeting.lm)),
            "bridge": sharing.init_bridge(keys[3], width=D, lm_width=meeting.lm.width),
        },
    }


def history_prompt(user):
    options, titles = prompts.PromptOptions(max_tokens=16), TITLES
    return prompts.history_prompt(make_vocabulary(), HISTORIES[user], options, titles=titles, user=user, read_user=True)


def make_rows():
    """Every history with its titles and every item's card, several to a row of 16 tokens."""
    cards = [prompts.card_prompt(make_vocabulary(), item, title) for item, title in enumerate(TITLES)]
    return packing.pack([*map(history_prompt, range(N_USERS)), *cards], 16)


def hidden_alone(params, prompt, arm, meeting):
    """(tokens, M): the states of one prompt in a row of its own."""
    rows_XM, _ = sharing.id_rows(params, meeting=meeting, arm=arm)
    packed = packing.pack([prompt], 16)
    hidden = HIDDEN(params["lm"], meeting.lm, packed.tokens, packed.positions, packed.segments, rows_XM)
    return np.asarray(hidden[0, : len(prompt)], np.float64)


def whole_batch():
    rows = make_rows()
    return rows.rows(np.arange(len(rows)))


def lm_constants():
    known = negatives.make_seen(*make_edges(), N_USERS, N_ITEMS)
    return {"warm_I": jnp.arange(N_ITEMS) != COLD, "known": known}


def domain_constants():
    return lm_constants() | domain_epoch.make_epoch_constants(*make_edges(), n_users=N_USERS, n_items=N_ITEMS)


def make_views(arm, meeting, params):
    """What each arm sees of the other: (for the LM, for the domain arm)."""
    sizes = {"arm": arm, "meeting": meeting, "n_users": N_USERS, "n_items": N_ITEMS}
    states = scorers.read_states(params, make_rows(), **sizes)
    return scorers.domain_view(arm, params), scorers.lm_view(params, states, states)


def make_optimizer(*, lm="lm", shared="shared", domain="domain", rate=0.01):
    """Groups of one rate; pass optimizer.FROZEN for what must not move."""
    rules = [("lm/.*", lm), ("shared/.*", shared), ("domain/.*", domain)]
    groups = {name: {"learning_rate": rate} for name in {lm, shared, domain} - {optimizer.FROZEN}}
    return optimizer.make_optimizer(rules=rules, groups=groups, clip_norm=1.0)


def make_state(params, optimizer):
    return TrainState(params, optimizer.init(params), jnp.int32(0), jax.random.key(11))


def make_lm_step(arm, meeting, *, optimizer, weights=LM_ALL, **options):
    return lm_step.make_lm_step(arm=arm, meeting=meeting, weights=weights, optimizer=optimizer, **options)


def make_domain_epoch(arm, meeting, *, optimizer, weights=DOMAIN_ALL, kl_users=8, kl_items=0):
    step = domain_epoch.make_domain_step(arm=arm, meeting=meeting, weights=weights, optimizer=optimizer)
    return domain_epoch.make_domain_epoch(step, batch_size=16, kl_users=kl_users, kl_items=kl_items)


def run_steps(compiled, state, batches, view, constants):
    """Runs a compiled step from a state on the host to another, and returns that and the metrics of every step."""
    state, seen = compiled.place_state(state), []
    view, constants = compiled.place_constants(view), compiled.place_constants(constants)
    for batch in batches:
        state, metrics = compiled.run(state, batch, view, constants)
        seen.append({name: float(value) for name, value in metrics.items()})
    return compiled.fetch_state(state), seen


def align_mse(z, e, table):
    """In units of the deviation of the domain arm's whole table."""
    return np.mean((z - e) ** 2, axis=-1) / np.std(table) ** 2


def softened_kl(teacher, student, temperature):
    t, s = log_softmax(teacher / temperature), log_softmax(student / temperature)
    return temperature**2 * np.sum(np.exp(t) * (t - s))
