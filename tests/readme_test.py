"""What README.md tells people to type exists and parses; .ci/run runs its tests, nobody runs the long ones here."""

import contextlib
import importlib.util
import io
import re
import shlex
from pathlib import Path

import pytest

from bdlm_jax import export, recommend
from bdlm_jax.data import download as downloads
from bdlm_jax.report import __main__ as report

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def commands():
    for block in re.findall(r"^```bash\n(.*?)^```", TEXT, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith("#"):
                yield re.split(r"\s{2,}# ", line)[0].strip()


COMMANDS = list(commands())
MAINS = {"bdlm_jax.recommend": recommend.main, "bdlm_jax.export": export.main, "bdlm_jax.report": report.main}
MODULES = [line for line in COMMANDS if line.startswith("python -m ") and "venv" not in line]


def help_of(main):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        main(["--help"])
    return out.getvalue()


def test_there_are_commands_of_every_kind():
    modules = {shlex.split(line)[2] for line in MODULES}
    assert modules == {"bdlm_jax.main", *MAINS}
    assert any(line.startswith("pip install -e .") for line in COMMANDS)


@pytest.mark.parametrize("line", MODULES)
def test_a_command_names_what_exists(line):
    words = shlex.split(line)
    assert importlib.util.find_spec(words[2]) is not None
    if words[2] != "bdlm_jax.main":
        known = help_of(MAINS[words[2]])
        for word in words[3:]:
            assert not word.startswith("-") or re.search(rf"(^|[\s\[,]){re.escape(word)}\b", known), word
        return
    file, _, arg = words[words.index("--config") + 1].partition(":")
    assert (ROOT / file).is_file()
    config = importlib.import_module(f"experiments.{Path(file).stem}").get_config(*([arg] if arg else [])).lock()
    for word in (word for word in words if word.startswith("--config.")):
        key, value = word.removeprefix("--config.").split("=")
        before = config
        for name in key.split("."):
            before = before[name]
        config.update_from_flattened_dict({key: type(before)(value)})


def test_downloads_are_called_as_they_are_defined():
    calls = re.findall(r"from bdlm_jax\.data\.download import (\w+); (\w+)\(", TEXT)
    assert calls
    for imported, called in calls:
        assert imported == called
        assert callable(getattr(downloads, called))


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!http)([^)#]+)", TEXT):
        if link == "docs/results.md":  # generated from finished runs
            continue
        assert (ROOT / link).exists(), link


def test_no_number_of_a_result_is_typed_by_hand():
    assert not re.search(r"\|.*\.\d{3}", TEXT), "numbers belong to docs/results.md, which is generated"


def test_the_picture_is_svg():
    import xml.etree.ElementTree

    assert xml.etree.ElementTree.parse(ROOT / "docs" / "system.svg").getroot().tag.endswith("svg")
