"""Cold items are lifted by what validation chooses, in every model alike; what is served ranks as what was tested."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from bdlm_jax.evaluation.evaluate import load_counts
from bdlm_jax.run.lifts import LIFTS
from bdlm_jax.serving import artefact, exports, scores
from bdlm_jax.story import train_and_evaluate
from experiments import tiny

pytestmark = pytest.mark.once

ROWS = ("lightgcn", "ids_lm", "bdlm_lm", "bdlm_domain")
WORDS = ("none", "validation", "kinds")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs of a run without lifts and of one with each choice of them, whose stages are the same."""
    folder = tmp_path_factory.mktemp("lifts")
    for word in WORDS:
        config = tiny.get_config()
        config.data.options.update({"n_users": 60, "history": 8})
        config.pretrain.epochs, config.domain.epochs = 0.0, 4
        config.mutual.update({"rounds": 1, "domain_epochs_a_round": 1, "distill_epochs": 4})
        config.models = ("lightgcn", "ids_lm", "bdlm")
        config.mutual.text_head = "none"
        config.runtime.store, config.evaluate.cold_lift = str(folder / "store"), word
        train_and_evaluate(config, str(folder / word))
    return {word: folder / word for word in WORDS}


def counts(workdir, row):
    return load_counts(workdir / "per_user" / f"{row}.npz")["full"]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("word", WORDS[1:])
def test_each_model_is_lifted_by_its_own_validation(runs, row, word):
    plain, lifted = runs["none"], runs[word]
    kept = json.loads((lifted / f"{row}_lift.json").read_text())
    reached = {float(amount): value for amount, value in kept[word].items()}
    assert tuple(reached) == LIFTS and kept["lift"] == max(LIFTS, key=reached.get)
    assert np.array_equal(counts(plain, row).better, counts(lifted, f"{row}_unlifted").better)
    same = np.array_equal(counts(plain, row).better, counts(lifted, row).better)
    assert same == (kept["lift"] == 0)


def test_some_model_is_lifted(runs):
    """So that the test above sees one."""
    assert any(json.loads((runs["validation"] / f"{row}_lift.json").read_text())["lift"] for row in ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_kinds_of_cases_weigh_alike_or_by_their_number(runs, row):
    """The mean over all cases lies between the two kinds' where their numbers put it, `kinds` halfway."""
    kept = json.loads((runs["kinds"] / f"{row}_lift.json").read_text())
    data = runs["kinds"] / "data"
    target_N = np.load(data / "validation_cand20.npz")["items_NC"][:, 0]
    share = np.load(data / "slices.npz")["warm"][target_N].mean()
    assert 0 < share < 1 and share != 0.5
    for amount in map(str, LIFTS):
        warm, cold = kept["warm"][amount], kept["cold"][amount]
        assert kept["validation"][amount] == pytest.approx(share * warm + (1 - share) * cold)
        assert kept["kinds"][amount] == pytest.approx((warm + cold) / 2)


@pytest.mark.parametrize(("arm", "row"), [("domain", "bdlm_domain"), ("lm", "bdlm_lm")])
def test_what_is_served_ranks_as_what_was_tested(runs, arm, row):
    workdir = runs["validation"]
    served, catalogue, tested = artefact.load_arm(workdir, arm), artefact.load_catalogue(workdir), counts(workdir, row)
    for user, target, better in list(zip(tested.user, tested.target, tested.better))[:20]:
        had = [item for item in catalogue.history(user) if item != target]
        scores_I = scores.arm_scores(served, [np.array(had)], users=[user])[0]
        others = np.setdiff1d(np.arange(len(scores_I)), [*had, target])
        assert abs(int((scores_I[others] > scores_I[target]).sum()) - better) <= 1  # float32, by two programs


def test_exports_hold_the_lift(runs, tmp_path):
    workdir = runs["validation"]
    exports.export_domain(workdir=workdir, out=tmp_path / "tables")
    tables, domain = load_file(tmp_path / "tables" / "embeddings.safetensors"), artefact.load_arm(workdir, "domain")
    assert np.array_equal(tables["item"], domain.items)
    exports.export_hf(workdir=workdir, out=tmp_path / "lm")
    tensors, lm = load_file(tmp_path / "lm" / "model.safetensors"), artefact.load_arm(workdir, "lm")
    n_items, config = len(lm.titles), json.loads((tmp_path / "lm" / "config.json").read_text())
    np.testing.assert_array_equal(tensors["lm_head.weight"][-n_items:], lm.items)
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"][-n_items:], lm.id_rows_XM[-n_items:])
    assert not config["tie_word_embeddings"]
    moved = np.any(lm.items != lm.id_rows_XM[-n_items:], axis=1)
    assert np.array_equal(np.flatnonzero(moved), lm.lift.item_N if np.any(lm.lift.by_D) else [])
