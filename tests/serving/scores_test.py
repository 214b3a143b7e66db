import dataclasses

import jax
import numpy as np
import pytest

from bdlm_jax.domain import ncf, sasrec
from bdlm_jax.domain.arm import Inputs
from bdlm_jax.lm import generate
from bdlm_jax.serving import artefact as serving
from bdlm_jax.serving import scores as scoring


def served_domain(model, item_ID, degree_I, *, user_UD=None, domain=None, length=4):
    item_ID = np.asarray(item_ID, np.float32)
    user_UD = np.zeros((1, item_ID.shape[1]), np.float32) if user_UD is None else np.asarray(user_UD, np.float32)
    return serving.ServedDomain(
        model, user_UD, item_ID, np.asarray(degree_I), domain or {}, {"length": length},
        dot=model != "ncf", reads_history=model == "sasrec",
    )  # fmt: skip


def test_a_new_node_is_one_propagation_over_its_history():
    arm = served_domain("lightgcn", [[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]], [3, 0, 8])
    # Items 0 and 1, with degrees 3 + 1 and 0 + 1 once the new user has them, and 2 items in the history.
    state = np.array([1.0 / np.sqrt(2 * 4), 2.0 / np.sqrt(2 * 1)])
    expected_I = [state[0], 2 * state[1], 3 * state[0] + state[1]]
    np.testing.assert_allclose(scoring.domain_scores(arm, history=[0, 1]), expected_I, rtol=1e-6)
    np.testing.assert_array_equal(scoring.domain_scores(arm, history=np.zeros(0, np.int64)), np.zeros(3))


def test_sasrec_reads_a_new_history():
    length, width = 4, 4
    domain = sasrec.sasrec_arm(Inputs(width=width), length=length).init(jax.random.key(0))
    item_ID = jax.random.normal(jax.random.key(1), (3, width))
    state_D = sasrec.States(2, 2).apply({"params": domain}, item_ID, np.array([[2, 0, 1, -1]]))[0, 3]
    served = served_domain("sasrec", item_ID, [1, 1, 1], domain=domain, length=length)
    new_I = scoring.domain_scores(served, history=[2, 0, 1])
    np.testing.assert_allclose(new_I, item_ID @ state_D, rtol=1e-4, atol=1e-5)


def test_ncf_scores_by_its_own_network():
    arm = ncf.ncf_arm(Inputs(width=4))
    domain = arm.init(jax.random.key(0))
    item_ID, user_UD = jax.random.normal(jax.random.key(1), (3, 4)), jax.random.normal(jax.random.key(2), (2, 4))
    served = served_domain("ncf", item_ID, [1, 1, 1], user_UD=user_UD, domain=domain)
    expected_UI = arm.score(domain, user_UD, item_ID)
    np.testing.assert_allclose(scoring.domain_scores(served, user=1), expected_UI[1], rtol=1e-5)


def test_top_items_leave_out_the_seen_and_keep_catalogue_order_in_ties():
    scores_I = np.array([0.5, 2.0, 0.5, 3.0, 0.5, -1.0], np.float32)
    assert scoring.top_items(scores_I, seen=[3], k=2).tolist() == [1, 0]
    assert scoring.top_items(scores_I, seen=[3], k=3).tolist() == [1, 0, 2]
    assert scoring.top_items(scores_I, seen=[0, 1, 2], k=10).tolist() == [3, 4, 5]
    assert scoring.top_items(scores_I, seen=range(6), k=1).tolist() == []


@pytest.mark.parametrize("user_token", ["start", "end", "none"])
@pytest.mark.parametrize("kind", ["ids", "ids_titles", "text"])
def test_words_are_asked_for_behind_the_items_token(tiny_run, monkeypatch, kind, user_token):
    """On the card, or behind the history where titles stand in it; and no special token can be written."""
    served = serving.load_lm_arm(tiny_run[1])
    served = dataclasses.replace(served, prompts=served.prompts | {"kind": kind, "user_token": user_token})
    vocabulary, asked = served.vocabulary, {}

    def write(params, config, tokens, mask, **options):
        asked.update(options, tokens=tokens)
        text = vocabulary.encode_text(["ab"])[0].tolist()
        return generate.Generated(np.array([[*text, vocabulary.eos]] * 2), np.full(2, len(text) + 1), np.zeros(2))

    monkeypatch.setattr(generate, "generate", write)
    assert scoring.lm_words(served, [3, 4], [7, 9], user=1) == ["ab", "ab"]
    before = [vocabulary.bos]
    if kind == "ids_titles":
        before += [vocabulary.unnamed_user] if user_token == "start" else []
        before += [vocabulary.item_token(3), *served.titles[3], vocabulary.item_token(4), *served.titles[4]]
    assert asked["tokens"].tolist() == [[*before, vocabulary.item_token(item)] for item in (7, 9)]
    forbidden = set(np.flatnonzero(~asked["allowed_V"]).tolist())
    n_known = len(vocabulary.tokenizer)
    assert forbidden == {vocabulary.bos, vocabulary.pad, vocabulary.unnamed_user, vocabulary.unnamed_item} | set(
        range(n_known, vocabulary.n_text)
    )


def test_words_leave_room_for_themselves_in_a_long_history(tiny_run, monkeypatch):
    served = serving.load_lm_arm(tiny_run[1])
    served = dataclasses.replace(served, prompts=served.prompts | {"kind": "ids_titles", "max_tokens": 40})
    sizes = []

    def write(params, config, tokens, mask, *, max_new, **options):
        sizes.append(tokens.shape[1] + max_new)
        return generate.Generated(np.zeros((1, 1), int), np.zeros(1, int), np.zeros(1))

    monkeypatch.setattr(generate, "generate", write)
    scoring.lm_words(served, np.arange(40), [45])
    assert 30 < sizes[0] <= 40
