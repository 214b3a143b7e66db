"""Who teaches the domain arm at length."""

import dataclasses
import json

import numpy as np
import pytest

from bdlm_jax.evaluation import scorers
from bdlm_jax.run import build, teachers
from bdlm_jax.runtime.files import load_safetensors


@pytest.fixture(scope="module")
def trained(tiny_run, tmp_path_factory):
    """The tiny run, its LM and its LightGCN alone; what is weighed is written elsewhere."""
    config, folder = tiny_run[:2]
    config = config.copy_and_resolve_references()
    run = build.start_run(config, folder)
    lm = load_safetensors(folder / "bdlm" / "best_lm.safetensors")
    alone = load_safetensors(folder / "lightgcn" / "best_domain.safetensors")
    run = dataclasses.replace(run, folder=tmp_path_factory.mktemp("weighed"))
    return run, {"domain": {}} | lm, {"domain": {}} | alone


def test_where_the_lm_teaches_alone_nothing_is_weighed(trained):
    run, lm, alone = trained
    assert run.config.mutual.teacher == "lm"
    assert teachers.weigh_domain(run, lm, alone, None) is None
    assert teachers.read_teacher(run, "test", texts=None, alone=None, weight=None).beside is None


def test_a_pool_is_the_sum_of_both_scores_and_its_weight_the_best_on_validation(trained):
    run, lm, alone = trained
    config = run.config.copy_and_resolve_references()
    config.mutual.teacher = "pool"
    run = dataclasses.replace(run, config=config)
    weight = teachers.weigh_domain(run, lm, alone, None)
    told = json.loads((run.folder / "teacher.json").read_text())
    assert told["weight"] == weight and told["validation"][str(weight)] == max(told["validation"].values())
    reader = teachers.read_teacher(run, "validation", texts=None, alone=lambda _: alone, weight=0.75)
    view = reader.view(run, lm)
    states = reader.read(run, lm, reader.users)
    user_UD, item_ID = build.make_arm(run, "lightgcn").encode(*(alone[name] for name in ("shared", "domain")))
    wanted = states["user"] @ states["rows_item"].T + 0.75 * np.asarray(user_UD) @ np.asarray(item_ID).T
    np.testing.assert_allclose(view["state_user"] @ view["rows_item"].T, wanted, rtol=1e-3, atol=1e-4)
    every = np.arange(run.data.n_users)
    plain = reader.scorer(run, lm).score(every)  # the LM arm itself ranks by its own scores
    np.testing.assert_allclose(plain, scorers.state_scorer(states["user"], states["rows_item"]).score(every), rtol=1e-5)


def test_at_test_the_domain_model_knows_the_validation_item(trained):
    run, _, alone = trained
    how = {"texts": None, "alone": lambda _: alone, "weight": 1.0}
    at = {part: teachers.read_teacher(run, part, **how).beside for part in ("validation", "test")}
    arm = build.make_arm(run, "lightgcn", parts=build.parts_at_test(run.config))
    wanted, _ = arm.encode(*(alone[name] for name in ("shared", "domain")))
    np.testing.assert_allclose(at["test"].user_UD, wanted, rtol=1e-4, atol=1e-6)
    assert not np.allclose(at["validation"].user_UD, at["test"].user_UD)
