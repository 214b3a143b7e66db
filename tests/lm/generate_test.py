from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdlm_jax.lm.causal_lm import LMConfig, continuation_log_likelihood, init_lm, lm_hidden, text_logits
from bdlm_jax.lm.decoding import prefill
from bdlm_jax.lm.generate import beam_titles, generate, keep_top_p, make_trie, rank_items
from bdlm_jax.types import InputError

V, EOS, PAD = 24, 1, 0
CONFIG = LMConfig(vocab_size=V, width=16, n_layers=2, n_heads=4, n_kv_heads=2, mlp_width=24)
TITLES = [[5, 6, 7], [5, 6], [8], [5, 9, 10, 11], [8], [12, 5]]  # 2 and 4 are the same


@pytest.fixture(scope="module", autouse=True)
def _looped_layers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bdlm_jax.lm.decoder._UNROLLED_LAYERS", 0)  # compiles one layer
        yield


@pytest.fixture(scope="module")
def lm(_looped_layers):
    params = jax.tree.map(lambda x: x * 6, init_lm(jax.random.key(0), CONFIG))
    return params, jax.random.normal(jax.random.key(1), (4, 16))


def prompts(side, lengths=(5, 2, 3)):
    """The last token of each row is an id token's; the rest is text."""
    rng = np.random.default_rng(0)
    tokens, mask = np.full((len(lengths), 5), PAD), np.zeros((len(lengths), 5), bool)
    for row, n in enumerate(lengths):
        at = slice(0, n) if side == "right" else slice(5 - n, 5)
        tokens[row, at], mask[row, at] = [*rng.integers(2, V, n - 1), V + row], True
    return tokens, mask


@pytest.fixture(scope="module")
def states(lm):
    """Whole-row states of one sequence, by one compiled call for all lengths up to 16."""
    params, rows_XM = lm
    run = jax.jit(partial(lm_hidden, params, CONFIG))

    def run_row(tokens):
        row = np.zeros((1, 16), int)
        row[0, : len(tokens)] = tokens
        segments = (np.arange(16) < len(tokens)).astype(int)[None]
        return run(row, np.arange(16)[None], segments, rows_XM)[0, : len(tokens)]

    return run_row


def naive_greedy(params, states, prompt, *, max_new, allowed_V=None):
    """The likeliest token of a whole forward pass, again and again."""
    tokens, total = list(prompt), 0.0
    for _ in range(max_new):
        logits_V = np.asarray(text_logits(params, CONFIG, states(tokens)[-1]))
        token = int(np.argmax(logits_V if allowed_V is None else np.where(allowed_V, logits_V, -np.inf)))
        total += float(logits_V[token] - jax.nn.logsumexp(logits_V))
        tokens.append(token)
        if token == EOS:
            break
    return tokens[len(prompt) :], total


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("allowed", [None, np.isin(np.arange(V), [EOS, 3, 4, 6, 9])])
def test_greedy_is_the_likeliest_token_of_whole_passes(lm, states, side, allowed):
    params, rows_XM = lm
    tokens_BL, mask_BL = prompts(side)
    out = generate(
        params, CONFIG, tokens_BL, mask_BL, max_new=8, eos=EOS, pad=PAD, id_rows_XM=rows_XM, allowed_V=allowed
    )
    for row in range(3):
        expected, total = naive_greedy(params, states, tokens_BL[row, mask_BL[row]], max_new=8, allowed_V=allowed)
        n = int(out.length_B[row])
        assert out.tokens_BT[row, :n].tolist() == expected
        assert set(out.tokens_BT[row, n:].tolist()) <= {PAD}
        np.testing.assert_allclose(out.log_likelihood_B[row], total, rtol=1e-5, atol=1e-5)


