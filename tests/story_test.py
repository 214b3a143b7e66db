from types import SimpleNamespace

import numpy as np
import own_lm
import pytest

from bdlm_jax import story
from bdlm_jax.data import twins
from bdlm_jax.data.splits import TEST, TRAIN, VALIDATION
from bdlm_jax.domain.closed_form import ease, interaction_matrix
from bdlm_jax.evaluation.evaluate import load_counts
from bdlm_jax.story import train_and_evaluate
from bdlm_jax.types import InputError
from experiments import tiny


def test_a_run_of_another_config_is_not_continued(tmp_path):
    config = tiny.get_config()
    config.models = ("item_pop",)
    results = train_and_evaluate(config, str(tmp_path))
    config.runtime.checkpoint_seconds = 1.0  # changes nothing of what is trained
    assert train_and_evaluate(config, str(tmp_path)) == results
    config.lm.learning_rate = 0.5
    told = r"written with another config.lm.learning_rate: 0.003, and now it is 0.5; choose a new --workdir"
    with pytest.raises(InputError, match=told):
        train_and_evaluate(config, str(tmp_path))


def test_closed_forms_learn_from_training_and_score_what_is_known_at_test(tmp_path):
    config = tiny.get_config()
    config.models, config.ease.l2 = ("item_knn", "ease"), 20.0
    results = train_and_evaluate(config, str(tmp_path))
    assert {row["model"] for row in results["rows"]} == {"item_knn", "ease"}
    split = twins.make_world(seed=config.seed, **config.data.options.to_dict()).split
    sizes = {"n_users": split.interactions.n_users, "n_items": split.interactions.n_items}
    train_UI, known_UI = (interaction_matrix(*split.edges(*p), **sizes) for p in ((TRAIN,), (TRAIN, VALIDATION)))
    scores_UI = known_UI @ ease(train_UI, l2=20.0)
    scores_UI[known_UI.toarray() > 0] = -np.inf
    user, item = split.cases(TEST)
    better = np.sum(scores_UI[user] > scores_UI[user, item][:, None], axis=1)
    np.testing.assert_array_equal(load_counts(tmp_path / "per_user" / "ease.npz")["full"].better, better)


def test_an_own_model_without_general_text_has_no_perplexity_and_the_run_goes_on(tmp_path, monkeypatch):
    own_lm.write_model(tmp_path / "model", own_lm.LLAMA)
    run = own_lm.make_run(tmp_path / "run", path=str(tmp_path / "model"))
    run.config.models, run.config.pretrain.samples = ("bdlm",), 0
    monkeypatch.setattr(story.contenders, "train_bdlm", lambda run, decoder: SimpleNamespace(lm={"lm": {}}))
    for _ in range(2):  # measured, and read back
        assert story._measure_language(run, lambda: None) is None
