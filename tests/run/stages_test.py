import dataclasses

import jax
import numpy as np
import pytest

from bdlm_jax.data.candidates import make_candidates
from bdlm_jax.data.splits import TEST, TRAIN, VALIDATION
from bdlm_jax.domain.models import MODELS
from bdlm_jax.evaluation import scorers
from bdlm_jax.lm.text_head import TextHead
from bdlm_jax.mutual import sharing
from bdlm_jax.run import build, reading, stages
from bdlm_jax.types import LeakError
from experiments import tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return build.start_run(tiny.get_config(), tmp_path_factory.mktemp("stages"))


@pytest.fixture
def run(made, monkeypatch):
    """Its `fit` hands back what a stage would have trained."""
    monkeypatch.setattr(build.Run, "fit", lambda self, stage, **arguments: arguments)
    return dataclasses.replace(made, config=made.config.copy_and_resolve_references())


def train_bdlm(run):
    domain_params = build.init_tables(run, "lightgcn", build.make_arm(run, "lightgcn"))
    return domain_params, stages.train_bdlm(run, build.make_decoder(run, None), domain_params)


def shapes(tree):
    return [np.shape(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    ("trained_by", "wanted"), [("both", {"lm", "domain"}), ("lm", {"lm"}), ("domain", {"domain"}), ("none", set())]
)
def test_the_switch_says_which_arm_trains_the_shared_tables(run, trained_by, wanted):
    run.config.shared.trained_by = trained_by
    _, made = train_bdlm(run)
    params = made["params"]()
    tables = {np.shape(table) for table in params["shared"].values()}
    # A frozen leaf has no optimiser state, so the moments tell who trains it.
    trains = {name: tables <= set(shapes(arm.optimizer.init(params))) for name, arm in made["arms"].items()}
    assert {name for name, does in trains.items() if does} == wanted
    assert [phase.arm for phase in made["phases"]] == ["lm", "domain", "lm"]


def test_in_lessons_both_arms_learn_in_turn_from_the_teacher_in_the_tree_that_the_rounds_left(run):
    config = run.config
    config.mutual.taught.update({"rounds": 2, "lm_epochs": 1.0, "domain_epochs": 3})
    domain_params, rounds = train_bdlm(run)
    start, reader = rounds["params"](), reading.bdlm_reader(run, "validation")
    made = stages.teach_both(run, build.make_decoder(run, None), start, domain_params, reader)
    assert [(phase.arm, phase.units) for phase in made["phases"] if phase.arm == "domain"] == [("domain", 3)] * 2
    assert [phase.arm for phase in made["phases"]] == ["lm", "domain", "lm", "domain"]
    assert made["params"]() is start and made["judged"] == ("domain", "lm")
    views = [arm.view(start) for arm in made["arms"].values()]
    for view in views:
        assert set(view) >= {"state_user", "rows_item"}
        np.testing.assert_array_equal(view["state_user"], views[0]["state_user"])
    config.mutual.taught.domain_epochs = 0
    made = stages.teach_both(run, build.make_decoder(run, None), start, domain_params, reader)
    assert [phase.arm for phase in made["phases"]] == ["lm", "lm"]


@pytest.mark.parametrize(("teacher", "hears"), [("pool", {"decoder", "content_IC"}), ("lm", {"decoder"})])
def test_taught_afresh_the_lm_begins_as_it_first_began_and_hears_the_teacher_at_every_place(run, teacher, hears):
    config = run.config
    config.mutual.taught.update({"rounds": 2, "lm_epochs": 1.0, "domain_epochs": 0, "lm": "afresh"})
    config.mutual.teacher = teacher
    domain_params, rounds = train_bdlm(run)
    first = rounds["params"]()
    start = jax.tree.map(lambda leaf: leaf + 1.0, first)
    reader = reading.bdlm_reader(run, "validation", texts=TextHead(run.content_IC, 1.0, 0.5))
    made = stages.teach_both(run, build.make_decoder(run, None), start, domain_params, reader)
    assert [phase.arm for phase in made["phases"]] == ["lm", "lm"]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, made["params"](), first)))
    view = made["arms"]["lm"].view(first)
    assert set(view) >= {"user", "item"} and set(view["teacher"]) >= hears
    assert ("content_IC" in view["teacher"]) == ("content_IC" in hears)
    table = start["lm"]["embedding"]
    assert np.array_equal(view["teacher"]["decoder"]["embedding"], table)  # of the LM as it was, not as it begins


@pytest.mark.parametrize("initial", ["domain", "random"])
def test_the_shared_tables_begin_with_the_domain_model_or_at_random(run, initial):
    run.config.shared.initial = initial
    domain_params, made = train_bdlm(run)
    params = made["params"]()
    for name, table in domain_params["shared"].items():
        assert np.array_equal(params["shared"][name], table) == (initial == "domain")


def test_no_decoder_is_made_before_the_stage_begins(run, monkeypatch):
    made = []
    monkeypatch.setattr(build.causal_lm, "init_lm", lambda *_, **__: made.append(1))
    train_bdlm(run)
    assert not made


@pytest.mark.parametrize("model", MODELS)
def test_every_domain_model_can_stand_in_the_bridge(run, model):
    arm = build.make_arm(run, model)
    params = build.init_tables(run, model, arm)
    user_UD, item_ID = jax.eval_shape(arm.encode, params["shared"], params["domain"])
    assert user_UD.shape == (run.data.n_users, 16) and item_ID.shape == (run.data.n_items, 16)


