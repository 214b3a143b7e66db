"""Recommendations for every user of a run, as one file: CSV, or Parquet where pyarrow is installed.

Users go in chunks, each a file of its own beside the one that comes of them: what was stopped goes on where it was.
"""

import csv
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bdlm_jax.runtime.files import read_json, replacing, write_json
from bdlm_jax.runtime.log import progress
from bdlm_jax.serving import answers
from bdlm_jax.serving.artefact import Arm
from bdlm_jax.serving.catalogue import Catalogue
from bdlm_jax.types import InputError

COLUMNS = ("user", "rank", "item", "title", "score")
USERS_AT_ONCE = 1024  # rows of so many users are held, and are one group of a Parquet file


def write_all(catalogue: Catalogue, arm: Arm, out: str | os.PathLike, *, k: int = 10, of: str = "") -> Path:
    """Writes `COLUMNS` of every user's k best items, users in the catalogue's order, to a new file; returns it.

    The file appears when it is whole; until then OUT.parts holds what is done, and the same call goes on with it. With
    fewer than k items left a user has fewer rows. `of` tells the arm from others, so that no two are mixed.

    Raises:
      InputError: a file that is there or cannot be, an ending that is not in `FORMATS`, no pyarrow for Parquet, parts
        of another call.
    """
    out = Path(out)
    if out.suffix not in FORMATS:
        raise InputError(f"--out {out} has no ending of {', '.join(FORMATS)}: give it one of them.")
    made, parts = FORMATS[out.suffix](), out.with_name(out.name + ".parts")
    try:
        if out.exists():
            raise InputError(f"{out} is there already: give --out a new file, or remove it first.")
        note, asked = (
            parts / "asked.json",
            {"of": of, "k": k, "users": len(catalogue.user_ids), "at_once": USERS_AT_ONCE},
        )
        if note.exists() and read_json(note, remedy=f"remove {parts}") != asked:
            told = f"{parts} holds parts of another export than this one"
            raise InputError(f"{told}: remove it, or give --out another name.")
        files = []
        with progress(description="recommend", total=len(catalogue.user_ids)) as bar:
            for start in range(0, len(catalogue.user_ids), USERS_AT_ONCE):
                users = catalogue.user_ids[start : start + USERS_AT_ONCE]
                files.append(parts / f"{start:012}{out.suffix}")
                if not files[-1].exists():
                    found = zip(users, answers.recommend(catalogue, arm, users=users, k=k))
                    if not note.exists():
                        write_json(note, asked)
                    with replacing(files[-1]) as partial:
                        made.write(partial, [{"user": user, **row} for user, rows in found for row in rows])
                bar.update(len(users))
        with replacing(out) as partial:
            made.join(files, partial)
        shutil.rmtree(parts)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written ({error}): give it another place.") from error
    return out


class _Format(NamedTuple):
    write: Callable[[Path, list[dict]], object]
    join: Callable[[Sequence[Path], Path], object]


def _csv() -> _Format:
    def write(path, rows):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def join(parts, path):
        with path.open("wb") as file:
            for n, part in enumerate(parts):
                with part.open("rb") as rows:
                    if n:
                        rows.readline()  # one header is enough
                    shutil.copyfileobj(rows, file)

    return _Format(write, join)


def _parquet() -> _Format:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        told = 'Parquet needs pyarrow: pip install "bdlm_jax[parquet]", or write a .csv.'
        raise InputError(told) from None
    types = (pyarrow.string(), pyarrow.int32(), pyarrow.string(), pyarrow.string(), pyarrow.float32())
    schema = pyarrow.schema([*zip(COLUMNS, types)])

    def write(path, rows):
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), path)

    def join(parts, path):
        with parquet.ParquetWriter(path, schema) as writer:
            for part in parts:
                writer.write_table(parquet.read_table(part, schema=schema))

    return _Format(write, join)


FORMATS = {".csv": _csv, ".parquet": _parquet}
