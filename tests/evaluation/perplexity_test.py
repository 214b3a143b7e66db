import jax
import numpy as np
import pytest

from bdlm_jax.evaluation.perplexity import perplexity
from bdlm_jax.lm.causal_lm import LMConfig, continuation_log_likelihood, init_lm
from bdlm_jax.lm.packing import pack_documents

CONFIG = LMConfig(vocab_size=24, width=8, n_layers=1, n_heads=2, n_kv_heads=1, mlp_width=8)
DOCUMENTS = [np.array([1, 5, 7, 9, 2]), np.array([1, 8, 8, 2])]


def test_a_model_that_knows_nothing_is_as_perplexed_as_there_are_tokens():
    params = jax.tree.map(np.zeros_like, init_lm(jax.random.key(0), CONFIG))
    packed = pack_documents(DOCUMENTS, 4, pad=0)
    assert len(packed) == 3  # a row and its rest, which batches of two rows fill up
    assert perplexity(params, CONFIG, packed, batch_rows=2) == pytest.approx(24)


def test_it_is_the_likelihood_of_every_token_behind_the_first():
    # Of some hundreds: at 4e23 the last digits of a loss in float32 move it by 1e-5, and they are the processor's.
    params = jax.tree.map(lambda leaf: 6 * leaf, init_lm(jax.random.key(1), CONFIG))
    found = perplexity(params, CONFIG, pack_documents(DOCUMENTS, 16, pad=0), batch_rows=2)
    total = 0.0
    for document in DOCUMENTS:
        first, rest = document[None, :1], document[None, None, 1:]
        total -= float(continuation_log_likelihood(params, CONFIG, first, first > 0, rest, rest > 0)[0, 0])
    assert found == pytest.approx(np.exp(total / (4 + 3)), rel=1e-5)