def test_generation_stops_at_the_end_token_row_by_row(lm, states):
    """Whatever token a row writes second is made the end token: it then stops there, and the others go on."""
    params, rows_XM = lm
    tokens_BL, mask_BL = prompts("left")
    run = partial(generate, params, CONFIG, tokens_BL, mask_BL, max_new=8, pad=PAD, id_rows_XM=rows_XM)
    free = run(eos=V + 100)
    assert free.length_B.tolist() == [8, 8, 8]
    end = int(free.tokens_BT[0, 1])
    first = [list(row).index(end) + 1 if end in row else 8 for row in free.tokens_BT.tolist()]
    out = run(eos=end)
    assert out.length_B.tolist() == first
    for row, n in enumerate(first):
        assert out.tokens_BT[row].tolist() == free.tokens_BT[row, :n].tolist() + [PAD] * (8 - n)


def test_drawn_tokens_follow_the_key_and_the_distribution(lm, states):
    params, rows_XM = lm
    prompt = [3, 7, V + 1]
    tokens_BL = np.tile(prompt, (4000, 1))
    run = partial(generate, params, CONFIG, eos=EOS, pad=PAD, id_rows_XM=rows_XM, max_new=1, temperature=2.0)
    out = run(tokens_BL, tokens_BL >= 0, key=jax.random.key(3), top_p=0.8)
    logits_V = text_logits(params, CONFIG, states(prompt)[-1]) / 2
    expected_V = np.asarray(jax.nn.softmax(keep_top_p(logits_V, 0.8)))
    drawn_V = np.bincount(out.tokens_BT[:, 0], minlength=V) / 4000
    assert set(np.flatnonzero(drawn_V)) <= set(np.flatnonzero(expected_V)), "top-p cuts the rest"
    np.testing.assert_allclose(drawn_V, expected_V, atol=5 * np.sqrt(0.25 / 4000))
    other = run(tokens_BL, tokens_BL >= 0, key=jax.random.key(4), top_p=0.8)
    assert (np.asarray(other.tokens_BT) != np.asarray(out.tokens_BT)).any()


def test_top_p_keeps_the_fewest_likeliest_tokens():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))
    for top_p, kept in ((0.3, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 2, 3]), (1.0, [0, 1, 2, 3])):
        assert np.flatnonzero(keep_top_p(logits, top_p) > -jnp.inf).tolist() == kept


def test_items_are_the_top_of_the_restricted_logits():
    hidden_BM = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    rows_IM = jnp.array([[3.0, 0.0], [1.0, 1.0], [2.0, 3.0]])
    seen_BI = jnp.array([[True, False, False], [True, False, True]])
    item_BK, logp_BK = rank_items(hidden_BM, rows_IM, k=3, seen_BI=seen_BI)
    assert item_BK.tolist() == [[2, 1, -1], [1, -1, -1]]
    expected = [[-np.log1p(np.exp(-1)), -1 - np.log1p(np.exp(-1)), -np.inf], [0.0, -np.inf, -np.inf]]
    np.testing.assert_allclose(logp_BK, expected, atol=1e-6)
    assert rank_items(hidden_BM, rows_IM, k=1)[0].tolist() == [[0], [2]]


def test_a_trie_spells_every_title_and_nothing_else():
    trie = make_trie([np.array(title) for title in TITLES], eos=EOS)
    spelt, paths = {}, [(0, [])]
    while paths:
        node, path = paths.pop()
        if not trie.n_N[node]:
            spelt[tuple(path)] = int(trie.sequence_N[node])
        for edge in range(trie.first_N[node], trie.first_N[node] + trie.n_N[node]):
            paths.append((edge + 1, [*path, int(trie.token_E[edge])]))
    assert spelt == {(*title, EOS): TITLES.index(title) for title in TITLES}
    assert (trie.sequence_N >= 0).sum() == 5
    with pytest.raises(InputError, match="title 1 holds the end token 1"):
        make_trie([np.array([5]), np.array([4, EOS])], eos=EOS)
    with pytest.raises(InputError, match="no titles"):
        make_trie([], eos=EOS)


