import dataclasses

import jax
import numpy as np
import pytest

from bdlm_jax.domain import ncf, sasrec
from bdlm_jax.domain.arm import Inputs
from bdlm_jax.lm import generate
from bdlm_jax.serving import artefact, scores
from bdlm_jax.serving.artefact import ServedDomain

NOBODY_4D = np.zeros((1, 4), np.float32)


def served_lm(tiny_run, **prompts):
    served = artefact.load_lm_arm(tiny_run[1])
    return dataclasses.replace(served, prompts=dataclasses.replace(served.prompts, **prompts))


def test_a_new_node_is_one_propagation_over_its_history():
    item_ID = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]], np.float32)
    arm = ServedDomain("lightgcn", item_ID[:1], item_ID, np.array([3, 0, 8]))
    # Items 0 and 1, with degrees 3 + 1 and 0 + 1 once the new user has them, and 2 items in the history.
    state = np.array([1.0 / np.sqrt(2 * 4), 2.0 / np.sqrt(2 * 1)])
    expected_I = [state[0], 2 * state[1], 3 * state[0] + state[1]]
    np.testing.assert_allclose(scores.domain_scores(arm, [[0, 1]]), [expected_I], rtol=1e-6)
    np.testing.assert_array_equal(scores.domain_scores(arm, [np.zeros(0, np.int64)]), np.zeros((1, 3)))


def test_sasrec_reads_a_new_history():
    domain = sasrec.sasrec_arm(Inputs(width=4), length=4).init(jax.random.key(0))
    item_ID = np.asarray(jax.random.normal(jax.random.key(1), (3, 4)))
    state_D = sasrec.States(2, 2).apply({"params": domain}, item_ID, np.array([[2, 0, 1, -1]]))[0, 3]
    served = ServedDomain("sasrec", NOBODY_4D, item_ID, np.ones(3), domain, {"length": 4}, reads_history=True)
    (new_I,) = scores.domain_scores(served, [[2, 0, 1]])
    np.testing.assert_allclose(new_I, item_ID @ state_D, rtol=1e-4, atol=1e-5)


def test_ncf_scores_by_its_own_network():
    arm = ncf.ncf_arm(Inputs(width=4), hidden=(8,))
    domain = arm.init(jax.random.key(0))
    item_ID, user_UD = jax.random.normal(jax.random.key(1), (3, 4)), jax.random.normal(jax.random.key(2), (2, 4))
    served = ServedDomain("ncf", user_UD, item_ID, np.ones(3), domain, {"hidden": [8]}, dot=False)
    expected_UI = arm.score(domain, user_UD, item_ID)
    np.testing.assert_allclose(scores.domain_scores(served, users=[1, 0]), expected_UI[::-1], rtol=1e-5)


def test_top_items_leave_out_the_seen_and_keep_catalogue_order_in_ties():
    scores_I = np.array([0.5, 2.0, 0.5, 3.0, 0.5, -1.0], np.float32)
    for seen, k, best in (([3], 2, [1, 0]), ([3], 3, [1, 0, 2]), ([0, 1, 2], 10, [3, 4, 5]), (range(6), 1, [])):
        assert scores.top_items(scores_I, seen=seen, k=k).tolist() == best
    unlikely_I = np.array([-np.inf, 1.0, -np.inf, 2.0])  # no score is so low that it stands for "seen"
    assert scores.top_items(unlikely_I, seen=[0, 3], k=3).tolist() == [1, 2]


def test_a_user_is_named_only_where_the_run_reads_names(tiny_run):
    served, history = served_lm(tiny_run), [3, 4]
    new_I, turned_I = scores.lm_scores(served, [history, history[::-1]])
    assert np.isfinite(new_I).all()
    assert not np.allclose(new_I, turned_I), "order counts"
    for named in (False, True):
        reading = served_lm(tiny_run, unnamed=not named)
        assert np.allclose(new_I, scores.lm_scores(reading, [history])), "nobody's name is shown for a new user"
        assert np.allclose(new_I, scores.lm_scores(reading, [history], users=[0])) != named


@pytest.mark.parametrize("user_token", ["start", "end", "none"])
@pytest.mark.parametrize("kind", ["ids", "ids_titles", "text"])
def test_words_are_asked_for_behind_the_items_token(tiny_run, monkeypatch, kind, user_token):
    """On the card, or behind the history where titles stand in it; and no special token can be written."""
    served = served_lm(tiny_run, kind=kind, user_token=user_token)
    vocabulary, asked = served.vocabulary, {}

    def write(params, config, tokens, mask, **options):
        asked.update(options, tokens=tokens)
        text = vocabulary.encode_text(["ab"])[0].tolist()
        return np.array([[*text, vocabulary.eos, vocabulary.pad]] * 2)

    monkeypatch.setattr(generate, "generate", write)
    assert scores.lm_words(served, [3, 4], [7, 9], user=1) == ["ab", "ab"]
    before = [vocabulary.bos]
    if kind == "ids_titles":
        before += [vocabulary.unnamed_user] if user_token == "start" else []
        before += [vocabulary.item_token(3), *served.titles[3], vocabulary.item_token(4), *served.titles[4]]
    assert asked["tokens"].tolist() == [[*before, vocabulary.item_token(item)] for item in (7, 9)]
    forbidden = set(np.flatnonzero(~asked["allowed_V"]).tolist())
    unknown = range(len(vocabulary.tokenizer), vocabulary.n_text)
    assert forbidden == {vocabulary.bos, vocabulary.pad, vocabulary.unnamed_user, vocabulary.unnamed_item, *unknown}


def test_words_leave_room_for_themselves_in_a_long_history(tiny_run, monkeypatch):
    served, sizes = served_lm(tiny_run, kind="ids_titles", max_tokens=40), []

    def write(params, config, tokens, mask, *, max_new, **options):
        sizes.append(tokens.shape[1] + max_new)
        return np.zeros((1, 1), int)

    monkeypatch.setattr(generate, "generate", write)
    scores.lm_words(served, np.arange(40), [45])
    assert 30 < sizes[0] <= 40
