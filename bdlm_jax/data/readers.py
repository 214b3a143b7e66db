"""Readers: from the files people have to `Interactions`, or to the `Split` that a publisher made.

`READERS` is the one list of them; what a reader takes beside its path is what its signature says.
"""

import html
import inspect
import logging
import re
from array import array
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from bdlm_jax.data.interactions import Interactions, make_interactions
from bdlm_jax.data.parquet import ParquetTable, open_parquet
from bdlm_jax.data.raw_files import File, Table, clean_text, id_lists, json_lines, list_files, open_atomic, open_table
from bdlm_jax.data.splits import Split, from_parts
from bdlm_jax.types import InputError

_LOG = logging.getLogger(__name__)

_COLUMNS = {
    "user": ("user", "user_id", "userid", "uid", "reviewerid"),
    "item": ("item", "item_id", "itemid", "iid", "movieid", "parent_asin", "asin", "product_id"),
    "time": ("time", "timestamp", "unixreviewtime"),
    "order": ("order", "position"),
    "rating": ("rating", "overall", "stars", "score"),
}
_OPTIONS = ("duplicates", "keep_items_without_interactions")  # of `make_interactions`, which readers hand on as `rest`
_USER_COLUMNS = {"id": ("id", *_COLUMNS["user"])}
_ITEM_COLUMNS = {
    "id": ("id", *_COLUMNS["item"]),
    "title": ("title", "item_title", "movie_title", "item_name", "name", "product_title"),
}

# MovieLens's codes, and how GroupLens writes titles: "Matrix, The (1999)".
_GROUPLENS = ("utf-8", "latin-1")  # 10M's movies.dat is the former, 100K's and 1M's are the latter
_RATINGS = {"user": 0, "item": 1, "rating": 2, "time": 3}  # where no header says it
_ORDERS = {"user": "user_id", "item": "item_id", "order": "order"}
_GENDERS = {"F": "female", "M": "male"}
_AGES = {"1": "under 18", "18": "18-24", "25": "25-34", "35": "35-44", "45": "45-49", "50": "50-55", "56": "56+"}
_OCCUPATIONS = (
    "other", "academic/educator", "artist", "clerical/admin", "college/grad student", "customer service",
    "doctor/health care", "executive/managerial", "farmer", "homemaker", "K-12 student", "lawyer", "programmer",
    "retired", "sales/marketing", "scientist", "self-employed", "technician/engineer", "tradesman/craftsman",
    "unemployed", "writer",
)  # fmt: skip
_GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
_ARTICLES = "The|A|An|L'|La|Le|Les|Un|Une|Il|Lo|Gli|I|El|Los|Las|Una|O|Os|As|Das|Der|Die|Den|Det|De|Het"
_INVERTED = re.compile(rf"^(?P<rest>.+?), (?P<article>{_ARTICLES})(?P<tail>: .+)?$")


def load_source(kind: str, path: str | Path, **options) -> Interactions | Split:
    """Reads `path` with the reader named `kind`, one of READERS, and its keyword options."""
    if kind not in READERS:
        raise InputError(f"the data kind is {kind!r}; use one of {', '.join(READERS)}.")
    allowed = reader_options(kind)
    if unknown := [name for name in options if name not in allowed]:
        raise InputError(f"the data kind {kind} has no option {unknown[0]!r}; it has {', '.join(allowed) or 'none'}.")
    return READERS[kind](path, **options)


