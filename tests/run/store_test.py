import dataclasses
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from bdlm_jax.data.splits import TEST, TRAIN
from bdlm_jax.report import finished_run
from bdlm_jax.run import build, stages, store
from bdlm_jax.runtime.fit import Fitted, best_phases
from bdlm_jax.runtime.log import Stopped, StopSignal
from experiments import tiny

ROOT = Path(__file__).resolve().parents[2]


class Noted:
    """A config that notes every leaf that is read, and has nothing else to read it by."""

    def __init__(self, tree, seen, prefix=""):
        self.__dict__.update(tree=tree, seen=seen, prefix=prefix)

    def __getitem__(self, name):
        value = self.tree[name]
        if hasattr(value, "items"):
            return Noted(value, self.seen, f"{self.prefix}{name}.")
        self.seen.add(self.prefix + name)
        return value

    __getattr__ = __getitem__

    def get(self, name, default=None):
        return self[name] if name in self.tree else default

    def items(self):
        return [(name, self[name]) for name in self.tree]

    def to_dict(self):
        return {name: value.to_dict() if isinstance(value, Noted) else value for name, value in self.items()}


class ReadingRun(build.Run):
    """Reads for a stage all that its training would: below run/ there is no config (tests/imports_test.py)."""

    def fit(self, stage, *, parents, phases, arms, params, judged, validate=None, select="", keep=None):
        start = params()
        values = dict.fromkeys(judged, 0.0) if keep else {name: validate(name, start)[select] for name in judged}
        for arm in arms.values():
            arm.batch(0)
            arm.view(start)
            arm.finish(start)
        return Fitted(dict.fromkeys(judged, start), values, dict.fromkeys(judged, 0))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return build.start_run(tiny.get_config(), tmp_path_factory.mktemp("store"))


def leaves(config):
    return [key for key, _ in store._flat(json.loads(config.to_json_best_effort()))]


def read_by_stages(made, changes):
    """{stage: the leaves that it reads} of all stages of a config."""
    config, seen = made.config.copy_and_resolve_references(), {}
    config.update_from_flattened_dict(changes)

    def run(stage):
        fields = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
        return ReadingRun(**fields | {"config": Noted(config, seen.setdefault(stage, set()))})

    decoder = stages.pretrain_lm(run("pretrain"))
    stages.train_text_lm(run("text_lm"), decoder)
    stages.train_ids_lm(run("ids_lm"), decoder)
    for model in ("mf", "sasrec"):
        stages.train_domain(run(model), model)
    domain = stages.train_domain(run(config.domain.model), config.domain.model)
    bdlm = stages.train_bdlm(run("bdlm"), decoder, domain.params["domain"])
    taught = bdlm.params["lm"], bdlm.params["domain"]
    distilled = stages.distill_domain(run("distill"), *taught)
    stages.refresh_domain(run("refresh"), *taught, distilled)
    return config, seen


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"domain.model": "mf", "mutual.reads": "layer0", "prompts.kind": "ids_titles", "lm.trains": "lora"},
        {"lm.row_std": 0.0, "select": "ndcg@10/full", "mutual.domain.align_user": 1.0, "mutual.align": "infonce"},
    ],
    ids=["defaults", "mf", "full"],
)
def test_no_stage_reads_a_setting_that_its_hash_leaves_out(made, changes):
    config, seen = read_by_stages(made, changes)
    for stage, read in seen.items():
        assert len(read) > 5, f"{stage} was not followed"
        assert [key for key in sorted(read) if not store.is_read(config, stage, key)] == []


def test_every_pattern_leaves_something_out(made):
    keys = leaves(made.config) + ["name"]
    for stage, patterns in store.UNREAD.items():
        for pattern in f"{store._NEVER} {patterns}".split():
            assert any(re.fullmatch(pattern, key) for key in keys), (stage, pattern)


def stage_hash(made, stage, changes=None, data=None, parents=None, select="ndcg@10/cand20", phases=()):
    config = made.config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes or {})
    facts = {"parents": parents, "select": select, "phases": phases}
    return store.stage_inputs(config, data or made.data, made.texts, stage, **facts)


def test_what_a_stage_takes_from_others_counts_by_its_content(made):
    tree = {"shared": {"user": np.zeros((2, 3))}, "domain": {}}
    plain = stage_hash(made, "bdlm", parents=(tree, 0.1))
    assert plain == stage_hash(made, "bdlm", {"pretrain.epochs": 2.0, "domain.epochs": 9}, parents=(tree, 0.1))
    others = [(tree, 0.2), tree, ({**tree, "domain": {"w": np.zeros(1)}}, 0.1)]
    others += [({"shared": {"user": value}, "domain": {}}, 0.1) for value in (np.ones((2, 3)), np.zeros((3, 2)))]
    hashes = [json.dumps(stage_hash(made, "bdlm", parents=parents)) for parents in others]
    assert len({json.dumps(plain), *hashes}) == 1 + len(others)


def test_an_lm_alone_is_the_same_whatever_the_domain_model_is(made):
    on_items = {"domain.model": "itemgcn", "itemgcn.length": 7}
    for stage in ("pretrain", "text_lm", "ids_lm"):
        assert stage_hash(made, stage, on_items) == stage_hash(made, stage), stage
    assert stage_hash(made, "bdlm", on_items) != stage_hash(made, "bdlm", on_items | {"itemgcn.length": 8})


