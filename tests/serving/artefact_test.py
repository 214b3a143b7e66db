import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from bdlm_jax.data.splits import TEST, TRAIN, VALIDATION
from bdlm_jax.evaluation import scorers as models
from bdlm_jax.run import prepare, served, stages
from bdlm_jax.run import rows as lm_rows
from bdlm_jax.runtime.files import load_safetensors
from bdlm_jax.serving import artefact as serving
from bdlm_jax.serving import scores as scoring
from bdlm_jax.serving.catalogue import Catalogue
from bdlm_jax.types import InputError

EVERYTHING = (TRAIN, VALIDATION, TEST)


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """The stages' view of the tiny run, as `train` makes it."""
    config, workdir, _ = tiny_run
    data = prepare.prepare_data(config, tmp_path_factory.mktemp("again"))
    vocabulary = prepare.prepare_vocabulary(config, data, workdir / "tokenizer")
    texts = lm_rows.encode_texts(config, data, vocabulary)
    return stages.Run(config, workdir, data, texts, None, jax.random.key(config.seed))


def params_of(run, stage, arm):
    return {"domain": {}} | load_safetensors(run.folder / stage / f"best_{arm}.safetensors")


def seen_mask(run):
    user, item = run.data.split.edges(*EVERYTHING)
    seen_UI = np.zeros((run.data.n_users, run.data.n_items), bool)
    seen_UI[user, item] = True
    return seen_UI


def test_the_domain_arm_scores_as_the_evaluator_does(run):
    scorer = models.domain_scorer(stages.make_test_arm(run), params_of(run, "refresh", "domain"))
    expected_UI = np.asarray(scorer.score(np.arange(run.data.n_users)))
    served, catalogue = serving.load_domain_arm(run.folder), serving.load_catalogue(run.folder)
    scores_UI = np.stack([scoring.domain_scores(served, user=user) for user in range(run.data.n_users)])
    np.testing.assert_allclose(scores_UI, expected_UI, rtol=1e-4, atol=1e-6)
    best_U = np.argmax(np.where(seen_mask(run), -np.inf, expected_UI), axis=1)
    for user in range(run.data.n_users):
        first = scoring.top_items(scores_UI[user], seen=catalogue.history(user), k=1)[0]
        assert first == best_U[user] or np.isclose(expected_UI[user, first], expected_UI[user, best_U[user]])


def test_the_lm_arm_scores_as_the_evaluator_does_on_all_that_is_known(run):
    params, config = params_of(run, "bdlm", "lm"), run.config
    arm, bridge = stages.make_arm(run, config.domain.model), stages.make_bridge(run, reads=config.mutual.reads)
    reading = lm_rows.reading_rows(config, run.data, run.texts, kind=config.prompts.kind, parts=EVERYTHING)
    expected_UI = np.asarray(stages.lm_scorer(run, params, arm, bridge, reading).score(np.arange(run.data.n_users)))
    served, catalogue = serving.load_lm_arm(run.folder), serving.load_catalogue(run.folder)
    for user in (0, 7, run.data.n_users - 1):
        scores_I = scoring.lm_scores(served, catalogue.history(user), user=user)
        np.testing.assert_allclose(scores_I, expected_UI[user], rtol=1e-4, atol=1e-4)


def test_a_user_is_named_only_where_the_run_reads_names(run):
    served, history = serving.load_lm_arm(run.folder), [3, 4]
    new_I = scoring.lm_scores(served, history)
    assert np.isfinite(new_I).all()
    assert not np.allclose(new_I, scoring.lm_scores(served, history[::-1])), "order counts"
    for named in (False, True):
        reading = dataclasses.replace(served, prompts=served.prompts | {"unnamed": not named})
        assert np.allclose(new_I, scoring.lm_scores(reading, history)), "nobody's name is shown for a new user"
        assert np.allclose(new_I, scoring.lm_scores(reading, history, user=0)) != named


