"""What ended in a traceback, in silence or in the wrong words once, each with the one sentence that it has now."""

import errno
import gzip
import logging
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from bdlm_jax import compare, export, recommend, story, sweep
from bdlm_jax.report import __main__ as report
from bdlm_jax.run import build, workdir
from bdlm_jax.runtime import checkpoint, files
from bdlm_jax.runtime.log import Stopped
from bdlm_jax.types import InputError
from experiments import tiny

ITEMS = "item_id,title\n" + "".join(f"{i},Title {i}\n" for i in range(20))


def interactions(*, head="user_id,item_id,timestamp", user=str, item=str, time=lambda t: 100 + t, n=6):
    generator, lines = np.random.default_rng(0), [head]
    for u in range(12):
        lines += [f"{user(u)},{item(i)},{time(t)}" for t, i in enumerate(generator.permutation(20)[:n])]
    return "\n".join(lines) + "\n"


def prepared(tmp_path, tables, **changes):
    """Begins a run of a folder with some files, for BDLM, and returns it."""
    config, folder = tiny.get_config(), tmp_path / "own"
    folder.mkdir()
    for name, content in tables.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    config.data.kind, config.data.path, config.data.options = "table", str(folder), {}
    config.data.candidates, config.models, config.select = {"cand3": 2}, ("bdlm",), "ndcg@10/cand3"
    config.evaluate.protocols, config.evaluate.text_protocols = ("cand3",), ()
    config.update_from_flattened_dict(changes)
    return build.start_run(config, tmp_path / "run")


TWO = {"interactions.csv": interactions(), "items.csv": ITEMS}
DATA = [
    ({"interactions.csv": interactions(item=lambda i: f"{i}.0"), "items.csv": ITEMS}, "no item has a text", {}),
    ({"interactions.csv": interactions()}, "or set config.data.titles=none", {}),
    (TWO | {"items.csv": "item_id,title\n"}, "no item has a text", {}),
    (TWO | {"items.csv": ITEMS.replace("title", "genre")}, "no item has a text", {}),
    (TWO | {"items.csv": ITEMS + "3,Another\n"}, "items.csv, line 22: the id '3' stood before", {}),
    (TWO | {"items.csv": ITEMS.replace("item_id,title", "title,title")}, "the column 'title' stands twice", {}),
    (TWO | {"interactions.csv": interactions(user=lambda u: "nan" if u else "a")}, "line 8: .* 'nan', a missing", {}),
    (TWO | {"interactions.csv": interactions(user=lambda u: "  " if u else "a")}, "line 8: field 'user' is empty", {}),
    (TWO | {"interactions.csv.gz": gzip.compress(b"user_id,item_id\n1,2\n")}, "holds interactions.csv and inter", {}),
    (TWO | {"items.tsv": ITEMS}, "holds items.csv and items.tsv", {}),
    (TWO | {"interactions.parquet": b"PAR1"}, "holds interactions.csv and interactions.parquet; keep one", {}),
    (
        TWO | {"interactions.csv": interactions(head="user_id,item_id,user")},
        "user_id and user may both be the user",
        {},
    ),
    (TWO | {"interactions.csv": interactions(head="item,item_id,user")}, "item and item_id may both be", {}),
    (TWO | {"interactions.csv": interactions(item=lambda i: i or "NULL")}, "'NULL', a missing id", {}),
    (TWO | {"interactions.csv": interactions(time="{:02d}.01.2024".format)}, "a date as 2024-05-31", {}),
    (TWO, "config.data.options.encoding: klingon is no encoding", {"data.options": {"encoding": "klingon"}}),
    (TWO, "cand3 asks for 1000000000 others beside each target", {"data.candidates.cand3": 10**9}),
    (TWO, "15 others beside .* for 12 of 12 test cases no 15 items are left", {"data.candidates.cand3": 15}),
    (TWO | {"interactions.csv": interactions(n=20)}, "no test case has anything to rank .* take data with more", {}),
    (TWO, "lower config.data.min_user", {"data.min_user": 99}),
    (TWO, "config.data.min_rating needs the field 'rating'", {"data.min_rating": 3.0}),
]


@pytest.mark.parametrize(("tables", "told", "changes"), DATA, ids=[told for _, told, _ in DATA])
def test_data_that_would_mislead_are_refused(tmp_path, tables, told, changes):
    with pytest.raises(InputError, match=told) as caught:
        prepared(tmp_path, tables, **changes)
    assert "\n" not in str(caught.value)


