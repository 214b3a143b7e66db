import gzip
import lzma

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax

from bdlm_jax.data.batches import concatenate
from bdlm_jax.lm.causal_lm import LMConfig, init_lm, lm_hidden, text_logits
from bdlm_jax.lm.pretrain import read_lines, text_cross_entropy, text_loss, text_rows
from bdlm_jax.lm.vocabulary import Vocabulary, train_tokenizer
from bdlm_jax.types import InputError


@pytest.fixture(scope="module")
def vocabulary():
    # Too little text for a merge: every byte is a token, so that lengths can be counted by eye.
    return Vocabulary(train_tokenizer(["a"], 261), 1, 1)


@pytest.fixture(scope="module")
def config(vocabulary):
    return LMConfig(vocab_size=vocabulary.n_text, width=16, n_layers=1, n_heads=2, n_kv_heads=1, mlp_width=16)


@pytest.fixture(scope="module")
def params(config):
    return init_lm(jax.random.key(0), config)


def test_documents_become_rows_with_a_target_at_every_token_but_a_segments_last(vocabulary):
    v = vocabulary
    a, b, c, d, e = (int(v.encode_text([letter])[0][0]) for letter in "abcde")
    packed = text_rows(["abc", "de"], v, 4)
    #   <bos> a b c | <eos> <bos> d e | <eos> pad pad pad
    assert packed.tokens.tolist() == [[v.bos, a, b, c], [v.eos, v.bos, d, e], [v.eos, v.pad, v.pad, v.pad]]
    assert packed.segments.tolist() == [[1, 1, 1, 1], [1, 2, 2, 2], [1, 0, 0, 0]]
    assert packed.positions.tolist() == [[0, 1, 2, 3], [0, 0, 1, 2], [0, 0, 0, 0]]
    # What a row's end cuts off is predicted from nowhere: no target crosses a row or a document.
    continued = packed.text_target
    assert continued.tolist() == [[a, b, c, -1], [-1, d, e, -1], [-1, -1, -1, -1]]
    assert packed.text_index.tolist() == [[0, 1, 2, 3]] * 3
    assert packed.prompt_row.tolist() == [0, 1, 1, 2] and packed.prompt_stop.tolist() == [4, 1, 4, 1]
    assert packed.item_target.shape == packed.user.shape == packed.card_item.shape == (3, 0)


def test_max_tokens_stops_the_stream(vocabulary):
    def endless():
        while True:
            yield "abcd"

    packed = text_rows(endless(), vocabulary, 8, max_tokens=20)
    assert (packed.segments > 0).sum() == 20


@pytest.mark.parametrize(("suffix", "opener"), [(".txt", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_files_give_the_rows_of_their_lines(tmp_path, vocabulary, suffix, opener):
    path = tmp_path / f"corpus{suffix}"
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("red shoe\n\n  café \n")
    assert list(read_lines(path)) == ["red shoe", "café"]
    np.testing.assert_array_equal(
        text_rows(path, vocabulary, 6).tokens, text_rows(["red shoe", "café"], vocabulary, 6).tokens
    )


def test_bad_corpora_are_refused(tmp_path, vocabulary):
    with pytest.raises(InputError, match="does not exist"):
        text_rows(tmp_path / "none.txt", vocabulary, 4)
    with pytest.raises(InputError, match="ends in none"):
        read_lines(tmp_path / "corpus.csv")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"one\ntwo\n" * 1000)[:-9])
    with pytest.raises(InputError, match="cannot be read"):
        list(read_lines(tmp_path / "cut.gz"))
    (tmp_path / "latin.txt").write_bytes("é\n".encode("latin-1"))
    with pytest.raises(InputError, match="cannot be read"):
        list(read_lines(tmp_path / "latin.txt"))
    with pytest.raises(InputError, match="no text"):
        text_rows([], vocabulary, 4)


def test_loss_is_the_cross_entropy_of_every_target(vocabulary, config, params):
    batch = text_rows(["abc", "de", "bd"], vocabulary, 6).rows(np.arange(2))
    total, count = jax.jit(text_loss, static_argnames=("config", "chunk"))(params, config, batch)
    hidden = jax.jit(lm_hidden, static_argnums=1)(
        params, config, batch["tokens"], batch["positions"], batch["segments"], None
    )
    log_p = log_softmax(np.asarray(text_logits(params, config, hidden), np.float64), axis=-1)
    expected = [
        -log_p[b, at, token]
        for b in range(2)
        for at, token in zip(batch["text_index"][b], batch["text_target"][b])
        if token >= 0
    ]
    assert count == len(expected) > 5
    np.testing.assert_allclose(total, sum(expected), rtol=1e-5)


def test_chunks_change_neither_loss_nor_gradient(vocabulary, config, params):
    batch = text_rows(["abcabc", "dede", "bd"], vocabulary, 6).rows(np.arange(3))
    step = jax.jit(jax.value_and_grad(lambda p, chunk: text_loss(p, config, batch, chunk=chunk)[0]), static_argnums=1)
    whole, parts = step(params, None), step(params, 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), whole, parts)


def test_no_target_is_a_zero_and_not_a_nan(config, params):
    none = jnp.full((2, 3), -1)
    total, count = text_cross_entropy(params, config, jnp.ones((2, 4, 16)), jnp.zeros((2, 3), int), none)
    assert (total, count) == (0, 0)


def test_a_corpus_is_learnt(vocabulary, config, params):
    packed = concatenate([text_rows(["abab abab abab", "cdcd cdcd cdcd"] * 4, vocabulary, 16)])
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state, batch):
        def mean(params):
            total, count = text_loss(params, config, batch)
            return total / count

        loss, gradient = jax.value_and_grad(mean)(params)
        update, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, update), state, loss

    state, losses = optimizer.init(params), []
    for n in range(60):
        params, state, loss = step(params, state, packed.batch(n, batch_size=4, seed=0))
        losses.append(float(loss))
    assert abs(losses[0] - np.log(vocabulary.n_text)) < 0.5, "before training, every token is about as likely"
    assert losses[-1] < 1.0
