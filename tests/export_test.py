import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from bdlm_jax import export, recommend
from bdlm_jax.serving import artefact as serving
from bdlm_jax.serving import scores as scoring
from bdlm_jax.types import InputError

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.fixture(scope="module")
def domain(tiny_run, tmp_path_factory):
    _, workdir, _ = tiny_run
    return workdir, export.export_domain(workdir=workdir, out=tmp_path_factory.mktemp("out") / "domain")


def test_the_example_beside_the_tables_recommends_what_recommend_does(domain):
    workdir, folder = domain
    for user in ("u000", "u004"):
        done = subprocess.run(
            [sys.executable, folder / "recommend.py", user, "7"], capture_output=True, text=True, timeout=60, check=True
        )
        rows = recommend.recommend(workdir=workdir, user=user, k=7)
        assert [line.split("\t") for line in done.stdout.splitlines()] == [
            [row["item"], f"{row['score']:.4f}", row["title"]] for row in rows
        ]


def test_the_example_stands_in_the_readme_and_ends_where_a_user_has_had_nearly_all(domain):
    workdir, folder = domain
    assert f"```python\n{export.EXAMPLE}```" in README.read_text(encoding="utf-8")
    names = {"__name__": "example", "__file__": str(folder / "recommend.py")}
    exec(compile(export.EXAMPLE, "recommend.py", "exec"), names)
    catalogue = serving.load_catalogue(workdir)
    found = names["recommend"]("u004", 10_000)
    assert len(found) == len(catalogue.item_ids) - len(set(catalogue.history(4).tolist()))


def test_the_manifest_names_every_file_with_its_checksum(domain):
    _, folder = domain
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    for name, facts in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert facts == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    tables, ids = load_file(folder / "embeddings.safetensors"), json.loads((folder / "ids.json").read_text())
    assert tables["user"].shape == (manifest["n_users"], manifest["width"]) == (len(ids["user_ids"]), 16)
    assert tables["item"].shape == (manifest["n_items"], manifest["width"]) == (len(ids["item_ids"]), 16)
    assert len(ids["titles"]) == manifest["n_items"]


def test_a_model_that_is_no_inner_product_is_refused(tiny_run, tmp_path):
    _, workdir, _ = tiny_run
    shutil.copytree(workdir / "serving", tmp_path / "serving")
    path = tmp_path / "serving" / "serving.json"
    path.write_text(path.read_text().replace('"lightgcn"', '"ncf"').replace('"dot": true', '"dot": false'))
    with pytest.raises(InputError, match='domain model "ncf", whose score is no inner product'):
        export.export_domain(workdir=tmp_path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", export.FORMATS)
def test_a_folder_that_is_taken_is_left_alone(tiny_run, tmp_path, capsys, form):
    _, workdir, _ = tiny_run
    (tmp_path / "mine").write_text("precious")
    assert export.main(["--workdir", str(workdir), "--format", form, "--out", str(tmp_path)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_no_finished_run_is_one_sentence(tmp_path, capsys):
    assert export.main(["--workdir", str(tmp_path), "--format", "domain", "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("bdlm_jax: ") and err.count("\n") == 1


@pytest.fixture(scope="module")
def hf(tiny_run, tmp_path_factory):
    _, workdir, _ = tiny_run
    return workdir, export.export_hf(workdir=workdir, out=tmp_path_factory.mktemp("out") / "hf")


def test_transformers_ranks_the_items_as_we_do(hf):
    """100 users, the next item of each: our top ten from the exported folder, in torch."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    workdir, folder = hf
    served, catalogue = serving.load_lm_arm(workdir), serving.load_catalogue(workdir)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    first, largest = served.vocabulary.item_tokens.start, 0.0
    for user in range(100):
        seen = catalogue.history(user)
        ours_I = scoring.lm_scores(served, seen, user=user)
        text = "<bos><user>" + "".join(f"<iid_{item}>" for item in seen)
        tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            theirs_I = model(tokens).logits[0, -1, first : first + len(catalogue.item_ids)].numpy()
        largest = max(largest, float(np.abs(theirs_I - ours_I).max()))
        best = scoring.top_items(ours_I, seen=seen, k=10)
        assert scoring.top_items(theirs_I, seen=seen, k=10).tolist() == best.tolist()
    print(f"largest difference of a logit: {largest:.1e}")
    assert largest <= 1e-4


@pytest.mark.parametrize(("kind", "user_token"), [("ids", "start"), ("ids_titles", "end"), ("text", "start")])
def test_the_cards_code_recommends(tiny_run, tmp_path, capsys, monkeypatch, kind, user_token):
    pytest.importorskip("torch")
    shutil.copytree(tiny_run[1] / "serving", tmp_path / "serving")
    path = tmp_path / "serving" / "serving.json"
    facts = json.loads(path.read_text())
    facts["lm"]["prompts"] |= {"kind": kind, "user_token": user_token}
    path.write_text(json.dumps(facts))
    folder = export.export_hf(workdir=tmp_path, out=tmp_path / "hf")
    (code,) = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    monkeypatch.chdir(folder)
    exec(compile(code, "README.md", "exec"), {})
    history = serving.load_catalogue(tmp_path).item_ids[:2]
    rows = recommend.recommend(workdir=tmp_path, history=history, arm="lm", k=10)
    assert capsys.readouterr().out.splitlines() == [f"{row['item']} {row['title']}" for row in rows]


def test_the_card_holds_the_runs_numbers(hf, tiny_run):
    _, folder = hf
    card, results = (folder / "README.md").read_text(encoding="utf-8"), tiny_run[2]
    (row,) = (
        r for r in results["rows"] if (r["model"], r["slice"], r["metric"]) == ("bdlm_lm", "all", "ndcg@10/cand20")
    )
    assert f"| ndcg@10/cand20 | {row['value']:.4f} | {row['users']} |" in card
    assert "{" not in re.sub(r"```.*?```", "", card, flags=re.S)


def test_without_torch_the_folders_tokens_and_rows_are_ours(hf):
    from bdlm_jax.lm import hf_config as families
    from bdlm_jax.lm import hf_weights as huggingface
    from bdlm_jax.lm import vocabulary

    workdir, folder = hf
    served = serving.load_lm_arm(workdir)
    tokenizer, ours = vocabulary.load_tokenizer(folder), served.vocabulary
    names = {"<uid_7>": ours.user_token(7), "<iid_0>": ours.item_token(0), "<iid_51>": ours.n_tokens - 1}
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in names} == names
    assert len(tokenizer) == ours.n_tokens
    config = families.lm_config_from_hf(folder)
    params = huggingface.load_lm(folder, config)
    assert config.vocab_size == ours.n_tokens
    np.testing.assert_array_equal(params["embedding"][ours.n_text :], served.id_rows_XM)
    np.testing.assert_array_equal(params["embedding"][: ours.n_text], served.params["embedding"])