def test_what_is_read_and_dropped_is_told(tmp_path, caplog):
    text = interactions(
        head="user_id,item_id,rating", time=lambda t: 5 if t else 1, item=lambda i: i if i else "9" * 5000
    )
    lines = text.splitlines()
    with caplog.at_level(logging.INFO, "bdlm_jax"):
        run = prepared(
            tmp_path, TWO | {"interactions.csv": "\n".join([*lines, lines[3], "late,1,5"]) + "\n"},
            **{"data.min_rating": 2.0, "data.min_user": 2},
        )  # fmt: skip
    told = caplog.text
    assert "74 rows read, 1 dropped as duplicates" in told
    assert "12 interactions dropped: rated below data.min_rating 2" in told
    assert "1 interactions dropped: fewer than data.min_user 2" in told
    assert "60 interactions kept" in told
    assert f"{run.data.n_items - 1} of {run.data.n_items} items have a text" in told  # the long id has none
    assert "no column says when" in told
    assert run.data.dropped == {
        "late": "the interactions that the data have are fewer than data.min_user 2 or min_item 0 ask for"
    }


@pytest.mark.parametrize(
    ("titles", "told"),
    [
        (ITEMS.splitlines()[:4], ["3 of 20 items have a text", "most items have no text, and bdlm reads nothing of"]),
        ([line.split(",")[0] + ",nan" for line in ITEMS.splitlines()[1:]], ["the text of 20 items is 'nan'"]),
        (ITEMS.splitlines(), []),
    ],
)
def test_titles_that_look_amiss_are_warned_of(tmp_path, caplog, titles, told):
    head = [] if titles[0].startswith("item_id") else ["item_id,title"]
    with caplog.at_level(logging.INFO, "bdlm_jax"):
        prepared(tmp_path, TWO | {"items.csv": "\n".join([*head, *titles]) + "\n"})
    assert all(words in caplog.text for words in told)
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == bool(told)


def test_dates_are_read_as_times(tmp_path):
    dates = TWO | {
        "interactions.csv": interactions(time="2024-01-{:02d}T10:00:00+02:00".format, n=5).replace("-00T", "-31T")
    }
    table = prepared(tmp_path, dates).data.split.interactions
    days = (table.time_E[:5] - table.time_E[0]) / 86_400_000
    assert days.tolist() == [0, 1, 2, 3, 30]  # the first row of each user is the last of January


def test_a_dropped_user_is_told_why(tiny_run, tmp_path, capsys):

    from bdlm_jax.serving.artefact import load_catalogue
    from bdlm_jax.serving.catalogue import find_user

    catalogue = load_catalogue(tiny_run[1])
    assert catalogue.dropped == {}
    catalogue.dropped["3"] = "the interactions that the data have are too few"
    with pytest.raises(
        InputError, match=r"user '3' is left out of this run, for the interactions .* too few: give --hist"
    ):
        find_user(catalogue, "3")


@pytest.mark.parametrize("where", ["file", "file/run", "x" * 300, "/proc/no/run"])
def test_a_workdir_that_cannot_be_one_is_named(tmp_path, where):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"cannot be a run directory .*; choose another --workdir"),
        workdir.hold(tmp_path / where),
    ):
        pass


def test_a_second_run_is_refused_and_a_killed_one_holds_nothing(tmp_path):
    with workdir.hold(tmp_path / "run") as folder:
        lock = folder / "lock"
    program = (
        "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(1, flush=True); "
        "time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", program, str(lock)], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"1\n"
    with pytest.raises(InputError, match="another run is at work in"), workdir.hold(tmp_path / "run"):
        pass
    other.kill()
    other.communicate()
    with workdir.hold(tmp_path / "run"):
        assert lock.exists()


def test_a_refused_run_leaves_its_workdir_to_the_corrected_one(tmp_path):
    with pytest.raises(InputError, match="no item has a text"):
        prepared(tmp_path, {"interactions.csv": interactions()})
    config = tiny.get_config()
    config.models, config.data.path = ("item_pop",), ""
    folder = tmp_path / "run"
    config.lm.width = 32
    workdir.begin(folder, config)
    build.start_run(config, folder)  # other data, other words
    workdir.record(folder, config)
    samples = folder / "data" / "samples.safetensors"
    samples.write_bytes(b"")
    workdir.begin(folder, config)
    assert samples.exists()
    config.lm.width = 16
    workdir.begin(folder, config)  # nothing was trained: other settings are welcome
    assert not samples.exists(), "another model's texts"
    (folder / "per_user").mkdir()
    (folder / "per_user" / "mf.npz").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"config\.json was written with another config\.lm\.width: 32, and now it is 16"
    ):
        workdir.begin(folder, config)
    (folder / "data").mkdir(exist_ok=True)
    workdir.finish(folder)
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"width": 32', '"width": 33'))
    with pytest.raises(InputError, match=r"config\.json is damaged, for its checksum differs; delete it if"):
        workdir.begin(folder, config)


def test_a_config_json_of_somebody_else_stays(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="is not of a run"):
        workdir.begin(tmp_path, tiny.get_config())
    assert (tmp_path / "config.json").read_text() == '{"model_type": "llama"}'


