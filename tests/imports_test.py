"""The floors of docs/architecture.md: a module imports from lower floors and from its own room."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [
    ["types"],
    ["runtime"],
    ["data"],
    ["domain", "lm"],
    ["mutual"],
    ["evaluation"],
    ["run"],
    ["report", "serving"],
    ["train", "recommend", "export"],
    ["main"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# ConfigDict stops at run/: below, functions take scalars.
READS_CONFIGS = {"run", "train", "main"}
NEVER = {"torch", "tensorflow", "keras", "pickle", "cloudpickle", "dill", "joblib"}
DISTRIBUTIONS = {
    "absl": "absl-py",
    "huggingface_hub": "huggingface-hub",
    "ml_collections": "ml-collections",
    "orbax": "orbax-checkpoint",
}

PACKAGE = sorted((ROOT / "bdlm_jax").rglob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))


def room_of(path):
    parts = path.relative_to(ROOT / "bdlm_jax").with_suffix("").parts
    return None if parts == ("__init__",) else parts[0]


def imported(source, package=()):
    """All modules that a source names, nested imports too, relative ones resolved."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = list(package[: len(package) - node.level + 1]) if node.level else []
            base = ".".join(start + ([node.module] if node.module else []))
            # `from bdlm_jax import data` names the module only in its alias.
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def climbs(room, names):
    """The imports that go up, or sideways into another room."""
    found = []
    for name in names:
        parts = name.split(".")
        if parts[0] == "bdlm_jax" and len(parts) > 1 and parts[1] in FLOOR:
            other = parts[1]
            if other != room and FLOOR[other] >= FLOOR[room]:
                found.append(name)
    return found


def forbidden(room, names):
    tops = {name.split(".")[0] for name in names}
    configs = {"ml_collections"} & tops if room not in READS_CONFIGS else set()
    return sorted(NEVER & tops | configs)


@pytest.mark.parametrize(
    ("room", "source", "caught"),
    [
        ("domain", "def f():\n    from bdlm_jax.lm import prompts", ["bdlm_jax.lm.prompts"]),
        ("lm", "from bdlm_jax import domain", ["bdlm_jax.domain"]),
        ("runtime", "import bdlm_jax.data.splits", ["bdlm_jax.data.splits"]),
        ("data", "from ..lm import vocabulary", ["bdlm_jax.lm.vocabulary"]),
        ("mutual", "from bdlm_jax.run import build", ["bdlm_jax.run.build"]),
        ("mutual", "from bdlm_jax.domain import arm\nfrom bdlm_jax.lm import causal_lm\nimport jax", []),
        ("data", "from bdlm_jax.data.splits import Split\nfrom bdlm_jax.types import InputError", []),
    ],
)
def test_the_reader_of_imports_sees_what_climbs(room, source, caught):
    assert climbs(room, imported(source, package=("bdlm_jax", room))) == caught


def test_the_reader_of_imports_sees_what_is_forbidden():
    source = "import torch.nn\ndef f():\n    from pickle import loads\nimport ml_collections"
    assert forbidden("data", imported(source)) == ["ml_collections", "pickle", "torch"]
    assert forbidden("train", imported(source)) == ["pickle", "torch"]


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_keeps_to_its_floor(path):
    room, source = room_of(path), path.read_text(encoding="utf-8")
    package = path.relative_to(ROOT).parent.parts
    names = imported(source, package)
    assert path.stem not in ("utils", "util", "common", "helpers", "misc")
    assert len(source.splitlines()) <= 400, "a file that grows past 400 lines has found its second room"
    if room is None:
        assert names == [], "the top of the package stays free of imports, so that `import bdlm_jax` is quick"
        return
    assert room in FLOOR, f"{room} has no floor: give it one here and in docs/architecture.md"
    assert climbs(room, names) == []
    assert forbidden(room, names) == []


def test_arrays_are_never_loaded_with_objects():
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant), path
                assert node.value.value is False, path


def test_experiments_import_only_configs_and_neighbours():
    neighbours = {path.stem for path in EXPERIMENTS} | {"experiments"}
    allowed = {"ml_collections"} | neighbours | set(sys.stdlib_module_names)
    for path in EXPERIMENTS:
        tops = {name.lstrip(".").split(".")[0] for name in imported(path.read_text(encoding="utf-8"), ("experiments",))}
        assert tops <= allowed, f"{path.name} imports {sorted(tops - allowed)}"


def test_every_import_is_declared():
    calls = [
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.keyword)
    ]
    (requirements,) = (ast.literal_eval(call.value) for call in calls if call.arg == "install_requires")
    names = {requirement.split(">")[0] for requirement in requirements} | {"tensorboardX"}
    used = {
        name.split(".")[0] for path in PACKAGE for name in imported(path.read_text(encoding="utf-8"), ("bdlm_jax",))
    }
    used -= set(sys.stdlib_module_names) | {"bdlm_jax", "jaxlib", ""}
    assert {DISTRIBUTIONS.get(name, name) for name in used} <= names
