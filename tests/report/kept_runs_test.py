"""docs/runs: whoever has it can make every number of docs/results.md again, and here that is done.

So it is with docs/runs_own_lm and docs/results_own_lm.md, and with the other pages of `PAGES`.
"""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from made_run import MODELS, make_run

from bdlm_jax.evaluation.evaluate import Counts
from bdlm_jax.report import __main__ as report
from bdlm_jax.report.compact import load_compact, save_compact
from bdlm_jax.report.finished_run import read_run
from bdlm_jax.report.keep import recomputed_cells

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"docs/results.md": "docs/runs"}
PAGES |= {
    f"docs/results_{name}.md": f"docs/runs_{name}" for name in ("own_lm", "own_data", "quickstart", "cold", "tuned")
}
KEPT = sorted(path.parent for runs in PAGES.values() for path in ROOT.glob(f"{runs}/*/*/counts.npz"))


@pytest.fixture(scope="session")
def small_docs(tmp_path_factory):
    """A folder as the repository's, with two kept runs and their page; the paths are those of no other machine."""
    root = tmp_path_factory.mktemp("small")
    paths = {"data.path": "/home/me/data/ml", "pretrain.corpus": "../texts/reviews.txt.xz", "runtime.store": "/big"}
    models = MODELS | {"bdlm_warm_lm": (25, 0), "pool": (33, 0)}
    runs = [make_run(root / "runs" / f"s{seed}", seed=seed, models=models, **paths) for seed in (0, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert report.main(["--keep", *map(str, runs)]) == 0
        assert report.main(["--collect", "docs/runs/twins/s0", "docs/runs/twins/s1"]) == 0
    return root


@pytest.mark.once
@pytest.mark.parametrize("folder", [None, *KEPT], ids=lambda folder: folder.name if folder else "small")
def test_rows_follow_from_the_counts_to_the_bit(folder, small_docs):
    folder = folder or small_docs / "docs/runs/twins/s1"
    assert recomputed_cells(*load_compact(folder / "counts.npz")) == read_run(folder).cells
    assert len(json.loads((folder / "results.json").read_text())["rows"]) == len(read_run(folder).cells) > 0


@pytest.mark.once
@pytest.mark.parametrize(
    ("root", "name"),
    [(None, "docs/results.md"), *[(ROOT, name) for name, runs in PAGES.items() if any(ROOT.glob(f"{runs}/*/*"))]],
    ids=lambda given: given if isinstance(given, str) else "docs" if given else "small",
)
def test_the_page_is_what_its_own_command_makes(root, name, small_docs, tmp_path, monkeypatch):
    root = root or small_docs
    page = (root / name).read_text(encoding="utf-8")
    words = shlex.split(page.splitlines()[0].removeprefix("<!-- generated, do not edit: ").removesuffix(" -->"))
    assert words[:3] == ["python", "-m", "bdlm_jax.report"]
    assert {folder.relative_to(root).as_posix() for folder in root.glob(f"{PAGES[name]}/*/*")} <= {*words}
    monkeypatch.chdir(root)
    again = tmp_path / Path(name).name  # of the same name, which those of its pictures begin with
    assert report.main([*words[3:], "--out", str(again)]) == 0  # the last --out is taken
    assert again.read_text(encoding="utf-8").splitlines()[1:] == page.splitlines()[1:]
    shown = re.findall(r"\]\((plots/[^)]+)\)", page)
    assert shown and all((at / picture).is_file() for at in (tmp_path, (root / name).parent) for picture in shown)


def test_a_kept_run_tells_what_the_run_itself_tells(small_docs):
    run, kept = read_run(small_docs / "runs/s0"), read_run(small_docs / "docs/runs/twins/s0")
    assert kept._replace(folder=None, counts=None) == run._replace(folder=None, counts=None)
    for model, protocols in run.counts.items():
        for protocol, counts in protocols.items():
            np.testing.assert_array_equal(np.array(kept.counts[model][protocol]), np.array(counts))
    config = json.loads((small_docs / "docs/runs/twins/s0/config.json").read_text())
    named = [config["data"]["path"], config["pretrain"]["corpus"], config["runtime"]["store"]]
    assert named == ["ml", "reviews.txt.xz", "big"] and config["lm"]["lora_targets"] == r".*_proj/kernel"


def test_a_kept_run_is_small_and_not_overwritten_by_another(small_docs, tmp_path, capsys):
    sizes = [path.stat().st_size for path in (small_docs / "runs/s0/per_user").iterdir()]
    assert (small_docs / "docs/runs/twins/s0/counts.npz").stat().st_size < sum(sizes)
    other = make_run(tmp_path / "s0", seed=0)
    assert report.main(["--keep", str(other), "--out", str(small_docs / "docs/runs")]) == 2
    assert "holds a run of another config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: (run / "data" / "slices.npz").unlink(), "slices.npz is not there"),
        (lambda run: (run / "per_user" / "text_lm.npz").unlink(), "is not what per_user/ gives"),
        (lambda run: (run / "sasrec").symlink_to("../stages/sasrec-1f"), "run/sasrec leads to ../stages/sasrec-1f"),
    ],
)
def test_what_cannot_be_made_again_is_not_kept(tmp_path, capsys, spoil, said):
    spoil(make_run(tmp_path / "run"))
    assert report.main(["--keep", str(tmp_path / "run"), "--out", str(tmp_path / "kept")]) == 2
    assert said in capsys.readouterr().err


def test_counts_survive_where_models_differ_in_their_cases(tmp_path):
    user, others = np.arange(300), np.full(300, 70_000)
    one = Counts(user, user % 7, np.full(300, 66_000), user * 0, others)
    two = Counts(user[:5], user[:5] % 7, user[:5], user[:5] * 0, others[:5] - 1)
    few = one._replace(user=user[::-1].copy(), target=one.target.copy(), others=others * 0 + 99)
    given = {"a": {"full": one, "cand100": few}, "b": {"full": two, "cand100": one}, "c": {"full": few, "cand100": few}}
    items = {"all": np.ones(7, bool), "cold": np.arange(7) == 2}
    save_compact(tmp_path / "c.npz", given, items)
    counts, slices = load_compact(tmp_path / "c.npz")
    for model, protocols in given.items():
        for protocol, made in protocols.items():
            read = counts[model][protocol]
            for name, items_I in items.items():
                assert np.array_equal(slices[name][read.target], items_I[made.target])
            assert set(read.target) <= {0, 1}  # which item a user had is not told
            rest = (c._replace(target=0) for c in (made, read))
            assert all(np.array_equal(x, y) for x, y in zip(*rest, strict=True))
    assert slices["all"].all() and counts["a"]["full"].equal.dtype == np.int64  # unsigned differences would wrap
    with np.load(tmp_path / "c.npz") as arrays:
        assert arrays["a/full/equal"].dtype == np.uint8 and arrays["a/full/better"].dtype == np.uint32
        shared = {name for name in arrays if name.startswith("*")}
        assert shared == {"*/*/user", "*/*/target", "*/*/others", "*/cand100/user", "*/cand100/others"}
        assert "a/full/user" not in arrays and "b/full/user" in arrays and arrays["*/*/user"].dtype == np.uint8
