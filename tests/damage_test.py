"""Any damaged byte in any file of a run directory, any odd value of any setting: the same answer, or one sentence.

The doors that do not train are asked in this process. The default suite tries some fifty cases of each kind, always the
same; `pytest -m slow tests/damage_test.py` tries a thousand others.
"""

import contextlib
import io
import os
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bdlm_jax
from bdlm_jax import recommend, story
from bdlm_jax.report.finished_run import read_run
from bdlm_jax.run import build, stages, workdir
from bdlm_jax.run.checks import _flatten, check_config
from bdlm_jax.runtime.door import REFUSED, refuse
from bdlm_jax.types import InputError
from experiments import tiny

STAGE = "mf"  # stands for all: they are written and read by the same loop
# What nobody reads back: what a browser shows, which a run writes anew, XLA's cache, the lock, TensorBoard's events.
UNREAD = ("report.html", "plots", "compiled", "lock", "tensorboard")
# Of safetensors and npz the whole content is checked, of JSON and text too: one of each kind would do, all are tried.
PARTS = ("serving", "data", "tokenizer", "per_user", STAGE)

FEW = settings(max_examples=50, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=1000, derandomize=False)


def files_read(folder):
    names = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [n for n in names if not {*n.parts} & {*UNREAD} and (len(n.parts) == 1 or n.parts[0] in PARTS)]


def damage(path, how, place, bit):
    """Turns one bit at a place between 0 and 1, cuts the file there, or empties it."""
    data = path.read_bytes()
    at = int(place * max(len(data) - 1, 0))
    made = {
        "empty": b"",
        "cut": data[:at],
        "flip": data[:at] + bytes([b ^ 1 << bit for b in data[at:][:1]]) + data[at + 1 :],
    }
    path.unlink()  # it is a hard link
    path.write_bytes(made[how])


def doors(name, folder):
    """The questions that a file of a finished run takes part in."""
    asked = ["--workdir", str(folder), "--user", "u004", "-k", "5"]
    if name.parts[0] == "serving":
        yield lambda: recommend.main(asked)
        yield lambda: recommend.main([*asked, "--arm", "lm"])
        return
    if "checkpoints" in name.parts:
        for done in ("done.json", "SHA256SUMS"):  # then the stage goes on from its last checkpoint
            (folder / STAGE / done).unlink()
    yield lambda: read_run(folder)._replace(folder=None)
    yield lambda: go_on(folder)
    run = bdlm_jax.load(folder)
    yield lambda: run.results.to_csv()
    yield lambda: str(run.report)


def go_on(folder):
    """What the same command does again, as far as a stage and a test that are finished."""
    config = tiny.get_config()
    workdir.begin(folder, config)
    run = build.start_run(config, folder)
    fitted = stages.train_domain(run, STAGE)
    sliced = [name for name in run.data.candidates["test"] if name not in config.data.candidates]
    counts = story._counted(folder / "per_user" / f"{STAGE}.npz", (*config.evaluate.protocols, *sliced))
    again = counts is None  # they would be counted anew
    return run.data.fingerprint, run.data.candidates, run.texts.titles, fitted, again or counts


def answer(ask):
    """What a door tells or returns, as something to compare; None where it refuses in one sentence."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            told = ask()
        if told == 2:
            raise InputError(err.getvalue().removeprefix("bdlm_jax: ").removesuffix("\n"))
    except REFUSED as error:
        with contextlib.redirect_stderr(err := io.StringIO()):
            assert refuse(error) == 2
        assert err.getvalue().count("\n") == 1, err.getvalue()
        return None
    return out.getvalue(), jax.tree.map(plain, told)


def plain(leaf):
    if hasattr(leaf, "__dataclass_fields__"):
        return jax.tree.map(plain, vars(leaf))
    return (leaf.dtype.str, leaf.shape, leaf.tobytes()) if isinstance(leaf, np.ndarray) else repr(leaf)


def same(found, wanted):
    """Whether an answer is the one of the whole directory; counts may be counted anew."""
    if found == wanted:
        return True
    again = found and isinstance(found[1], tuple) and len(found[1]) == 5 and found[1][4] == "True"
    return bool(again) and found[1][:4] == wanted[1][:4]


@pytest.fixture(scope="module")
def whole(tiny_run):
    """(the run's directory, its files that are read, and the answers of every kind of file's doors)."""
    folder, answers = Path(tiny_run[1]), {}
    for name in files_read(folder):
        kind = (name.parts[0], "checkpoints" in name.parts) if len(name.parts) > 1 else ("", False)
        if kind not in answers:
            with copied(folder) as copy:
                answers[kind] = [answer(ask) for ask in doors(name, copy)]
            assert None not in answers[kind], name
    return folder, files_read(folder), answers


@contextlib.contextmanager
def copied(folder):
    with tempfile.TemporaryDirectory(dir=folder.parent) as at:
        copy = Path(at) / "run"
        shutil.copytree(folder, copy, copy_function=os.link, ignore=shutil.ignore_patterns("plots", "compiled"))
        yield copy


def check_damage(whole, data):
    folder, files, answers = whole
    name = data.draw(st.sampled_from(files))
    how = data.draw(st.sampled_from(("flip", "flip", "cut", "empty")))
    place, bit = data.draw(st.floats(0, 1)), data.draw(st.integers(0, 7))
    kind = (name.parts[0], "checkpoints" in name.parts) if len(name.parts) > 1 else ("", False)
    with copied(folder) as copy:
        damage(copy / name, how, place, bit)
        for ask, wanted in zip(doors(name, copy), answers[kind]):
            found = answer(ask)
            assert found is None or same(found, wanted), (name, how, place, bit)


@FEW
@given(data=st.data())
def test_a_damaged_file_changes_no_answer(whole, data):
    check_damage(whole, data)


@pytest.mark.slow
@MANY
@given(data=st.data())
def test_a_thousand_damaged_files_change_no_answer(whole, data):
    check_damage(whole, data)


ODD = (
    True, None, 0, 1, -1, 7, 2**31, 2**40, 2**63, 2**70, 10**400, 0.0, -0.5, 1.0, 1e-300, 1e300, float("inf"),
    float("-inf"), float("nan"), "", "x", "full", "../..", "\0", "é\n", "(", "a" * 5000, (), ("x",), (1,), ("x", "x"),
    ("full",), ("a" * 5000,), {}, {"x": 1},
)  # fmt: skip
LEAVES = [key for key, _ in _flatten(tiny.get_config())]
READ_EARLY = ("seed", "data.", "tokenizer.", "prompts.", "evaluate.", "select", "models")  # by `start_run`


def check_odd(key, value, folder):
    config = tiny.get_config()
    try:
        config.update_from_flattened_dict({key: value})
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError):
        return  # refused where it is written, see main_test.py

    def ask():
        check_config(config)
        if key.startswith(READ_EARLY):
            build.start_run(config, folder)

    answer(ask)


@FEW
@given(key=st.sampled_from(LEAVES), value=st.sampled_from(ODD))
def test_an_odd_setting_is_refused_in_one_sentence_or_taken(key, value):
    with tempfile.TemporaryDirectory() as folder:
        check_odd(key, value, Path(folder))


@pytest.mark.slow
@pytest.mark.parametrize("key", LEAVES)
def test_every_setting_with_every_odd_value(key, tmp_path):
    for number, value in enumerate(ODD):
        check_odd(key, value, tmp_path / str(number))
