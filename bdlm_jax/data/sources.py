"""Readers: from the files people have to `Interactions`.

Tables (CSV, TSV), RecBole's atomic files and adjacency lists here; MovieLens and Amazon beside; `load_source` picks one
by name. Every malformed line is refused with its file and line number.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bdlm_jax.data.amazon import read_amazon
from bdlm_jax.data.files import clean_text, find_separator, list_files, read_bytes, table_columns, table_rows
from bdlm_jax.data.interactions import Interactions, build_interactions
from bdlm_jax.data.movielens import read_movielens
from bdlm_jax.data.splits import PART_NAMES, Split, from_parts
from bdlm_jax.types import InputError

_COLUMN_NAMES = {
    "user": ("user", "user_id", "userid", "uid", "reviewerid"),
    "item": ("item", "item_id", "itemid", "iid", "movieid", "parent_asin", "asin", "product_id"),
    "time": ("time", "timestamp", "unixreviewtime"),
    "order": ("order", "position"),
    "rating": ("rating", "overall", "stars", "score"),
}
_ITEM_COLUMN_NAMES = {
    "id": ("id", *_COLUMN_NAMES["item"]),
    "title": ("title", "item_title", "movie_title", "item_name", "name", "product_title"),
}


def load_source(kind: str, path: str | Path, **options) -> Interactions | Split:
    """Reads `path` with the reader named `kind`.

    Args:
        kind: "table", "movielens", "recbole", "amazon" or "adjacency".
        path: file, folder or zip, as the reader takes it.
        options: the reader's keyword options.

    Returns:
        Interactions; a Split for "adjacency", which publishes its own.

    Raises:
        InputError: the kind, an option or the files cannot be used.
    """
    readers = {
        "table": read_table,
        "movielens": read_movielens,
        "recbole": read_recbole,
        "amazon": read_amazon,
        "adjacency": read_adjacency_folder,
    }
    if kind not in readers:
        raise InputError(f"the data kind is {kind!r}; use one of {', '.join(readers)}.")
    code = readers[kind].__code__
    allowed = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    unknown = [name for name in options if name not in allowed]
    if unknown:
        raise InputError(f"the data kind {kind} has no option {unknown[0]!r}; it has {', '.join(allowed) or 'none'}.")
    return readers[kind](path, **options)


def read_table(
    path: str | Path,
    *,
    columns: Mapping[str, str | int] | None = None,
    sep: str | None = None,
    header: bool = True,
    items: str | Path | None = None,
    item_columns: Mapping[str, str] | None = None,
    users: str | Path | None = None,
    user_columns: Mapping[str, str] | None = None,
    encoding: str = "utf-8-sig",
    duplicates: str = "first",
    keep_items_without_interactions: bool = False,
) -> Interactions:
    """Reads a delimited table of interactions, .gz or not, and optionally tables that describe items and users.

    Args:
        path: the table, or a folder with interactions.csv/.tsv and optionally items.* and users.* (each may be .gz).
        columns: {"user", "item", and of "time" or "order", "rating": the column's name, or its position from 0};
            None: known names are recognised (user_id, item_id, timestamp, order, rating, …).
        sep: separator; None: the one that the first line has most.
        header: whether the first line holds names.
        items: table of items; a relative path may also stand beside `path`.
        item_columns: {"id": column, field: column, …}; None: known ids and titles, the others by their names.
        users: table of users.
        user_columns: the same for users.
        encoding: of the text.
        duplicates: as in `make_interactions`.
        keep_items_without_interactions: as in `make_interactions`.

    Returns:
        Interactions; HTML entities in item and user text are read as the characters they stand for.

    Raises:
        InputError: a file or column is missing, or a line is malformed.
    """
    path = Path(path)
    if path.is_dir():
        found = {
            Path(name).stem: file.label for name, file in list_files(path).items() if name.endswith((".csv", ".tsv"))
        }
        if "interactions" not in found:
            raise InputError(f"{path} has no interactions.csv or interactions.tsv; name the table itself.")
        path, items, users = Path(found["interactions"]), items or found.get("items"), users or found.get("users")
    data = read_bytes(path)
    separator = sep or find_separator(data)
    names = _header(data, str(path), separator, encoding)
    wanted = _positions(names, columns, str(path), header)
    values, where = table_columns(
        data, str(path), separator=separator, wanted=wanted, n_fields=len(names), header=header, encoding=encoding
    )
    interactions, _ = build_interactions(
        values.pop("user"), values.pop("item"), **values,
        item_fields=_read_fields(items, path, item_columns, encoding, _ITEM_COLUMN_NAMES),
        user_fields=_read_fields(users, path, user_columns, encoding, {"id": ("id", *_COLUMN_NAMES["user"])}),
        duplicates=duplicates, keep_items_without_interactions=keep_items_without_interactions, where=where,
    )  # fmt: skip
    return interactions


def read_recbole(
    path: str | Path,
    *,
    name: str | None = None,
    title: str | None = None,
    duplicates: str = "first",
    keep_items_without_interactions: bool = False,
) -> Interactions:
    """Reads RecBole's atomic files: a folder (or zip) with NAME.inter and optionally NAME.item and NAME.user.

    Args:
        path: the folder or zip.
        name: NAME, where the folder holds several sets.
        title: the item field that is the title; None: title, movie_title, … or the first token_seq.
        duplicates: as in `make_interactions`.
        keep_items_without_interactions: as in `make_interactions`.

    Returns:
        Interactions; the other fields keep RecBole's names.

    Raises:
        InputError: a file is missing, a header is not `name:type`, or a line is malformed.
    """
    files = list_files(path)
    found = sorted(file.removesuffix(".inter") for file in files if file.endswith(".inter"))
    if name is None and len(found) != 1:
        raise InputError(f"{path} holds {len(found)} .inter files where one is needed; choose with name= (of {found}).")
    name = name or found[0]
    if f"{name}.inter" not in files:
        raise InputError(f"{path} has no {name}.inter; it has {', '.join(found) or 'no .inter file'}.")
    file = files[f"{name}.inter"]
    data = file.read()
    names = _atomic_header(data, file.label)
    wanted = _positions(list(names), None, file.label, True)
    values, where = table_columns(data, file.label, separator="\t", wanted=wanted, n_fields=len(names), header=True)
    interactions, _ = build_interactions(
        values.pop("user"), values.pop("item"), **values,
        item_fields=_read_atomic(files.get(f"{name}.item"), title=title, with_title=True),
        user_fields=_read_atomic(files.get(f"{name}.user"), title=None, with_title=False),
        duplicates=duplicates, keep_items_without_interactions=keep_items_without_interactions, where=where,
    )  # fmt: skip
    return interactions


def read_adjacency_lists(train_path: str | Path, test_path: str | Path) -> Split:
    """Reads a split published as adjacency lists, one user a line: `user item item …` (LightGCN's Gowalla and others).

    Args:
        train_path: training lists, .gz or not.
        test_path: test lists.

    Returns:
        Split with training and test parts and no validation; the order of a list is kept as the user's order.

    Raises:
        InputError: a file is missing, an id is not a whole number, or a pair is in both files.
    """
    parts, lines = [], []
    for path in (train_path, test_path):
        users, items, rows = [], [], []
        for line, text in enumerate(read_bytes(path).decode("latin-1").split("\n"), start=1):
            fields = text.split()
            if not fields:
                continue
            if not "".join(fields).isdecimal():
                raise InputError(
                    f"{path}, line {line}: ids must be whole numbers separated by spaces; correct the line."
                )
            values = [int(field) for field in fields]
            users += values[:1] * (len(values) - 1)
            items += values[1:]
            rows += [line] * (len(values) - 1)
        parts.append((np.array(users, np.int64), np.array(items, np.int64)))
        lines.append((path, rows))

    def where(part, row):
        path, rows = lines[0 if part == PART_NAMES[0] else 1]
        return f"{path}, line {rows[row]}"

    return from_parts(parts[0], parts[1], where=where)


def read_adjacency_folder(path: str | Path) -> Split:
    """Reads train.txt and test.txt (each may be .gz) of a folder with `read_adjacency_lists`."""
    files = list_files(path)
    if "train.txt" not in files or "test.txt" not in files:
        raise InputError(f"{path} must hold train.txt and test.txt (or .gz); check the folder.")
    return read_adjacency_lists(files["train.txt"].label, files["test.txt"].label)


def _header(data: bytes, label: str, separator: str, encoding: str) -> list[str]:
    for _, row in table_rows(data.split(b"\n", 1)[0], label, separator=separator, encoding=encoding):
        return [name.strip() for name in row]
    raise InputError(f"{label}, line 1: the table is empty; check the file.")


def _positions(names: list[str], columns: Mapping | None, label: str, header: bool) -> dict[str, int]:
    if columns is None:
        if not header:
            raise InputError(f"{label} has no header, so columns= must give the positions of 'user' and 'item'.")
        lowered = [name.lower() for name in names]
        columns = {}
        for role, known in _COLUMN_NAMES.items():
            match = next((names[lowered.index(name)] for name in known if name in lowered), None)
            if match is not None:
                columns[role] = match
        if "time" in columns:
            columns.pop("order", None)
    unknown = [role for role in columns if role not in _COLUMN_NAMES]
    if unknown:
        raise InputError(f"columns= has the role {unknown[0]!r}; the roles are {', '.join(_COLUMN_NAMES)}.")
    for role in ("user", "item"):
        if role not in columns:
            raise InputError(f"{label}: no column for '{role}' (it has {', '.join(names)}); name it with columns=.")
    positions = {}
    for role, column in columns.items():
        if isinstance(column, int) and 0 <= column < len(names):
            positions[role] = column
        elif isinstance(column, str) and header and column in names:
            positions[role] = names.index(column)
        else:
            raise InputError(f"{label}: no column {column!r} for '{role}'; it has {', '.join(names)}.")
    return positions


def _read_fields(path, beside: Path, columns: Mapping | None, encoding: str, known: Mapping) -> dict[str, dict]:
    if path is None:
        return {}
    path = Path(path)
    if not path.exists() and not path.is_absolute() and (beside.parent / path).exists():
        path = beside.parent / path
    data = read_bytes(path)
    separator = find_separator(data)
    names = _header(data, str(path), separator, encoding)
    if columns is None:
        lowered = [name.lower() for name in names]
        columns = {}
        for field, aliases in known.items():
            match = next((names[lowered.index(name)] for name in aliases if name in lowered), None)
            if match is not None:
                columns[field] = match
        columns |= {name: name for name in names if name not in columns.values()}
    if "id" not in columns:
        raise InputError(f"{path}: no id column (it has {', '.join(names)}); name it as 'id' with item_columns=.")
    missing = [column for column in columns.values() if column not in names]
    if missing:
        raise InputError(f"{path}: no column {missing[0]!r}; it has {', '.join(names)}.")
    position = {field: names.index(column) for field, column in columns.items()}
    rows = table_rows(data, str(path), separator=separator, encoding=encoding, n_fields=len(names))
    next(rows)
    key = position.pop("id")
    return {row[key]: {field: clean_text(row[at]) for field, at in position.items()} for _, row in rows}


def _atomic_header(data: bytes, label: str) -> dict[str, str]:
    names = {}
    for field in _header(data, label, "\t", "utf-8-sig"):
        name, colon, kind = field.partition(":")
        if not colon or kind not in ("token", "token_seq", "float", "float_seq"):
            raise InputError(
                f"{label}, line 1: {field!r} is not name:type with one of RecBole's types; correct the header."
            )
        names[name] = kind
    return names


def _read_atomic(file, *, title: str | None, with_title: bool) -> dict[str, dict]:
    if file is None:
        return {}
    data = file.read()
    kinds = _atomic_header(data, file.label)
    names = list(kinds)
    rename = {}
    if with_title:
        known = (name for name in _ITEM_COLUMN_NAMES["title"] if name in names)
        sequences = (name for name in names[1:] if kinds[name] == "token_seq")
        title = title or next(known, None) or next(sequences, None)
        if title is not None and title not in names:
            raise InputError(f"{file.label}, line 1: no field {title!r}; it has {', '.join(names)}.")
        rename = {title: "title"}
    rows = table_rows(data, file.label, separator="\t", n_fields=len(names))
    next(rows)
    return {
        row[0]: {rename.get(name, name): clean_text(value) for name, value in zip(names[1:], row[1:])}
        for _, row in rows
    }
