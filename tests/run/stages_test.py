import jax
import numpy as np
import pytest

from bdlm_jax.data.splits import TRAIN, VALIDATION
from bdlm_jax.run import build as arms
from bdlm_jax.run import rows as lm_rows
from bdlm_jax.run import stages
from bdlm_jax.run.prepare import prepare_data, prepare_vocabulary
from bdlm_jax.types import LeakError
from experiments import tiny


class Recorder(stages.Run):
    """Hands back what a stage would have trained."""

    def fit(self, stage, **arguments):
        return arguments


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config, folder = tiny.get_config(), tmp_path_factory.mktemp("stages")
    data = prepare_data(config, folder / "data")
    vocabulary = prepare_vocabulary(config, data, folder / "tokenizer")
    texts = lm_rows.encode_texts(config, data, vocabulary)
    return Recorder(config, folder, data, texts, None, jax.random.key(0))


def shapes(tree):
    return [np.shape(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    ("trained_by", "wanted"), [("both", {"lm", "domain"}), ("lm", {"lm"}), ("domain", {"domain"}), ("none", set())]
)
def test_the_switch_says_which_arm_trains_the_shared_tables(run, trained_by, wanted):
    run = run._replace(config=run.config.copy_and_resolve_references())
    run.config.shared.trained_by = trained_by
    domain_params = arms.init_domain_params(run, stages.make_arm(run, "lightgcn"), "lightgcn")
    made = stages.train_bdlm(run, None, domain_params)
    params = made["params"]()
    tables = {np.shape(table) for table in params["shared"].values()}
    # A frozen leaf has no optimiser state, so the moments tell who trains it.
    trains = {name: tables <= set(shapes(arm.optimizer.init(params))) for name, arm in made["arms"].items()}
    assert {name for name, does in trains.items() if does} == wanted
    assert [phase.arm for phase in made["phases"]] == ["lm", "domain", "lm"]


@pytest.mark.parametrize("initial", ["domain", "random"])
def test_the_shared_tables_begin_with_the_domain_model_or_at_random(run, initial):
    run = run._replace(config=run.config.copy_and_resolve_references())
    run.config.shared.initial = initial
    domain_params = arms.init_domain_params(run, stages.make_arm(run, "lightgcn"), "lightgcn")
    params = stages.train_bdlm(run, None, domain_params)["params"]()
    for name, table in domain_params["shared"].items():
        assert np.array_equal(params["shared"][name], table) == (initial == "domain")


@pytest.mark.parametrize("model", ["lightgcn", "mf", "ncf", "sasrec"])
def test_every_domain_model_can_stand_in_the_bridge(run, model):
    arm = stages.make_arm(run, model)
    params = arms.init_domain_params(run, arm, model)
    user_UD, item_ID = jax.eval_shape(arm.encode, params["shared"], params["domain"])
    assert user_UD.shape == (run.data.n_users, 16) and item_ID.shape == (run.data.n_items, 16)


def test_stages_draw_from_keys_of_their_own(run):
    names = ("pretrain", "mf", "lightgcn", "text_lm", "ids_lm", "bdlm", "distill", "refresh", "bdlm/init", "mf/init")
    keys = {tuple(np.asarray(jax.random.key_data(run.stage_key(name)))) for name in names}
    assert len(keys) == len(names)


def test_a_later_edge_in_the_training_graph_raises(run, monkeypatch):
    edges = type(run.data.split).edges
    monkeypatch.setattr(type(run.data.split), "edges", lambda self, *parts: edges(self, TRAIN, VALIDATION))
    with pytest.raises(LeakError):
        stages.make_arm(run, "lightgcn")
    monkeypatch.undo()
    stages.make_arm(run, "lightgcn", parts=(TRAIN, VALIDATION))
