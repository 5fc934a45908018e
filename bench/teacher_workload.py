"""The recorded rollouts that `make bench-teacher` plays, as a file and as sequences to score. No torch.

Axes: G rollouts of a context, P contexts, N = P G rollouts (rollout n has context n // G), C context tokens,
T completion tokens, K ids of the dense support, M masses of adaptive ones.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from vopd_client.errors import VopdError
from vopd_client.types import Candidates, SequenceToScore, Support, TeacherTopK

Sharing = Literal["shared", "alone"]  # a context for G rollouts, or a context for each

UInt16Array = npt.NDArray[np.uint16]
# Ids of ordinary tokens, any of which may stand at the head of a context; special tokens come first in vocabularies.
FIRST_PLAIN_ID = 1000
FIRST_BLOCK = 16  # tokens: the smallest block of vLLM's prefix cache
ARRAYS = ("contexts_PC", "completions_NT", "support_ids_NTK", "counts_MNT")


class WorkloadError(VopdError, ValueError):
    """A workload file that cannot be played, or an impossible choice from one."""


@dataclass(frozen=True)
class WorkloadSettings:
    """concurrency: sequences that a client has outstanding, at most. masses: of the adaptive supports."""

    model: str
    temperature: float
    seed: int
    group_size: int
    context_tokens: int
    completion_tokens: int
    k: int
    concurrency: int
    masses: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Workload:
    """support_ids_NTK: the student's top ids, most likely first. counts_MNT: how many of them each mass takes."""

    settings: WorkloadSettings
    contexts_PC: UInt16Array
    completions_NT: UInt16Array
    support_ids_NTK: UInt16Array
    counts_MNT: UInt16Array

    def __post_init__(self) -> None:
        """Raises: WorkloadError for arrays that do not fit the settings or one another."""
        check_workload(self)

    @property
    def num_contexts(self) -> int:
        return len(self.contexts_PC)

    def counts_NT(self, mass: float | None) -> UInt16Array:
        """Support sizes at every position; None: all k. Raises: WorkloadError for a mass that is not recorded."""
        if mass is None:
            return np.full(self.completions_NT.shape, self.settings.k, np.uint16)
        if mass not in self.settings.masses:
            raise WorkloadError(f"mass {mass} is not recorded; there are {list(self.settings.masses)}")
        counts: UInt16Array = self.counts_MNT[self.settings.masses.index(mass)]
        return counts

    def candidates(self, rollout: int, mass: float | None) -> Candidates:
        """The student's ids of one rollout, ragged."""
        counts_T = self.counts_NT(mass)[rollout].astype(np.int64)
        is_in_TK = np.arange(self.settings.k) < counts_T[:, None]
        return Candidates(self.support_ids_NTK[rollout][is_in_TK].astype(np.int64), counts_T)

    def mean_support_size(self, mass: float | None, num_contexts: int) -> float:
        """Ids a position, over the rollouts of the first contexts."""
        return float(self.counts_NT(mass)[: num_contexts * self.settings.group_size].mean())


def check_workload(workload: Workload) -> None:
    """Raises: WorkloadError, which says what does not fit."""
    settings = workload.settings
    num_contexts = len(workload.contexts_PC)
    num_rollouts = num_contexts * settings.group_size
    tokens, k = settings.completion_tokens, settings.k
    expected = {
        "contexts_PC": (num_contexts, settings.context_tokens),
        "completions_NT": (num_rollouts, tokens),
        "support_ids_NTK": (num_rollouts, tokens, k),
        "counts_MNT": (len(settings.masses), num_rollouts, tokens),
    }
    if num_contexts == 0 or min(settings.group_size, settings.context_tokens, tokens, k, settings.concurrency) < 1:
        raise WorkloadError(f"{num_contexts} contexts and {settings}: nothing to score")
    for name, shape in expected.items():
        found: npt.NDArray[Any] = getattr(workload, name)
        if found.shape != shape or found.dtype != np.uint16:
            raise WorkloadError(f"{name} is {found.dtype} {found.shape}; the settings ask for uint16 {shape}")
    if ((workload.counts_MNT < 1) | (workload.counts_MNT > k)).any():
        raise WorkloadError(
            f"a support of {workload.counts_MNT.min()} to {workload.counts_MNT.max()} ids, not 1 to {k}"
        )
    sorted_NTK = np.sort(workload.support_ids_NTK, axis=-1)
    if (sorted_NTK[..., 1:] == sorted_NTK[..., :-1]).any():
        raise WorkloadError("an id is twice in one support")
    by_mass = np.argsort(settings.masses)
    if (np.diff(workload.counts_MNT[by_mass].astype(np.int64), axis=0) < 0).any():
        raise WorkloadError("a larger mass has a smaller support")


