import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdlm_jax.data.interactions import make_interactions
from bdlm_jax.data.splits import leave_one_out
from bdlm_jax.data.storage import load_interactions, load_split, save_interactions, save_split
from bdlm_jax.types import InputError


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.text(min_size=1, max_size=5), min_size=3, max_size=6, unique=True), st.text(max_size=9), st.booleans()
)
def test_what_is_saved_comes_back(tmp_path_factory, items, title, rated):
    path = tmp_path_factory.mktemp("stored") / "x.npz"
    x = make_interactions(
        [1] * len(items), items, time=range(len(items)), rating=range(len(items)) if rated else None,
        item_fields={items[0]: {"title": title, "a/b": "slash"}}, user_fields={1: {"age": title}},
    )  # fmt: skip
    save_split(path, leave_one_out(x))
    split = load_split(path)
    y = split.interactions
    assert y.fingerprint() == x.fingerprint()
    assert y.item_text(("title", "a/b")) == x.item_text(("title", "a/b"))
    assert (y.time_kind, y.user_text(("age",))) == ("timestamp", [title])
    assert np.array_equal(split.part_E, leave_one_out(x).part_E)
    assert [entry.name for entry in path.parent.iterdir()] == ["x.npz"]


def test_a_changed_or_missing_file_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    save_interactions(path, make_interactions([1, 2], [3, 4]))
    with pytest.raises(InputError, match="without a split"):
        load_split(path)
    with np.load(path) as file:
        data = dict(file)
    np.savez(path, **{**data, "item_E": data["item_E"][::-1]})
    with pytest.raises(InputError, match="hash differs"):
        load_interactions(path)
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        load_interactions(path)
    with pytest.raises(InputError, match="cannot be read"):
        load_interactions(tmp_path / "none.npz")
