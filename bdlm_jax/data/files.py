"""Bytes and rows of the files that readers understand, with the line number of whatever is wrong.

Tables take a fast path through pandas when nothing about them is unusual; quotes, gaps or a value that does not fit
send them through a careful pass that names the line.
"""

import ast
import csv
import dataclasses
import gzip
import html
import io
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from bdlm_jax.types import InputError

_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError, RuntimeError)
_ZIP_MEMBER_LIMIT = 4 << 30
_CHUNK = 64 << 20


@dataclasses.dataclass(frozen=True)
class File:
    """A file in a folder or in a zip: `label` names it in messages, `read` gives its bytes, uncompressed."""

    label: str
    read: Callable[[], bytes]


def read_bytes(path: str | Path) -> bytes:
    """All bytes of a file, uncompressed if it ends in .gz.

    Raises:
        InputError: the file is missing or broken.
    """
    path = Path(path)
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} is not there; check the path.") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder where a file is needed; name the file in it.") from None
    except _BROKEN as error:
        raise InputError(f"{path} cannot be read ({error}); fetch it again.") from error


def as_file(path: str | Path) -> File:
    """The file at `path`."""
    return File(str(path), lambda: read_bytes(path))


def list_files(path: str | Path) -> dict[str, File]:
    """The files of a folder (or of the only folder in it) or of a zip, by base name without ".gz".

    Raises:
        InputError: there is no folder and no zip at `path`.
    """
    path = Path(path)
    if path.is_dir():
        inside = sorted(path.iterdir())
        folders = [entry for entry in inside if entry.is_dir()]
        if len(folders) == 1 and not any(
            entry.suffix in (".dat", ".data", ".csv", ".inter", ".gz") for entry in inside
        ):
            inside = sorted(folders[0].iterdir())
        return {entry.name.removesuffix(".gz"): as_file(entry) for entry in inside if entry.is_file()}
    if not path.exists():
        raise InputError(f"{path} is not there; check the path.")
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is neither a folder nor a zip ({error}); give one of the two.") from error
    members.sort(key=lambda member: -member.filename.count("/"))  # the outermost of two equal names wins
    return {
        member.filename.rsplit("/", 1)[-1].removesuffix(".gz"): File(
            f"{path}:{member.filename}", lambda name=member.filename: _read_member(path, name)
        )
        for member in members
    }


def _read_member(path: Path, name: str) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo(name).file_size > _ZIP_MEMBER_LIMIT:
                raise InputError(f"{path}:{name} unpacks to more than 4 GiB; unpack it yourself and give the folder.")
            data = archive.read(name)
        return gzip.decompress(data) if name.endswith(".gz") else data
    except _BROKEN as error:
        raise InputError(f"{path}:{name} cannot be read ({error}); fetch it again.") from error


def clean_text(text: str) -> str:
    """HTML entities become characters, runs of blanks one space."""
    return " ".join(html.unescape(text).split())


def find_separator(data: bytes) -> str:
    """The separator of a table, judged by its first line."""
    line = data[:65536].split(b"\n", 1)[0].decode("latin-1")
    counts = {separator: line.count(separator) for separator in ("::", "\t", ",", ";", "|")}
    return max(counts, key=counts.get) if any(counts.values()) else ","


def table_rows(
    data: bytes, label: str, *, separator: str, encoding: str = "utf-8-sig", n_fields: int | None = None
) -> Iterator[tuple[int, list[str]]]:
    """Rows of a delimited text with their line numbers; blank lines are skipped, and tabs and bars know no quotes.

    Args:
        data: the file's bytes.
        label: names the file in messages.
        separator: one character, or "::".
        encoding: of the text.
        n_fields: fields of each row; None: as many as the first row has.

    Yields:
        (line number from 1, fields).

    Raises:
        InputError: the text is not in this encoding, or a row has another number of fields.
    """
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(
            f"{label}, line {line}: the text is not {encoding}; convert it or name its encoding."
        ) from None
    if len(separator) > 1:
        lines = enumerate(text.split("\n"), start=1)
        rows = ((line, row.rstrip("\r").split(separator) if row.rstrip("\r") else []) for line, row in lines)
    else:
        quoting = csv.QUOTE_NONE if separator in "\t|" else csv.QUOTE_MINIMAL
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting, strict=True)
        rows = ((reader.line_num, row) for row in reader)
    line = 0
    try:
        for line, row in rows:
            if not row:
                continue
            n_fields = n_fields or len(row)
            if len(row) != n_fields:
                raise InputError(
                    f"{label}, line {line}: {len(row)} fields where {n_fields} are needed; correct the line."
                )
            yield line, row
    except csv.Error as error:
        raise InputError(f"{label}, line {line + 1}: {error}; correct the line.") from None


