"""What was read is kept: the same table again, another for other bytes or options, and nothing from a damaged file."""

import numpy as np
import pytest

from bdlm_jax.data import prepared, readers
from bdlm_jax.data.splits import Split


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "own"
    source.mkdir()
    (source / "interactions.csv").write_text("user_id,item_id,timestamp,rating\n7,b,3,4.5\n7,a,2,1\n11,b,5,2\n")
    (source / "items.csv").write_text("item_id,title\na,Ä – first\nb,\n", encoding="utf-8")
    return source


def load(tmp_path, folder, **options):
    return prepared.load_prepared(tmp_path / "kept", "table", folder, **options)


def test_a_table_is_read_once_and_comes_back_the_same(tmp_path, folder, monkeypatch):
    first = load(tmp_path, folder)
    monkeypatch.setattr(readers, "load_source", lambda *_, **__: pytest.fail("it was read again"))
    again = load(tmp_path, folder)
    assert again.fingerprint() == first.fingerprint() and again.time_kind == first.time_kind
    for name in ("user_E", "item_E", "time_E", "rating_E", "user_ids", "item_ids"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
        assert getattr(again, name).dtype == getattr(first, name).dtype
    assert again.item_text() == first.item_text() == ["Ä – first", ""]


def test_other_bytes_options_or_damage_are_read_anew(tmp_path, folder):
    first, kept = load(tmp_path, folder), tmp_path / "kept"
    assert load(tmp_path, folder, duplicates="last").fingerprint() == first.fingerprint()
    assert len([*kept.iterdir()]) == 2
    items = folder / "items.csv"
    items.write_text(items.read_text(encoding="utf-8").replace("first", "other"), encoding="utf-8")
    assert load(tmp_path, folder).item_text() == ["Ä – other", ""]
    assert len([*kept.iterdir()]) == 3
    for path in kept.iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 1
        path.write_bytes(data)
    assert load(tmp_path, folder).item_text() == ["Ä – other", ""]


def test_a_publishers_split_is_handed_through(tmp_path):
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).write_text("0 1 2\n" if name == "train.txt" else "0 3\n")
    assert isinstance(prepared.load_prepared(tmp_path / "kept", "adjacency", tmp_path), Split)
    assert not (tmp_path / "kept").exists()
