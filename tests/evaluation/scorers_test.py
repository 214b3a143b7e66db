import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_bdlm
from scipy.sparse import csr_matrix
from small_bdlm import N_ITEMS, N_USERS, TITLES

from bdlm_jax.domain.arm import dot_score
from bdlm_jax.evaluation import scorers
from bdlm_jax.lm import causal_lm, packing, prompts

ARM = small_bdlm.make_arm()
MEETING = small_bdlm.make_meeting()
SIZES = {"arm": ARM, "meeting": MEETING, "n_users": N_USERS, "n_items": N_ITEMS}
USERS = np.arange(N_USERS)


@pytest.fixture(scope="module")
def params():
    return small_bdlm.make_params(ARM, MEETING)


@pytest.fixture(scope="module")
def states(params):
    return scorers.read_states(params, small_bdlm.make_rows(), **SIZES)


def test_state_scores_are_the_logits_computed_the_long_way(params, states):
    user = 4
    h = small_bdlm.hidden_alone(params, small_bdlm.history_prompt(user), ARM, MEETING)[-1]
    _, item_ID = ARM.encode(params["shared"], params["domain"])
    wanted = [h @ (np.asarray(item_ID[i]) @ np.asarray(params["lm"]["bridge"]["into"])) for i in range(N_ITEMS)]
    scores = scorers.state_scorer(states["user"], states["rows_item"]).score(np.array([0, user]))
    np.testing.assert_allclose(scores[1], wanted, rtol=1e-4, atol=1e-5)


def test_a_pool_adds_standard_scores_and_ends_in_its_first_or_second():
    first_BI, second_BI = np.array([[1.0, 2, 6], [0, 0, 3]]), np.array([[5.0, 1, 0], [1, 2, 3]])
    pair = [
        scorers.CatalogueScorer(lambda user_B, s=scores: jnp.asarray(s)[user_B]) for scores in (first_BI, second_BI)
    ]
    standard = [(s - s.mean(1, keepdims=True)) / s.std(1, keepdims=True) for s in (first_BI, second_BI)]
    for weight in (0.0, 0.5):
        found = scorers.pool_scorer(*pair, weight).score(np.arange(2))
        np.testing.assert_allclose(found, standard[0] + weight * standard[1], rtol=1e-5)
    flat = scorers.pool_scorer(pair[0], scorers.popularity_scorer(np.ones(3)), 9.0).score(np.arange(2))
    np.testing.assert_allclose(flat, standard[0], rtol=1e-5)  # who scores all alike says nothing


@pytest.mark.parametrize("batch_rows", [1, 3])
def test_states_do_not_depend_on_the_rows_of_a_pass(params, states, batch_rows):
    rows = small_bdlm.make_rows()
    assert len(rows) % 3  # the last pass is padded
    again = scorers.read_states(params, rows, **SIZES, batch_rows=batch_rows)
    for name in states:
        np.testing.assert_allclose(again[name], states[name], atol=2e-6)
    assert np.abs(states["user"]).min(axis=1).all() and np.abs(states["item"]).min(axis=1).all()


def test_what_no_prompt_reads_is_zero(params):
    rows = packing.pack([prompts.card_prompt(small_bdlm.make_vocabulary(), 3, TITLES[3])], 16)
    found = scorers.read_states(params, rows, **SIZES)
    assert not found["user"].any()
    assert np.flatnonzero(found["item"].any(axis=1)).tolist() == [3]


def test_domain_scores_are_inner_products(params):
    user_UD, item_ID = ARM.encode(params["shared"], params["domain"])
    scores = scorers.domain_scorer(ARM, params).score(np.array([2, 0, 2]))
    np.testing.assert_allclose(scores, np.asarray(user_UD)[[2, 0, 2]] @ np.asarray(item_ID).T, rtol=1e-5, atol=1e-6)


def test_closed_form_scores_sum_the_rows_of_what_was_had():
    had_UI = csr_matrix(np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], np.float32))
    weights = np.array([[0, 2, 3], [5, 0, 0], [7, 0, 0]], np.float32)
    for given in (weights, csr_matrix(weights)):
        scores = scorers.closed_form_scorer(had_UI, given).score(np.array([2, 0, 1]))
        np.testing.assert_array_equal(scores, [[5, 0, 0], [7, 2, 3], [0, 0, 0]])


