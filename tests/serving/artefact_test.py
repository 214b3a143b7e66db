import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import bdlm_jax
from bdlm_jax.data.splits import TRAIN, Split
from bdlm_jax.domain import ncf
from bdlm_jax.domain.arm import Inputs
from bdlm_jax.evaluation import scorers
from bdlm_jax.evaluation.evaluate import load_counts
from bdlm_jax.run import build, reading, rows, teachers
from bdlm_jax.runtime import files
from bdlm_jax.runtime.files import CHECKSUMS, load_safetensors, save_safetensors
from bdlm_jax.serving import artefact, scores
from bdlm_jax.types import InputError

LOADERS = (artefact.load_catalogue, artefact.load_domain_arm, artefact.load_lm_arm)


@pytest.fixture(scope="module")
def run(tiny_run):
    """The stages' view of the tiny run, as `train` makes it."""
    return build.start_run(*tiny_run[:2])


def params_of(run, stage, arm):
    return {"domain": {}} | load_safetensors(run.folder / stage / f"best_{arm}.safetensors")


def test_the_domain_arm_scores_as_the_evaluator_does(run):
    arm = build.make_arm(run, "lightgcn", parts=build.parts_at_test(run.config))
    scorer = scorers.domain_scorer(arm, params_of(run, "refresh", "domain"))
    expected_UI = np.asarray(scorer.score(np.arange(run.data.n_users)))
    served = artefact.load_domain_arm(run.folder)
    scores_UI = scores.domain_scores(served, users=range(run.data.n_users))
    np.testing.assert_allclose(scores_UI, expected_UI, rtol=1e-4, atol=1e-6)


def test_the_lm_arm_scores_as_the_evaluator_does_on_all_that_is_known(run):
    params, config = params_of(run, "bdlm", "lm"), run.config
    split = Split(run.data.split.interactions, np.full_like(run.data.split.part_E, TRAIN))
    past = dataclasses.replace(run, data=run.data._replace(split=split))
    users = rows.reading_rows(past, kind=config.prompts.kind, part="test")
    texts = teachers.weigh_texts(run, params, None)
    assert texts.last or texts.mean
    reader = reading.bdlm_reader(run, "test", texts=texts)
    reader = reader._replace(users=users, histories=rows.known_histories(past, "test"))
    expected_UI = np.asarray(reader.scorer(run, params).score(np.arange(run.data.n_users)))
    served, catalogue = artefact.load_lm_arm(run.folder), artefact.load_catalogue(run.folder)
    users = [0, 7, *range(20, 70), run.data.n_users - 1]  # more than go through the model at once
    scores_BI = scores.lm_scores(served, [*map(catalogue.history, users)], users=users)
    np.testing.assert_allclose(scores_BI, expected_UI[users], rtol=1e-4, atol=1e-4)
    assert served.config == run.lm
    assert served.vocabulary.n_tokens == run.texts.vocabulary.n_tokens
    assert served.prompts.max_tokens == config.prompts.length


def test_every_arm_ranks_as_it_was_tested(run):
    catalogue, arms = artefact.load_catalogue(run.folder), artefact.served_arms(run.folder)
    assert [*arms] == ["mf", "lightgcn", "ids_lm", "lm", "domain"]
    for name, facts in arms.items():
        counts = load_counts(run.folder / "per_user" / f"{facts['row']}.npz")["full"]
        histories = [*map(catalogue.history, counts.user)]
        known = [history[history != item] for history, item in zip(histories, counts.target)]
        scores_UI = scores.arm_scores(artefact.load_arm(run.folder, name), known, users=counts.user.tolist())
        target_N = scores_UI[np.arange(len(counts.target)), counts.target]
        for had, scores_I in zip(known, scores_UI):
            scores_I[had] = -np.inf
        better = np.sum(scores_UI > target_N[:, None], axis=1)
        assert np.mean(better == counts.better) > 0.97, name  # sums in another order part what is nearly level


