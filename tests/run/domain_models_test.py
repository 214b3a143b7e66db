"""Every other domain model than the tiny run's, as BDLM's own: a whole run, and what is served of it."""

import math

import numpy as np
import pytest

import bdlm_jax
from bdlm_jax.domain.models import MODELS
from bdlm_jax.evaluation.evaluate import load_counts
from bdlm_jax.serving import artefact, scores
from bdlm_jax.story import train_and_evaluate
from experiments import tiny

OPTIONS = {"ncf": {"hidden": (8, 4)}, "sasrec": {"n_blocks": 1, "length": 8}, "itemgcn": {"length": 8}}


@pytest.mark.once
@pytest.mark.parametrize("model", sorted(MODELS.keys() - {"lightgcn"}))
def test_bdlm_trains_and_recommends_around_it(tmp_path, model):
    config = tiny.get_config()
    config.models, config.domain.model = (model, "bdlm"), model
    config.data.options.update({"n_users": 60, "history": 8})
    config.pretrain.epochs, config.prompts.card_copies = 0.0, 2.0
    config.domain.epochs, config.domain.options = 2, OPTIONS.get(model, {})
    for section in (config.sasrec, config.itemgcn):
        section.update({"epochs": 2, "batch_size": 32})
    config.mutual.update({"domain_epochs_a_round": 1, "distill_epochs": 2})
    if model == "itemgcn":
        config.mutual.teacher = "pool"
        config.mutual.taught.update({"rounds": 1, "lm_epochs": 1.0, "domain_epochs": 1})
    if model == "mf":
        config.mutual.text_head = "graph"
        config.mutual.teacher = "pool"
        config.mutual.taught.update({"rounds": 1, "lm_epochs": 1.0, "domain_epochs": 0, "lm": "afresh"})
    has_lessons = model in ("itemgcn", "mf")
    config.mutual.lm.text = config.mutual.lm.align_user = 0.0  # compiles sooner
    results = train_and_evaluate(config, str(tmp_path))
    assert {row["model"] for row in results["rows"]} == {model, "bdlm_lm", "bdlm_domain", "bdlm_domain_unrefreshed"}
    assert all(math.isfinite(row["value"]) for row in results["rows"])

    # Who taught the domain arm at the end was weighed on validation.
    told = {path.name for path in tmp_path.glob("*teacher.json")}
    assert told == ({"bdlm_teacher.json", "teacher.json"} if has_lessons else set())
    assert (tmp_path / "taught" / "done.json").is_file() == has_lessons

    # What is served ranks as what was evaluated.
    served, catalogue = artefact.load_domain_arm(tmp_path), artefact.load_catalogue(tmp_path)
    counts = load_counts(tmp_path / "per_user" / "bdlm_domain.npz")["full"]
    assert served.model == model
    for user, target, better in zip(counts.user, counts.target, counts.better):
        (scores_I,) = scores.domain_scores(served, users=[user])
        unseen = np.setdiff1d(np.arange(len(scores_I)), catalogue.history(user))
        assert np.sum(scores_I[unseen] > scores_I[target]) == better
    run = bdlm_jax.load(tmp_path)
    assert run.arms == (model, "lm", "domain")
    for arm in run.arms:
        for who in ({"users": ["u04"]}, {"histories": ["i03;i07,i11"]}):
            found = run.recommend(**who, arm=arm, k=5)
            assert len(found) == 5 and np.isfinite(found["score"]).all()
