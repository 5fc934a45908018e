"""Prompt files: JSONL, Parquet, or a data set of the hub. Read and checked before any model is loaded; no torch.

A row holds `prompt` (text) or `messages` (chat), which the student sees; optionally `teacher_prompt` or
`teacher_messages`, which the teacher sees before the same completion (default: what the student sees);
optionally an `answer` with a `verifier`, a `kind` that evaluations are broken down by, and the name of the `teacher`
that scores it. Rows with other names for prompt and answer are read through a `RowFormat`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vopd_client.config import Verifier
from vopd_client.errors import DataError
from vopd_client.prompt_rows import ROW_KEYS, PromptRow, RowFormat, choose_teachers, map_rows, parse_row
from vopd_client.reasoning_gym_prompts import is_task_spec, load_task_rows
from vopd_client.render import Prompt, render_prompts
from vopd_client.row_streams import DataSetStream, JsonlStream, ParquetStream, RowStream

__all__ = [
    "Prompt", "PromptRow", "RowFormat",
    "choose_teachers", "load_prompts", "open_stream", "read_row", "render_prompts",
]  # fmt: skip

OUR_FORMAT = RowFormat()
OTHER_FILES = frozenset({".json", ".csv", ".tsv", ".txt", ".yaml"})

logger = logging.getLogger(__name__)


def load_prompts(
    spec: str, *, default_verifier: Verifier = "exact", row_format: RowFormat = OUR_FORMAT
) -> list[PromptRow]:
    """All rows of `spec`: a .jsonl or .parquet file, or a data set (hub id or directory).

    A data set is `name`, `name:split` or `name:configuration:split`; `reasoning-gym:task?name=value` are rows that a
    task makes, see `reasoning_gym_prompts`.

    Lines of a .jsonl file and rows of the others count from 1 in `source`; blank lines are skipped. Columns of a
    hub data set that are not ours are left out, since nobody can rename them there; in a file they are errors.

    Raises: DataError, a line for each of the first few bad rows, or saying what is wrong with `spec` itself.
    """

    if is_task_spec(spec):
        return load_task_rows(spec, row_format)

    def parse(numbered: tuple[int, tuple[str, object]]) -> PromptRow:
        index, (source, value) = numbered
        return read_row(value, index=index, source=source, default_verifier=default_verifier, row_format=row_format)

    rows = map_rows(parse, enumerate(_read(spec, row_format)))
    if not rows:
        raise DataError(f"{spec}: holds no rows")
    return rows


def read_row(value: object, *, index: int, source: str, default_verifier: Verifier, row_format: RowFormat) -> PromptRow:
    """One row as it was read: an object, or a line of JSON. Raises: DataError that starts with `source`."""
    if isinstance(value, bytes):
        value = _decode_json(value, source)
    value = row_format.read(value, source)
    return parse_row(value, index=index, source=source, default_verifier=default_verifier)


def open_stream(spec: str, *, row_format: RowFormat = OUR_FORMAT) -> RowStream:
    """The rows of the same forms, to be read piece by piece in file order.

    Raises: DataError saying what is wrong with `spec` itself, or with the columns of a data set.
    """
    if is_task_spec(spec):
        raise DataError(f"{spec}: rows of reasoning-gym are made before the run begins: leave out stream_prompts")
    path = Path(spec)
    match path.suffix.lower():
        case ".jsonl":
            return JsonlStream(_existing(path))
        case ".parquet":
            return ParquetStream(_existing(path))
        case suffix if suffix in OTHER_FILES:
            raise _other_file(spec)
        case _:
            data_set = _load_data_set(*_parts_of(spec), streaming=True)
            columns = data_set.column_names or list(next(iter(data_set.take(1)), {}))
            left_out = _columns_left_out(columns, spec, row_format)
            return DataSetStream(spec, data_set.remove_columns(left_out) if left_out else data_set)


def _read(spec: str, row_format: RowFormat) -> Iterator[tuple[str, object]]:
    """(source, value) of every row; the values of a .jsonl file are its lines, not decoded yet."""
    path = Path(spec)
    match path.suffix.lower():
        case ".jsonl":
            return _read_jsonl(_existing(path))
        case ".parquet":
            return _read_parquet(_existing(path))
        case suffix if suffix in OTHER_FILES:
            raise _other_file(spec)
        case _:
            return _read_data_set(spec, row_format)


def _other_file(spec: str) -> DataError:
    return DataError(f"{spec}: prompts are read from .jsonl (one JSON object a line) or .parquet")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    return path


def _read_jsonl(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", line


def _decode_json(line: bytes, source: str) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 at byte {error.start + 1} of the line") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{source}: not JSON at column {error.colno}: {error.msg}") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", value
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error


def _read_data_set(spec: str, row_format: RowFormat) -> Iterator[tuple[str, object]]:
    data_set = _load_data_set(*_parts_of(spec))
    left_out = _columns_left_out(data_set.column_names, spec, row_format)
    for number, value in enumerate(data_set.remove_columns(left_out), start=1):
        yield f"{spec}:{number}", value


def _columns_left_out(columns: Sequence[str], spec: str, row_format: RowFormat) -> list[str]:
    """Those that are not read. Raises: DataError when there is no prompt among the others."""
    row_format.check_columns(columns, spec)
    if row_format.names_columns:
        wanted = [row_format.prompt_column or "prompt", row_format.answer_column or "answer"]
    else:
        wanted = list(ROW_KEYS)
    if not {row_format.prompt_column or "prompt", "messages"} & set(columns) & set(wanted):
        raise DataError(
            f"{spec}: a data set of prompts has a column prompt or messages; this one has {', '.join(columns)}. "
            "prompt_column names another one"
        )
    left_out = [column for column in columns if column not in wanted]
    if left_out:
        logger.info("%s: columns left out: %s", spec, ", ".join(left_out))
    return left_out


def _parts_of(spec: str) -> tuple[str, str | None, str]:
    """(name, configuration, split) of name, name:split or name:configuration:split."""
    match spec.split(":"):
        case [name]:
            return name, None, ""
        case [name, split]:
            return name, None, split
        case [name, configuration, split]:
            return name, configuration or None, split
        case _:
            raise DataError(f"{spec}: a data set is name, name:split or name:configuration:split")


def _load_data_set(name: str, configuration: str | None, split: str, *, streaming: bool = False) -> Any:
    """A `datasets.Dataset`: of the hub, of a directory of data files, or of one that `save_to_disk` wrote.

    streaming: a `datasets.IterableDataset` of the first two; the last is mapped from the disk either way.
    """
    import datasets

    directory = Path(name)
    is_saved = (directory / "dataset_dict.json").exists() or (directory / "state.json").exists()
    try:
        if is_saved:
            if configuration is not None:
                raise DataError(f"{name}: no configuration {configuration!r}: a saved data set has none")
            loaded = datasets.load_from_disk(name)
            if isinstance(loaded, datasets.Dataset):
                return loaded
            return loaded[_choose_split(name, split, list(loaded))]
        splits = datasets.get_dataset_split_names(name, configuration)
        split = _choose_split(name, split, splits)
        return datasets.load_dataset(name, configuration, split=split, streaming=streaming)
    except DataError:
        raise
    except (OSError, ValueError) as error:  # not found, unreachable, needs a configuration, damaged
        reason = " ".join(str(error).split())
        raise DataError(f"{name}: no such file, and not a data set that can be loaded: {reason}") from error


def _choose_split(name: str, split: str, splits: list[str]) -> str:
    if split in splits:
        return split
    if not split and len(splits) == 1:
        return splits[0]
    if not split and "train" in splits:
        return "train"
    asked = f"no split {split!r}" if split else "which split?"
    raise DataError(f"{name}: {asked} It has {', '.join(splits)}; write {name}:{splits[0]}")