def reader_options(kind: str) -> list[str]:
    """The keyword options of a reader of READERS."""
    taken = inspect.signature(READERS[kind]).parameters
    return [*(name for name in taken if name not in ("path", "rest")), *(_OPTIONS if "rest" in taken else ())]


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
    **rest,
) -> Interactions:
    """Reads a delimited table of interactions, .gz or not, and optionally tables that describe items and users.

    Args:
        path: the table, or a folder with interactions.csv/.tsv and optionally items.* and users.* (each may be .gz, or
            .parquet: a file or a folder of parts, with the extra `parquet`).
        columns: {"user", "item", and of "time" or "order", "rating": the column's name, or its position from 0};
            None: known names are recognised (user_id, item_id, timestamp, order, rating, …).
        items, users: tables; a relative path may also stand beside `path`.
        item_columns, user_columns: {"id": column, field: column, …}; None: known ids and titles, others by their names.
        rest: duplicates and keep_items_without_interactions, as in `make_interactions`, in every reader that has it.
    """
    path = Path(path)
    if path.is_dir():
        tables = {n: file.path for n, file in list_files(path).items() if n.endswith((".csv", ".tsv"))}
        tables |= {entry.name: entry for entry in path.glob("*.parquet")}
        found = {Path(name).stem: entry for name, entry in tables.items()}
        for stem in ("interactions", "items", "users"):
            if len(same := [name for name in tables if Path(name).stem == stem]) > 1:
                raise InputError(f"{path} holds {' and '.join(same)}; keep one, for only one would be read.")
        if "interactions" not in found:
            raise InputError(f"{path} has no interactions.csv, .tsv or .parquet; name the table itself.")
        path, items, users = found["interactions"], items or found.get("items"), users or found.get("users")
    return make_interactions(
        **_columns(_open(path, separator=sep, header=header, encodings=(encoding,)), columns),
        item_fields=_read_fields(items, path, item_columns, encoding, _ITEM_COLUMNS),
        user_fields=_read_fields(users, path, user_columns, encoding, _USER_COLUMNS),
        **rest,
    )


def _open(path: Path, **options) -> Table | ParquetTable:
    return open_parquet(path) if path.suffix == ".parquet" else open_table(File(path), **options)


def _columns(table: Table | ParquetTable, columns: Mapping[str, str | int] | None) -> dict:
    """What `make_interactions` takes of a table, found as `columns` says or by the columns' own names."""
    names, known = table.names, ", ".join(table.names)
    if columns is None:
        if not table.header:
            told = "has no header; give the positions of user and item in config.data.options.columns"
            raise InputError(f"{table.label} {told}.")
        columns = _recognised(names, _COLUMNS)
        for role in ("user", "item", "time"):
            if len(same := [name for name in names if name.lower() in _COLUMNS[role]]) > 1:
                told = f"{' and '.join(same)} may both be the {role}; name the columns in config.data.options.columns"
                raise InputError(f"{table.label}: {told}.")
        if "time" in columns:
            columns.pop("order", None)
        elif "order" not in columns:
            told = "no column says when (timestamp, order); the rows are taken in the order of the file"
            _LOG.warning("%s: %s. config.data.options.columns names it.", table.label, told)
    for role in (*columns, "user", "item"):
        if role not in _COLUMNS:
            raise InputError(f"config.data.options.columns has the role {role!r}; the roles are {', '.join(_COLUMNS)}.")
        if role not in columns:
            told = f"no column for '{role}' (it has {known}); name it in config.data.options.columns"
            raise InputError(f"{table.label}: {told}.")
    positions = {}
    for role, column in columns.items():
        if table.header and column in names:
            column = names.index(column)
        if not isinstance(column, int) or not 0 <= column < len(names):
            raise InputError(f"{table.label}: no column {column!r} for '{role}'; it has {known}.")
        positions[role] = column
    return {**table.columns(positions), "where": table.where}


