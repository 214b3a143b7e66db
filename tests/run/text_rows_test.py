import jax
import numpy as np
import optax
import pytest

from bdlm_jax.lm.causal_lm import LMConfig, init_lm, lm_hidden
from bdlm_jax.lm.vocabulary import Vocabulary, train_tokenizer
from bdlm_jax.mutual.lm_step import states_at
from bdlm_jax.mutual.losses import text_loss
from bdlm_jax.run.rows import text_rows
from bdlm_jax.types import InputError


@pytest.fixture(scope="module")
def vocabulary():
    # Too little text for a merge: every byte is a token, so that lengths can be counted by eye.
    return Vocabulary(train_tokenizer(["a"], 261), 1, 1)


def test_documents_become_rows_with_a_target_at_every_token_but_a_segments_last(vocabulary):
    v = vocabulary
    a, b, c, d, e = (int(v.encode_text([letter])[0][0]) for letter in "abcde")
    packed = text_rows(["abc", "de"], v, 4)
    #   <bos> a b c | <eos> <bos> d e | <eos> pad pad pad
    assert packed.tokens.tolist() == [[v.bos, a, b, c], [v.eos, v.bos, d, e], [v.eos, v.pad, v.pad, v.pad]]
    assert packed.segments.tolist() == [[1, 1, 1, 1], [1, 2, 2, 2], [1, 0, 0, 0]]
    assert packed.positions.tolist() == [[0, 1, 2, 3], [0, 0, 1, 2], [0, 0, 0, 0]]
    # What a row's end cuts off is predicted from nowhere: no target crosses a row or a document.
    assert packed.text_target.tolist() == [[a, b, c, -1], [-1, d, e, -1], [-1, -1, -1, -1]]
    assert packed.text_index.tolist() == [[0, 1, 2, 3]] * 3
    assert packed.item_target.shape == packed.user.shape == packed.card_item.shape == (3, 0)


def test_max_tokens_stops_the_stream(vocabulary):
    def endless():
        while True:
            yield "abcd"

    packed = text_rows(endless(), vocabulary, 8, max_tokens=20)
    assert (packed.segments > 0).sum() == 20


def test_a_corpus_without_text_is_refused(vocabulary):
    with pytest.raises(InputError, match="no text"):
        text_rows([], vocabulary, 4)


def test_a_corpus_is_learnt(vocabulary):
    config = LMConfig(vocab_size=vocabulary.n_text, width=16, n_layers=1, n_heads=2, n_kv_heads=1, mlp_width=16)
    packed, optimizer = text_rows(["abab abab abab", "cdcd cdcd cdcd"] * 4, vocabulary, 16), optax.adam(1e-2)

    def mean_loss(params, batch):
        rows = (batch["tokens"], batch["positions"], batch["segments"])
        state_NM = states_at(lm_hidden(params, config, *rows, None), batch["text_index"])
        total, count = text_loss(params, config, state_NM, batch["text_target"].reshape(-1))
        return total / count

    @jax.jit
    def step(params, state, batch):
        loss, gradient = jax.value_and_grad(mean_loss)(params, batch)
        update, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, update), state, loss

    params = init_lm(jax.random.key(0), config)
    state, losses = optimizer.init(params), []
    for n in range(60):
        params, state, loss = step(params, state, packed.batch(n, batch_size=4, seed=0))
        losses.append(float(loss))
    assert abs(losses[0] - np.log(vocabulary.n_text)) < 0.5, "before training, every token is about as likely"
    assert losses[-1] < 1.0
