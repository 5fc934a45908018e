"""The gRPC methods with a context that says what a real one would: what the caller is told, and the log."""

from __future__ import annotations

import logging
from typing import Any

import grpc
import pytest

from fake_engine import FakeEngine
from vopd_server.admission import Admission, TokenBudget
from vopd_server.grpc_api import SERVICE, TeacherRpc
from vopd_server.service import TeacherService
from vopd_server.validation import Limits
from wire_client import Question, score_request

LIMITS = Limits(64, 8, 64, 8, 2**20)
REQUEST = score_request([[1, 2]], [Question([271, 272])])
REQUEST.request_id = "find-me"


class AbortedError(Exception):
    """What a real context raises after it has sent the status."""


class Context:
    """A call without a network; `aborted` is the status it was ended with."""

    def __init__(self, time_remaining_s: float | None = None) -> None:
        self._time_remaining_s = time_remaining_s
        self.aborted: tuple[grpc.StatusCode, str] | None = None

    def time_remaining(self) -> float | None:
        return self._time_remaining_s

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Any) -> None:
        assert trailing_metadata[0][0] == "grpc-status-details-bin"
        self.aborted = code, details
        raise AbortedError


async def rpc_around(engine: FakeEngine) -> tuple[TeacherRpc, TeacherService]:
    service = TeacherService(engine, LIMITS, Admission(TokenBudget(100)))
    await service.start()
    return TeacherRpc(service, answer_timeout_s=60), service


async def test_the_servers_own_clock_ends_a_call_at_its_deadline() -> None:
    engine = FakeEngine()
    rpc, service = await rpc_around(engine)
    engine.hold()
    context: Any = Context(time_remaining_s=0.01)
    with pytest.raises(AbortedError):
        await rpc.Score(REQUEST.SerializeToString(), context)
    assert context.aborted == (grpc.StatusCode.DEADLINE_EXCEEDED, "the caller's deadline passed after 0.01 s")
    assert (engine.num_cancelled, service.admission.budget.reserved_tokens) == (1, 0)
    assert service.is_idle


async def test_a_call_whose_deadline_has_passed_never_reaches_the_engine() -> None:
    engine = FakeEngine()
    rpc, _ = await rpc_around(engine)
    context: Any = Context(time_remaining_s=-1.0)
    with pytest.raises(AbortedError):
        await rpc.Score(REQUEST.SerializeToString(), context)
    assert context.aborted is not None
    assert context.aborted[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    assert engine.requests == []


async def test_a_call_is_logged_with_its_id_and_size_and_without_its_tokens(caplog: pytest.LogCaptureFixture) -> None:
    rpc, _ = await rpc_around(FakeEngine())
    context: Any = Context()
    with caplog.at_level(logging.DEBUG, "vopd_server"):
        await rpc.Score(REQUEST.SerializeToString(), context)
    (call,) = [record for record in caplog.records if record.getMessage() == "Score"]
    told = vars(call)
    assert (told["request_id"], told["code"], told["num_sequences"], told["num_tokens"]) == ("find-me", "OK", 1, 4)
    values = [value for record in caplog.records for value in vars(record).values()]
    assert not any("271" in str(value) for value in values if not isinstance(value, int | float))


def test_every_method_of_the_contract_is_there() -> None:
    assert [method.name for method in SERVICE.methods if not hasattr(TeacherRpc, method.name)] == []
