import os
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdlm_jax.runtime import files
from bdlm_jax.types import InputError


def test_a_tree_comes_back_with_its_types(tmp_path):
    table = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    tree = {
        "params": {
            "shared": {"user": table, "scale": np.float32(2.5), "column": table.T},  # .T: not contiguous
            "lm": {"embedding": jnp.array([[1.5, -2.25]], jnp.bfloat16), "layers": [np.zeros(2), np.ones(2)]},
        }
    }
    path = tmp_path / "deep" / "model.safetensors"
    files.save_safetensors(path, tree)
    found = files.load_safetensors(path)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for mine, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(tree)):
        assert (mine.dtype, mine.shape) == (wanted.dtype, wanted.shape)
        np.testing.assert_array_equal(mine, wanted)


def test_a_table_is_for_whom_the_umask_lets_read(tmp_path):
    before = os.umask(0o027)
    try:
        files.save_safetensors(tmp_path / "table", {"a": np.ones(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "table").stat().st_mode & 0o777 == 0o640


def test_what_cannot_be_read_or_written_is_refused(tmp_path):
    (tmp_path / "broken").write_bytes(b"no tensors here")
    for name in ("broken", "missing"):
        with pytest.raises(InputError, match=f"{name} cannot be read"):
            files.load_safetensors(tmp_path / name)
    with pytest.raises(InputError, match="slash"):
        files.save_safetensors(tmp_path / "one", {"a/b": np.ones(2)})


def test_what_fails_while_it_is_written_leaves_what_was_there(tmp_path):
    files.write_text(tmp_path / "a", "before")
    with pytest.raises(KeyError), files.replacing(tmp_path / "a") as partial:
        partial.write_text("half")
        raise KeyError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "before")]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_written_takes_the_place_of_what_was_there_by_a_rename(tmp_path, kind):
    for text in ("before", "after"):
        with files.replacing(tmp_path / "a") as partial:
            if kind == "folder":
                partial.mkdir()
            (partial / "b" if kind == "folder" else partial).write_text(text)
            written = partial.stat().st_ino
            assert text == "before" or (tmp_path / "a").exists(), "the old one stands until the new one is whole"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").stat().st_ino == written
    assert (tmp_path / "a" / "b" if kind == "folder" else tmp_path / "a").read_text() == "after"


def test_every_byte_of_a_table_counts(tmp_path):
    path, tree = tmp_path / "a.safetensors", {"a": np.arange(6.0).reshape(2, 3), "b": jnp.ones(2, jnp.bfloat16)}
    files.save_safetensors(path, tree)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            found = files.load_safetensors(path)
        except InputError:
            continue
        for name, wanted in tree.items():  # a blank of the header, say
            np.testing.assert_array_equal(found[name], wanted)
    for at in range(0, len(whole), 9):
        path.write_bytes(whole[:at])
        with pytest.raises(InputError, match="cannot be read"):
            files.load_safetensors(path)


def test_checksums_name_what_is_damaged_or_gone(tmp_path):
    for name in ("a", "deep/b"):
        files.write_text(tmp_path / name, name)
    assert files.damaged_file(tmp_path) is None  # nothing is known
    files.write_checksums(tmp_path)
    command = ["sha256sum", "-c", "--strict", files.CHECKSUMS]
    if shutil.which("sha256sum"):
        assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    assert files.damaged_file(tmp_path) is None
    (tmp_path / "deep" / "b").write_text("c")
    assert files.damaged_file(tmp_path) == tmp_path / "deep" / "b" == files.damaged_file(tmp_path, "deep/b", "new")
    assert files.damaged_file(tmp_path, "a") is None
    (tmp_path / "a").unlink()
    assert files.damaged_file(tmp_path, "a") == tmp_path / "a"
    (tmp_path / "a").write_text("anew")
    files.write_checksums(tmp_path, ["a"], keep=True)  # of the other nothing is read, and what is noted stays
    assert files.damaged_file(tmp_path, "a") is None and files.damaged_file(tmp_path) == tmp_path / "deep" / "b"
    files.write_checksums(tmp_path, ["a"])
    assert files.damaged_file(tmp_path) is None
    (tmp_path / files.CHECKSUMS).write_bytes(b"\xff\n")
    assert files.damaged_file(tmp_path) == tmp_path / files.CHECKSUMS
