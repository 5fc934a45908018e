"""Where training prompts come from: a list that is held, or rows that are read as they are needed.

Both say which prompts a step draws; neither says how many there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vopd_client.render import Prompt
from vopd_client.schedule import prompts_of_step


class PromptsByPosition(Protocol):
    """Prompts that can be looked up, such as a list."""

    def __getitem__(self, position: int, /) -> Prompt: ...


class PromptSource(PromptsByPosition, Protocol):
    """The training prompts of a run."""

    @property
    def fingerprint(self) -> str:
        """What a checkpoint compares; short."""
        ...

    def of_step(self, step: int) -> Sequence[int]:
        """Positions of the prompts of one step, in order; these can be looked up until the step is done.

        Raises: DataError for what cannot be read.
        """
        ...

    def write_state(self, checkpoint: Path, last_step: int) -> None:
        """Writes what `read_state` needs into a checkpoint that is not sealed yet. Raises: OSError."""
        ...

    def read_state(self, checkpoint: Path, last_step: int) -> None:
        """From here on the first step is the one after `last_step`. Raises: CheckpointError."""
        ...


@dataclass(frozen=True)
class ListedPrompts:
    """All prompts, rendered; their order follows from the seed alone."""

    prompts: Sequence[Prompt]
    seed: int
    prompts_per_step: int

    def __getitem__(self, position: int, /) -> Prompt:
        return self.prompts[position]

    @property
    def fingerprint(self) -> str:
        return hash_prompts(self.prompts)

    def of_step(self, step: int) -> Sequence[int]:
        return prompts_of_step(self.seed, step, len(self.prompts), self.prompts_per_step)

    def write_state(self, checkpoint: Path, last_step: int) -> None:
        """There is none."""

    def read_state(self, checkpoint: Path, last_step: int) -> None:
        """There is none."""


def hash_prompts(prompts: Sequence[Prompt]) -> str:
    """A fingerprint of what both sides see and of who scores it, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        for ids in (prompt.student_ids, prompt.teacher_ids):
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.astype("<i8").tobytes())
        digest.update(prompt.teacher.encode())
    return digest.hexdigest()[:16]
