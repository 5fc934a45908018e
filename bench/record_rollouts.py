"""Records the student's rollouts that `make bench-teacher` plays: contexts, completions, and their supports.

The student is the demo's model, sampled at temperature 1 by the sampler of the trainer. Contexts are chats about the
demo's questions, half of them lists to be gone on with, half of them asking for free text, cut to the same length from
the left. Kept are the first completions that do not end before their limit.

    python bench/record_rollouts.py --model .cache/smollm2-135m-instruct --out bench/data/teacher_rollouts.npz
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from teacher_workload import Workload, WorkloadError, WorkloadSettings, save_workload
from vopd_client.rollouts.base import Rollout, RolloutKey
from vopd_client.rollouts.transformers import RolloutSampler
from vopd_client.student import LoadedStudent, load_student
from vopd_proto.arrays import IntArray

DATA = Path("examples/demo/heldout.jsonl")
MASSES = (0.9999, 0.99, 0.9)
DRAWN_TOGETHER = 8
MOST_DRAWS = 64  # a context whose completions nearly all end early is not for this

Messages = list[dict[str, str]]


def contexts_of(rows: Sequence[dict[str, Any]], num_contexts: int) -> list[Messages]:
    """Chats of both kinds of question; the odd ones ask for free text. Each is about rows of its own."""
    kinds = ("capital", "past tense")
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}
    chats = []
    for number in range(num_contexts):
        kind = kinds[(number + number // 2) % 2]
        pool = by_kind[kind]
        start = 5 * number % len(pool)
        own = [*pool[start:], *pool[:start]]
        other = by_kind[kinds[kinds.index(kind) - 1]][0]
        chats.append(_free_text(kind, own[0], other) if number % 2 else _list(kind, own))
    return chats


def _subject(row: dict[str, Any]) -> str:
    """The country or verb that a row asks for: the last words of its question."""
    question: str = row["teacher_messages"][-1]["content"]
    return question.rstrip("?").split(" of ", 1)[1]


def _list(kind: str, rows: Sequence[dict[str, Any]]) -> Messages:
    """Three lists that are solved, and one that is not."""
    lists = [rows[start : start + 8] for start in range(0, 24, 8)]
    messages: Messages = []
    for part in lists:
        messages.append({"role": "user", "content": _question(kind, part)})
        lines = [f"{_subject(row)}: {row['answer'].removeprefix('Answer: ')}" for row in part]
        messages.append({"role": "assistant", "content": "\n".join(lines)})
    unsolved = [*rows[24:], *rows[:16:2]]
    return [*messages, {"role": "user", "content": _question(kind, unsolved)}]


def _question(kind: str, rows: Sequence[dict[str, Any]]) -> str:
    return f"Say the {kind} of each, a line each: {', '.join(map(_subject, rows))}."


def _free_text(kind: str, row: dict[str, Any], other: dict[str, Any]) -> Messages:
    """The teacher's solved examples of both kinds, and a question that one word does not answer."""
    examples: Messages = [*other["teacher_messages"][:-1], *row["teacher_messages"][:-1]]
    question: str = row["teacher_messages"][-1]["content"]
    more = {
        "capital": "Describe it in two paragraphs: how it began, what it looks like, and what people do there.",
        "past tense": "Explain it, and then write a story of ten sentences in which it stands three times.",
    }[kind]
    return [*examples, {"role": "user", "content": f"{question} {more}"}]


def token_ids(student: LoadedStudent, chat: Messages, num_tokens: int) -> IntArray:
    """The last tokens of a chat, where its question is. Raises: WorkloadError for one that is too short."""
    text = student.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = np.array(student.tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)
    if len(ids) < num_tokens:
        raise WorkloadError(f"a context of {len(ids)} tokens, {num_tokens} wanted: {text[-100:]!r}")
    return ids[-num_tokens:]


