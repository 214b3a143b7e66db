"""Who teaches both arms at length."""

import dataclasses
import json

import numpy as np
import pytest

from bdlm_jax.evaluation import scorers
from bdlm_jax.lm.text_head import TextHead
from bdlm_jax.mutual import lessons
from bdlm_jax.run import build, reading, stages, teachers
from bdlm_jax.runtime.files import load_safetensors
from bdlm_jax.runtime.fit import Fitted


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


def taught(run, *, teacher, lessons=0):
    config = run.config.copy_and_resolve_references()
    config.mutual.teacher, config.mutual.taught.rounds = teacher, lessons
    return dataclasses.replace(run, config=config)


def test_where_the_lm_teaches_alone_nothing_is_weighed(trained):
    run, lm, alone = trained
    assert run.config.mutual.teacher == "lm"
    assert teachers.weigh_domain(run, lm, alone, None) is None
    assert teachers.Teacher(None, None, alone=None).read(run, "test").beside is None


def test_where_the_domain_model_teaches_its_scores_alone_are_heard(trained):
    run, lm, alone = trained
    run = taught(run, teacher="domain")
    weight = teachers.weigh_domain(run, lm, alone, None)
    view = teachers.Teacher(None, weight, lambda _: alone).read(run, "validation").view(run, lm)
    user_UD, item_ID = build.make_arm(run, "lightgcn").encode(*(alone[name] for name in ("shared", "domain")))
    np.testing.assert_allclose(view["state_user"] @ view["rows_item"].T, user_UD @ item_ID.T, rtol=1e-3, atol=1e-5)


def test_a_pool_is_the_sum_of_both_scores_and_its_weight_the_best_on_validation(trained):
    run, lm, alone = trained
    run = taught(run, teacher="pool")
    weight = teachers.weigh_domain(run, lm, alone, None)
    told = json.loads((run.folder / "teacher.json").read_text())
    assert told["weight"] == weight and told["validation"][str(weight)] == max(told["validation"].values())
    reader = teachers.Teacher(None, 0.75, lambda _: alone).read(run, "validation")
    view = reader.view(run, lm)
    states = reader.read(run, lm, reader.users)
    user_UD, item_ID = build.make_arm(run, "lightgcn").encode(*(alone[name] for name in ("shared", "domain")))
    wanted = states["user"] @ states["rows_item"].T + 0.75 * np.asarray(user_UD) @ np.asarray(item_ID).T
    np.testing.assert_allclose(view["state_user"] @ view["rows_item"].T, wanted, rtol=1e-3, atol=1e-4)
    every = np.arange(run.data.n_users)
    plain = reader.scorer(run, lm).score(every)  # the LM arm itself ranks by its own scores
    np.testing.assert_allclose(plain, scorers.state_scorer(states["user"], states["rows_item"]).score(every), rtol=1e-5)


def test_a_graph_head_asks_the_domain_model_how_alike_items_are(trained):
    run, lm, alone = trained
    config = run.config.copy_and_resolve_references()
    config.mutual.text_head = "graph"
    run = dataclasses.replace(run, config=config)
    head = teachers.weigh_texts(run, lm, lambda _: alone)
    told = json.loads((run.folder / "text_head.json").read_text())
    reached = {(tried["last"], tried["mean"]): tried[config.select] for tried in told["validation"]}
    assert reached[head.last, head.mean] == max(reached.values()) and len(reached) > 10
    item_ID = np.asarray(build.make_arm(run, "lightgcn").encode(*(alone[name] for name in ("shared", "domain")))[1])
    content_IC = np.asarray(head.content_IC)
    np.testing.assert_allclose(content_IC / content_IC[0, 0], item_ID / item_ID[0, 0], rtol=1e-3, atol=1e-4)
    assert np.mean(np.sum(content_IC[run.warm_I] ** 2, axis=1)) == pytest.approx(1, rel=1e-4)


def test_at_test_the_domain_model_knows_the_validation_item(trained):
    run, _, alone = trained
    teacher = teachers.Teacher(None, 1.0, lambda _: alone)
    at = {part: teacher.read(run, part).beside for part in ("validation", "test")}
    arm = build.make_arm(run, "lightgcn", parts=build.parts_at_test(run.config))
    wanted, _ = arm.encode(*(alone[name] for name in ("shared", "domain")))
    np.testing.assert_allclose(at["test"].user_UD, wanted, rtol=1e-4, atol=1e-6)
    assert not np.allclose(at["validation"].user_UD, at["test"].user_UD)


@pytest.mark.parametrize("lessons", [0, 2])
def test_a_refit_hears_the_teachers_that_were_chosen_before_it(trained, monkeypatch, lessons):
    run, lm, alone = trained
    run, told = taught(run, teacher="pool", lessons=lessons), []
    monkeypatch.setattr(stages, "train_bdlm", lambda *_: Fitted({"lm": lm}, {}, {}))

    def teach_both(own, decoder, start, domain_params, reader):
        told.append((own is run, reader.beside.weight, reader.beside.user_UD))
        return Fitted({"lm": lm}, {}, {})

    monkeypatch.setattr(stages, "teach_both", teach_both)
    taught_by = {}
    teachers.learn_together(run, None, lambda _: alone, taught_by)
    files = {path.name for path in run.folder.glob("*teacher.json")}
    assert files >= {"teacher.json"} | ({"bdlm_teacher.json"} if lessons else set())
    monkeypatch.setattr(stages, "validate", None)  # a refit has no validation
    teachers.learn_together(dataclasses.replace(run, first=run), None, lambda _: alone, taught_by)
    assert [first for first, *_ in told] == ([True, False] if lessons else [])
    if lessons:
        assert told[0][1] == told[1][1] == taught_by["bdlm"].weight
        assert np.array_equal(told[0][2], told[1][2])
    assert set(taught_by) == {"after", "bdlm"} | ({"taught"} if lessons else set())


def test_at_the_end_of_a_history_that_fits_a_row_the_lessons_teacher_is_the_lm_that_is_served(trained):
    run, lm, alone = trained
    texts = TextHead(teachers.domain_content(run, alone), 1.5, 0.5)
    reader = reading.bdlm_reader(run, "validation", texts=texts)
    options = {"arm": reader.arm, "meeting": reader.meeting}
    batch = reader.users.rows(np.arange(len(reader.users)))
    first = run.texts.vocabulary.item_tokens.start
    item_BL = np.where(batch["tokens"] >= first, batch["tokens"] - first, -1)
    said = lessons.teach(
        lessons.make_teacher(lm, texts, **options),
        batch | {"item_index": batch["user_index"]}, item_BL, meeting=reader.meeting,
    )  # fmt: skip
    scores_BTI = np.einsum("btn,in->bti", *said)
    served = reader.scorer(run, lm)
    users = batch["user"][batch["user"] >= 0]
    assert sorted(users) == list(range(run.data.n_users))
    np.testing.assert_allclose(scores_BTI[batch["user"] >= 0], served.score(users), rtol=1e-3, atol=1e-3)
