"""Opening, decoding and parsing the files that readers understand; every refusal names the file and, in it, the line.

Tables are parsed by pandas alone. It fills short rows silently, so that their width is checked before.
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
import warnings
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from bdlm_jax.runtime.log import progress
from bdlm_jax.types import InputError

_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError, RuntimeError)
_ZIP_MEMBER_LIMIT = 4 << 30
_ROWS = 1_000_000  # of a table that are parsed together
_SEPARATORS = ("::", "\t", ",", ";", "|")
_LONG = "\x1f"  # stands for a separator of several characters, which pandas' fast parser does not know
_ATOMIC_TYPES = ("token", "token_seq", "float", "float_seq")
_DATA = re.compile(r"\.(dat|data|csv|tsv|inter|gz)$|^train\.txt$")  # a folder that has one is not looked into further


@dataclasses.dataclass(frozen=True)
class File:
    """A file at `path`, or a member of the zip at `path`."""

    path: Path
    member: str = ""

    @property
    def label(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    def read(self) -> bytes:
        """All bytes, uncompressed if the name ends in .gz."""
        try:
            if self.member:
                with zipfile.ZipFile(self.path) as archive:
                    if archive.getinfo(self.member).file_size > _ZIP_MEMBER_LIMIT:
                        raise InputError(f"{self.label} unpacks to more than 4 GiB; unpack it and give the folder.")
                    data = archive.read(self.member)
            else:
                data = self.path.read_bytes()
            return gzip.decompress(data) if self.label.endswith(".gz") else data
        except FileNotFoundError:
            raise InputError(f"{self.label} is not there; check the path.") from None
        except IsADirectoryError:
            raise InputError(f"{self.label} is a folder where a file is needed; name the file in it.") from None
        except _BROKEN as error:
            raise InputError(f"{self.label} cannot be read ({error}); fetch it again.") from error


def list_files(path: str | Path) -> dict[str, File]:
    """The files of a folder (or of the only folder in it) or of a zip, by base name without ".gz"."""
    path = Path(path)
    if path.is_dir():
        inside = sorted(path.iterdir())
        folders = [entry for entry in inside if entry.is_dir()]
        if len(folders) == 1 and not any(_DATA.search(entry.name) for entry in inside):
            inside = sorted(folders[0].iterdir())
        files = {entry.name: File(entry) for entry in inside if entry.is_file()}
        if twice := sorted(name for name in files if f"{name}.gz" in files):
            raise InputError(f"{path} holds {twice[0]} and {twice[0]}.gz; remove one, for only one would be read.")
        return {name.removesuffix(".gz"): file for name, file in files.items()}
    if not path.exists():
        raise InputError(f"{path} is not there; check the path.")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [member.filename for member in archive.infolist() if not member.is_dir()]
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is neither a folder nor a zip ({error}); give one of the two.") from error
    names.sort(key=lambda name: -name.count("/"))  # the outermost of two equal names wins
    return {name.rsplit("/", 1)[-1].removesuffix(".gz"): File(path, name) for name in names}


def clean_text(text: str) -> str:
    """HTML entities become characters, runs of blanks one space."""
    return " ".join(html.unescape(text).split())


class Column:
    """A column that comes in parts: numbers, or ids, each of which is kept once."""

    def __init__(self, is_id: bool):
        self.is_id, self._parts, self._code = is_id, [], {}

    def add(self, values: np.ndarray, ids: Iterable | None = None) -> None:
        """Adds values; of ids, each row's number among those of `ids` (-1: none)."""
        if self.is_id:
            code = self._code
            numbers = np.array([*(code.setdefault(value, len(code)) for value in ids), -1], np.int32)
            values = numbers[values]
        self._parts.append(values)

    def joined(self) -> np.ndarray | pd.Categorical:
        """The whole column; its parts are gone then."""
        parts, self._parts = self._parts, []
        values = np.concatenate(parts)
        return pd.Categorical.from_codes(values, list(self._code)) if self.is_id else values


