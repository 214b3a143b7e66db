import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_bdlm
from scipy.special import log_softmax
from small_bdlm import COLD, HISTORIES, LM_ALL, N_ITEMS, N_USERS

from bdlm_jax.lm import causal_lm, prompts
from bdlm_jax.lm import packing as batches
from bdlm_jax.mutual import domain_epoch, lm_step, sharing
from bdlm_jax.mutual.options import DomainWeights, LMWeights
from bdlm_jax.types import TrainState

ARM = small_bdlm.make_arm()
BRIDGE = small_bdlm.make_bridge()
HIDDEN = jax.jit(causal_lm.lm_hidden, static_argnums=1)
WARM_I = np.arange(N_ITEMS) != COLD


@pytest.fixture(scope="module")
def params():
    return small_bdlm.make_params(ARM, BRIDGE)


def hidden_alone(params, prompt):
    """(tokens, M): one prompt in a row of its own, without packing."""
    packed = batches.pack([prompt], 16)
    rows_XM, _ = sharing.id_rows(params, bridge=BRIDGE, arm=ARM)
    hidden = HIDDEN(params["lm"], BRIDGE.lm, packed.tokens, packed.positions, packed.segments, rows_XM)
    return np.asarray(hidden[0, : len(prompt)], np.float64)


def align_mse(z, e, table):
    """In units of the deviation of the domain arm's whole table."""
    return np.mean((z - e) ** 2, axis=-1) / np.std(table) ** 2


def softened_kl(teacher, student, temperature):
    t, s = log_softmax(teacher / temperature), log_softmax(student / temperature)
    return temperature**2 * np.sum(np.exp(t) * (t - s))


def test_every_term_of_the_lm_equals_the_prompts_taken_one_by_one(params):
    view, _ = small_bdlm.make_views(ARM, BRIDGE, params)
    user_UD, item_ID = (np.asarray(view[name], np.float64) for name in ("user", "item"))
    rows_IM = np.asarray(sharing.id_rows(params, bridge=BRIDGE, arm=ARM)[1], np.float64)
    embedding_VM, out = params["lm"]["embedding"], params["lm"]["bridge"]
    to_width = lambda h: h @ out["out"] + out["out_bias"]  # noqa: E731
    vocabulary = small_bdlm.make_vocabulary()
    wanted = dict.fromkeys(("item", "text", "align_user", "align_item", "kl"), 0.0)
    counts = dict.fromkeys(wanted, 0)
    for user, history in enumerate(HISTORIES):
        prompt = prompts.history_prompt(
            vocabulary,
            history,
            prompts.PromptOptions(max_tokens=16),
            titles=small_bdlm.TITLES,
            user=user,
            read_user=True,
        )
        hidden = hidden_alone(params, prompt)
        for at in np.flatnonzero(prompt.item_targets >= 0):
            logits = np.where(WARM_I, hidden[at] @ rows_IM.T, -np.inf)
            wanted["item"] -= log_softmax(logits)[prompt.item_targets[at]]
            counts["item"] += 1
        for at in np.flatnonzero(prompt.text_targets >= 0):
            wanted["text"] -= log_softmax(hidden[at] @ embedding_VM.T)[prompt.text_targets[at]]
            counts["text"] += 1
        wanted["align_user"] += align_mse(to_width(hidden[-1]), user_UD[user], user_UD)
        open_I = WARM_I & ~np.isin(np.arange(N_ITEMS), history)
        teacher, student = user_UD[user] @ item_ID.T, hidden[-1] @ rows_IM.T
        wanted["kl"] += softened_kl(teacher[open_I], student[open_I], BRIDGE.temperature)
        counts["align_user"] += 1
        counts["kl"] += 1
    for item, title in enumerate(small_bdlm.TITLES):
        prompt = prompts.card_prompt(vocabulary, item, title)
        hidden = hidden_alone(params, prompt)
        for at in np.flatnonzero(prompt.text_targets >= 0):
            wanted["text"] -= log_softmax(hidden[at] @ embedding_VM.T)[prompt.text_targets[at]]
            counts["text"] += 1
        if item != COLD:
            wanted["align_item"] += align_mse(to_width(hidden[-1]), item_ID[item], item_ID)
            counts["align_item"] += 1

    rows = small_bdlm.make_rows()
    terms = jax.jit(
        lambda params, batch: lm_step.lm_losses(
            params,
            batch,
            view,
            small_bdlm.lm_constants(),
            arm=ARM,
            bridge=BRIDGE,
            weights=LM_ALL,
            keys_B=None,
            axis_name=None,
        )
    )(params, rows.rows(np.arange(len(rows))))
    assert set(terms) == set(wanted)
    for name, (total, count) in terms.items():
        np.testing.assert_allclose(total, wanted[name], rtol=2e-4, err_msg=name)
        assert count == counts[name], name