def test_the_catalogue_holds_every_interaction_and_raw_names(run):
    catalogue, table = artefact.load_catalogue(run.folder), run.data.split.interactions
    assert catalogue.user_ids == table.user_ids.tolist()
    assert catalogue.item_ids == table.item_ids.tolist()
    assert catalogue.titles == table.item_fields["title"].tolist()
    for user in (0, 5):
        np.testing.assert_array_equal(catalogue.history(user), table.item_E[table.user_E == user])


def test_records_come_back_as_they_were_written(tiny_run, tmp_path, monkeypatch):
    """Params with lists too (NCF's layers), which no tables replace."""
    catalogue, tables, lm = (load(tiny_run[1]) for load in LOADERS)
    own = ncf.ncf_arm(Inputs(width=16), hidden=(8,)).init(jax.random.key(3))
    domain = dataclasses.replace(tables, model="ncf", domain=own, options={"hidden": [8]}, dot=False)
    lm = dataclasses.replace(lm, contexts=lm.titles[: len(catalogue.user_ids)])
    assert artefact.served_arms(tmp_path) == {}
    artefact.write_arm(tmp_path, "lm", lm, catalogue, row="bdlm_lm")
    read, hash_file = [], files.file_sha256  # an arm is not read again for the next
    monkeypatch.setattr(files, "file_sha256", lambda path: read.append(path.name) or hash_file(path))
    artefact.write_arm(tmp_path, "ncf", domain, catalogue)
    assert not {"lm.safetensors", "catalogue.json"} & {*read} and artefact.is_served(tmp_path)
    rows = {name: (facts["kind"], facts["row"]) for name, facts in artefact.served_arms(tmp_path).items()}
    assert rows == {"lm": ("lm", "bdlm_lm"), "ncf": ("domain", "ncf")}
    for record, load in zip((catalogue, domain, lm), LOADERS):
        for field in dataclasses.fields(record):
            if field.name != "vocabulary":
                before, after = getattr(record, field.name), getattr(load(tmp_path), field.name)
                jax.tree.map(np.testing.assert_array_equal, before, after)
    vocabulary = artefact.load_lm_arm(tmp_path).vocabulary
    assert vocabulary.n_tokens == lm.vocabulary.n_tokens
    assert vocabulary.tokenizer.get_vocab() == lm.vocabulary.tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ({"name": "both"}, "arm 'both' is none of this run's: choose one of mf, lightgcn, ids_lm, lm, domain"),
        ({"name": "lm", "kind": "domain"}, "arm 'lm' is none of this run's: choose one of mf, lightgcn, domain"),
    ],
)
def test_an_arm_is_found_by_name_and_bdlms_is_the_first(tiny_run, tmp_path, ask, message):
    folder = tiny_run[1]
    found = [artefact.find_arm(folder, *who) for who in ((), ("lightgcn",), ("lm",), ("bdlm_lm",))]
    assert [*found, artefact.find_arm(folder, kind="lm")] == ["domain", "lightgcn", "lm", "lm", "lm"]
    with pytest.raises(InputError, match=message):
        artefact.find_arm(folder, **ask)
    artefact.write_arm(tmp_path, "mf", artefact.load_domain_arm(folder), artefact.load_catalogue(folder))
    assert artefact.find_arm(tmp_path) == "mf"
    manifest = tmp_path / "serving" / "serving.json"
    manifest.write_text('{"format": 3, "domain": {}}')  # another version's, which the next start writes anew
    (manifest.parent / CHECKSUMS).unlink()
    assert artefact.served_arms(tmp_path) == {}
    artefact.write_arm(tmp_path, "mf", artefact.load_domain_arm(folder), artefact.load_catalogue(folder))
    assert [*artefact.served_arms(tmp_path)] == ["mf"]
    with pytest.raises(InputError, match="serves no language model, but mf: train one in it"):
        artefact.find_arm(tmp_path, kind="lm")