@dataclasses.dataclass(frozen=True)
class Table:
    """A delimited text, utf-8 by now, whose rows have `width` fields each; blank lines count for nothing.

    Tabs, bars and separators of several characters know no quotes.
    """

    label: str
    text: bytes
    separator: str
    header: bool
    names: list[str]  # of the first row, whether it is a header or not
    width: int
    lines: array | None  # the number of each row's last line; None: they follow each other

    def columns(self, wanted: Mapping[str, int]) -> dict:
        """{role: column at this position}: "user" and "item" as categories, others as numbers if all of them are."""
        ids = {wanted[role]: str for role in ("user", "item")}  # as "category", pandas would read "007" as 7
        gathered = {position: Column(position in ids) for position in set(wanted.values())}
        bar = progress(description=f"reading {self.label}", total=max(self.text.count(b"\n"), 1))
        for frame in self._parts(usecols=sorted(gathered), dtype=ids):
            for position, column in gathered.items():
                column.add(*(pd.factorize(frame[position]) if column.is_id else (frame[position].to_numpy(),)))
            bar.update(len(frame))
        bar.close()
        columns = {}
        for role, position in wanted.items():
            column = gathered[position].joined()
            if position not in ids and column.dtype.kind not in "iuf":  # as it is written, for whoever refuses it
                column = self._read(usecols=[position], dtype=str)[position].to_numpy()
            columns[role] = column
        return columns

    def rows(self) -> Iterator[tuple[str, ...]]:
        """All fields of every row, without the header."""
        return self._read(dtype=str).itertuples(index=False, name=None)

    @property
    def where(self) -> Callable[[int], str]:
        """A function that names the file and the line of a row, and does not keep the text."""
        label, lines, header = self.label, self.lines, self.header
        return lambda row: f"{label}, line {row + header + 1 if lines is None else lines[row + header]}"

    def check_width(self) -> array | None:
        """Raises if a row has another number of fields than `width`; returns `lines`."""
        separator = self.separator.encode()
        # What is left of an even text without its values is one pattern, again and again.
        marks = self.text.translate(None, bytes(set(range(256)) - {*separator, *b"\r\n"})).rstrip(b"\r\n")
        for end in (b"\n", b"\r\n"):
            row = separator * (self.width - 1) + end
            even = marks + end == row * ((len(marks) + len(end)) // len(row))
            if even and (self._quoting == csv.QUOTE_NONE or b'"' not in self.text):
                return None
        lines = array("q")
        for line, fields in self._lines():
            if len(fields) != self.width:
                counts = f"{len(fields)} fields where {self.width} are needed"
                raise InputError(f"{self.label}, line {line}: {counts}; correct the line.")
            lines.append(line)
        return lines

    @property
    def _quoting(self) -> int:
        return csv.QUOTE_MINIMAL if self.separator in ",; " else csv.QUOTE_NONE

    def _read(self, **options) -> pd.DataFrame:
        return pd.concat(self._parts(**options))

    def _parts(self, **options) -> Iterator[pd.DataFrame]:
        """Frames of `_ROWS` rows at most, so that text becomes numbers a part at a time; one at least."""
        options |= {"sep": self.separator, "quoting": self._quoting, "header": 0 if self.header else None}
        options |= {"names": range(self.width), "index_col": False}
        try:
            with warnings.catch_warnings():  # a column of numbers and words is refused later, with its line
                warnings.simplefilter("ignore", pd.errors.DtypeWarning)
                # "NA" is an id, a title or a mistake, as everything else
                yield from pd.read_csv(io.BytesIO(self.text), na_filter=False, chunksize=_ROWS, **options)
        except (ValueError, OverflowError) as error:
            raise InputError(f"{self.label} cannot be read as a table ({error}); correct it.") from error

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        """(line number from 1, fields), slowly."""
        lines = io.TextIOWrapper(io.BytesIO(self.text), "utf-8", newline="")
        reader = csv.reader(lines, delimiter=self.separator, quoting=self._quoting, strict=True)
        line = 0
        try:
            for row in reader:
                line = reader.line_num
                if row:
                    yield line, row
        except csv.Error as error:
            raise InputError(f"{self.label}, line {line + 1}: {error}; correct the line.") from None


def open_table(
    file: File,
    *,
    separator: str | None = None,
    header: bool = True,
    width: int | None = None,
    encodings: Sequence[str] = ("utf-8-sig",),
) -> Table:
    """Reads a delimited text, in the first of `encodings` that fits; None means what the first line shows most."""
    text = file.read()
    if not (text.isascii() and encodings[0].startswith("utf-8")):  # a large table is not copied without need
        text = _decode(text, file.label, encodings).encode()
    if separator is None:
        first_line = text[:65536].split(b"\n", 1)[0].decode(errors="replace")
        separator = max(_SEPARATORS, key=first_line.count) if any(map(first_line.count, _SEPARATORS)) else ","
    if len(separator) > 1:
        text, separator = text.replace(separator.encode(), _LONG.encode()), _LONG
    table = Table(file.label, text, separator, header, names=[], width=0, lines=None)
    _, first = next(table._lines(), (0, []))
    if not first:
        raise InputError(f"{file.label}, line 1: the table is empty; check the file.")
    table = dataclasses.replace(table, names=[name.strip() for name in first], width=width or len(first))
    if twice := header and [name for name in table.names if name and table.names.count(name) > 1]:
        raise InputError(f"{file.label}, line 1: the column {twice[0]!r} stands twice; rename or remove one.")
    return dataclasses.replace(table, lines=table.check_width())


def _decode(data: bytes, label: str, encodings: Sequence[str]) -> str:
    for encoding in encodings:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
        except (LookupError, UnicodeError):
            raise InputError(f"config.data.options.encoding: {encoding} is no encoding; give utf-8, say.") from None
    raise InputError(
        f"{label}, line {line}: the text is not {encoding}; convert it or name its encoding in "
        "config.data.options.encoding."
    )


def open_atomic(file: File) -> tuple[Table, list[str]]:
    """A table in RecBole's format, whose header is `name:type`: the table, named without types, and the types."""
    table = open_table(file, separator="\t")
    for field in table.names:
        if field.partition(":")[2] not in _ATOMIC_TYPES:
            raise InputError(
                f"{file.label}, line 1: {field!r} is not name:type, as RecBole has it; correct the header."
            )
    names, types = zip(*(field.split(":") for field in table.names))
    return dataclasses.replace(table, names=list(names)), list(types)


def id_lists(file: File) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(user, item, line number from 1) of adjacency lists, one user a line: `user item item …`."""
    users, items, lines = (array("q") for _ in range(3))
    for line, text in enumerate(file.read().decode("latin-1").split("\n"), start=1):
        fields = text.split()
        if not fields:
            continue
        if not "".join(fields).isdecimal():
            raise InputError(f"{file.label}, line {line}: ids must be whole numbers and spaces; correct the line.")
        user, *listed = map(int, fields)
        users.extend([user] * len(listed))
        items.extend(listed)
        lines.extend([line] * len(listed))
    return np.asarray(users), np.asarray(items), np.asarray(lines)


def json_lines(path: str | Path) -> Iterator[tuple[int, dict]]:
    """(line number from 1, object) of a file with one JSON object (or Python literal) a line, .gz or not."""
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
    for parse in (json.loads, lambda text: ast.literal_eval(text.decode("utf-8").strip())):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    raise InputError(f"{where}: this is neither a JSON object nor a Python literal; correct the line.")
