import gzip
import json
import lzma

import pytest

from bdlm_jax.data.corpus import read_documents
from bdlm_jax.types import InputError

RECORDS = [
    {"title": "Toy Story", "year": 1995, "genres": ["Animation", "Comedy"], "text": "A  cowboy\nand a doll."},
    {"title": "Heat", "text": "A thief."},
    {"text": ""},
    {"text": "Plain."},
]
WRITTEN = ["Toy Story (1995). Animation, Comedy. A cowboy and a doll.", "Heat. A thief.", "Plain."]


@pytest.mark.parametrize(("end", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_documents_of_lines_and_of_json_lines(tmp_path, end, pack):
    path = tmp_path / f"films.jsonl{end}"
    path.write_bytes(pack("\n".join(map(json.dumps, RECORDS)).encode()))
    assert read_documents(path) == WRITTEN
    path = tmp_path / f"films.txt{end}"
    path.write_bytes(pack(b"one two\n\n three \n"))
    assert read_documents(path) == ["one two", "three"]
    assert read_documents(path, max_tokens=1) == ["one two"]


@pytest.mark.parametrize("line", ['{"title": "Heat"}', "[1, 2]", "not json", "3"])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    path = tmp_path / "films.jsonl"
    path.write_text('{"text": "Plain."}\n' + line + "\n")
    with pytest.raises(InputError, match=r"films\.jsonl, line 2: not a JSON object with a field text"):
        read_documents(path)


@pytest.mark.parametrize("content", ["", "\n \n\n"])
def test_a_file_without_text_is_refused(tmp_path, content):
    (tmp_path / "films.txt").write_text(content)
    with pytest.raises(InputError, match=r"films\.txt holds no text; give a document a line"):
        read_documents(tmp_path / "films.txt")


def test_what_is_no_text_is_refused(tmp_path):
    path = tmp_path / "films.txt.gz"
    path.write_bytes(b"no gzip")
    with pytest.raises(InputError, match=r"films\.txt\.gz cannot be read .* give a whole UTF-8 text file"):
        read_documents(path)
