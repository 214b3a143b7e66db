"""What README.md tells people to type exists and parses; .ci/run runs its tests, nobody runs the long ones here."""

import importlib
import itertools
import re
import shlex
import xml.etree.ElementTree
from pathlib import Path

import pytest

from bdlm_jax import compare, export, pretrain, recommend, sweep
from bdlm_jax.data import download
from bdlm_jax.report import __main__ as report
from bdlm_jax.run import search, shipped
from bdlm_jax.serving import __main__ as serving

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
MAINS = {
    "bdlm_jax.compare": compare.main,
    "bdlm_jax.data.download": download.main,
    "bdlm_jax.recommend": recommend.main,
    "bdlm_jax.export": export.main,
    "bdlm_jax.pretrain": pretrain.main,
    "bdlm_jax.report": report.main,
    "bdlm_jax.serving": serving.main,
    "bdlm_jax.sweep": sweep.main,
}
LINES = "".join(re.findall(r"^```bash\n(.*?)^```", TEXT, re.M | re.S)).replace("\\\n", " ").splitlines()
COMMANDS = [shlex.split(line, comments=True) for line in LINES if re.match("python -m (?!venv)", line)]


def test_there_are_commands_of_every_kind():
    assert {words[2] for words in COMMANDS} == {"bdlm_jax.main", "bdlm_jax.tune", *MAINS}
    assert any(line.startswith("pip install -e .") for line in LINES)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_names_what_exists(words, capsys):
    if words[2] in MAINS:
        with pytest.raises(SystemExit):
            MAINS[words[2]](["--help"])
        known = capsys.readouterr().out
        for word in words[3:]:
            assert not word.startswith("-") or re.search(rf"(^|[\s\[,]){re.escape(word)}\b", known), word
        return
    given = dict(itertools.pairwise(words))
    if words[2] == "bdlm_jax.tune":
        flags = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', (ROOT / "bdlm_jax" / "tune.py").read_text(encoding="utf-8"))
        assert {word for word in given if re.fullmatch(r"--\w+", word)} == {f"--{flag}" for flag in flags}
        assert given["--model"] in search.SPACES and int(given["--trials"]) > 1
    word = given.get("--config") or shipped.DATASETS[given["--dataset"]].experiment
    file, _, arg = shipped.find_experiment(word).partition(":")
    assert (ROOT / file).is_file()
    config = importlib.import_module(f"experiments.{Path(file).stem}").get_config(*([arg] if arg else [])).lock()
    for word in (word for word in words if word.startswith("--config.")):
        key, value = word.removeprefix("--config.").split("=")
        before = config
        for name in key.split("."):
            before = before[name]
        config.update_from_flattened_dict({key: type(before)(value)})


def test_the_use_from_python_runs(tiny_run):
    """In the tiny run's place and with its names; what each line returns is a table with rows."""
    text = TEXT
    for name, value in {"runs/quickstart": str(tiny_run[1]), "u0007": "u007", "i003": "i03", "i007": "i07"}.items():
        text = text.replace(name, value)
    (block,) = re.findall(r"^```python\n(import bdlm_jax\n.*?)^```", text, re.M | re.S)
    assert len([line for line in block.splitlines() if line]) == 3
    known, last = {}, block.splitlines()[-1]
    exec(compile(block, "README.md", "exec"), known)
    lines = re.findall(r"`(run\.(?:items\.nearest|history|results)[^`]*)`", text)
    assert len(lines) == 3
    lines += [last, f"run.recommend({re.search('histories=.*', last)[0]})"]
    for line in lines:
        assert len(eval(line, known)) > 0, line


def test_links_lead_somewhere_and_the_picture_is_svg():
    for link in re.findall(r"\]\((?!http)([^)#]+)", TEXT):
        assert (ROOT / link).exists(), link
    assert xml.etree.ElementTree.parse(ROOT / "docs" / "system.svg").getroot().tag.endswith("svg")


def test_no_number_of_a_result_is_typed_by_hand():
    assert not re.search(r"\|.*\.\d{3}", TEXT), "numbers belong to docs/results.md, which is generated"
