"""Streams of rows: which rows a step draws, how few are held, and going on without what came before."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from vopd_client.errors import CheckpointError, DataError
from vopd_client.prompt_rows import PromptRow, RowFormat
from vopd_client.prompts import Prompt, open_stream, read_row
from vopd_client.row_streams import Place, RowReader, RowStream, row_groups_from
from vopd_client.streamed_prompts import STATE_FILE, StreamedPrompts, StreamOfRows

NUM_ROWS = 23
ROWS = [{"prompt": f"row {index}"} for index in range(NUM_ROWS)]


def write_jsonl(path: Path) -> str:
    path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))  # with blank lines between
    return str(path)


def write_parquet(path: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=5)
    return str(path)


def write_directory(path: Path) -> str:
    """A data set of two files, as a hub repository holds them, with a column that is not ours."""
    path.mkdir()
    half = [{**row, "other": 1} for row in ROWS]
    write_parquet(path / "train-00000-of-00002.parquet", half[:10])
    write_parquet(path / "train-00001-of-00002.parquet", half[10:])
    return str(path)


def write_jsonl_directory(path: Path) -> str:
    path.mkdir()
    (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def write_saved(path: Path) -> str:
    datasets.Dataset.from_list(ROWS).save_to_disk(path)
    return str(path)


WRITERS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "jsonl": ("data.jsonl", write_jsonl),
    "parquet": ("data.parquet", write_parquet),
    "directory": ("data", write_directory),
    "jsonl-directory": ("lines", write_jsonl_directory),
    "saved": ("saved", write_saved),
}


@pytest.fixture(params=WRITERS)
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The same rows in each of the forms."""
    name, write = WRITERS[request.param]
    return write(tmp_path / name)


def parse(value: object, index: int, source: str) -> PromptRow:
    return read_row(value, index=index, source=source, default_verifier="exact", row_format=RowFormat())


def text_of(row: PromptRow) -> str:
    assert row.prompt is not None
    return row.prompt


class Counted:
    """Rows of a stream with a count of those that were read, and of those that were rendered."""

    def __init__(self, spec: str, *, shuffle_buffer: int = 6, max_staleness: int = 0, seed: int = 3) -> None:
        self.rendered: list[str] = []
        self.num_read = 0
        self._rows = open_stream(spec)
        stream = StreamOfRows(spec, self, parse, shuffle_buffer)
        self.prompts = StreamedPrompts(stream, self._render, seed=seed, prompts_per_step=4, max_staleness=max_staleness)

    def read(self, place: Place | None) -> RowReader:
        return _CountedReader(self, self._rows.read(place))

    def _render(self, row: PromptRow) -> Prompt:
        self.rendered.append(text_of(row))
        ids = np.array([row.index + 1])
        return Prompt(row.index, row.source, ids, ids, None, None, None, text_of(row))

    def texts(self, step: int) -> list[str]:
        return [self.prompts[position].text for position in self.prompts.of_step(step)]


class _CountedReader:
    def __init__(self, counted: Counted, reader: RowReader) -> None:
        self._counted = counted
        self._reader = reader

    def __iter__(self) -> Iterator[tuple[str, object]]:
        for row in self._reader:
            self._counted.num_read += 1
            yield row

    def place(self) -> Place:
        return self._reader.place()


# ---------------------------------------------------------------- rows


def rows_of(stream: RowStream, place: Place | None = None) -> list[tuple[str, str]]:
    read = enumerate(stream.read(place))
    return [(source, text_of(parse(value, index, source))) for index, (source, value) in read]


def test_every_form_gives_the_same_rows_in_file_order_and_again(spec: str) -> None:
    stream = open_stream(spec)
    for _ in range(2):
        rows = rows_of(stream)
        assert [text for _, text in rows] == [row["prompt"] for row in ROWS]
    assert [source.rpartition(":")[0] for source, _ in rows] == [spec] * NUM_ROWS
    assert rows[2][0] == (f"{spec}:5" if spec.endswith(".jsonl") else f"{spec}:3")  # the line in the file, or the row


def test_a_place_leads_to_the_next_row_in_another_process(spec: str) -> None:
    for num_before in (1, 5, 12, NUM_ROWS):
        reader = open_stream(spec).read(None)
        before = list(islice(reader, num_before))
        place = json.loads(json.dumps(reader.place()))  # as a checkpoint keeps it
        after = rows_of(open_stream(spec), place)
        assert len(before) == num_before
        assert [text for _, text in after] == [row["prompt"] for row in ROWS[num_before:]]
        assert [source for source, _ in after] == [source for source, _ in rows_of(open_stream(spec))][num_before:]


def test_row_groups_before_the_place_are_not_read() -> None:
    assert row_groups_from([5, 5, 3], 0) == ([0, 1, 2], 0)
    assert row_groups_from([5, 5, 3], 5) == ([1, 2], 0)
    assert row_groups_from([5, 5, 3], 12) == ([2], 2)
    assert row_groups_from([5, 5, 3], 13) == ([], 0)


def test_a_jsonl_file_that_changed_before_the_place_is_noticed(tmp_path: Path) -> None:
    spec = write_jsonl(tmp_path / "data.jsonl")
    reader = open_stream(spec).read(None)
    list(islice(reader, 3))
    Path(spec).write_text("x" + Path(spec).read_text())
    with pytest.raises(DataError, match=r"line 6 no longer begins at byte \d+"):
        list(open_stream(spec).read(reader.place()))