def test_views_hold_what_the_other_arm_needs(params, states):
    for_lm, for_domain = small_bdlm.make_views(ARM, MEETING, params)
    assert set(for_lm) == {"user", "item", "domain"}
    bridge = params["lm"]["bridge"]
    np.testing.assert_allclose(for_domain["z_item"], states["item"] @ bridge["out"] + bridge["out_bias"], rtol=1e-5)
    np.testing.assert_array_equal(for_domain["state_user"], states["user"])


@pytest.fixture(scope="module")
def texts():
    generator = np.random.default_rng(0)
    prefix = generator.integers(5, 16, (N_USERS, 6)).astype(np.int32)
    prefix_mask = np.arange(6) < generator.integers(2, 7, (N_USERS, 1))
    # Items 1, 4 and 8 have the same title; 2 has its tokens and one more.
    titles = generator.integers(5, 16, (N_ITEMS, 4)).astype(np.int32)
    title_mask = np.arange(4) < generator.integers(1, 4, (N_ITEMS, 1))
    titles[[4, 8]], title_mask[[4, 8]] = titles[1], title_mask[1]
    titles[8][~title_mask[8]] = 15  # what stands in the padding makes no other title
    titles[2], title_mask[2] = titles[1], np.arange(4) < title_mask[1].sum() + 1
    return (prefix, prefix_mask), (titles, title_mask)


def test_equal_titles_tie_to_the_bit_and_others_do_not(params, texts):
    scorer = scorers.text_scorer(params["lm"], MEETING.lm, *texts, users_at_once=4)
    items = np.tile(np.array([[8, 2, 1, 0, 4, -1]], np.int32), (N_USERS, 1))
    scores = np.asarray(scorer.score(USERS, items))
    assert scores.shape == (N_USERS, 6)
    assert (scores[:, 0] == scores[:, 2]).all() and (scores[:, 2] == scores[:, 4]).all()
    assert (scores[:, 1] < scores[:, 0]).all()
    # The order of the candidates, and who else is among them, changes next to nothing.
    turned = np.asarray(scorer.score(USERS, items[:, [3, 2, 1]]))
    np.testing.assert_allclose(turned, scores[:, [3, 2, 1]], rtol=1e-5)


def test_a_title_scores_the_sum_of_its_tokens_log_likelihoods(params, texts):
    (prefix, prefix_mask), (titles, title_mask) = texts
    user, item = 5, 2
    head, tail = prefix[user][prefix_mask[user]], titles[item][title_mask[item]]
    tokens = np.concatenate([head, tail])[None]
    ones = np.ones_like(tokens)
    hidden = causal_lm.lm_hidden(params["lm"], MEETING.lm, tokens, np.cumsum(ones, 1) - 1, ones, None)
    log_probabilities = jax.nn.log_softmax(causal_lm.text_logits(params["lm"], MEETING.lm, hidden))[0]
    wanted = sum(float(log_probabilities[len(head) + n - 1, t]) for n, t in enumerate(tail))
    score = scorers.text_scorer(params["lm"], MEETING.lm, *texts).score(np.array([user]), np.array([[item, 0]]))
    np.testing.assert_allclose(score[0, 0], wanted, rtol=1e-4)
    assert jnp.shape(score) == (1, 2)


def test_a_later_validation_compiles_nothing(params, texts, caplog):
    def compilations(params):
        caplog.clear()
        with jax.log_compiles():
            states = scorers.read_states(params, small_bdlm.make_rows(), **SIZES)
            scorers.state_scorer(states["user"], states["rows_item"]).score(USERS)
            scorers.domain_scorer(ARM, params).score(USERS)
            scorers.text_scorer(params["lm"], MEETING.lm, *texts).score(USERS, np.tile(np.arange(7), (N_USERS, 1)))
        return [record.getMessage() for record in caplog.records if "XLA compilation" in record.getMessage()]

    moved = jax.tree.map(lambda leaf: leaf * 1.5, params)
    assert compilations(params) and compilations(moved) == []


def test_ranks_do_not_come_from_rounded_products(params):
    """What an accelerator is asked for; a CPU multiplies float32 whatever the word."""
    view = scorers.domain_view(ARM, params)
    programs = [
        scorers._pair_scores.lower(view, USERS, score=dot_score),
        scorers._encode.lower(params["shared"], params["domain"], arm=ARM),
        scorers._id_rows.lower(params, meeting=MEETING, arm=ARM),
    ]
    for text in (program.as_text() for program in programs):
        assert text.count("stablehlo.dot_general") == text.count("precision = [HIGHEST, HIGHEST]") > 0