def test_every_term_of_the_domain_arm_equals_its_formula(params):
    _, view = small_bdlm.make_views(ARM, BRIDGE, params)
    user_UD, item_ID = (np.asarray(t, np.float64) for t in ARM.encode(params["shared"], params["domain"]))
    user, positive, negative = np.array([0, 1, 8, 0]), np.array([1, 4, 7, 2]), np.array([3, 0, 1, 6])
    weight = np.array([1.0, 1.0, 1.0, 0.0], np.float32)
    batch = {
        "user": user, "positive": positive, "negative": negative, "weight": weight,
        "align_item": np.array([COLD, 0, 0]), "kl_user": np.array([4, 2]), "kl_item": np.array([1, 7, 0, COLD, 4]),
    }  # fmt: skip
    constants = small_bdlm.domain_constants()
    terms = domain_epoch.domain_losses(
        params, batch, view, constants, arm=ARM, bridge=BRIDGE, weights=small_bdlm.DOMAIN_ALL, axis_name=None
    )
    margin = np.sum(user_UD[user] * (item_ID[positive] - item_ID[negative]), axis=1)
    shared = {name: np.asarray(table, np.float64) for name, table in params["shared"].items()}
    norms = sum(np.sum(t**2, 1) for t in (shared["user"][user], shared["item"][positive], shared["item"][negative]))
    degree_0 = sum(0 in history for history in HISTORIES)
    near = align_mse(item_ID, np.asarray(view["z_item"]), item_ID)
    kl = 0.0
    for u in (4, 2):
        open_C = np.array([i for i in (1, 7, 0, COLD, 4) if i not in HISTORIES[u]])
        teacher = np.asarray(view["state_user"])[u] @ np.asarray(view["rows_item"])[open_C].T
        kl += softened_kl(teacher, user_UD[u] @ item_ID[open_C].T, BRIDGE.temperature)
    wanted = {
        "bpr": (np.log1p(np.exp(-margin)) @ weight, 3),
        "regularisation": (0.5 * norms @ weight, 3),
        "align_item": (near[COLD] / (1 + 0) + 2 * near[0] / (1 + degree_0), 1 + 2 / (1 + degree_0)),
        "align_user": (align_mse(user_UD, np.asarray(view["z_user"]), user_UD)[[4, 2]].sum(), 2),
        "kl": (kl, 2),
    }
    assert set(terms) == set(wanted)
    for name, (total, count) in terms.items():
        np.testing.assert_allclose([total, count], wanted[name], rtol=1e-4, err_msg=name)


def test_a_weight_of_zero_leaves_the_term_out(params):
    rows = small_bdlm.make_rows()
    terms = jax.eval_shape(
        lambda: lm_step.lm_losses(
            params,
            rows.rows(np.arange(4)),
            {},
            small_bdlm.lm_constants(),
            arm=ARM,
            bridge=BRIDGE,
            weights=LMWeights(item=1.0, text=0.0),
            keys_B=None,
            axis_name=None,
        )
    )
    assert list(terms) == ["item"]


