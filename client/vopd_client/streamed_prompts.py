"""Training prompts that are read, checked, rendered and tokenised as steps need them.

A block of `shuffle_buffer` rows is read in file order and drawn from in a seeded order, then the next one; so the
draws are a function of the seed and the rows alone, the same in every process, and going on needs no more than the
place where the current block begins. When the rows end, they begin again, in another order.

Held at a time: the rows of the current block that are not drawn yet, and those of the steps that are at work.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from vopd_client.errors import CheckpointError, DataError
from vopd_client.prompt_rows import PromptRow
from vopd_client.render import Prompt
from vopd_client.row_streams import Place, RowStream, SourceAndValue
from vopd_client.schedule import block_order

STATE_FILE = "prompt_stream.json"

Parse = Callable[[object, int, str], PromptRow]  # (value, index, source)


@dataclass(frozen=True, slots=True)
class BlockStart:
    """Where a block begins. draw: its first one, counted over all epochs; place: None for the first of an epoch."""

    draw: int = 0
    epoch: int = 0
    row: int = 0
    place: Place | None = None


@dataclass(frozen=True)
class StreamOfRows:
    """Rows and how they become prompt rows, before anything is known that renders them."""

    spec: str
    rows: RowStream
    parse: Parse
    shuffle_buffer: int

    def beginning(self) -> list[PromptRow]:
        """The first block, parsed: what is wrong with it, is wrong before a model is loaded.

        Raises: DataError, a line for each of the first few bad rows, or for a stream without rows.
        """
        from vopd_client.prompt_rows import map_rows

        block = list(islice(self.rows.read(None), self.shuffle_buffer))
        if not block:
            raise DataError(f"{self.spec}: holds no rows")
        return map_rows(lambda item: self.parse(item[1][1], item[0], item[1][0]), enumerate(block))


class StreamedPrompts:
    """A `PromptSource`; steps are asked for in order.

    render: one row as both sides see it; only the rows that this process asks for are parsed and rendered.
    max_staleness: steps that are sampled ahead, and whose prompts must still be there.
    """

    def __init__(
        self,
        stream: StreamOfRows,
        render: Callable[[PromptRow], Prompt],
        *,
        seed: int,
        prompts_per_step: int,
        max_staleness: int,
    ) -> None:
        self._stream = stream
        self._render = render
        self._seed = seed
        self._prompts_per_step = prompts_per_step
        self._kept_steps = 1 + max_staleness
        self._starts: list[BlockStart] = []  # of blocks that a checkpoint may have to go back to
        self._in_block: list[tuple[int, SourceAndValue]] = []  # not drawn yet, the next one last
        self._of_step: dict[int, list[int]] = {}
        self._rows: dict[int, SourceAndValue] = {}  # drawn by the kept steps
        self._prompts: dict[int, Prompt] = {}
        self._next_draw = 0
        self._draws = self._draw_from(BlockStart())

    @property
    def fingerprint(self) -> str:
        """Of where the rows come from and how they are shuffled; what the rows say is not looked at."""
        named = json.dumps(["stream", self._stream.spec, self._stream.shuffle_buffer, self._seed])
        return "stream-" + hashlib.sha256(named.encode()).hexdigest()[:16]

    @property
    def num_rows_held(self) -> int:
        return len(self._in_block) + len(self._rows)

    def __getitem__(self, position: int, /) -> Prompt:
        """A prompt of a kept step. Raises: DataError with file and line for a row that cannot be used."""
        if position not in self._prompts:
            source, value = self._rows[position]
            self._prompts[position] = self._render(self._stream.parse(value, position, source))
        return self._prompts[position]

    def of_step(self, step: int) -> Sequence[int]:
        if step not in self._of_step:
            first = (step - 1) * self._prompts_per_step
            assert first >= self._next_draw, f"step {step} is asked for after later ones"
            for _ in range(first - self._next_draw):  # what came before: read, never looked at
                next(self._draws)
            drawn = list(islice(self._draws, self._prompts_per_step))
            self._next_draw = first + self._prompts_per_step
            self._of_step[step] = [index for index, _ in drawn]
            self._rows |= dict(drawn)
            self._forget_before(step)
        return self._of_step[step]

    def write_state(self, checkpoint: Path, last_step: int) -> None:
        first = last_step * self._prompts_per_step
        start = next((start for start in reversed(self._starts) if start.draw <= first), BlockStart())
        (checkpoint / STATE_FILE).write_text(json.dumps(asdict(start)) + "\n", encoding="utf-8")

    def read_state(self, checkpoint: Path, last_step: int) -> None:
        path = checkpoint / STATE_FILE
        try:
            start = BlockStart(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if not 0 <= start.draw <= last_step * self._prompts_per_step:
            raise CheckpointError(f"{path}: draw {start.draw} does not come before step {last_step + 1}")
        self._next_draw = start.draw
        self._draws = self._draw_from(start)

    def _draw_from(self, start: BlockStart) -> Iterator[tuple[int, SourceAndValue]]:
        """(index of the row, the row) of one draw after the other, endlessly."""
        size = self._stream.shuffle_buffer
        while True:
            reader = self._stream.rows.read(start.place)
            rows = iter(reader)
            num_before = start.draw
            while True:
                block = list(islice(rows, size))
                if not block:
                    break
                self._starts.append(start)
                order = block_order(self._seed, start.epoch, start.row, len(block))
                self._in_block = [(start.row + position, block[position]) for position in reversed(order)]
                num_rows = len(block)
                del block
                while self._in_block:
                    yield self._in_block.pop()
                start = BlockStart(start.draw + num_rows, start.epoch, start.row + num_rows, reader.place())
            if start.draw == num_before and start.row == 0:
                raise DataError(f"{self._stream.spec}: holds no rows")
            start = BlockStart(start.draw, start.epoch + 1)

    def _forget_before(self, step: int) -> None:
        """Keeps the rows of the steps at work, and the block starts that a checkpoint can need."""
        self._of_step = {kept: rows for kept, rows in self._of_step.items() if kept > step - self._kept_steps}
        needed = {index for rows in self._of_step.values() for index in rows}
        self._rows = {index: row for index, row in self._rows.items() if index in needed}
        self._prompts = {index: prompt for index, prompt in self._prompts.items() if index in needed}
        oldest = max(0, (step - 1 - self._kept_steps) * self._prompts_per_step)
        while len(self._starts) > 1 and self._starts[1].draw <= oldest:
            del self._starts[0]
