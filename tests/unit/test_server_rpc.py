"""The gRPC methods with a context that says what a real one would: what the caller is told, and the log."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from fake_engine import FAKE_HIDDEN_SIZE, FakeEngine, until
from open_service import QUEUE_BYTES, open_service, reserved_tokens
from vopd_proto import teacher_pb2 as pb
from vopd_server import calls
from vopd_server.admission import Admission
from vopd_server.grpc_api import SERVICE, TeacherRpc
from vopd_server.key_file import new_key, utc_now, with_key
from vopd_server.key_ring import KeyRing
from vopd_server.key_storage import change_key_file
from vopd_server.scheduler import FairScheduler
from vopd_server.service import TeacherService
from vopd_server.tenancy import TenantLimits
from vopd_server.validation import Limits
from wire_client import Question, score_request

LIMITS = Limits(64, 8, 64, 8, 2**20)
Metadata = tuple[tuple[str, str | bytes], ...]
REQUEST = score_request([[1, 2]], [Question([271, 272])])
REQUEST.request_id = "find-me"


class AbortedError(Exception):
    """What a real context raises after it has sent the status."""


class Context:
    """A unary call without a network; `aborted` is the status it was ended with. message None: it never arrives."""

    def __init__(
        self, message: bytes | None = b"", *, time_remaining_s: float | None = None, metadata: Metadata = ()
    ) -> None:
        self._messages = [message, aio.EOF]
        self._time_remaining_s = time_remaining_s
        self._metadata = metadata
        self.aborted: tuple[grpc.StatusCode, str] | None = None
        self.written: list[bytes] = []
        self.is_read = asyncio.Event()
        self.is_read.set()

    async def read(self) -> Any:
        message = self._messages.pop(0)
        if message is None:
            await asyncio.Event().wait()
        return message

    async def write(self, data: bytes) -> None:
        await self.is_read.wait()
        self.written.append(data)

    @property
    def pieces(self) -> list[pb.GetHeadResponse]:
        """Of the head."""
        return [pb.GetHeadResponse.FromString(data) for data in self.written]

    def invocation_metadata(self) -> Metadata:
        return self._metadata

    def time_remaining(self) -> float | None:
        return self._time_remaining_s

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Any) -> None:
        assert trailing_metadata[0][0] == "grpc-status-details-bin"
        self.aborted = code, details
        raise AbortedError


async def rpc_around(engine: FakeEngine, *, answer_timeout_s: float = 60) -> tuple[TeacherRpc, TeacherService]:
    service = open_service(engine, LIMITS, queue_tokens=100)
    await service.start()
    return TeacherRpc(service, answer_timeout_s=answer_timeout_s), service


async def rpc_with_keys(keys_file: Path) -> tuple[TeacherRpc, FakeEngine]:
    """One tenant, `team`, whose key nobody here has."""
    _, stored = new_key("team", TenantLimits(), created_at=utc_now())
    change_key_file(keys_file, lambda file: with_key(file, stored), create=True)
    engine = FakeEngine()
    scheduler = FairScheduler(window_tokens=0, queue_tokens=100, queue_bytes=QUEUE_BYTES)
    service = TeacherService(engine, LIMITS, Admission(scheduler), door=KeyRing.from_file(keys_file))
    await service.start()
    return TeacherRpc(service, answer_timeout_s=60), engine


async def test_the_servers_own_clock_ends_a_call_at_its_deadline() -> None:
    engine = FakeEngine()
    rpc, service = await rpc_around(engine)
    engine.hold()
    context: Any = Context(REQUEST.SerializeToString(), time_remaining_s=0.01)
    with pytest.raises(AbortedError):
        await rpc.Score(None, context)
    assert context.aborted == (grpc.StatusCode.DEADLINE_EXCEEDED, "the caller's deadline passed after 0.01 s")
    assert (engine.num_cancelled, reserved_tokens(service)) == (1, 0)
    assert service.is_idle


async def test_a_call_that_both_ends_have_ended_at_its_deadline_is_no_error_of_the_server() -> None:
    """gRPC raises what it raises here when the status finds nobody any more."""

    class EndedContext(Context):
        async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Any) -> None:
            self.aborted = code, details
            raise aio.InternalError("Failed execute_batch")

    engine = FakeEngine()
    rpc, service = await rpc_around(engine)
    engine.hold()
    context: Any = EndedContext(REQUEST.SerializeToString(), time_remaining_s=0.01)
    await rpc.Score(None, context)
    assert context.aborted[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    assert (engine.num_cancelled, reserved_tokens(service)) == (1, 0)


async def test_a_call_whose_deadline_has_passed_never_reaches_the_engine() -> None:
    engine = FakeEngine()
    rpc, _ = await rpc_around(engine)
    context: Any = Context(REQUEST.SerializeToString(), time_remaining_s=-1.0)
    with pytest.raises(AbortedError):
        await rpc.Score(None, context)
    assert context.aborted is not None
    assert context.aborted[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    assert engine.requests == []


async def test_a_call_is_logged_with_its_id_and_size_and_without_its_tokens(caplog: pytest.LogCaptureFixture) -> None:
    rpc, _ = await rpc_around(FakeEngine())
    context: Any = Context(REQUEST.SerializeToString())
    with caplog.at_level(logging.DEBUG, "vopd_server"):
        await rpc.Score(None, context)
    (call,) = [record for record in caplog.records if record.getMessage() == "Score"]
    told = vars(call)
    assert (told["request_id"], told["code"], told["num_sequences"], told["num_tokens"]) == ("find-me", "OK", 1, 4)
    values = [value for record in caplog.records for value in vars(record).values()]
    assert not any("271" in str(value) for value in values if not isinstance(value, int | float))


# ---------------------------------------------------------------- GetHead


def logged(caplog: pytest.LogCaptureFixture, method: str) -> list[str]:
    return [vars(record)["code"] for record in caplog.records if record.getMessage() == method]


@pytest.fixture
async def large_head() -> AsyncIterator[FakeEngine]:
    """Two pieces of a MiB, and one that is smaller."""
    engine = FakeEngine(vocab_size=2 * 2**20 // (4 * FAKE_HIDDEN_SIZE) + 1, gives_head=True)
    yield engine
    await engine.close()


async def test_the_head_is_sent_in_pieces_of_a_megabyte_the_first_with_the_size(
    large_head: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    rpc, service = await rpc_around(large_head)
    context: Any = Context()
    with caplog.at_level(logging.INFO, "vopd_server"):
        await rpc.GetHead(None, context)
    head = large_head.info.head
    assert head is not None
    assert b"".join(piece.data for piece in context.pieces) == head.path.read_bytes()
    assert [len(piece.data) for piece in context.pieces] == [2**20, 2**20, head.num_bytes - 2**21]
    assert [piece.num_bytes for piece in context.pieces] == [head.num_bytes, 0, 0]
    assert logged(caplog, "GetHead") == ["OK"]
    counted = service.metrics.exposition(service.status())[0].decode()
    assert 'vopd_calls_total{code="OK",method="GetHead",tenant="open",transport="grpc"} 1.0' in counted


async def test_the_head_is_read_no_faster_than_it_is_taken_and_no_longer_than_it_is_wanted(
    large_head: FakeEngine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    read_piece = calls._read_piece
    monkeypatch.setattr(calls, "_read_piece", lambda *where: read.append(where[1]) or read_piece(*where))
    rpc, service = await rpc_around(large_head)
    context: Any = Context()
    context.is_read.clear()
    with caplog.at_level(logging.INFO, "vopd_server"):
        sending = asyncio.create_task(rpc.GetHead(None, context))
        await until(lambda: read == [0])
        await asyncio.sleep(0.02)
        assert read == [0], "the next piece waits for the first to be taken"
        assert not service.is_idle
        service.drain()  # what has begun is finished, or cancelled by who asked
        sending.cancel()
        await asyncio.wait((sending,))
    assert sending.cancelled()
    assert service.is_idle
    assert logged(caplog, "GetHead") == ["CANCELLED"]


async def test_draining_waits_for_a_head_that_is_being_sent(large_head: FakeEngine) -> None:
    rpc, service = await rpc_around(large_head)
    context: Any = Context()
    context.is_read.clear()
    sending = asyncio.create_task(rpc.GetHead(None, context))
    await until(lambda: not service.is_idle)
    service.drain()
    late: Any = Context()
    with pytest.raises(AbortedError):
        await rpc.GetHead(None, late)
    assert late.aborted == (grpc.StatusCode.UNAVAILABLE, "the teacher is shutting down")
    context.is_read.set()
    await sending
    assert len(context.written) == 3
    assert service.is_idle


async def test_a_client_that_takes_no_piece_of_the_head_is_given_up(large_head: FakeEngine) -> None:
    rpc, service = await rpc_around(large_head, answer_timeout_s=0.02)
    context: Any = Context()
    context.is_read.clear()
    with pytest.raises(AbortedError):
        await rpc.GetHead(None, context)
    told = (grpc.StatusCode.DEADLINE_EXCEEDED, "an answer was left unread for 0.02 s (answer_timeout_s)")
    assert context.aborted == told
    assert service.is_idle


async def test_a_file_of_the_head_that_is_cut_short_is_an_internal_error(large_head: FakeEngine) -> None:
    rpc, _ = await rpc_around(large_head)
    head = large_head.info.head
    assert head is not None
    os.truncate(head.path, 2**20 + 5)
    context: Any = Context()
    with pytest.raises(AbortedError):
        await rpc.GetHead(None, context)
    assert context.aborted == (grpc.StatusCode.INTERNAL, f"the file of the output head ends at byte {2**20 + 5}")
    assert len(context.written) == 1


# ---------------------------------------------------------------- whose call it is


async def test_a_call_without_a_valid_key_is_refused_before_its_message_is_read(tmp_path: Path) -> None:
    rpc, engine = await rpc_with_keys(tmp_path / "keys.json")
    for metadata in ((), (("authorization", "Bearer nobody.secret"),), (("authorization", "Basic bm8="),)):
        context: Any = Context(None, metadata=metadata)  # to read would be to wait for ever
        with pytest.raises(AbortedError):
            await asyncio.wait_for(rpc.Score(None, context), 5)
        assert context.aborted is not None
        assert context.aborted[0] is grpc.StatusCode.UNAUTHENTICATED
    assert engine.requests == []


async def test_a_message_that_never_comes_is_given_up() -> None:
    rpc, service = await rpc_around(FakeEngine(), answer_timeout_s=0.02)
    context: Any = Context(None)
    with pytest.raises(AbortedError):
        await rpc.Score(None, context)
    told = (grpc.StatusCode.DEADLINE_EXCEEDED, "the request did not arrive within 0.02 s (answer_timeout_s)")
    assert context.aborted == told
    assert service.is_idle


def test_every_method_of_the_contract_is_there() -> None:
    assert [method.name for method in SERVICE.methods if not hasattr(TeacherRpc, method.name)] == []
