import hashlib
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers
from safetensors.numpy import load_file

import bdlm_jax
from bdlm_jax import export
from bdlm_jax.runtime.files import CHECKSUMS, load_safetensors
from bdlm_jax.serving import artefact, scores
from bdlm_jax.serving.exports import EXAMPLE, export_domain, export_hf

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.fixture(scope="module")
def domain(tiny_run, tmp_path_factory):
    return export_domain(workdir=tiny_run[1], out=tmp_path_factory.mktemp("out") / "domain")


@pytest.fixture(scope="module")
def hf(tiny_run, tmp_path_factory):
    return export_hf(workdir=tiny_run[1], out=tmp_path_factory.mktemp("out") / "hf")


def change_manifest(workdir, to, arm, change):
    """Copies what is served to another run directory, where `change` has edited the facts of an arm."""
    shutil.copytree(workdir / "serving", to / "serving")
    path = to / "serving" / "serving.json"
    manifest = json.loads(path.read_text())
    (facts,) = [facts for facts in manifest["arms"] if facts["arm"] == arm]
    change(facts)
    path.write_text(json.dumps(manifest))
    (path.parent / CHECKSUMS).unlink()
    return to


@pytest.mark.parametrize(("user", "k"), [("u000", 7), ("u004", 10_000)])
def test_the_example_beside_the_tables_recommends_what_recommend_does(tiny_run, domain, user, k):
    command = [sys.executable, domain / "recommend.py", user, str(k)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    rows = bdlm_jax.load(tiny_run[1]).recommend([user], k=k)
    expected = [[item, f"{score:.4f}", title] for item, score, title in zip(rows["item"], rows["score"], rows["title"])]
    assert [line.split("\t") for line in done.stdout.splitlines()] == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nobody"], "user 'nobody' is none of the 150 that ids.json lists."),
        (["u000", "0"], "K is 0, but at least one item must be asked for."),
        (["u000", "-3"], "K is -3, but at least one item must be asked for."),
        ([], "the following arguments are required: user"),
        (["u000", "many"], "argument k: invalid int value: 'many'"),
    ],
)
def test_the_example_refuses_in_one_sentence(domain, capsys, monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["recommend.py", *words])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(domain / "recommend.py"), run_name="__main__")
    assert stop.value.code == 2
    assert tuple(capsys.readouterr()) == ("", f"recommend.py: error: {message}\n")


@pytest.mark.parametrize("form", export.FORMATS)
def test_others_may_read_what_is_exported(form, request):
    paths = [*request.getfixturevalue(form).iterdir()]
    assert paths and {path.stat().st_mode & 0o777 for path in paths} == {0o644}


def test_the_example_stands_in_the_readme():
    assert f"```python\n{EXAMPLE.read_text(encoding='utf-8')}```" in README.read_text(encoding="utf-8")


def test_the_manifest_names_every_file_with_its_checksum(domain):
    manifest = json.loads((domain / "manifest.json").read_text(encoding="utf-8"))
    assert set(manifest["files"]) == {path.name for path in domain.iterdir()} - {"manifest.json"}
    for name, facts in manifest["files"].items():
        content = (domain / name).read_bytes()
        assert facts == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    tables, ids = load_file(domain / "embeddings.safetensors"), json.loads((domain / "ids.json").read_text())
    assert tables["user"].shape == (manifest["n_users"], manifest["width"]) == (len(ids["user_ids"]), 16)
    assert tables["item"].shape == (manifest["n_items"], manifest["width"]) == (len(ids["item_ids"]), 16)
    assert len(ids["titles"]) == manifest["n_items"]