def test_the_domain_arm_loads_without_jax_and_without_the_lm(tiny_run, tmp_path):
    shutil.copytree(tiny_run[1] / "serving", tmp_path / "serving")
    shutil.rmtree(tmp_path / "serving" / "tokenizer")
    (tmp_path / "serving" / "lm.safetensors").unlink()
    program = (
        "import sys; from bdlm_jax import recommend\n"
        f"ask = ['--workdir', {str(tmp_path)!r}, '-k', '2']\n"
        "codes = [recommend.main([*ask, *who]) for who in (['--history', 'i01;i03'], ['--user', 'u000'])]\n"
        "heavy = {'jax', 'flax', 'transformers', 'tokenizers', 'torch', 'scipy', 'pandas'}\n"
        "print(codes, sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[0, 0] []", done.stderr


@pytest.mark.parametrize(
    ("damaged", "text", "message"),
    [
        ("serving.json", None, "no finished run that recommends"),
        ("serving.json", '{"format": 0}', "another version"),
        ("serving.json", '{"format"', "serving.json cannot be read .* delete .*/serving"),
        ("serving.json", "[]", "serving.json cannot be read .* delete .*/serving"),
        ("serving.json", '{"format": 4, "arms": [3]}', "serving.json holds no manifest: delete .*/serving"),
        ("catalogue.json", "{}", "catalogue.json holds no catalogue .*: delete .*/serving"),
        (
            "catalogue.json",
            '{"user_ids": [], "item_ids": [], "titles": []}',
            "are not of one length.: delete .*/serving",
        ),
        ("catalogue.safetensors", "{}", "catalogue.safetensors cannot be read .* delete .*/serving"),
        ("domain.safetensors", "{}", "domain.safetensors cannot be read .* delete .*/serving"),
        ("lm.safetensors", "{}", "lm.safetensors cannot be read .* delete .*/serving"),
    ],
)
def test_what_cannot_be_served_is_named(tiny_run, tmp_path, damaged, text, message):
    shutil.copytree(tiny_run[1] / "serving", tmp_path / "serving")
    path = tmp_path / "serving" / damaged
    (path.parent / CHECKSUMS).unlink()  # an older version wrote none, and a person may delete it
    path.unlink() if text is None else path.write_text(text, encoding="utf-8")
    touched = [load for load in LOADERS if path.stem == "serving" or path.stem in load.__name__]
    assert touched
    for load in touched:
        with pytest.raises(InputError, match=message):
            load(tmp_path)


def test_a_manifest_of_another_shape_is_named(tiny_run, tmp_path):
    shutil.copytree(tiny_run[1] / "serving", tmp_path / "serving")
    (tmp_path / "serving" / CHECKSUMS).unlink()
    arms = [{"arm": kind, "kind": kind} for kind in ("domain", "lm")]
    (tmp_path / "serving" / "serving.json").write_text(json.dumps({"format": artefact.FORMAT, "arms": arms}))
    for load, what in zip(LOADERS[1:], ("domain", "language")):
        with pytest.raises(InputError, match=f"serving.json holds no {what} model .*: delete .*/serving"):
            load(tmp_path)
    with pytest.raises(InputError, match="of two runs: its tables have other rows than its catalogue"):
        names = json.loads((tmp_path / "serving" / "catalogue.json").read_text())
        shorter = {name: values[:-1] if name in ("item_ids", "titles") else values for name, values in names.items()}
        (tmp_path / "serving" / "catalogue.json").write_text(json.dumps(shorter))
        tree = load_safetensors(tmp_path / "serving" / "catalogue.safetensors")
        tree["item"] = np.minimum(tree["item"], len(shorter["item_ids"]) - 1)
        save_safetensors(tmp_path / "serving" / "catalogue.safetensors", tree)
        shutil.copy(tiny_run[1] / "serving" / "serving.json", tmp_path / "serving" / "serving.json")
        bdlm_jax.load(tmp_path).recommend(users=["u004"])


def test_what_is_served_is_damaged_where_one_byte_is(tiny_run, tmp_path):
    shutil.copytree(tiny_run[1] / "serving", tmp_path / "serving")
    assert artefact.is_served(tmp_path)
    path = tmp_path / "serving" / "catalogue.json"
    path.write_bytes(path.read_bytes().replace(b"u004", b"u904"))
    assert not artefact.is_served(tmp_path), "the run would not write it again"
    with pytest.raises(InputError, match=r"catalogue.json cannot be read .its checksum differs.: delete .*/serving"):
        artefact.load_catalogue(tmp_path)
    artefact.load_domain_arm(tmp_path)  # it reads no other file