EXPERIMENTS = [
    ("def get_config():\n    return {'seed': 1}\n", {}, "get_config() returns a dict, not a ConfigDict"),
    ("def get_config():\n    return None\n", {}, "not a ConfigDict"),
    ("seed = 1\n", {}, "has no get_config()"),
    ("import no_such_module\n", {}, "mine.py: ModuleNotFoundError: No module named 'no_such_module'"),
    ("def get_config(:\n", {}, "mine.py: SyntaxError: "),
    ("def get_config():\n    return 1 / 0\n", {}, "mine.py: ZeroDivisionError: division by zero"),
    (
        "from experiments import tiny\ndef get_config(c=tiny.get_config()):\n    c.models = 'bdlm'\n    return c\n",
        {},
        "models",
    ),
]


@pytest.mark.parametrize(("body", "changes", "told"), EXPERIMENTS, ids=[told for _, _, told in EXPERIMENTS])
def test_an_experiment_that_gives_no_settings_is_one_sentence(tmp_path, capsys, monkeypatch, body, changes, told):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # config_flags loads every experiment by this name
    (tmp_path / "mine.py").write_text(body)
    try:
        sweep.read_config(str(tmp_path / "mine.py"), changes)
    except InputError as error:
        said = str(error)
    except SystemExit as stop:
        assert stop.code == 2
        said = capsys.readouterr().err.removesuffix("\n")
    assert told in said and "\n" not in said


def test_a_stop_is_heard_during_an_evaluation_and_ends_with_its_code(tiny_run, monkeypatch, tmp_path):
    config = tiny.get_config()
    config.models, config.evaluate.chunk = ("item_pop",), 1
    counted = []

    def count(*args):
        counted.append(1)
        if len(counted) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return np.zeros(1), np.zeros(1)

    monkeypatch.setattr("bdlm_jax.evaluation.evaluate.count_better", count)
    with pytest.raises(Stopped) as stopped:
        story.train_and_evaluate(config, str(tmp_path / "run"))
    assert stopped.value.code == 143 and len(counted) == 3


def full_disk(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_full_disk_is_one_line_and_what_was_there_stays(tiny_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "page.md").write_text("before")
    monkeypatch.setattr(files, "flush_to_disk", full_disk)
    run = str(tiny_run[1])
    for door in (
        lambda: compare.main([run, "--out", str(tmp_path / "page.md")]),
        lambda: export.main(["--workdir", run, "--format", "domain", "--out", str(tmp_path / "tables")]),
    ):
        assert door() == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "No space left on device" in told and "check the path" in told
    assert (tmp_path / "page.md").read_text() == "before" and not (tmp_path / "tables").exists()


def test_what_libraries_make_of_a_full_disk_is_one_sentence(tiny_run, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise Exception("No space left on device (os error 28)")  # as tokenizers says it

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    assert export.main(["--workdir", str(tiny_run[1]), "--format", "hf", "--out", str(tmp_path / "hf")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "the tokenizer cannot be written to" in told
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(
        InputError, match=r"needs 1,048,\d\d\d bytes for a checkpoint, and the disk has 1,000; make room"
    ):
        checkpoint.save(tmp_path / "checkpoints", 1, {"a": np.zeros(3)})
    assert not [*(tmp_path / "checkpoints").iterdir()] and not (tmp_path / "hf").exists()


@pytest.mark.parametrize("door", [compare.main, lambda words: report.main(["--collect", *words])])
@pytest.mark.parametrize("out", [".", "..", "mine", "mine/.."])
def test_a_folder_is_not_written_over(tiny_run, tmp_path, monkeypatch, capsys, door, out):
    (tmp_path / "mine" / "precious").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine" if out == ".." else tmp_path)
    assert door([str(tiny_run[1]), "--out", out]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and ("names no file; give one" in told or "is a folder; name a file in it" in told)
    assert (tmp_path / "mine" / "precious").is_dir()


@pytest.mark.parametrize("out", ["file/page", "x" * 300, "/proc/no/page"])
def test_a_place_that_cannot_be_written_is_one_line(tiny_run, tmp_path, capsys, out):
    (tmp_path / "file").write_text("")
    run, out = str(tiny_run[1]), str(tmp_path / out)
    assert export.main(["--workdir", run, "--format", "domain", "--out", out]) == 2
    assert compare.main([run, "--out", out]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 2 and told.err.count("bdlm_jax: ") == 2


@pytest.mark.parametrize("workdir", ["nowhere", "x" * 300, "file", "file/run"])
def test_a_run_that_is_not_there_is_one_line(tmp_path, capsys, workdir):
    (tmp_path / "file").write_text("")
    at = str(tmp_path / workdir)
    assert recommend.main(["--workdir", at, "--user", "u1"]) == 2
    assert report.main(["--workdir", at]) == 2
    assert compare.main([at]) == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_one_run_named_twice_counts_once_or_not_at_all(tiny_run, tmp_path, capsys):
    run = str(tiny_run[1])
    assert report.main(["--collect", run, run, "--out", str(tmp_path / "page.md")]) == 2
    assert "the same settings and seed" in capsys.readouterr().err
