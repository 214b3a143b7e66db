"""The floors of docs/architecture.md: a module imports from lower floors and from its own wing, and stays small."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [
    {"types"},
    {"runtime"},
    {"data"},
    {"domain", "lm"},
    {"mutual"},
    {"evaluation"},
    {"run"},
    {"report", "serving"},
    {"story", "recommend", "export", "compare", "pretrain"},
    {"main", "sweep", "tune", "__init__"},
]
FLOOR = {wing: floor for floor, wings in enumerate(FLOORS) for wing in wings}
READS_CONFIGS = {"run", "story", "main", "sweep", "tune", "__init__"}  # below run/, functions take scalars
NEVER = {"torch", "tensorflow", "keras", "pickle", "cloudpickle", "dill", "joblib"}
DISTRIBUTIONS = {
    "absl": "absl-py",
    "huggingface_hub": "huggingface-hub",
    "ml_collections": "ml-collections",
    "orbax": "orbax-checkpoint",
}
PACKAGE = sorted((ROOT / "bdlm_jax").rglob("*.py"))


def imported(source, package=()):
    """All modules that a source names, nested imports too, relative ones resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            # `from bdlm_jax import data` names the module only in its alias.
            yield from (".".join([*start, *filter(None, [node.module]), alias.name]) for alias in node.names)


def wrong(wing, names):
    """The imports that go up, or sideways into another wing, or that nothing here may have."""
    found = []
    for top, *below in (name.split(".") for name in names):
        other = below[0] if top == "bdlm_jax" and below else wing
        climbs = other != wing and FLOOR.get(other, -1) >= FLOOR[wing]
        if climbs or top in NEVER or (top == "ml_collections" and wing not in READS_CONFIGS):
            found.append(".".join([top, *below]))
    return found


@pytest.mark.parametrize(
    ("wing", "source", "caught"),
    [
        ("domain", "def f():\n    from bdlm_jax.lm import prompts", ["bdlm_jax.lm.prompts"]),
        ("lm", "from bdlm_jax import domain", ["bdlm_jax.domain"]),
        ("runtime", "import bdlm_jax.data.splits", ["bdlm_jax.data.splits"]),
        ("data", "from ..lm import vocabulary", ["bdlm_jax.lm.vocabulary"]),
        ("mutual", "from bdlm_jax.run import build", ["bdlm_jax.run.build"]),
        ("mutual", "from bdlm_jax.domain import arm\nfrom . import losses\nimport jax", []),
        ("data", "import torch.nn\ndef f():\n    from pickle import loads", ["torch.nn", "pickle.loads"]),
        ("data", "import ml_collections", ["ml_collections"]),
        ("story", "import ml_collections\nfrom bdlm_jax.types import InputError", []),
    ],
)
def test_the_reader_of_imports_sees_what_is_wrong(wing, source, caught):
    assert wrong(wing, imported(source, ("bdlm_jax", wing))) == caught


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_keeps_to_its_floor(path):
    source, (_, *wing, _) = path.read_text(encoding="utf-8"), path.relative_to(ROOT).parts
    names = list(imported(source, ("bdlm_jax", *wing)))
    assert path.stem not in ("utils", "util", "common", "helpers", "misc")
    assert len(source.splitlines()) <= 400, "a file that grows past 400 lines has found its second room"
    assert "noqa: E731" not in source, "what has a name is a function"
    assert not re.search(r"allow_pickle=(?!False)", source)
    assert wrong(wing[0] if wing else path.stem, names) == []


def test_the_top_of_the_package_imports_nothing_before_it_is_asked():
    tree = ast.parse((ROOT / "bdlm_jax" / "__init__.py").read_text(encoding="utf-8"))
    at_once = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {name for node in at_once for name in imported(ast.unparse(node))} <= {"os", "typing.TYPE_CHECKING"}


def test_experiments_import_only_configs_and_neighbours():
    allowed = {"ml_collections", "experiments"} | set(sys.stdlib_module_names)
    controls = ROOT / "bdlm_jax" / "run" / "controls.py"  # words and settings: itself no more than a config
    for path in (controls, *(ROOT / "experiments").glob("*.py")):
        names = imported(path.read_text(encoding="utf-8"), ("experiments",))
        tops = {name.split(".")[0] for name in names if not name.startswith("bdlm_jax.run.controls")}
        assert tops <= allowed, f"{path.name} imports {sorted(tops - allowed)}"


def test_every_import_is_declared():
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    (requirements,) = re.findall(r"install_requires=\[(.*?)\]", text, re.S)
    declared = set(re.findall(r'"([\w-]+)>=', requirements)) | {"tensorboardX", "optuna", "wandb"}
    declared |= {"fastapi", "pydantic", "uvicorn", "pyarrow", "faiss"}  # of extras
    used = {
        name.split(".")[0] for path in PACKAGE for name in imported(path.read_text(encoding="utf-8"), ("bdlm_jax",))
    }
    used -= set(sys.stdlib_module_names) | {"bdlm_jax", "jaxlib"}
    assert {DISTRIBUTIONS.get(name, name) for name in used} <= declared
