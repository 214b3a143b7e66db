"""Parquet is read as the same table in CSV is: a file or a folder of parts, ids and times of several types."""

import datetime

import pytest

from bdlm_jax.data.readers import load_source
from bdlm_jax.types import InputError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

COLUMNS = {"user_id": [7, 7, 11, 7], "item_id": ["b", "a", "b", "c"], "timestamp": [3, 2, 5, 9]}


def write(path, columns):
    parquet.write_table(pyarrow.table(columns), path)
    return path


def as_csv(folder):
    lines = [",".join(map(str, row)) for row in zip(*COLUMNS.values())]
    (folder / "interactions.csv").write_text("\n".join([",".join(COLUMNS), *lines, ""]))
    (folder / "items.csv").write_text("item_id,title\na,First\nb,Second\n")
    return load_source("table", folder)


def test_a_folder_of_parts_equals_the_csv(tmp_path):
    (tmp_path / "csv").mkdir()
    wanted = as_csv(tmp_path / "csv")
    parts = tmp_path / "own" / "interactions.parquet"
    parts.mkdir(parents=True)
    for number, rows in enumerate((slice(0, 1), slice(1, 4))):
        write(parts / f"part-{number}.parquet", {name: values[rows] for name, values in COLUMNS.items()})
    write(tmp_path / "own" / "items.parquet", {"item_id": ["a", "b", "c"], "title": ["First", "Second", None]})
    assert load_source("table", tmp_path / "own").fingerprint() == wanted.fingerprint()


def test_ids_and_times_of_other_types(tmp_path):
    second = [datetime.datetime(2020, 1, 1, 0, 0, s) for s in COLUMNS["timestamp"]]
    coded = pyarrow.array(COLUMNS["item_id"]).dictionary_encode()
    names = pyarrow.array([str(user) for user in COLUMNS["user_id"]], pyarrow.large_string())
    path = write(tmp_path / "log.parquet", {"user_id": names, "item_id": coded, "timestamp": second})
    table = load_source("table", path)
    assert table.user_ids.tolist() == ["7", "11"] and table.item_ids.tolist() == ["a", "b", "c"]
    assert table.item_E.tolist() == [0, 1, 2, 1]
    assert (table.time_E[2] - table.time_E[0]) == 7_000_000  # microseconds, as pyarrow keeps them


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("user_id", [7, None, 11, 7], r"row 2: field 'user' is empty"),
        ("timestamp", [3, 2, None, 9], r"row 3: field 'time' is nan"),
    ],
)
def test_a_bad_value_is_refused_with_its_row(tmp_path, column, values, message):
    path = write(tmp_path / "log.parquet", COLUMNS | {column: values})
    with pytest.raises(InputError, match=message):
        load_source("table", path)


def test_what_is_no_parquet_is_refused(tmp_path):
    (tmp_path / "log.parquet").write_text("user_id,item_id")
    with pytest.raises(InputError, match="cannot be read as parquet"):
        load_source("table", tmp_path / "log.parquet")