@pytest.mark.parametrize(
    ("what", "matters_to"),
    [
        ("labels", {"mf", "ids_lm", "refresh", "anything"}),
        ("corpus", {"ids_lm", "refresh", "anything"}),
        ("candidates", {"mf", "ids_lm", "refresh", "anything"}),
        ("candidates of test", set()),
        ("candidates, full", set()),
    ],
)
def test_data_counts_as_far_as_it_is_read(made, what, matters_to):
    data, select = made.data, "ndcg@10/full" if what.endswith("full") else "ndcg@10/cand20"
    if what == "labels":
        part_E = data.split.part_E.copy()
        first, last = (np.flatnonzero(part_E == part)[0] for part in (TRAIN, TEST))
        part_E[[first, last]] = part_E[[last, first]]
        data = data._replace(split=dataclasses.replace(data.split, part_E=part_E))
    elif what == "corpus":
        data = data._replace(corpus=[*data.corpus, "more"])
    else:
        part = "test" if what.endswith("test") else "validation"
        candidates = {**data.fingerprint["candidates"], f"{part}/cand20": "other"}
        data = data._replace(fingerprint={**data.fingerprint, "candidates": candidates})
    for stage in ("mf", "ids_lm", "refresh", "anything"):
        same = stage_hash(made, stage, select=select) == stage_hash(made, stage, data=data, select=select)
        assert same == (stage not in matters_to), stage


def test_a_shape_from_a_file_counts_by_its_content(made, tmp_path):
    path, hashes = tmp_path / "config.json", []
    for layers in (1, 2):
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 300}
        path.write_text(json.dumps({"model_type": "llama", "num_hidden_layers": layers, "rms_norm_eps": 1e-6, **sizes}))
        hashes.append([stage_hash(made, stage, {"lm.config": str(path)}) for stage in ("mf", "bdlm")])
    assert hashes[0][0] == hashes[1][0] and hashes[0][1] != hashes[1][1]


def test_a_key_that_nobody_named_counts(made):
    changes = {"lm.dropout": 0.5, "seed": 3, "data.candidates_seed": 1}
    for key, value in changes.items():
        assert stage_hash(made, "a new stage") != stage_hash(made, "a new stage", {key: value})
    assert stage_hash(made, "mf") != stage_hash(made, "mf", phases=[("domain", 3)])


@pytest.fixture
def trained(monkeypatch):
    """The folders of all stages that were trained, and not read."""
    folders, fit = [], build.fit

    def noted(folder, **arguments):
        folders.extend([] if (folder / "done.json").exists() else [folder])
        return fit(folder, **arguments)

    monkeypatch.setattr(build, "fit", noted)
    return folders


def test_runs_share_what_their_difference_does_not_touch(made, tmp_path, trained):
    def fitted(name, **changes):
        config = made.config.copy_and_resolve_references()
        config.update_from_flattened_dict({"runtime.store": str(tmp_path / "all" / "stages"), **changes})
        run = dataclasses.replace(made, config=config, folder=tmp_path / "all" / name)
        return stages.train_domain(run, "mf"), run.folder / "mf"

    first, link = fitted("first")
    again, other = fitted("again", **{"mutual.rounds": 3, "lm.width": 32, "domain.test_graph": "train"})
    assert len(trained) == 1 and link.resolve() == other.resolve() and not other.readlink().is_absolute()
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    assert json.loads((link / "inputs.json").read_text())["settings"]["mf.epochs"] == 2
    fitted("slow", **{"mf.learning_rate": 1e-4})
    assert len(trained) == 2
    fitted("first")
    assert len(trained) == 2

    # A report reads through the link, and whoever moves both takes nothing away.
    (tmp_path / "all").rename(tmp_path / "moved")
    assert "mf" in finished_run.stage_seconds(tmp_path / "moved" / "first")
    assert best_phases(tmp_path / "moved" / "again" / "mf")["domain"]["phase"] >= 0

    # Nor is a stage left behind that was begun without a store.
    begun = dataclasses.replace(made, folder=tmp_path / "own", config=made.config.copy_and_resolve_references())
    stages.train_domain(begun, "mf")
    begun.config.runtime.store = str(tmp_path / "moved" / "stages")
    stages.train_domain(begun, "mf")
    assert len(trained) == 3 and not (begun.folder / "mf").is_symlink()


def test_a_second_run_waits_for_the_first_and_a_dead_one_holds_nothing(tmp_path):
    holder = """
import pathlib, sys, time
from bdlm_jax.run import store
with store.stage_folder(sys.argv[1], pathlib.Path(sys.argv[2]), lambda: {"stage": "mf"}) as folder:
    print(folder, flush=True)
    time.sleep(600)
"""
    words = [sys.executable, "-c", holder, str(tmp_path / "stages"), str(tmp_path / "first" / "mf")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        held = Path(process.stdout.readline().strip())
        stopping = StopSignal()
        stopping.requested = True
        with pytest.raises(Stopped), wanted(tmp_path, stop=stopping):
            pytest.fail("two processes hold one stage")
        threading.Timer(0.5, process.kill).start()
        with wanted(tmp_path) as folder:
            assert folder == held and process.wait() == -9


def wanted(tmp_path, **options):
    return store.stage_folder(str(tmp_path / "stages"), tmp_path / "second" / "mf", lambda: {"stage": "mf"}, **options)