@pytest.mark.parametrize("side", ["left", "right"])
def test_beams_over_titles_find_those_that_exist_by_their_likelihood(lm, side):
    """With more beams than titles the search is exhaustive: the order is that of all titles' likelihoods."""
    params, rows_XM = lm
    tokens_BL, mask_BL = prompts(side)
    trie = make_trie([np.array(title) for title in TITLES], eos=EOS)
    continuation, there = np.zeros((6, 5), int), np.zeros((6, 5), bool)
    for row, title in enumerate(TITLES):
        continuation[row, : len(title) + 1], there[row, : len(title) + 1] = [*title, EOS], True
    score = jax.jit(partial(continuation_log_likelihood, params, CONFIG, id_rows_XM=rows_XM))
    expected_BS = np.asarray(score(tokens_BL, mask_BL, np.tile(continuation, (3, 1, 1)), np.tile(there, (3, 1, 1))))
    found = beam_titles(params, CONFIG, tokens_BL, mask_BL, trie, n_beams=7, pad=PAD, id_rows_XM=rows_XM)
    for row in range(3):
        order = [s for s in np.argsort(-expected_BS[row]) if s != 4]
        assert found.title_BK[row].tolist() == [*order, -1, -1]
        np.testing.assert_allclose(found.log_likelihood_BK[row, :5], expected_BS[row, order], rtol=1e-5, atol=1e-5)
        assert np.isneginf(found.log_likelihood_BK[row, 5:]).all()
        for place, title in enumerate(order):
            wanted = [*TITLES[title], EOS]
            assert found.tokens_BKT[row, place].tolist() == wanted + [PAD] * (5 - len(wanted))


def test_one_beam_is_greedy_and_still_ends_in_a_title(lm, states):
    params, rows_XM = lm
    tokens_BL, mask_BL = prompts("left")
    trie = make_trie([np.array(title) for title in TITLES], eos=EOS)
    found = beam_titles(params, CONFIG, tokens_BL, mask_BL, trie, pad=PAD, id_rows_XM=rows_XM)
    for row in range(3):
        path = []
        while not path or path[-1] != EOS:
            open_titles = [[*title, EOS] for title in TITLES if [*title, EOS][: len(path)] == path]
            logits_V = np.asarray(text_logits(params, CONFIG, states([*tokens_BL[row, mask_BL[row]], *path])[-1]))
            path.append(max({title[len(path)] for title in open_titles}, key=lambda token: logits_V[token]))
        assert TITLES[int(found.title_BK[row, 0])] == path[:-1]


def test_single_token_beams_are_the_top_of_the_restricted_logits(lm):
    """A trie of depth one, its end aside, ranks as `rank_items` does over the text rows."""
    params, rows_XM = lm
    tokens_BL, mask_BL = prompts("left")
    allowed = [4, 9, 17, 21]
    hidden_BM, _ = prefill(params, CONFIG, tokens_BL, mask_BL, length=5, id_rows_XM=rows_XM)
    item_BK, _ = rank_items(hidden_BM, params["embedding"][jnp.array(allowed)], k=4)
    one = make_trie([np.array([], int)], eos=EOS)
    trie = one._replace(
        first_N=np.array([0, 4, 4, 4, 4]), n_N=np.array([4, 0, 0, 0, 0]), token_E=np.array(allowed),
        sequence_N=np.array([-1, 0, 1, 2, 3]), slot_W=np.arange(4),
    )  # fmt: skip
    found = beam_titles(params, CONFIG, tokens_BL, mask_BL, trie, n_beams=4, pad=PAD, id_rows_XM=rows_XM)
    np.testing.assert_array_equal(found.title_BK, item_BK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 1.0}, "give a key"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"max_new": 0}, "max_new is 0"),
    ],
)
def test_impossible_options_are_said(lm, options, message):
    tokens_BL, mask_BL = prompts("left")
    with pytest.raises(InputError, match=message):
        generate(lm[0], CONFIG, tokens_BL, mask_BL, **{"max_new": 2, "eos": EOS, "pad": PAD, **options})