def table_columns(
    data: bytes,
    label: str,
    *,
    separator: str,
    wanted: dict[str, int],
    n_fields: int,
    header: bool,
    encoding: str = "utf-8-sig",
) -> tuple[dict[str, object], Callable[[int], str]]:
    """Columns of a table of interactions: ids under "user" and "item", numbers under every other name.

    Args:
        data: the file's bytes.
        label: names the file in messages.
        separator: one character, or "::".
        wanted: {name: position of the column}.
        n_fields: fields of each row.
        header: whether the first line holds names.
        encoding: of the text.

    Returns:
        ({name: column}, where): where(row) names the file and line of a row.

    Raises:
        InputError: a row has another number of fields, or a value is not a number.
    """
    columns = _fast_columns(data, separator, wanted, n_fields, header)
    if columns is not None:
        return columns, lambda row: f"{label}, line {row + 1 + header}"
    rows = table_rows(data, label, separator=separator, encoding=encoding, n_fields=n_fields)
    if header:
        next(rows, None)
    lines, values = [], {name: [] for name in wanted}
    for line, row in rows:
        lines.append(line)
        for name, position in wanted.items():
            value = row[position]
            if name not in ("user", "item"):
                value = _number(value, name, f"{label}, line {line}")
            values[name].append(value)
    return values, lambda row: f"{label}, line {lines[row]}"


def _number(text: str, name: str, where: str) -> int | float:
    try:
        return int(text) if text.strip().lstrip("-").isdecimal() else float(text)
    except ValueError:
        raise InputError(f"{where}: field '{name}' is {text!r}; give a number.") from None


def _fast_columns(data: bytes, separator: str, wanted: dict, n_fields: int, header: bool) -> dict | None:
    """The columns, or None where only the careful pass can tell what the file says."""
    if b"\x00" in data or b"\x1f" in data or b'"' in data:
        return None
    if len(separator) > 1:
        data, separator = data.replace(separator.encode(), b"\x1f"), "\x1f"
    mark = re.escape(separator.encode())
    odd = rb"(?:^|\n|" + mark + rb")(?:[ +]|0[0-9])|\n\r?\n|\r[^\n]"  # "007" is not 7, and blank lines shift the count
    body = data.rstrip(b"\r\n")
    if re.search(odd, body) or not _same_width(body, separator.encode(), n_fields - 1):
        return None
    ids = {wanted["user"]: "category", wanted["item"]: "category"}
    try:
        frame = pd.read_csv(
            io.BytesIO(body), sep=separator, header=None, skiprows=int(header), usecols=sorted(wanted.values()),
            names=list(range(n_fields)), index_col=False, dtype=ids,
            keep_default_na=False, na_filter=False, quoting=csv.QUOTE_NONE, skip_blank_lines=False, encoding="utf-8",
        )  # fmt: skip
    except (ValueError, pd.errors.ParserError, pd.errors.EmptyDataError, OverflowError):
        return None
    columns = {}
    for name, position in wanted.items():
        column = frame[position]
        if name in ("user", "item"):
            categories = column.cat.categories
            if not (pd.api.types.is_integer_dtype(categories) or pd.api.types.is_string_dtype(categories)):
                return None
            columns[name] = column.array
        elif column.dtype.kind in "iuf":
            columns[name] = column.to_numpy()
        else:
            return None
    return columns


def _same_width(body: bytes, separator: bytes, n_separators: int) -> bool:
    start = 0
    while start < len(body):
        end = len(body) if start + _CHUNK >= len(body) else body.rfind(b"\n", start, start + _CHUNK) + 1
        if end <= start:
            return False
        chunk = np.frombuffer(body, np.uint8, end - start, start)
        ends = np.flatnonzero(chunk == ord("\n"))
        ends = ends if len(ends) and ends[-1] == len(chunk) - 1 else np.append(ends, len(chunk))
        before = np.searchsorted(np.flatnonzero(chunk == separator[0]), ends)
        if not np.all(np.diff(before, prepend=0) == n_separators):
            return False
        start = end
    return True


def json_lines(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Objects of a file with one JSON object (or Python literal, as Amazon 2014's metadata) a line, .gz or not.

    Yields:
        (line number from 1, object).

    Raises:
        InputError: the file is missing or broken, or a line is no object.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is not there or is no file; check the path.")
    line = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for line, text in enumerate(file, start=1):
                if text.strip():
                    yield line, _object(text, f"{path}, line {line}")
    except _BROKEN as error:
        raise InputError(f"{path} cannot be read after line {line} ({error}); fetch it again.") from error


def _object(text: bytes, where: str) -> dict:
    try:
        try:
            value = json.loads(text)
        except ValueError:
            value = ast.literal_eval(text.decode("utf-8").strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{where}: this is neither a JSON object nor a Python literal; correct the line.")
    return value