def test_the_step_reports_the_weighted_sum_and_draws_new_dropout(params):
    bridge = small_bdlm.make_bridge(reads="layer0", dropout=0.5)
    weights, optimizer = LMWeights(item=2.0, text=0.5), small_bdlm.make_optimizer(rate=0.0)
    step = jax.jit(small_bdlm.make_lm_step(ARM, bridge, weights=weights, optimizer=optimizer))
    batch = small_bdlm.make_rows().batch(0, batch_size=8, seed=0)
    state = small_bdlm.make_state(params, optimizer)
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch, {}, small_bdlm.lm_constants())
        np.testing.assert_allclose(metrics["loss"], 2.0 * metrics["item"] + 0.5 * metrics["text"], rtol=1e-6)
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3  # the params stand still (rate 0): only dropout differs
    assert state.step == 3
    _, again = step(small_bdlm.make_state(params, optimizer), batch, {}, small_bdlm.lm_constants())
    assert float(again["loss"]) == losses[0]


def test_an_epoch_shows_every_edge_once_with_unseen_warm_negatives():
    user_E, item_E = small_bdlm.make_edges()

    def counting_step(state, batch, view, constants, *, axis_name):
        u, w = batch["user"], batch["weight"]
        tables = state.params["tables"]
        tables = {
            "positive": tables["positive"].at[u, batch["positive"]].add(w),
            "negative": tables["negative"].at[u, batch["negative"]].add(w),
            "align": tables["align"].at[batch["align_item"]].add(1),
            "kl": tables["kl"].at[batch["kl_user"]].add(1),
        }
        return state._replace(params=state.params | {"tables": tables}, step=state.step + 1), {"w": w.sum()}

    zeros = jnp.zeros((N_USERS, N_ITEMS))
    tables = {"positive": zeros, "negative": zeros, "align": jnp.zeros(N_ITEMS), "kl": jnp.zeros(N_USERS)}
    shared = {"user": jnp.zeros((N_USERS, 1)), "item": jnp.zeros((N_ITEMS, 1))}
    state = TrainState({"shared": shared, "tables": tables}, (), jnp.int32(0), jax.random.key(0))
    # 10 a step do not divide the 27 edges.
    epoch = jax.jit(domain_epoch.make_domain_epoch(counting_step, batch_size=10, kl_users=4))
    slots = domain_epoch.make_slots(batch_size=10, kl_users=4)
    assert len(user_E) == 27
    for number in range(1, 4):
        state, metrics = epoch(state, slots, {}, small_bdlm.domain_constants())
        made = state.params["tables"]
        wanted = np.zeros((N_USERS, N_ITEMS))
        wanted[user_E, item_E] = number
        np.testing.assert_array_equal(made["positive"], wanted)
        np.testing.assert_allclose(metrics["w"], 27 / 3)
    assert state.step == 3 * 3
    assert made["negative"].sum() == 3 * 27
    assert not np.any(made["negative"][user_E, item_E])
    assert not np.any(made["negative"][:, COLD])
    assert made["align"].sum() == 3 * 3 * 10 and made["kl"].sum() == 3 * 3 * 4
    assert made["align"][COLD] > 0 and np.count_nonzero(made["align"]) > 6


def test_an_arm_alone_needs_no_bridge_and_learns(params):
    alone = {"shared": params["shared"], "domain": params["domain"]}
    optimizer = small_bdlm.make_optimizer(rate=0.05)
    epoch = jax.jit(
        small_bdlm.make_domain_epoch(ARM, None, weights=DomainWeights(), optimizer=optimizer, kl_users=0, batch_size=27)
    )
    state, losses = small_bdlm.make_state(alone, optimizer), []
    for _ in range(30):
        state, metrics = epoch(state, domain_epoch.make_slots(batch_size=27), {}, small_bdlm.domain_constants())
        losses.append(float(metrics["bpr"]))
    assert losses[-1] < 0.5 * losses[0]
