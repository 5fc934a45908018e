"""Can this teacher teach this student? Pure comparisons; everything is refused before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from vopd_client.errors import HandshakeError
from vopd_client.types import Candidates, SequenceScores, SequenceToScore, SupportKind, TeacherInfo
from vopd_proto.arrays import IntArray
from vopd_proto.fingerprint import tokenizer_fingerprint

MAX_DIFFERENCES_SHOWN = 5

# ---------------------------------------------------------------- tokenizers


def check_tokenizers(
    student_tokens: Sequence[bytes],
    *,
    teacher_fingerprint: str,
    fetch_teacher_tokens: Callable[[], Sequence[bytes]],
) -> None:
    """Equal ids must mean equal text. The teacher's table is fetched only to say what differs.

    Raises: HandshakeError with the tables' sizes and the first differing entries.
    """
    if tokenizer_fingerprint(student_tokens) == teacher_fingerprint:
        return
    teacher_tokens = fetch_teacher_tokens()
    differing = differing_ids(student_tokens, teacher_tokens)
    shown = [
        f"  id {index}: student {_entry(student_tokens, index)}, teacher {_entry(teacher_tokens, index)}"
        for index in differing[:MAX_DIFFERENCES_SHOWN]
    ]
    if len(differing) > len(shown):
        shown.append(f"  … and {len(differing) - len(shown)} more")
    raise HandshakeError(
        f"student and teacher have different tokenizers: {len(student_tokens)} and {len(teacher_tokens)} entries, "
        f"{len(differing)} of them different\n" + "\n".join(shown)
    )


def differing_ids(student_tokens: Sequence[bytes], teacher_tokens: Sequence[bytes]) -> list[int]:
    """Ids at which the tables differ, in order; those that one table lacks included."""
    shorter = min(len(student_tokens), len(teacher_tokens))
    longer = max(len(student_tokens), len(teacher_tokens))
    return [i for i in range(shorter) if student_tokens[i] != teacher_tokens[i]] + list(range(shorter, longer))


def _entry(tokens: Sequence[bytes], index: int) -> str:
    return repr(tokens[index].decode("utf-8", "replace")) if index < len(tokens) else "has no such id"


def num_shared_ids(*, student_vocab_size: int, teacher_vocab_size: int, num_ids: int) -> int:
    """Ids below it exist in the tokenizer and in both models' heads, which may be padded differently."""
    return min(student_vocab_size, teacher_vocab_size, num_ids)


# ---------------------------------------------------------------- end tokens

EndTokenMode = Literal["map", "drop", "keep"]


@dataclass(frozen=True, slots=True)
class EndTokens:
    """How the two models end an answer.

    swap: (student's end id, teacher's end id) where the two have none in common; None: nothing to map.
    unknown_to_teacher: ids at which the student ends and the teacher goes on.
    message: what to tell people; empty when both end alike.
    """

    swap: tuple[int, int] | None
    unknown_to_teacher: frozenset[int]
    message: str


def compare_end_tokens(
    student_end_ids: Sequence[int], teacher_end_ids: Sequence[int], *, describe: Callable[[int], str] = str
) -> EndTokens:
    """Compares the ids at which student and teacher end; the first of each side is its main one.
    `describe` is how an id stands in the message.

    A teacher that ends otherwise gives the student's end token next to no probability, and so punishes
    every ending. Where the student can end as the teacher mainly does, nothing need be mapped.
    """
    ends_of_student, ends_of_teacher = frozenset(student_end_ids), frozenset(teacher_end_ids)
    # A teacher may list an end that it hardly ever writes: what counts is whether the student can end as it does.
    shares_main = bool(teacher_end_ids) and teacher_end_ids[0] in ends_of_student
    unknown = ends_of_student - ends_of_teacher if shares_main or not teacher_end_ids else ends_of_student
    if not unknown:
        return EndTokens(None, frozenset(), "")
    ours, theirs = (
        ", ".join(describe(index) for index in ids) or "no token" for ids in (student_end_ids, teacher_end_ids)
    )
    ends = f"student ends with {ours}, teacher with {theirs}"
    if shares_main or not teacher_end_ids:
        return EndTokens(None, unknown, ends)
    return EndTokens((student_end_ids[0], teacher_end_ids[0]), unknown, ends)


@dataclass(frozen=True, slots=True)
class IdSwap:
    """Exchanges two ids, or none: the student's labels for the teacher's and back.

    A permutation, so the relabelled teacher is still a distribution: its probability of ending belongs to
    the student's end token, and the other way round. Contexts are the teacher's own and stay as they are.
    """

    pair: tuple[int, int] | None

    def ids(self, ids: IntArray) -> IntArray:
        """Relabelled ids, any shape; applying it twice changes nothing."""
        if self.pair is None:
            return ids
        first, second = self.pair
        return np.where(ids == first, second, np.where(ids == second, first, ids))

    def to_teacher(self, sequence: SequenceToScore) -> SequenceToScore:
        """The sequence as the teacher is to read it; what lies between the student's turns stays as it is, too."""
        if self.pair is None:
            return sequence
        support = sequence.support
        if isinstance(support, Candidates):
            support = Candidates(self.ids(support.ids), support.counts_T)
        completion_ids = self.ids(sequence.completion_ids)
        if sequence.is_sampled_T is not None:
            completion_ids = np.where(sequence.is_sampled_T, completion_ids, sequence.completion_ids)
        return replace(sequence, completion_ids=completion_ids, support=support)

    def from_teacher(self, scores: SequenceScores) -> SequenceScores:
        """The scores in the student's labels."""
        return scores if self.pair is None else replace(scores, support_ids=self.ids(scores.support_ids))