def _recognised(names: list[str], known: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    lowered = {name.lower(): name for name in reversed(names)}
    return {role: lowered[alias] for role, aliases in known.items() for alias in reversed(aliases) if alias in lowered}


def _read_fields(path, beside: Path, columns, encoding: str, known) -> dict[str, dict[str, str]]:
    """{id: {field: text}} of a table that describes items or users."""
    if path is None:
        return {}
    path = path if Path(path).exists() or not (beside.parent / path).exists() else beside.parent / path
    table = _open(Path(path), encodings=(encoding,))
    names = table.names
    if columns is None:
        columns = _recognised(names, known)
        columns |= {name: name for name in names if name not in columns.values()}
    if "id" not in columns:
        option = "item_columns" if known is _ITEM_COLUMNS else "user_columns"
        raise InputError(f"{path}: no id column (it has {', '.join(names)}); name it in config.data.options.{option}.")
    missing = [column for column in columns.values() if column not in names]
    if missing:
        raise InputError(f"{path}: no column {missing[0]!r}; it has {', '.join(names)}.")
    positions = {field: names.index(column) for field, column in columns.items()}
    return _fields(table, positions.pop("id"), positions)


def _fields(table: Table | ParquetTable, key: int, positions: dict[str, int]) -> dict[str, dict[str, str]]:
    fields: dict[str, dict[str, str]] = {}
    for n, row in enumerate(table.rows()):
        made = {field: clean_text(row[at]) for field, at in positions.items()}
        if fields.setdefault(row[key], made) != made:
            raise InputError(f"{table.where(n)}: the id {row[key]!r} stood before, with other text; drop one of them.")
    return fields


def read_recbole(path: str | Path, *, name: str | None = None, title: str | None = None, **rest) -> Interactions:
    """Reads RecBole's atomic files: a folder (or zip) with NAME.inter and optionally NAME.item and NAME.user.

    Args:
        name: NAME, where the folder holds several sets.
        title: the item field that is the title; None: title, movie_title, … or the first token_seq.
    """
    files = list_files(path)
    found = sorted(file.removesuffix(".inter") for file in files if file.endswith(".inter"))
    if name is None and len(found) != 1:
        told = f"{len(found)} .inter files where one is needed; choose in config.data.options.name (of {found})"
        raise InputError(f"{path} holds {told}.")
    name = name or found[0]
    if name not in found:
        raise InputError(f"{path} has no {name}.inter; it has {', '.join(found) or 'no .inter file'}.")
    return make_interactions(
        **_columns(open_atomic(files[f"{name}.inter"])[0], None),
        item_fields=_read_atomic(files.get(f"{name}.item"), is_item=True, title=title),
        user_fields=_read_atomic(files.get(f"{name}.user"), is_item=False),
        **rest,
    )


def _read_atomic(file: File | None, *, is_item: bool, title: str | None = None) -> dict[str, dict[str, str]]:
    if file is None:
        return {}
    table, types = open_atomic(file)
    _, *names = table.names
    if is_item:
        sequences = (name for name, kind in zip(names, types[1:]) if kind == "token_seq")
        title = title or _recognised(table.names, _ITEM_COLUMNS).get("title") or next(sequences, None)
    if title is not None and title not in table.names:
        raise InputError(f"{file.label}, line 1: no field {title!r}; it has {', '.join(table.names)}.")
    return _fields(table, 0, {"title" if name == title else name: at for at, name in enumerate(names, start=1)})


def read_movielens(path: str | Path, **rest) -> Interactions:
    """Reads MovieLens as GroupLens publishes it, a folder or the zip: 100K (u.data), 1M and 10M (.dat), the newer CSVs.

    A folder that has interactions.csv(.gz) (user, item, order) in place of ratings.dat is read with it. Items have a
    title ("The Matrix (1999)") and genres ("Action, Sci-Fi"); users of 100K and 1M gender, age and occupation.
    """
    files = list_files(path)
    item_fields, user_fields = {}, {}
    if "u.data" in files:
        columns = _columns(open_table(files["u.data"], separator="\t", header=False, width=4), _RATINGS)
        item_fields = _movies_100k(files["u.item"]) if "u.item" in files else {}
        if "u.user" in files:
            user_fields = _users(files["u.user"], "|", ("age", "gender", "occupation"), {"gender": _GENDERS})
    elif "movies.dat" in files:
        if "ratings.dat" in files:
            columns = _columns(open_table(files["ratings.dat"], separator="::", header=False, width=4), _RATINGS)
        elif "interactions.csv" in files:
            columns = _columns(open_table(files["interactions.csv"], separator=",", width=3), _ORDERS)
        else:
            raise InputError(f"{path} has movies.dat but no ratings.dat; give MovieLens's whole folder or zip.")
        item_fields = _movies(files["movies.dat"], separator="::", header=False, encodings=_GROUPLENS)
        if "users.dat" in files:
            codes = {"gender": _GENDERS, "age": _AGES, "occupation": {str(n): o for n, o in enumerate(_OCCUPATIONS)}}
            user_fields = _users(files["users.dat"], "::", ("gender", "age", "occupation"), codes)
    elif "ratings.csv" in files:
        columns = _columns(open_table(files["ratings.csv"], separator=",", width=4), None)
        if "movies.csv" in files:
            item_fields = _movies(files["movies.csv"], separator=",")
    else:
        raise InputError(f"{path} holds neither u.data, movies.dat nor ratings.csv; give MovieLens's folder or zip.")
    return make_interactions(**columns, item_fields=item_fields, user_fields=user_fields, **rest)


def _movies(file: File, **options) -> dict[str, dict[str, str]]:
    rows = open_table(file, width=3, **options).rows()
    return {movie: _movie(title, genres.split("|")) for movie, title, genres in rows}


def _movies_100k(file: File) -> dict[str, dict[str, str]]:
    table, fields = open_table(file, separator="|", header=False, width=24, encodings=_GROUPLENS), {}
    for n, (movie, title, _, _, _, *flags) in enumerate(table.rows()):
        if not set(flags) <= {"0", "1"}:
            raise InputError(f"{table.where(n)}: the genre flags must be 0 or 1; correct the line.")
        fields[movie] = _movie(title, (genre for genre, flag in zip(_GENRES_100K, flags) if flag == "1"))
    return fields


def _movie(title: str, genres: Iterable[str]) -> dict[str, str]:
    known = (genre for genre in genres if genre not in ("(no genres listed)", "unknown"))
    return {"title": clean_title(title), "genres": ", ".join(known)}


def _users(file: File, separator: str, names: tuple[str, ...], codes: dict[str, dict]) -> dict[str, dict[str, str]]:
    """The fields `names` of every user, in words where MovieLens has codes for them."""
    table, fields = open_table(file, separator=separator, header=False, width=5, encodings=_GROUPLENS), {}
    for n, (user, *values) in enumerate(table.rows()):
        try:
            fields[user] = {name: codes[name][v] if name in codes else v for name, v in zip(names, values)}
        except KeyError as error:
            raise InputError(f"{table.where(n)}: gender, age or occupation has no code {error}; correct it.") from None
    return fields


def clean_title(title: str) -> str:
    """Puts articles back where they are said: "Matrix, The (1999)" is "The Matrix (1999)"."""
    parts = [_INVERTED.sub(_article_first, part.strip()) for part in re.split(r"[()]", title)]
    if title.count("(") != title.count(")") or re.search(r"\([^)]*\(", title):
        return " ".join(title.split())  # nested or open parentheses: leave what cannot be read
    named = [part if index % 2 == 0 else f"({part})" for index, part in enumerate(parts)]
    return " ".join(" ".join(named).split())


def _article_first(match: re.Match) -> str:
    article = match["article"]
    return article + ("" if article.endswith("'") else " ") + match["rest"] + (match["tail"] or "")


def read_amazon(path: str | Path, *, metadata: str | Path | None = None, **rest) -> Interactions:
    """Reads Amazon reviews as the McAuley lab publishes them, JSON lines of 2014, 2018 or 2023, .gz or not.

    The years name their fields differently, and 2014's metadata are Python literals; both are told from the records.

    Args:
        path: the review file, or a folder that holds one review file and optionally its meta_… file.
        metadata: the products' file, for title, brand, categories and description (markup removed, 2,000 characters).
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(entry for entry in path.iterdir() if re.search(r"\.jsonl?(\.gz)?$", entry.name))
        described = [entry for entry in found if entry.name.startswith("meta_")]
        if len(found) - len(described) != 1 or len(described) > 1:
            raise InputError(f"{path} must hold one review file and at most one meta_ file; name them instead.")
        (path,), metadata = set(found) - set(described), metadata or next(iter(described), None)
    ids, keys = {"user": {}, "item": {}}, {}
    codes = {"user": array("i"), "item": array("i")}  # arrays, for some categories have tens of millions of reviews
    times, ratings, lines = array("q"), array("d"), array("q")
    for line, record in json_lines(path):
        if not keys:
            keys = _recognised(list(record), _COLUMNS)
            for role in ("user", "item", "time", "rating"):
                if role not in keys:
                    raise InputError(f"{path}, line {line}: no field for '{role}'; is it a review file?")
        try:
            for kind, known in ids.items():
                text = record[keys[kind]]
                if not isinstance(text, str) or not text:
                    raise KeyError(keys[kind])
                codes[kind].append(known.setdefault(text, len(known)))
            times.append(int(record[keys["time"]]))
            ratings.append(float(record[keys["rating"]]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{path}, line {line}: a field is missing or unusable ({error}); correct it.") from None
        lines.append(line)
    if not keys:
        raise InputError(f"{path} has no review; check the file.")
    columns = {kind: pd.Categorical.from_codes(np.asarray(codes[kind]), list(known)) for kind, known in ids.items()}
    needed = None if rest.get("keep_items_without_interactions") else ids["item"]
    columns |= {"time": np.asarray(times), "rating": np.asarray(ratings)}
    return make_interactions(
        **columns,
        item_fields=_amazon_metadata(metadata, needed) if metadata else None,
        **rest,
        where=lambda row: f"{path}, line {lines[row]}",
    )


def _amazon_metadata(path: str | Path, needed: Container[str] | None) -> dict[str, dict[str, str]]:
    fields = {}
    for line, record in json_lines(path):
        key = record.get("parent_asin") or record.get("asin")
        if not isinstance(key, str):
            raise InputError(f"{path}, line {line}: no field asin or parent_asin; is it a metadata file?")
        if needed is None or key in needed:
            fields[key] = {
                "title": _plain_text(record.get("title")),
                "brand": _plain_text(record.get("brand") or record.get("store")),
                "categories": _plain_text(_last_path(record.get("categories") or record.get("category"))),
                "description": _plain_text(record.get("description")),
            }
    return fields


def _last_path(categories) -> str:
    """2014 nests paths of categories, later years have one path; both become "Beauty, Makeup, Face"."""
    if isinstance(categories, list) and categories and isinstance(categories[-1], list):
        categories = categories[-1]
    return ", ".join(map(str, categories)) if isinstance(categories, list) else str(categories or "")


def _plain_text(value) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value or "")
    if "getTime" in text:  # the page's script in place of the text, a known fault of 2018's metadata
        return ""
    return clean_text(re.sub(r"<[^<>]{1,200}>", " ", html.unescape(text)))[:2000].rstrip()


def read_adjacency(path: str | Path) -> Split:
    """Reads a split published as adjacency lists: train.txt and test.txt (or .gz), one user a line, `user item item …`.

    LightGCN's Gowalla and others come so. There is no validation part; a list's order is kept as its user's order.
    """
    files = list_files(path)
    if "train.txt" not in files or "test.txt" not in files:
        raise InputError(f"{path} must hold train.txt and test.txt (or .gz); check the folder.")
    parts = {part: id_lists(files[f"{part}.txt"]) for part in ("train", "test")}
    columns = {part: (user, item) for part, (user, item, _) in parts.items()}
    return from_parts(**columns, where=lambda part, row: f"{files[f'{part}.txt'].label}, line {parts[part][2][row]}")


READERS = {
    "table": read_table,
    "movielens": read_movielens,
    "recbole": read_recbole,
    "amazon": read_amazon,
    "adjacency": read_adjacency,
}
