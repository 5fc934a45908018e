"""Rows of prompt files too large to hold, in file order, from any place on; not decoded and not checked yet. No torch.

A place is a small JSON object: the byte and line of a .jsonl file, the row of a .parquet file (whose row groups are
looked up in its index) or of a data set that was saved to disk, and what the datasets library says of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vopd_client.errors import DataError

Place = Mapping[str, Any]
SourceAndValue = tuple[str, object]

JSONL_READ_BYTES = 1 << 16  # at a time
PARQUET_BATCH_ROWS = 64  # decoded at a time


class RowReader(Protocol):
    """One way through the rows, from a place to the end."""

    def __iter__(self) -> Iterator[SourceAndValue]:
        """(source, value) of each row. Raises: DataError for what cannot be read."""
        ...

    def place(self) -> Place:
        """Where the row after the last one that was read begins."""
        ...


class RowStream(Protocol):
    """Rows that can be read again and again."""

    def read(self, place: Place | None) -> RowReader:
        """From `place` on; None: from the beginning."""
        ...


@dataclass(frozen=True)
class JsonlStream:
    """Lines of a .jsonl file; blank ones are skipped."""

    path: Path

    def read(self, place: Place | None) -> RowReader:
        return _JsonlReader(self.path, place or {"line": 0, "byte": 0})


class _JsonlReader:
    """Opens the file for a few lines at a time: a run that ends anyhow leaves none open."""

    def __init__(self, path: Path, place: Place) -> None:
        self._path = path
        self._line = int(place["line"])
        self._byte = int(place["byte"])

    def __iter__(self) -> Iterator[SourceAndValue]:
        while lines := self._next_lines():
            for line in lines:
                self._line += 1
                self._byte += len(line)
                if line.strip():
                    yield f"{self._path}:{self._line}", line

    def place(self) -> Place:
        return {"line": self._line, "byte": self._byte}

    def _next_lines(self) -> list[bytes]:
        """About JSONL_READ_BYTES of them; none at the end."""
        try:
            with self._path.open("rb") as file:
                file.seek(max(0, self._byte - 1))
                before = file.read(1) if self._byte > 0 else b"\n"
                lines = file.readlines(JSONL_READ_BYTES)
        except OSError as error:
            raise DataError(f"{self._path}: cannot be read after line {self._line}: {error.strerror}") from error
        if lines and before != b"\n":
            raise DataError(
                f"{self._path}: line {self._line + 1} no longer begins at byte {self._byte}: what comes before it has "
                "changed since it was read"
            )
        return lines


@dataclass(frozen=True)
class ParquetStream:
    """Rows of a .parquet file. Row groups before the place are not read."""

    path: Path

    def read(self, place: Place | None) -> RowReader:
        return _ParquetReader(self.path, int(place["row"]) if place else 0)


class _ParquetReader:
    def __init__(self, path: Path, row: int) -> None:
        self._path = path
        self._row = row

    def __iter__(self) -> Iterator[SourceAndValue]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self._path) as file:
                sizes = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
                groups, to_skip = row_groups_from(sizes, self._row)
                for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, row_groups=groups):
                    skipped = min(to_skip, batch.num_rows)
                    to_skip -= skipped
                    for value in batch.slice(skipped).to_pylist():
                        self._row += 1
                        yield f"{self._path}:{self._row}", value
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{self._path}: not a readable Parquet file after row {self._row}: {error}") from error

    def place(self) -> Place:
        return {"row": self._row}


def row_groups_from(sizes: Sequence[int], row: int) -> tuple[list[int], int]:
    """The row groups that hold `row` and what comes after it, and how many rows of them come before it."""
    first_row = 0
    for index, size in enumerate(sizes):
        if row < first_row + size:
            return list(range(index, len(sizes))), row - first_row
        first_row += size
    return [], 0


@dataclass(frozen=True)
class DataSetStream:
    """Rows of a `datasets.IterableDataset`, which knows its own place, or of a `datasets.Dataset` on disk."""

    spec: str
    data_set: Any

    def read(self, place: Place | None) -> RowReader:
        return _DataSetReader(self.spec, self.data_set, place or {"row": 0})


class _DataSetReader:
    def __init__(self, spec: str, data_set: Any, place: Place) -> None:
        self._spec = spec
        self._row = int(place["row"])
        self._is_saved = not hasattr(data_set, "load_state_dict")
        self._data_set = data_set
        if not self._is_saved:
            data_set.load_state_dict(place.get("state", {}))  # an empty one: from the beginning

    def __iter__(self) -> Iterator[SourceAndValue]:
        try:
            for value in self._values():
                self._row += 1
                yield f"{self._spec}:{self._row}", value
        except Exception as error:  # the hub, the network and every format have errors of their own
            reason = " ".join(str(error).split())
            raise DataError(f"{self._spec}: cannot be read after row {self._row}: {reason}") from error

    def _values(self) -> Iterator[object]:
        if self._is_saved:
            return (self._data_set[row] for row in range(self._row, len(self._data_set)))
        return iter(self._data_set)

    def place(self) -> Place:
        if self._is_saved:
            return {"row": self._row}
        return {"row": self._row, "state": self._data_set.state_dict()}
