"""MovieLens as GroupLens publishes it: 100K (u.data), 1M and 10M (.dat), the newer CSVs; from a folder or the zip.

A folder that has interactions.csv(.gz) (user, item, order) in place of ratings.dat is read with it.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from bdlm_jax.data.files import File, list_files, table_columns, table_rows
from bdlm_jax.data.interactions import Interactions, build_interactions
from bdlm_jax.types import InputError

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


def read_movielens(
    path: str | Path, *, duplicates: str = "first", keep_items_without_interactions: bool = False
) -> Interactions:
    """Reads any MovieLens set.

    Args:
        path: the unpacked folder, or the publisher's zip.
        duplicates: as in `make_interactions`.
        keep_items_without_interactions: movies that nobody rated join the catalogue.

    Returns:
        Interactions with item fields title ("The Matrix (1999)") and genres ("Action, Sci-Fi"), and, for 100K and 1M,
        user fields gender, age and occupation in words.

    Raises:
        InputError: the files are not MovieLens's, or a line in them is malformed.
    """
    files = list_files(path)
    if "u.data" in files:
        ratings, item_fields, user_fields = _read_100k(files)
    elif "movies.dat" in files:
        ratings, item_fields, user_fields = _read_dat(files, path)
    elif "ratings.csv" in files:
        ratings = _ratings(files["ratings.csv"], ",", {"user": 0, "item": 1, "rating": 2, "time": 3}, header=True)
        item_fields, user_fields = _read_movies(files.get("movies.csv"), ",", "utf-8-sig", header=True), {}
    else:
        raise InputError(f"{path} holds neither u.data, movies.dat nor ratings.csv; give MovieLens's folder or zip.")
    columns, where = ratings
    interactions, _ = build_interactions(
        columns.pop("user"), columns.pop("item"), **columns, item_fields=item_fields, user_fields=user_fields,
        duplicates=duplicates, keep_items_without_interactions=keep_items_without_interactions, where=where,
    )  # fmt: skip
    return interactions


def clean_title(title: str) -> str:
    """Puts articles back where they are said: "Matrix, The (1999)" is "The Matrix (1999)"."""
    parts = [_article_first(part.strip()) for part in re.split(r"[()]", title)]
    if title.count("(") != title.count(")") or re.search(r"\([^)]*\(", title):
        return " ".join(title.split())  # nested or open parentheses: leave what cannot be read
    named = [part if index % 2 == 0 else f"({part})" for index, part in enumerate(parts)]
    return " ".join(" ".join(named).split())


def _article_first(part: str) -> str:
    match = _INVERTED.match(part)
    if not match:
        return part
    article = match["article"]
    return article + ("" if article.endswith("'") else " ") + match["rest"] + (match["tail"] or "")


def _ratings(file: File, separator: str, wanted: Mapping[str, int], *, header: bool, n_fields: int = 4):
    data = file.read()
    return table_columns(
        data,
        file.label,
        separator=separator,
        wanted=dict(wanted),
        n_fields=n_fields,
        header=header,
        encoding="utf-8-sig",
    )


def _read_dat(files, path):
    if "ratings.dat" in files:
        ratings = _ratings(files["ratings.dat"], "::", {"user": 0, "item": 1, "rating": 2, "time": 3}, header=False)
    elif "interactions.csv" in files:
        file = files["interactions.csv"]
        first = file.read()[:200].decode("latin-1").splitlines()[:1]
        if first != ["user_id,item_id,order"]:
            raise InputError(f"{file.label}, line 1: the columns must be user_id,item_id,order; found {first}.")
        ratings = _ratings(file, ",", {"user": 0, "item": 1, "order": 2}, header=True, n_fields=3)
    else:
        raise InputError(f"{path} has movies.dat but no ratings.dat; give MovieLens's whole folder or zip.")
    users = {}
    if "users.dat" in files:
        file = files["users.dat"]
        for line, (user, gender, age, occupation, _) in table_rows(
            file.read(), file.label, separator="::", encoding="latin-1", n_fields=5
        ):
            if gender not in _GENDERS or age not in _AGES or occupation not in map(str, range(len(_OCCUPATIONS))):
                raise InputError(
                    f"{file.label}, line {line}: gender, age or occupation is not one of MovieLens's codes."
                )
            users[user] = {
                "gender": _GENDERS[gender],
                "age": _AGES[age],
                "occupation": _OCCUPATIONS[int(occupation)],
            }
    return ratings, _read_movies(files["movies.dat"], "::", "latin-1", header=False), users


def _read_movies(file: File | None, separator: str, encoding: str, *, header: bool) -> dict[str, dict]:
    if file is None:
        return {}
    data = file.read()
    if encoding == "latin-1" and _is_utf8(data):  # 10M's movies.dat is UTF-8, 1M's is latin-1
        encoding = "utf-8"
    rows = table_rows(data, file.label, separator=separator, encoding=encoding, n_fields=3)
    if header:
        next(rows, None)
    return {
        movie: {"title": clean_title(title), "genres": _genres(genres.split("|"))} for _, (movie, title, genres) in rows
    }


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _genres(names) -> str:
    return ", ".join(name for name in names if name not in ("(no genres listed)", "unknown"))


def _read_100k(files):
    ratings = _ratings(files["u.data"], "\t", {"user": 0, "item": 1, "rating": 2, "time": 3}, header=False)
    items, users = {}, {}
    if "u.item" in files:
        file = files["u.item"]
        for line, row in table_rows(file.read(), file.label, separator="|", encoding="latin-1", n_fields=24):
            flags = row[5:]
            if not set(flags) <= {"0", "1"}:
                raise InputError(f"{file.label}, line {line}: the genre flags must be 0 or 1; correct the line.")
            genres = [name for name, flag in zip(_GENRES_100K, flags) if flag == "1"]
            items[row[0]] = {"title": clean_title(row[1]), "genres": _genres(genres)}
    if "u.user" in files:
        file = files["u.user"]
        for line, (user, age, gender, occupation, _) in table_rows(
            file.read(), file.label, separator="|", encoding="latin-1", n_fields=5
        ):
            if gender not in _GENDERS:
                raise InputError(f"{file.label}, line {line}: the gender must be M or F; correct the line.")
            users[user] = {"gender": _GENDERS[gender], "age": age, "occupation": occupation}
    return ratings, items, users