def test_a_domain_model_has_the_settings_of_its_own_section_or_of_the_domain(run):
    run.config.domain.model, run.config.domain.epochs, run.config.mf.epochs = "ncf", 3, 5
    units = {model: sum(p.units for p in stages.train_domain(run, model)["phases"]) for model in ("ncf", "mf")}
    assert units == {"ncf": 3, "mf": 5}


def test_a_rate_follows_the_schedule_of_its_section_over_all_epochs(run):
    run.config.sasrec.update({"schedule": "linear", "epochs": 3, "batch_size": 64, "weight_decay": 0.0})
    params = build.init_tables(run, "sasrec", build.make_arm(run, "sasrec"))
    ones, steps = jax.tree.map(np.ones_like, params), 3 * -(-run.data.n_users // 64)
    optimizer = stages.train_domain(run, "sasrec")["arms"]["domain"].optimizer
    state, moved = optimizer.init(params), []
    for _ in range(steps):
        updates, state = optimizer.update(ones, state, params)
        moved.append(-float(updates["shared"]["item"][0, 0]))
    # Adam moves by the rate where gradients stay the same; the last step's is the first above a tenth.
    wanted = run.config.sasrec.learning_rate * np.linspace(1.0, 0.1, steps + 1)[:-1]
    np.testing.assert_allclose(moved, wanted, rtol=1e-4)


def test_stages_draw_from_keys_of_their_own(run):
    names = ("pretrain", "mf", "lightgcn", "text_lm", "ids_lm", "bdlm", "distill", "refresh", "bdlm/init", "mf/init")
    keys = {tuple(np.asarray(jax.random.key_data(run.stage_key(name)))) for name in names}
    assert len(keys) == len(names)


def test_validation_in_full_takes_the_same_few_cases_for_every_seed(run):
    scorer = scorers.popularity_scorer(run.data.split.degree(TRAIN))

    def users(part, most, seed=0, protocol="full"):
        run.config.evaluate.validation_users, run.config.seed = most, seed
        return stages.count_cases(run, scorer, part, protocol).user.tolist()

    everyone = run.data.split.cases(VALIDATION)[0].tolist()
    assert users("validation", 0) == users("validation", 1000) == everyone
    some = users("validation", 40)
    assert len(set(some)) == 40 and some == sorted(some) and set(some) < set(everyone)
    assert some == users("validation", 40, seed=1) and some != everyone[:40]
    assert len(users("test", 40)) == len(users("validation", 40, protocol="cand20")) == len(everyone)


def test_of_large_data_a_fixed_draw_of_the_cases_is_tested(run, monkeypatch):
    """All by default where the scores of one model are few enough; the bound and the setting both make it a part."""
    scorer = scorers.popularity_scorer(run.data.split.degree(TRAIN))
    everyone = run.data.split.cases(TEST)[0].tolist()

    def users(seed=0):
        run.config.seed = seed
        return stages.count_cases(run, scorer, "test", "full").user.tolist()

    assert users() == everyone
    run.config.evaluate.cases = 30
    some = users()
    assert len(some) == 30 and some == users(seed=1) == sorted(some) and set(some) < set(everyone)
    run.config.evaluate.cases = -1
    monkeypatch.setattr("bdlm_jax.run.ranked.MOST_SCORES", 30 * run.data.n_items)
    assert users() == some
    run.config.evaluate.cases = 0
    assert users() == everyone


def test_candidates_redrawn_between_two_models_are_refused(run):
    scorer = scorers.popularity_scorer(run.data.split.degree(TRAIN))
    stages.count_cases(run, scorer, "test", "cand20")
    other = make_candidates(run.data.split, TEST, n_negatives=19, seed=9, name="cand20")
    sets = {**run.data.candidates, "test": {**run.data.candidates["test"], "cand20": other}}
    run = dataclasses.replace(run, data=run.data._replace(candidates=sets))
    with pytest.raises(LeakError, match="cand20 are not those that this run began with"):
        stages.count_cases(run, scorer, "test", "cand20")


def pretended_lm(run, stage):
    """What the stage of an LM would have trained."""
    return train_bdlm(run)[1] if stage == "bdlm" else stages.train_ids_lm(run, build.make_decoder(run, None))


@pytest.mark.parametrize("stage", ["ids_lm", "bdlm"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_every_lm_drops_user_names_as_often(run, stage, share):
    run.config.prompts.user_dropout = share
    tokens = pretended_lm(run, stage)["arms"]["lm"].batch(0)["tokens"]
    assert np.isin(tokens, run.texts.vocabulary.user_tokens).any() == (share == 0)
    assert (tokens == run.texts.vocabulary.unnamed_user).any() == (share == 1)


@pytest.mark.parametrize(("stage", "own", "other"), [("ids_lm", "lm_alone", "lm"), ("bdlm", "lm", "lm_alone")])
def test_each_lm_has_the_scale_of_rows_that_its_own_setting_says(run, stage, own, other):
    run.config[own].row_std, run.config[other].row_std = 0.3, 7.0
    params = pretended_lm(run, stage)["params"]()
    arm = build.make_arm(run, "lightgcn") if stage == "bdlm" else build.DOT_ARM
    reads = run.config.mutual.reads if stage == "bdlm" else "layer0"
    _, item_ID = sharing.read_tables(params["shared"], params["domain"], encode=arm.encode, reads=reads)
    rows_IM = np.asarray(item_ID @ params["lm"]["bridge"]["into"])[run.warm_I]
    np.testing.assert_allclose(np.sqrt(np.mean(rows_IM**2)), 0.3, rtol=0.1)
