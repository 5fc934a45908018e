"""The teachers of a run, by the names that rows call them by, and what each of them is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from vopd_client.batch import plan_microbatches
from vopd_client.handshake import num_shared_ids
from vopd_client.scoring import Request, SentRollout, about_teacher
from vopd_client.student import LoadedStudent, StudentForTraining
from vopd_client.teacher_head import TeacherHead
from vopd_client.types import Teacher
from vopd_proto.fingerprint import token_table


class ConnectedTeacher(Teacher, Protocol):
    """A teacher that can also show its tokenizer, to say what differs, and perhaps its output head."""

    def tokenizer(self) -> tuple[list[bytes], str]:
        """The id -> token table, and the tokenizer's JSON."""
        ...

    def head_file(self, cache_dir: Path | None = None) -> Path:
        """The safetensors file of the output head, laid out as teacher.proto says; blocks while it is fetched.

        cache_dir: where what comes over a wire is kept; None: the user's cache directory.

        Raises: TeacherUnsupportedError when the teacher does not give it away.
        """
        ...


Teachers = Mapping[str, ConnectedTeacher]  # by the names that prompts call them by


@dataclass(frozen=True)
class TeachingPlan:
    """One teacher of a run and what it is asked.

    name: what rows call it; "" for a run's only teacher that has none.
    evaluation_request: with a support or hidden states whatever the objective, to measure the KL with.
    head: its output head, where one of the two asks for hidden states.
    """

    name: str
    teacher: ConnectedTeacher
    request: Request
    evaluation_request: Request
    head: TeacherHead | None = None

    @property
    def title(self) -> str:
        return f"teacher {self.name}" if self.name else "the teacher"

    def fit(self, student: StudentForTraining) -> None:
        """From here on the student's probabilities are those that this teacher's scores are compared with."""
        student.dropped_ids = tuple(sorted(self.request.drop_end_ids))
        student.teacher_head = self.head


def fit_to_teachers(
    student: LoadedStudent,
    plans: Mapping[str, TeachingPlan],
    *,
    temperature: float,
    head_cache: Path | None,
    tell: Callable[[str], None],
) -> dict[str, TeachingPlan]:
    """From here on the student's module gives probabilities of what teachers score: of the ids that all of them have.

    Returns: the plans, with the output heads of those that are asked for hidden states.
    Raises: HandshakeError for a head that is none, and what fetching it raises.
    """
    module = student.module
    module.temperature = temperature
    module.num_shared_ids = min(
        num_shared_ids(
            student_vocab_size=student.vocab_size,
            teacher_vocab_size=plan.teacher.info.vocab_size,
            num_ids=len(token_table(student.tokenizer)),
        )
        for plan in plans.values()
    )
    fitted = {}
    for name, plan in plans.items():
        head = None
        if "vocabulary" in (plan.request.support, plan.evaluation_request.support):
            tell(f"fetching the output head of {plan.title}, unless it is in the cache")
            with about_teacher(name):
                head = TeacherHead.load(
                    plan.teacher.head_file(head_cache),
                    temperature=temperature,
                    device=next(module.parameters()).device,
                    vocab_size=plan.teacher.info.vocab_size,
                ).with_exchanged_ids(plan.request.swap.pair)
        fitted[name] = replace(plan, head=head)
    return fitted


def plan_teachers_microbatches(sent: Sequence[SentRollout], max_tokens: int) -> list[list[int]]:
    """`plan_microbatches` of each teacher's rollouts by themselves, the teachers in the order of their names; masked
    rollouts are in none.

    What the student's probabilities are compared with, and of which ids they are, is a teacher's own.

    Returns: indices into `sent`, each once.
    """
    plan = []
    scored = [place for place, item in enumerate(sent) if not item.is_masked]
    for name in sorted({sent[place].prompt.teacher for place in scored}):
        places = [place for place in scored if sent[place].prompt.teacher == name]
        lengths = [sent[place].num_tokens for place in places]
        plan += [[places[index] for index in indices] for indices in plan_microbatches(lengths, max_tokens)]
    return plan
