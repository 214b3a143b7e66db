"""Recommendations for every user of a run, as one file: CSV, or Parquet where pyarrow is installed."""

import contextlib
import csv
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from bdlm_jax.runtime.files import replacing
from bdlm_jax.runtime.log import progress
from bdlm_jax.serving import answers
from bdlm_jax.serving.artefact import Arm
from bdlm_jax.serving.catalogue import Catalogue
from bdlm_jax.types import InputError

COLUMNS = ("user", "rank", "item", "title", "score")
USERS_AT_ONCE = 1024  # rows of so many users are held, and are one group of a Parquet file


def write_all(catalogue: Catalogue, arm: Arm, out: str | os.PathLike, *, k: int = 10) -> Path:
    """Writes `COLUMNS` of every user's k best items, users in the catalogue's order, to a new file; returns it.

    The file appears when it is whole. With fewer than k items left a user has fewer rows.

    Raises:
      InputError: a file that is there or cannot be, an ending that is not in `WRITERS`, no pyarrow for Parquet.
    """
    out = Path(out)
    if out.suffix not in WRITERS:
        raise InputError(f"--out {out} has no ending of {', '.join(WRITERS)}: give it one of them.")
    try:
        if out.exists():
            raise InputError(f"{out} is there already: give --out a new file, or remove it first.")
        with replacing(out) as partial, WRITERS[out.suffix](partial) as write:
            for users in _chunks(catalogue.user_ids):
                found = zip(users, answers.recommend(catalogue, arm, users=users, k=k))
                write([{"user": user, **row} for user, rows in found for row in rows])
    except OSError as error:
        raise InputError(f"--out {out} cannot be written ({error}): give it another place.") from error
    return out


def _chunks(users: list[str]) -> Iterator[list[str]]:
    with progress(description="recommend", total=len(users)) as bar:
        for start in range(0, len(users), USERS_AT_ONCE):
            yield users[start : start + USERS_AT_ONCE]
            bar.update(min(USERS_AT_ONCE, len(users) - start))


@contextlib.contextmanager
def _csv(path: Path) -> Iterator[Callable[[list[dict]], object]]:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        yield writer.writerows


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Callable[[list[dict]], object]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        told = 'Parquet needs pyarrow: pip install "bdlm_jax[parquet]", or write a .csv.'
        raise InputError(told) from None
    types = (pyarrow.string(), pyarrow.int32(), pyarrow.string(), pyarrow.string(), pyarrow.float32())
    schema = pyarrow.schema([*zip(COLUMNS, types)])
    with parquet.ParquetWriter(path, schema) as writer:
        yield lambda rows: writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))


WRITERS = {".csv": _csv, ".parquet": _parquet}
