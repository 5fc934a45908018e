"""The teachers that the contract suites ask: every engine there is, in a real server, with a reference.

The reference is computed in the test: the fake engine's formula, or a plain one-sequence transformers forward in fp32.
Where vLLM is installed (`make test-vllm`) its engine joins, with both of its model runners.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import cache, partial

import grpc
import numpy as np
import pytest
import torch

from fake_engine import FakeEngine, fake_logprobs_TV
from fake_server import fake_teacher
from teacher_process import RunningTeacher
from vopd_proto.arrays import Float32Array
from wire_client import Answer, Question, RefusedError, WireClient, connect

CONTEXTS = [[65, 66, 67, 68], [200], list(range(1, 120))]
TRANSPORTS = {
    "Score": WireClient.score,
    "ScoreStream": WireClient.score_stream,
    "HTTP protobuf": WireClient.score_http_protobuf,
    "HTTP JSON": WireClient.score_http_json,
}
Ask = Callable[..., Awaitable[list[Answer]]]  # one of them, bound to a client
TOLERANCE_NATS = 1e-4
VLLM_TOLERANCE_NATS = 1e-3  # in float32; measured: 1e-5 on average, 5e-5 at most

Reference = Callable[[Sequence[int], Sequence[int], float], Float32Array]


@dataclass(frozen=True)
class Teacher:
    """A teacher to ask, and what it should answer: reference(context, completion, temperature) is [T, V]."""

    client: WireClient
    reference: Reference
    vocab_size: int
    max_context_length: int
    supports: frozenset[str]
    any_temperature: bool
    tolerance_nats: float = TOLERANCE_NATS

    def has(self, what: str) -> bool:
        """A kind of support, or "temperature" for one that is not 1."""
        return self.any_temperature if what == "temperature" else what in self.supports

    def expected_TV(self, question: Question, temperature: float = 1.0) -> Float32Array:
        return self.reference(CONTEXTS[question.context], question.completion, temperature)


async def known_teacher(
    client: WireClient, reference: Reference, *, supports: set[str], any_temperature: bool, tolerance_nats: float
) -> Teacher:
    """What the test says this engine has; the teacher must say the same of itself."""
    info = await client.info()
    assert {descriptor.name for descriptor, offered in info.supports.ListFields() if offered} == supports
    assert info.any_temperature == any_temperature
    return Teacher(
        client=client,
        reference=reference,
        vocab_size=info.vocab_size,
        max_context_length=info.max_context_length,
        supports=frozenset(supports),
        any_temperature=any_temperature,
        tolerance_nats=tolerance_nats,
    )


async def answers_or_refusal(teacher: Teacher, asking: Awaitable[list[Answer]], needs: str) -> list[Answer]:
    """The answers; none from a teacher that does not have what is asked for and says so, naming what it has."""
    if teacher.has(needs):
        return await asking
    with pytest.raises(RefusedError) as refused:
        await asking
    assert refused.value.refusal.code is grpc.StatusCode.FAILED_PRECONDITION
    if needs == "temperature":
        assert "scores at temperature 1 only" in refused.value.refusal.message
    else:
        assert refused.value.refusal.message.endswith(
            f"no {needs} support; it has {', '.join(sorted(teacher.supports))}"
        )
    return []


def random_completion(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 256, length)]


# ---------------------------------------------------------------- references


def fake_reference(context: Sequence[int], completion: Sequence[int], temperature: float) -> Float32Array:
    return fake_logprobs_TV(np.asarray(context, np.int64), np.asarray(completion, np.int64), temperature=temperature)


@cache
def forward_logits_SV(model: torch.nn.Module, token_ids: tuple[int, ...]) -> torch.Tensor:
    """Of one unpadded forward, once for all transports."""
    with torch.inference_mode():
        logits_SV: torch.Tensor = model(input_ids=torch.tensor([token_ids])).logits[0].float()
    return logits_SV


def forward_reference(
    model: torch.nn.Module, context: Sequence[int], completion: Sequence[int], temperature: float
) -> Float32Array:
    """Row t from the logits at position C - 1 + t."""
    logits_SV = forward_logits_SV(model, (*context, *completion))
    rows = slice(len(context) - 1, len(context) - 1 + len(completion))
    logprobs_TV: Float32Array = torch.log_softmax(logits_SV[rows] / temperature, dim=-1).numpy()
    return logprobs_TV


# ---------------------------------------------------------------- teachers


async def fake_engine_in_process(stack: AsyncExitStack, _request: pytest.FixtureRequest) -> Teacher:
    running = await stack.enter_async_context(fake_teacher(FakeEngine()))
    return await known_teacher(
        running.client,
        fake_reference,
        supports={"sampled", "teacher_top_k", "candidates"},
        any_temperature=True,
        tolerance_nats=TOLERANCE_NATS,
    )


async def fake_engine_with_head(stack: AsyncExitStack, _request: pytest.FixtureRequest) -> Teacher:
    running = await stack.enter_async_context(fake_teacher(FakeEngine(gives_head=True)))
    return await known_teacher(
        running.client,
        fake_reference,
        supports={"sampled", "teacher_top_k", "candidates", "hidden_states"},
        any_temperature=True,
        tolerance_nats=TOLERANCE_NATS,
    )


async def teacher_of_process(
    stack: AsyncExitStack,
    request: pytest.FixtureRequest,
    *,
    name: str,
    supports: set[str],
    any_temperature: bool,
    tolerance_nats: float,
) -> Teacher:
    """The fixtures `name`_process and `name`_reference_model of the suite's conftest."""
    process: RunningTeacher = request.getfixturevalue(f"{name}_process")
    model: torch.nn.Module = request.getfixturevalue(f"{name}_reference_model")
    client = await stack.enter_async_context(connect(process.url, process.http_url))
    return await known_teacher(
        client,
        partial(forward_reference, model),
        supports=supports,
        any_temperature=any_temperature,
        tolerance_nats=tolerance_nats,
    )


async def transformers_process(stack: AsyncExitStack, request: pytest.FixtureRequest) -> Teacher:
    return await teacher_of_process(
        stack,
        request,
        name="tiny",
        supports={"sampled", "teacher_top_k", "candidates", "hidden_states"},
        any_temperature=True,
        tolerance_nats=TOLERANCE_NATS,
    )


async def vllm_process(stack: AsyncExitStack, request: pytest.FixtureRequest) -> Teacher:
    """On a CPU vLLM has its V1 model runner, which scores no given ids."""
    return await teacher_of_process(
        stack,
        request,
        name="vllm",
        supports={"sampled", "teacher_top_k"},
        any_temperature=False,
        tolerance_nats=VLLM_TOLERANCE_NATS,
    )


async def vllm_v2_process(stack: AsyncExitStack, request: pytest.FixtureRequest) -> Teacher:
    """The V2 model runner, whose kernels are interpreted where there is no GPU: a tiny vocabulary."""
    return await teacher_of_process(
        stack,
        request,
        name="vllm_v2",
        supports={"sampled", "teacher_top_k", "candidates"},
        any_temperature=False,
        tolerance_nats=VLLM_TOLERANCE_NATS,
    )


MakeTeacher = Callable[[AsyncExitStack, pytest.FixtureRequest], Awaitable[Teacher]]
TEACHERS: list[MakeTeacher] = [fake_engine_in_process, fake_engine_with_head, transformers_process]
if importlib.util.find_spec("vllm"):
    TEACHERS += [vllm_process, vllm_v2_process]