class Recorder:
    """Draws rollouts of one student; the same numbers give the same rollouts whatever support is recorded."""

    def __init__(self, student: LoadedStudent, settings: WorkloadSettings) -> None:
        self._student = student
        self._settings = settings

    def draw(self, context: int, context_ids: IntArray, first: int, mass: float) -> list[Rollout]:
        """DRAWN_TOGETHER rollouts from number `first` on, in order."""
        settings, student = self._settings, self._student
        sampler = RolloutSampler(
            student.module.model,
            num_shared_ids=student.module.num_shared_ids,
            end_ids=student.end_ids,
            pad_id=student.pad_id,
            max_new_tokens=settings.completion_tokens,
            temperature=settings.temperature,
            top_k=settings.k,
            support_mass=mass,
            seed=settings.seed,
            batch_size=DRAWN_TOGETHER,
            mixed_precision="bf16",
        )
        keys = [RolloutKey(0, context, first + number) for number in range(DRAWN_TOGETHER)]
        drawn = sampler.sample([(key, context_ids) for key in keys])
        return sorted(drawn, key=lambda rollout: rollout.key.rollout_index)

    def group(self, context: int, context_ids: IntArray) -> tuple[list[Rollout], list[list[Rollout]]]:
        """G full completions with dense supports, and the same ones with the support of each mass."""
        dense: list[Rollout] = []
        adaptive: list[list[Rollout]] = [[] for _ in self._settings.masses]
        for first in range(0, MOST_DRAWS, DRAWN_TOGETHER):
            drawn = self.draw(context, context_ids, first, mass=1.0)
            kept = [
                place
                for place, rollout in enumerate(drawn)
                if not rollout.ended and len(rollout.completion_ids) == self._settings.completion_tokens
            ][: self._settings.group_size - len(dense)]
            if kept:
                dense += [drawn[place] for place in kept]
                for found, mass in zip(adaptive, self._settings.masses, strict=True):
                    again = self.draw(context, context_ids, first, mass)
                    found += [again[place] for place in kept]
            if len(dense) == self._settings.group_size:
                return dense, adaptive
        raise WorkloadError(f"only {len(dense)} of {MOST_DRAWS} completions of context {context} reach the limit")


def check_prefixes(dense: Rollout, adaptive: Rollout, k: int) -> None:
    """The adaptive support holds the first of the dense one. Raises: WorkloadError."""
    ids_TK = dense.support_ids.reshape(-1, k)
    is_in_TK = np.arange(k) < adaptive.support_counts_T[:, None]
    same_tokens = np.array_equal(dense.completion_ids, adaptive.completion_ids)
    if not same_tokens or not np.array_equal(ids_TK[is_in_TK], adaptive.support_ids):
        raise WorkloadError(f"{dense.key}: an adaptive support is not the beginning of the dense one")


def record(student: LoadedStudent, settings: WorkloadSettings, num_contexts: int, console: Console) -> Workload:
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    recorder = Recorder(student, settings)
    contexts, dense, counts = [], [], []
    for number, chat in enumerate(contexts_of(rows, num_contexts)):
        context_ids = token_ids(student, chat, settings.context_tokens)
        of_group, adaptive = recorder.group(number, context_ids)
        for of_mass in adaptive:
            for one, other in zip(of_group, of_mass, strict=True):
                check_prefixes(one, other, settings.k)
        contexts.append(context_ids)
        dense += of_group
        counts.append([[rollout.support_counts_T for rollout in of_mass] for of_mass in adaptive])
        means = [float(np.mean(of_mass)) for of_mass in counts[-1]]
        said = ", ".join(f"{mean:.1f} for {mass}" for mean, mass in zip(means, settings.masses, strict=True))
        drawn = of_group[-1].key.rollout_index + 1
        console.print(f"context {number}: {len(of_group)} of {drawn} rollouts; support {said}", markup=False)
        console.print(f"  {student.tokenizer.decode(of_group[0].completion_ids)!r}", markup=False)
    return Workload(
        settings,
        np.stack(contexts).astype(np.uint16),
        np.stack([rollout.completion_ids for rollout in dense]).astype(np.uint16),
        np.stack([rollout.support_ids.reshape(-1, settings.k) for rollout in dense]).astype(np.uint16),
        np.concatenate(counts, axis=1).astype(np.uint16),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    settings = WorkloadSettings(
        model=Path(arguments.model).name,
        temperature=1.0,
        seed=arguments.seed,
        group_size=8,
        context_tokens=256,
        completion_tokens=64,
        k=100,
        concurrency=64,
        masses=MASSES,
    )
    student = load_student(arguments.model, device="cpu")
    if student.vocab_size > np.iinfo(np.uint16).max + 1:
        raise WorkloadError(f"{student.vocab_size} ids do not fit 16 bits")
    student.module.eval()
    console = Console()
    save_workload(arguments.out, record(student, settings, arguments.contexts, console))
    console.print(f"{arguments.out}: {arguments.out.stat().st_size / 1000:.0f} kB", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
