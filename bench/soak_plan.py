"""Who takes part in the soak, and what it wrote down. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from soak_workload import Kind, Reference, distance
from vopd_client.types import SequenceScores
from vopd_server.tenancy import TenantLimits

Transport = Literal["gRPC stream", "gRPC unary", "HTTP"]
# busy: always has something queued. unruly: two of three requests are misdeeds. calm: thinks in between.
# tight: more at a time than its own queue bound lets in.
Role = Literal["busy", "unruly", "calm", "tight"]
Misdeed = Literal["cancel", "disconnect", "deadline", "too long", "wrong key", "half a body"]

TRANSPORTS: tuple[Transport, ...] = ("gRPC stream", "gRPC unary", "HTTP")
WEIGHTS = (1, 2, 4)
ROLES: tuple[Role, ...] = ("busy", "unruly", "calm", "busy")
# A stream has no deadline of its own, and only HTTP has a body that can be broken off.
MISDEEDS: dict[Transport, tuple[Misdeed, ...]] = {
    "gRPC stream": ("cancel", "disconnect", "too long", "wrong key"),
    "gRPC unary": ("cancel", "disconnect", "deadline", "too long", "wrong key"),
    "HTTP": ("cancel", "disconnect", "deadline", "too long", "wrong key", "half a body"),
}
TIGHT_QUEUE_TOKENS = 2500
REFERENCE_TENANT = "reference"


@dataclass(frozen=True)
class JobPlan:
    """workers: units that it has under way at a time. number: of the job, and the seed of what it draws."""

    number: int
    tenant_id: str
    transport: Transport
    role: Role
    weight: int
    workers: int

    @property
    def limits(self) -> TenantLimits:
        queue_tokens = TIGHT_QUEUE_TOKENS if self.role == "tight" else None
        return TenantLimits(weight=float(self.weight), queue_tokens=queue_tokens)

    @property
    def kinds(self) -> frozenset[Kind]:
        """A busy one asks for small things: in single turns of 2k tokens a minute's share is a matter of luck."""
        all_kinds: frozenset[Kind] = frozenset({"short", "few-shot", "long completion", "long context"})
        return all_kinds - {"long context", "long completion"} if self.role == "busy" else all_kinds


def make_plans(num_jobs: int) -> list[JobPlan]:
    """Every nine jobs have every transport with every weight, and a role."""
    return [_plan(number) for number in range(num_jobs)]


def _plan(number: int) -> JobPlan:
    weight = WEIGHTS[number // len(TRANSPORTS) % len(WEIGHTS)]
    role = ROLES[number // (len(TRANSPORTS) * len(WEIGHTS)) % len(ROLES)]
    if role == "calm" and weight == WEIGHTS[0]:
        role = "tight"
    # Several times what is running for a tenant of its weight, so that there is always more behind it.
    workers = {"busy": 2 + weight, "unruly": 1, "calm": 1, "tight": 4}[role]
    return JobPlan(number, f"job-{number:02}", TRANSPORTS[number % len(TRANSPORTS)], role, weight, workers)


@dataclass
class Tally:
    """What one job asked for and what came of it, in sequences.

    asked = right + wrong + given_up + refused + late + failed, or something is missing.

    duplicated: answers to what had been answered. in_time: right or wrong before the end of the soak, as are tokens,
    scored_tokens and turn_tokens, which count a context once for those that share it.
    told: error codes that the teacher answered with, as it should. untold: those that it may have counted, while the
    client had gone. latencies_s: by kind, of in_time.
    """

    asked: int = 0
    right: int = 0
    wrong: int = 0
    given_up: int = 0
    refused: int = 0
    late: int = 0
    failed: int = 0
    duplicated: int = 0
    in_time: int = 0
    tokens: int = 0
    turn_tokens: int = 0
    scored_tokens: int = 0
    scored_tokens_ever: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    largest_mean_nats: float = 0.0
    largest_nats: float = 0.0
    least_ids_shared: float = 1.0
    strangers_refused: int = 0
    misdeeds: Counter[str] = field(default_factory=Counter)
    told: Counter[str] = field(default_factory=Counter)
    untold: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    latencies_s: dict[str, list[float]] = field(default_factory=dict)

    @property
    def missing(self) -> int:
        return self.asked - self.right - self.wrong - self.given_up - self.refused - self.late - self.failed

    def check(self, reference: Reference, scores: SequenceScores, *, seconds: float, in_time: bool) -> None:
        """An answer has come, after so many seconds."""
        found = distance(scores, reference)
        if found.is_right:
            self.right += 1
        else:
            self.wrong += 1
            self.failures[f"wrong answer: {found}"] += 1
        self.largest_mean_nats = max(self.largest_mean_nats, found.mean_nats)
        self.largest_nats = max(self.largest_nats, found.largest_nats)
        self.least_ids_shared = min(self.least_ids_shared, found.ids_shared)
        num_rows = len(reference.sequence.completion_ids)
        self.scored_tokens_ever += num_rows
        if in_time:
            self.in_time += 1
            self.tokens += reference.num_tokens
            self.scored_tokens += num_rows
            self.latencies_s.setdefault(reference.kind, []).append(seconds)

    def failed_with(self, error: BaseException, num_sequences: int) -> None:
        """Something that should not have happened."""
        self.failed += num_sequences
        if "is not waiting for an answer" in str(error):
            self.duplicated += 1
        self.failures[f"{type(error).__name__}: {error}"[:300]] += 1
