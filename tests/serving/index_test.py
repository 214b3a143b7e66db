"""A domain arm that looks for its items by an index: what is found is scored as ever, and the index is told apart."""

import dataclasses
import sys

import numpy as np
import pytest

from bdlm_jax import recommend
from bdlm_jax.serving import index, scores
from bdlm_jax.serving.artefact import ServedDomain
from bdlm_jax.types import InputError

DRAW = np.random.default_rng(0)
# Small whole numbers: no product is rounded, and many are equal.
ARM = ServedDomain("mf", *(DRAW.integers(-2, 3, (n, 4)).astype(np.float32) for n in (5, 300)), np.ones(300))
SEEN = [DRAW.integers(300, size=n) for n in (0, 7, 1, 30, 3)]


def test_what_is_found_is_ranked_as_without_an_index():
    def search(state_BD, n):
        best_BN = np.argsort(-(state_BD @ ARM.item_ID.T), axis=1, kind="stable")[:, :n]
        return np.pad(best_BN, ((0, 0), (0, 2)), constant_values=-1)  # faiss says -1 where it found fewer

    found = dataclasses.replace(ARM, search=search)
    for users, k in (([0, 1, 2, 3, 4], 10), ([4, 2, 0, 1, 3], 300)):
        pairs = [scores.best_items(arm, SEEN, users=users, k=k) for arm in (ARM, found)]
        for (items, of_items), (others, of_others) in zip(*pairs):
            np.testing.assert_array_equal(items, others)
            np.testing.assert_allclose(of_items, of_others, rtol=1e-6)


def test_an_index_finds_most_and_nothing_seen():
    pytest.importorskip("faiss")
    tables = [DRAW.standard_normal((n, 8), np.float32) for n in (40, 2000)]
    arm = index.with_index(ServedDomain("mf", *tables, np.ones(2000)))
    assert 0.3 < index.measure_recall(arm) < 1, "one part of sixteen holds more than its share of the best, not all"
    assert (
        index.measure_recall(index.with_index(arm, one_in=1)) > 0.99
    )  # all is looked at; eight bits may mistake a tie
    (first, _), (then, of_items) = (
        scores.best_items(arm, [had], users=[0], k=5)[0]
        for had in ([], scores.best_items(arm, [[]], users=[0], k=5)[0][0])
    )
    assert len({*first, *then}) == 10 and (np.diff(of_items) <= 0).all()
    assert "index of 2,000 items; of the 10 best it finds" in index.describe_index(arm)


@pytest.mark.parametrize(("arm", "told"), [("domain", "faiss is missing"), ("lm", "whose score is an inner product")])
def test_what_an_index_needs_is_told(tiny_run, capsys, monkeypatch, arm, told):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert recommend.main(["--workdir", str(tiny_run[1]), "--all", "--out", "x.csv", "--arm", arm, "--index"]) == 2
    assert told in capsys.readouterr().err


def test_what_has_no_index_is_told():
    with pytest.raises(InputError, match="inner product"):
        index.with_index(dataclasses.replace(ARM, dot=False))
    with pytest.raises(InputError, match="--index is 0; it goes through one of so many parts"):
        index.with_index(ARM, one_in=0)