def end_token_swap(end_tokens: EndTokens, mode: EndTokenMode) -> IdSwap:
    """What to relabel in this mode: something in `map` only."""
    return IdSwap(end_tokens.swap if mode == "map" else None)


# ---------------------------------------------------------------- capabilities


@dataclass(frozen=True, slots=True)
class ScoringPlan:
    """What to ask the teacher for, and what to tell people about it (empty when it is what they asked for)."""

    support: SupportKind
    message: str


def check_capabilities(
    info: TeacherInfo,
    *,
    support: Literal["student", "teacher"],
    top_k: int,
    temperature: float,
    objective: str,
    max_prompt_tokens: int,
    max_new_tokens: int,
    deterministic: bool = False,
    needs_vocabulary: str = "",
) -> ScoringPlan:
    """Refuses a run that this teacher cannot score; says which support to ask for.

    A teacher that cannot gather the student's ids gives its own top-k instead (an unbiased baseline too).
    Only `opd` trains without any support; it then has no exact KL to report.

    Args: needs_vocabulary: what, if anything, needs the teacher's whole distribution.
    Raises: HandshakeError naming everything that does not fit, with both numbers.
    """
    problems = []
    if temperature != 1.0 and not info.any_temperature:
        problems.append(f"temperature {temperature:g}: this teacher scores at temperature 1 only")
    num_tokens = max_prompt_tokens + max_new_tokens
    lengths = f"prompt {max_prompt_tokens} + completion {max_new_tokens} tokens"
    if num_tokens > info.max_context_length:
        problems.append(f"{lengths} > max_context_length {info.max_context_length}")
    if 0 < info.max_tokens_per_request < num_tokens:
        problems.append(f"{lengths} > max_tokens_per_request {info.max_tokens_per_request}")
    if deterministic and not info.deterministic:
        problems.append("a deterministic run needs a deterministic teacher: start it with --deterministic")
    plan = _choose_support(info.supports, support)
    if needs_vocabulary and "hidden_states" not in info.supports:
        problems.append(
            f"{needs_vocabulary} needs the teacher's whole distribution, from hidden states; this teacher offers "
            f"{_names(info.supports)} (its operator can allow more with `vopd-server serve --engine transformers "
            "--allow-full-vocab`; vopd-rb comes close without)"
        )
    if plan.support == "sampled" and objective != "opd":
        problems.append(f"objective {objective} needs a support; this teacher offers {_names(info.supports)}")
    if plan.support != "sampled" and top_k > info.max_support_size:
        problems.append(f"top-k {top_k} > max_support_size {info.max_support_size}")
    if problems:
        raise HandshakeError(f"teacher {info.model_id} cannot score this run: " + "; ".join(problems))
    return plan


def _choose_support(supports: frozenset[SupportKind], wanted: Literal["student", "teacher"]) -> ScoringPlan:
    if wanted == "student" and "candidates" in supports:
        return ScoringPlan("candidates", "")
    if "teacher_top_k" in supports:
        fell_back = "this teacher cannot score the student's own top-k; its own top-k is the support instead"
        return ScoringPlan("teacher_top_k", fell_back if wanted == "student" else "")
    if wanted == "teacher" and "candidates" in supports:
        return ScoringPlan("candidates", "this teacher has no top-k of its own; the student's is the support instead")
    return ScoringPlan("sampled", "this teacher scores sampled tokens only: the KL is not measured")


def _names(supports: Iterable[SupportKind]) -> str:
    return ", ".join(sorted(supports)) or "nothing"


# ---------------------------------------------------------------- reconnects


def check_same_teacher(before: TeacherInfo, now: TeacherInfo, *, where: str) -> None:
    """Another connection, perhaps another replica, must show the same teacher.

    Raises: HandshakeError naming what changed.
    """
    changes = [
        f"{name} {old!r} -> {new!r}"
        for name, old, new in (
            ("model revision", before.model_revision, now.model_revision),
            ("tokenizer fingerprint", before.fingerprint, now.fingerprint),
            ("vocabulary size", before.vocab_size, now.vocab_size),
            ("dtype", before.dtype, now.dtype),
        )
        if old != new
    ]
    if before.head_sha256 and before.head_sha256 != now.head_sha256:
        changes.append(f"output head {before.head_sha256!r} -> {now.head_sha256!r}")
    if missing := before.supports - now.supports:
        changes.append(f"no longer offers {_names(missing)}")
    if before.deterministic and not now.deterministic:
        changes.append("no longer deterministic")
    if before.any_temperature and not now.any_temperature:
        changes.append("scores at temperature 1 only")
    if changes:
        raise HandshakeError(
            f"{where} is not the teacher this run began with: {'; '.join(changes)}. "
            "Its scores would be mixed with the other's"
        )


def check_revision(expected: str, actual: str, *, where: str) -> None:
    """Every answer says which weights gave it.

    Raises: HandshakeError when they are not the ones of the handshake.
    """
    if actual != expected:
        raise HandshakeError(
            f"{where}: the model revision changed from {expected!r} to {actual!r} in the middle of the run; "
            "scores of other weights would be mixed"
        )