def test_the_catalogue_holds_every_interaction_and_raw_names(run):
    catalogue, table = serving.load_catalogue(run.folder), run.data.split.interactions
    assert catalogue.user_ids == table.user_ids.tolist()
    assert catalogue.item_ids == table.item_ids.tolist()
    assert catalogue.titles == table.item_fields["title"].tolist()
    for user in (0, 5):
        np.testing.assert_array_equal(catalogue.history(user), table.item_E[table.user_E == user])


def test_the_domain_arm_loads_without_jax_and_without_the_lm(run, tmp_path):
    shutil.copytree(run.folder / "serving", tmp_path / "serving")
    shutil.rmtree(tmp_path / "serving" / "tokenizer")
    (tmp_path / "serving" / "lm.safetensors").unlink()
    program = (
        "import sys; from bdlm_jax.recommend import recommend\n"
        f"rows = recommend(workdir={str(tmp_path)!r}, history=['i01', 'i03'], k=2)\n"
        f"rows += recommend(workdir={str(tmp_path)!r}, user='u000', k=2)\n"
        "print(len(rows), sorted({'jax', 'flax', 'transformers', 'tokenizers', 'torch', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "4 []", done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, 'no finished run with "bdlm"'), ('{"format": 0}', "another version"), ('{"format"', "cannot be read")],
)
def test_what_cannot_be_served_is_said_in_a_sentence(tmp_path, text, message):
    if text is not None:
        (tmp_path / "serving").mkdir()
        (tmp_path / "serving" / "serving.json").write_text(text, encoding="utf-8")
    for load in (serving.load_catalogue, serving.load_domain_arm, serving.load_lm_arm):
        with pytest.raises(InputError, match=message):
            load(tmp_path)


@pytest.mark.parametrize("damaged", ["domain.safetensors", "lm.safetensors", "catalogue.safetensors", "catalogue.json"])
def test_a_damaged_file_is_named(run, tmp_path, damaged):
    shutil.copytree(run.folder / "serving", tmp_path / "serving")
    (tmp_path / "serving" / damaged).write_text("{}", encoding="utf-8")
    load = {"domain": serving.load_domain_arm, "lm": serving.load_lm_arm}.get(
        damaged.split(".")[0], serving.load_catalogue
    )
    with pytest.raises(InputError, match=damaged.split(".")[0]):
        load(tmp_path)


def test_params_with_lists_come_back_from_serving(run, tmp_path):
    """NCF's layers are a list: written as the run writes them, they score the same after loading."""
    config = run.config.copy_and_resolve_references()
    config.domain.model = "ncf"
    changed = run._replace(config=config)
    own = params_of(run, "bdlm", "lm")
    params = own | {"domain": stages.make_arm(changed, "ncf").init(jax.random.key(3))}
    serving.write_serving(
        tmp_path,
        Catalogue(**served.catalogue_fields(run)),
        serving.ServedDomain(**served.domain_fields(changed, params)),
        serving.ServedLM(**served.lm_fields(run, own)),
    )
    loaded = serving.load_domain_arm(tmp_path)
    expected_UI = models.domain_scorer(stages.make_arm(changed, "ncf"), params).score(np.array([0, 1]))
    np.testing.assert_allclose(scoring.domain_scores(loaded, user=1), expected_UI[1], rtol=1e-4, atol=1e-6)


def test_the_manifest_holds_what_the_lm_needs(run):
    served = serving.load_lm_arm(run.folder)
    assert served.config == stages.lm_config(run)
    manifest = json.loads((run.folder / "serving" / "serving.json").read_text(encoding="utf-8"))
    assert manifest["lm"]["prompts"]["max_tokens"] == run.config.prompts.length
    assert served.vocabulary.n_tokens == run.texts.vocabulary.n_tokens
    assert all(np.array_equal(a, b) for a, b in zip(served.titles, run.texts.titles, strict=True))
    assert serving.load_domain_arm(run.folder).options == {"length": run.config.prompts.max_items}