def save_workload(path: Path, workload: Workload) -> None:
    """The same bytes for the same workload."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: getattr(workload, name) for name in ARRAYS}
    np.savez_compressed(path, settings=np.array(json.dumps(asdict(workload.settings))), **arrays)


def load_workload(path: Path) -> Workload:
    """Raises: WorkloadError, which names the file and what is wrong with it."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            missing = [name for name in ("settings", *ARRAYS) if name not in file]
            if missing:
                raise WorkloadError(f"has no {', '.join(missing)}")
            told = json.loads(str(file["settings"]))
            settings = WorkloadSettings(**{**told, "masses": tuple(told["masses"])})
            return Workload(settings, *(file[name] for name in ARRAYS))
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise WorkloadError(f"{path}: not a workload: {error}") from error


# ---------------------------------------------------------------- sequences


@dataclass(frozen=True)
class Play:
    """One way to play a workload. support: "dense", the mass of an adaptive one, or the teacher's own "top_k".

    number: of the pass, from 0; every number gives contexts that no other number gives.
    """

    sharing: Sharing
    support: Literal["dense", "top_k"] | float
    num_contexts: int
    number: int


def sequences_of(workload: Workload, play: Play) -> list[SequenceToScore]:
    """The sequences of one pass, group by group.

    The first token of every context is its own in every pass, so that nothing computed in an earlier pass can help.
    Where each rollout stands alone, its context is the group's one turned by an amount of its own.

    Raises: WorkloadError for more contexts than there are, and for contexts that share what they may not.
    """
    if not 1 <= play.num_contexts <= workload.num_contexts:
        raise WorkloadError(f"{play.num_contexts} contexts asked for; the workload has {workload.num_contexts}")
    group_size = workload.settings.group_size
    contexts = list(_fresh_contexts(workload, play))
    check_first_blocks(contexts, group_size if play.sharing == "shared" else 1)
    return [
        SequenceToScore(context, workload.completions_NT[rollout].astype(np.int64), support_of(workload, play, rollout))
        for rollout, context in enumerate(contexts)
    ]


def support_of(workload: Workload, play: Play, rollout: int) -> Support:
    match play.support:
        case "top_k":
            return TeacherTopK(workload.settings.k)
        case "dense":
            return workload.candidates(rollout, None)
        case mass:
            return workload.candidates(rollout, mass)


def _fresh_contexts(workload: Workload, play: Play) -> Iterator[npt.NDArray[np.int64]]:
    """One for each rollout of the first contexts."""
    group_size = workload.settings.group_size
    num_all = workload.num_contexts * group_size
    for rollout in range(play.num_contexts * group_size):
        group, member = divmod(rollout, group_size)
        context_C = workload.contexts_PC[group].astype(np.int64)
        first = group
        if play.sharing == "alone":
            context_C = np.roll(context_C, member * (len(context_C) // group_size))
            first = rollout
        context_C[0] = FIRST_PLAIN_ID + play.number * num_all + first
        yield context_C


def check_first_blocks(contexts: list[npt.NDArray[np.int64]], group_size: int) -> None:
    """Raises: WorkloadError when contexts of two groups begin with the same block, or one group has two contexts."""
    group_of: dict[bytes, int] = {}
    for rollout, context_C in enumerate(contexts):
        group = rollout // group_size
        if group_of.setdefault(context_C[:FIRST_BLOCK].tobytes(), group) != group:
            raise WorkloadError(f"rollout {rollout} shares the first {FIRST_BLOCK} tokens of another group's context")
        if not np.array_equal(context_C, contexts[group * group_size]):
            raise WorkloadError(f"rollout {rollout} has another context than its group")