@pytest.mark.parametrize(
    ("form", "fault", "message"),
    [
        *[(form, "taken", "exists and is not empty") for form in export.FORMATS],
        *[(form, "unfinished", "holds no finished run") for form in export.FORMATS],
        ("domain", "no place", "/dev/null/out cannot be written"),
        ("domain", "no product", 'domain model "ncf", whose score is no inner product'),  # any LM arm is exported
    ],
)
def test_what_cannot_be_exported_is_one_sentence_and_leaves_the_folder_alone(
    tiny_run, tmp_path, capsys, form, fault, message
):
    workdir, out = tiny_run[1], tmp_path / "out"
    if fault == "taken":
        out.mkdir()
        (out / "mine").write_text("precious")
    elif fault == "unfinished":
        workdir = tmp_path
    elif fault == "no place":
        out = Path("/dev/null/out")
    else:
        ncf = {"model": "ncf", "dot": False}
        workdir = change_manifest(workdir, tmp_path, "domain", lambda facts: facts.update(ncf))
    assert export.main(["--workdir", str(workdir), "--format", form, "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("bdlm_jax: ") and err.count("\n") == 1
    assert message in err
    assert [path.name for path in out.rglob("*")] == (["mine"] if fault == "taken" else [])
    assert not list(tmp_path.glob("*.partial"))


def test_transformers_ranks_the_items_as_we_do(tiny_run, hf):
    """100 users, the next item of each: our top ten from the exported folder, in torch."""
    torch = pytest.importorskip("torch")
    served, catalogue = artefact.load_lm_arm(tiny_run[1]), artefact.load_catalogue(tiny_run[1])
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(hf, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf)
    texts = {name: torch.from_numpy(x) for name, x in load_safetensors(hf / "text_head.safetensors").items()}
    first, largest = served.vocabulary.item_tokens.start, 0.0
    for user in range(100):
        seen = catalogue.history(user)
        (ours_I,) = scores.lm_scores(served, [seen], users=[user])
        text = "<bos><user>" + "".join(f"<iid_{item}>" for item in seen)
        tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        said = texts["content"][torch.from_numpy(seen)]
        with torch.no_grad():
            theirs_I = model(tokens).logits[0, -1, first : first + len(catalogue.item_ids)]
            theirs_I += texts["content"] @ (texts["last"] * said[-1] + texts["mean"] * said.mean(0))
        theirs_I = theirs_I.numpy()
        largest = max(largest, float(np.abs(theirs_I - ours_I).max()))
        best = scores.top_items(ours_I, seen=seen, k=10)
        assert scores.top_items(theirs_I, seen=seen, k=10).tolist() == best.tolist()
    assert largest <= 1e-4


@pytest.mark.parametrize(
    ("kind", "user_token", "cut", "chat"),
    [
        ("ids", "start", {"max_items": 1}, []),
        ("ids_titles", "end", {"max_tokens": 12}, []),
        ("text", "start", {}, []),
        ("ids", "start", {}, [1, 70, 71, 290]),
    ],
)
def test_the_cards_code_recommends(tiny_run, tmp_path, capsys, monkeypatch, kind, user_token, cut, chat):
    """The same as we do, a history that is too long too."""
    pytest.importorskip("torch")
    shown = {"prompts": {"kind": kind, "user_token": user_token, **cut}, "vocabulary": {"chat": chat}}
    change_manifest(
        tiny_run[1], tmp_path, "lm", lambda facts: [facts[name].update(change) for name, change in shown.items()]
    )
    assert artefact.load_lm_arm(tmp_path).vocabulary.head == tuple(chat or [1])
    folder = export_hf(workdir=tmp_path, out=tmp_path / "hf")
    (code,) = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    monkeypatch.chdir(folder)
    exec(compile(code, "README.md", "exec"), {})
    history = artefact.load_catalogue(tmp_path).item_ids[:2]
    rows = bdlm_jax.load(tmp_path).recommend(histories=[history], arm="lm", k=10)
    assert capsys.readouterr().out.splitlines() == [f"{a} {b}" for a, b in zip(rows["item"], rows["title"])]
    if cut:  # the older item makes no difference but in what its text adds
        served = artefact.load_lm_arm(tmp_path)
        prompts = [scores._history_prompt(served, h, user=None).tokens.tolist() for h in ([0, 1], [1])]
        assert prompts[0] == prompts[1]


def test_the_card_holds_the_runs_numbers(hf, tiny_run):
    card, at = (hf / "README.md").read_text(encoding="utf-8"), ("bdlm_lm", "all", "ndcg@10/cand20")
    (row,) = [row for row in tiny_run[2]["rows"] if (row["model"], row["slice"], row["metric"]) == at]
    for name, module in (("bdlm_jax", bdlm_jax), ("transformers", transformers), ("tokenizers", tokenizers)):
        assert f"{name} {module.__version__}" in card
    assert f"| ndcg@10/cand20 | {row['value']:.4f} | {row['users']} |" in card
    assert "{" not in re.sub(r"```.*?```", "", card, flags=re.S)


def test_without_torch_the_folders_tokens_and_rows_are_ours(tiny_run, hf):
    from bdlm_jax.lm import hf_config, hf_weights, vocabulary

    served = artefact.load_lm_arm(tiny_run[1])
    tokenizer, ours = vocabulary.load_tokenizer(hf), served.vocabulary
    names = {"<uid_7>": ours.user_token(7), "<iid_0>": ours.item_token(0), "<iid_51>": ours.n_tokens - 1}
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in names} == names
    assert len(tokenizer) == ours.n_tokens
    config = hf_config.lm_config_from_hf(hf)
    params = hf_weights.load_lm(hf, config)
    assert config.vocab_size == ours.n_tokens
    np.testing.assert_array_equal(params["embedding"][ours.n_text :], served.id_rows_XM)
    np.testing.assert_array_equal(params["embedding"][: ours.n_text], served.params["embedding"])


def test_a_model_alone_is_exported_by_its_name(tiny_run, tmp_path):
    run = bdlm_jax.load(tiny_run[1])
    export_domain(workdir=run.folder, out=tmp_path / "lightgcn", arm="lightgcn")
    tables = load_file(tmp_path / "lightgcn" / "embeddings.safetensors")
    np.testing.assert_array_equal(tables["item"], run.arm("lightgcn").item_ID)
    assert not np.array_equal(tables["item"], run.arm("domain").item_ID)
    export_hf(workdir=run.folder, out=tmp_path / "ids_lm", arm="ids_lm")
    (value,) = [
        row["value"]
        for row in tiny_run[2]["rows"]
        if row["model"] == "ids_lm" and (row["slice"], row["metric"]) == ("all", "hr@1/cand20")
    ]
    card = (tmp_path / "ids_lm" / "README.md").read_text(encoding="utf-8")
    assert "model `ids_lm` of a run" in card and f"| hr@1/cand20 | {value:.4f} |" in card
