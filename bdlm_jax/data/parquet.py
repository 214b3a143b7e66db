"""Parquet files as tables: the same columns and rows as `raw_files.Table` gives, read a batch at a time.

pyarrow reads them, the extra `parquet`. A folder of parts, as other tools write it, is one table.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bdlm_jax.data.raw_files import Column
from bdlm_jax.runtime.log import progress
from bdlm_jax.types import InputError

_ROWS = 1_000_000  # that are read together


@dataclasses.dataclass(frozen=True)
class ParquetTable:
    """A parquet file, or a folder of them in the order of their names, with the columns of its schema."""

    label: str
    dataset: Any
    header: bool = True

    @property
    def names(self) -> list[str]:
        return list(self.dataset.schema.names)

    @property
    def where(self) -> Callable[[int], str]:
        """A function that names the table and a row of it, from 1."""
        return lambda row, label=self.label: f"{label}, row {row + 1}"

    def columns(self, wanted: Mapping[str, int]) -> dict:
        """{role: column at this position}: "user" and "item" as categories; times as whole numbers of their unit."""
        ids = {wanted[role] for role in ("user", "item")}
        gathered = {position: Column(position in ids) for position in set(wanted.values())}
        bar = progress(description=f"reading {self.label}", total=self.dataset.count_rows())
        for batch in self._batches([self.names[position] for position in gathered]):
            for (_, column), values in zip(gathered.items(), batch.columns):
                column.add(*(_coded(values) if column.is_id else (_numbers(values),)))
            bar.update(len(batch))
        bar.close()
        joined = {position: column.joined() for position, column in gathered.items()}
        return {role: joined[position] for role, position in wanted.items()}

    def rows(self) -> Iterator[tuple[str, ...]]:
        """All fields of every row as text, "" where there is none."""
        for batch in self._batches(self.names):
            columns = [["" if value is None else str(value) for value in c.to_pylist()] for c in batch.columns]
            yield from zip(*columns)

    def _batches(self, names: list[str]) -> Iterator:
        import pyarrow

        try:
            yield from self.dataset.to_batches(columns=names, batch_size=_ROWS)
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"{self.label} cannot be read ({error}); write it again.") from error


def open_parquet(path: Path) -> ParquetTable:
    """Opens a parquet file or a folder of parts; the extra `parquet` must be installed."""
    try:
        import pyarrow
        import pyarrow.dataset
    except ImportError:
        raise InputError(f'{path} is parquet, which pyarrow reads: pip install "bdlm_jax[parquet]".') from None
    try:
        return ParquetTable(str(path), pyarrow.dataset.dataset(path, format="parquet"))
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} cannot be read as parquet ({error}); check the file.") from error


def _coded(values) -> tuple[np.ndarray, list]:
    """(each row's number among the different ids, -1 where there is none; these ids)."""
    import pyarrow

    if not pyarrow.types.is_dictionary(values.type):
        values = values.dictionary_encode()
    return values.indices.fill_null(-1).to_numpy(zero_copy_only=False), values.dictionary.to_pylist()


def _numbers(values) -> np.ndarray:
    import pyarrow

    if pyarrow.types.is_temporal(values.type):
        values = values.cast(pyarrow.int64() if pyarrow.types.is_timestamp(values.type) else pyarrow.int32())
    return values.to_numpy(zero_copy_only=False)