def test_what_cannot_be_streamed_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file"):
        open_stream(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match=r"prompts are read from \.jsonl"):
        open_stream("data.csv")
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "other")
    with pytest.raises(DataError, match="has a column prompt or messages; this one has text"):
        open_stream(str(tmp_path / "other"))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(DataError, match="holds no rows"):
        StreamOfRows(str(empty), open_stream(str(empty)), parse, 4).beginning()


# ---------------------------------------------------------------- steps


def test_an_epoch_has_every_row_once_and_the_next_one_another_order(spec: str) -> None:
    counted = Counted(spec)
    drawn = [text for step in range(1, 13) for text in counted.texts(step)]  # 48 draws: two epochs and two more
    first, second = drawn[:NUM_ROWS], drawn[NUM_ROWS : 2 * NUM_ROWS]
    assert sorted(first) == sorted(second) == sorted(row["prompt"] for row in ROWS)
    assert first != second  # equal with probability below 1e-9
    for block in range(0, NUM_ROWS, 6):  # a row is drawn from the block of rows that it was read with
        assert sorted(first[block : block + 6]) == sorted(row["prompt"] for row in ROWS[block : block + 6])
    assert [Counted(spec, seed=4).texts(1), Counted(spec).texts(1)] != [drawn[:4], drawn[:4]]


def test_a_buffer_of_one_row_is_the_files_order(tmp_path: Path) -> None:
    counted = Counted(write_jsonl(tmp_path / "data.jsonl"), shuffle_buffer=1)
    assert [text for step in (1, 2) for text in counted.texts(step)] == [row["prompt"] for row in ROWS[:8]]


def test_no_more_rows_are_held_than_the_buffer_and_the_steps_at_work(tmp_path: Path) -> None:
    counted = Counted(write_jsonl(tmp_path / "data.jsonl"), max_staleness=1)
    for step in range(1, 40):
        counted.texts(step)
        assert counted.prompts.num_rows_held <= 6 + 2 * 4
        assert counted.num_read <= 4 * step + 6  # and none is read before it is needed
    assert counted.num_read > 5 * NUM_ROWS


def test_the_prompts_of_a_step_can_be_looked_up_until_it_is_done(tmp_path: Path) -> None:
    counted = Counted(write_jsonl(tmp_path / "data.jsonl"), max_staleness=1)
    first = counted.texts(1)
    counted.texts(2)
    assert counted.texts(1) == first
    counted.texts(3)
    with pytest.raises(AssertionError, match="step 1 is asked for after later ones"):
        counted.prompts.of_step(1)


def test_only_rows_that_are_looked_up_are_parsed_and_rendered(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]) + "not JSON\n")
    counted = Counted(str(path), shuffle_buffer=1)
    mine = counted.prompts.of_step(1)[::2]  # as one of two processes
    assert [counted.prompts[position].text for position in mine] == counted.rendered == ["row 0", "row 2"]
    positions = counted.prompts.of_step(2)
    with pytest.raises(DataError, match=rf"{path}:5: not JSON at column 1"):
        counted.prompts[positions[0]]


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize("last_step", [1, 3, 6, 9])
def test_a_run_that_goes_on_draws_what_it_would_have_drawn(spec: str, tmp_path: Path, last_step: int) -> None:
    whole, checkpoint = Counted(spec, max_staleness=1), tmp_path / "checkpoint"
    checkpoint.mkdir()
    for step in range(1, last_step + 2):  # one step ahead
        whole.texts(step)
    whole.prompts.write_state(checkpoint, last_step)
    expected = [whole.texts(last_step + 1)] + [whole.texts(step) for step in range(last_step + 2, 14)]

    again = Counted(spec, max_staleness=1)
    again.prompts.read_state(checkpoint, last_step)
    assert again.texts(last_step + 1) == expected[0]
    assert again.rendered == expected[0]  # nothing of what came before
    assert again.num_read <= 2 * 6  # nothing but the blocks that the step is drawn from
    assert [again.texts(step) for step in range(last_step + 2, 14)] == expected[1:]


def test_a_state_that_is_damaged_or_of_another_step_is_refused(tmp_path: Path) -> None:
    counted = Counted(write_jsonl(tmp_path / "data.jsonl"))
    with pytest.raises(CheckpointError, match=f"{STATE_FILE} cannot be read"):
        counted.prompts.read_state(tmp_path, 1)
    for step in range(1, 6):
        counted.texts(step)
    counted.prompts.write_state(tmp_path, 5)
    with pytest.raises(CheckpointError, match="draw 18 does not come before step 3"):
        counted.prompts.read_state(tmp_path, 2)


def test_a_fingerprint_is_of_where_rows_come_from_and_of_their_order(tmp_path: Path) -> None:
    spec = write_jsonl(tmp_path / "data.jsonl")
    other = write_parquet(tmp_path / "data.parquet")
    streams = [Counted(spec), Counted(other), Counted(spec, shuffle_buffer=7), Counted(spec, seed=4)]
    assert len({counted.prompts.fingerprint for counted in streams}) == 4
    assert Counted(spec).prompts.fingerprint == streams[0].prompts.fingerprint
