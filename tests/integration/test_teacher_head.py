"""Hidden states and the output head over both transports: what arrives, what breaks, and what stays on the disk."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import aclosing
from pathlib import Path

import grpc
import numpy as np
import pytest

from asking import FakeTime, assert_answers, connected_to, until
from fake_teacher import HEAD, HEAD_SHA256, HIDDEN_SIZE, FakeTeacher, Refusal, Script
from vopd_client.errors import (
    AlignmentError,
    ConfigError,
    HandshakeError,
    NonFiniteError,
    TeacherInternalError,
    TeacherPermissionError,
    TeacherUnavailableError,
    TeacherUnsupportedError,
)
from vopd_client.teacher import TeacherClient
from vopd_client.teacher.channel import parse_url
from vopd_client.teacher.grpc_transport import GrpcTransport
from vopd_client.teacher.head_download import MAX_BROKEN_DOWNLOADS
from vopd_client.teacher.http_transport import HttpTransport
from vopd_client.teacher.patience import Timing
from vopd_client.teacher.transport import CallFailed, Traffic, Transport
from vopd_client.types import HiddenStates, NoSupport, SequenceToScore
from vopd_proto import teacher_pb2 as pb
from vopd_proto.arrays import pack_floats

FILE_NAME = f"{HEAD_SHA256}.safetensors"


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


# ---------------------------------------------------------------- hidden states


def asks_for_states(num_tokens: int = 7) -> SequenceToScore:
    return SequenceToScore(np.arange(3), np.arange(num_tokens), HiddenStates())


async def test_hidden_states_come_whole_and_in_row_chunks(connected):
    async with connected(Script(head=HEAD, rows_per_chunk=3)) as (_, client), client.open_stream() as stream:
        assert "hidden_states" in client.info.supports
        asked = [asks_for_states(length) for length in (7, 1, 0, 400)]
        for question, answer in zip(asked, await client.score(asked), strict=True):
            assert_answers(answer, question)
        for question, answer in zip(asked, await asyncio.gather(*map(stream.submit, asked)), strict=True):
            assert_answers(answer, question)
            assert answer.hidden_states_TH is not None
            assert answer.hidden_states_TH.shape == (len(question.completion_ids), HIDDEN_SIZE)


async def test_a_list_is_split_by_the_size_of_its_hidden_states(connected):
    limits = {"limits.max_message_bytes": 20_000, "hidden_size": HIDDEN_SIZE}
    asked = [asks_for_states(100)] * 8  # of 100 x 6 x 4 bytes each, and some around them
    async with connected(Script(head=HEAD, info=limits)) as (teacher, client):
        for answer in await client.score(asked):
            assert_answers(answer, asked[0])
        assert [len(request.sequences) for request in teacher.record.score_requests] == [4, 4]


def nan_in_row_two(scores: pb.SequenceScores) -> None:
    states = np.zeros((scores.num_rows, HIDDEN_SIZE))
    states[2, 4] = np.nan
    scores.hidden_states.CopyFrom(pack_floats(states, pb.BFLOAT16))


def narrower(scores: pb.SequenceScores) -> None:
    scores.hidden_states.CopyFrom(pack_floats(np.zeros((scores.num_rows, HIDDEN_SIZE - 1)), pb.FLOAT16))


def none_at_all(scores: pb.SequenceScores) -> None:
    scores.ClearField("hidden_states")


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        (nan_in_row_two, NonFiniteError, "hidden state nan in dimension 4 at position 2"),
        (narrower, AlignmentError, "7 rows holds 35 numbers of hidden states, not 7 x 6"),
        (none_at_all, AlignmentError, "asked for 7 x 6 hidden states, answered with none"),
    ],
)
async def test_wrong_hidden_states_fail_their_sequence_and_never_become_scores(change, error, complaint, connected):
    async with connected(Script(head=HEAD, change_answer=change)) as (teacher, client), client.open_stream() as stream:
        with pytest.raises(error, match=complaint):
            await stream.submit(asks_for_states())
        with pytest.raises(error, match=complaint):
            await client.score([asks_for_states()])
        teacher.script.change_answer = None
        assert_answers(await stream.submit(asks_for_states()), asks_for_states())


# ---------------------------------------------------------------- the head


async def test_the_head_is_fetched_once_and_is_no_part_of_the_scores_traffic(connected, tmp_path: Path):
    async with connected(Script(head=HEAD), api_key="id.secret") as (teacher, client):
        assert client.info.head_sha256 == HEAD_SHA256
        path = await client.head_file(tmp_path)
        assert path == tmp_path / FILE_NAME
        assert path.read_bytes() == HEAD
        assert names(tmp_path) == [FILE_NAME]
        assert teacher.record.metadata[-1]["authorization"] == "Bearer id.secret"
        assert await client.head_file(tmp_path) == path
        assert teacher.record.num_head_calls == 1
        assert client.head_bytes_received == len(HEAD)
        assert (client.bytes_sent, client.bytes_received) == (0, 0)
        await client.score([SequenceToScore(np.arange(3), np.arange(4), NoSupport())])
        assert client.bytes_received == teacher.record.bytes_out


async def test_a_head_in_the_users_cache_is_not_asked_for(connected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = tmp_path / "vopd" / "heads" / FILE_NAME
    kept.parent.mkdir(parents=True)
    kept.write_bytes(HEAD)
    async with connected(Script(head=HEAD)) as (teacher, client):
        assert await client.head_file() == kept
        assert (teacher.record.num_head_calls, client.head_bytes_received) == (0, 0)


@pytest.mark.parametrize("damage", [HEAD[:-1], b"\0" + HEAD[1:]])
async def test_a_damaged_file_is_fetched_again(damage, connected, tmp_path: Path):
    (tmp_path / FILE_NAME).write_bytes(damage)
    async with connected(Script(head=HEAD)) as (teacher, client):
        assert (await client.head_file(tmp_path)).read_bytes() == HEAD
        assert teacher.record.num_head_calls == 1
        assert names(tmp_path) == [FILE_NAME]


async def test_several_at_once_get_the_same_file(connected, tmp_path: Path):
    async with connected(Script(head=HEAD)) as (_, client):
        paths = await asyncio.gather(*(client.head_file(tmp_path) for _ in range(5)))
        assert {path.read_bytes() for path in paths} == {HEAD}
        assert names(tmp_path) == [FILE_NAME]


async def test_a_teacher_that_keeps_its_head_says_how_it_could_be_had(connected, tmp_path: Path):
    async with connected() as (teacher, client):
        with pytest.raises(TeacherUnsupportedError, match="vopd-server serve --allow-full-vocab"):
            await client.head_file(tmp_path)
        assert teacher.record.num_head_calls == 0


# ---------------------------------------------------------------- downloads that break


async def test_a_broken_download_begins_again_from_the_start(connected, tmp_path: Path):
    time = FakeTime()
    script = Script(head=HEAD)
    script.break_head_after.extend([4000, 8000])
    async with connected(script, timing=time.timing) as (teacher, client):
        assert (await client.head_file(tmp_path)).read_bytes() == HEAD
        assert names(tmp_path) == [FILE_NAME]
        assert teacher.record.num_head_calls == 3
        assert teacher.record.num_info_calls == 3  # a handshake before each
        assert client.head_bytes_received == 4000 + 8000 + len(HEAD)
        assert len(time.slept_s) == 2
        assert client.waiting_reason == ""


async def test_a_teacher_that_is_restarted_in_the_middle_sends_all_of_it_again(connected, tmp_path: Path):
    script = Script(head=HEAD, head_piece_pause_s=60.0)
    async with connected(script, timing=Timing()) as (teacher, client):
        fetching = asyncio.create_task(client.head_file(tmp_path))
        await until(lambda: client.head_bytes_received)
        await teacher.stop()
        script.head_piece_pause_s = 0.0
        await teacher.start()
        assert (await fetching).read_bytes() == HEAD
        assert names(tmp_path) == [FILE_NAME]


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
async def test_a_refused_download_is_asked_for_again_after_the_delay_the_server_wants(code, connected, tmp_path: Path):
    time = FakeTime()
    async with connected(Script(head=HEAD), timing=time.timing) as (teacher, client):
        teacher.script.refuse_head.extend([Refusal(code, retry_delay_s=7.5)] * (MAX_BROKEN_DOWNLOADS + 1))
        assert (await client.head_file(tmp_path)).read_bytes() == HEAD
        assert teacher.record.num_head_calls == MAX_BROKEN_DOWNLOADS + 2
        assert all(7.5 <= slept <= 7.5 * 1.25 for slept in time.slept_s)


async def test_a_download_that_always_breaks_is_given_up_although_every_attempt_gets_somewhere(
    connected, tmp_path: Path
):
    script = Script(head=HEAD)
    script.break_head_after.extend([4000] * 100)
    async with connected(script) as (teacher, client):
        with pytest.raises(TeacherUnavailableError, match=r"broke 10 times; the last time after 4000 bytes: \w+"):
            await client.head_file(tmp_path)
        assert teacher.record.num_head_calls == MAX_BROKEN_DOWNLOADS == 10
        assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.FAILED_PRECONDITION, TeacherUnsupportedError),
        (grpc.StatusCode.PERMISSION_DENIED, TeacherPermissionError),
        (grpc.StatusCode.INTERNAL, TeacherInternalError),
    ],
)
async def test_another_refusal_is_an_error_at_once(code, error, connected, tmp_path: Path):
    async with connected(Script(head=HEAD)) as (teacher, client):
        teacher.script.refuse_head.append(Refusal(code, "because"))
        with pytest.raises(error, match="because"):
            await client.head_file(tmp_path)
        assert teacher.record.num_head_calls == 1
        assert names(tmp_path) == []


async def test_a_large_head_on_a_slow_line_takes_as_long_as_it_takes(connected, tmp_path: Path):
    script = Script(head=HEAD, head_piece_bytes=1000, head_piece_pause_s=0.1)
    async with connected(script, timeout_s=0.6, timing=Timing()) as (_, client):
        began = asyncio.get_running_loop().time()
        assert (await client.head_file(tmp_path)).read_bytes() == HEAD
        assert asyncio.get_running_loop().time() - began > 0.6


async def test_a_download_that_stands_still_is_given_up_when_the_time_is_up(connected, tmp_path: Path):
    script = Script(head=HEAD, head_piece_pause_s=60.0)
    async with connected(script, timeout_s=0.3, timing=Timing()) as (_, client):
        with pytest.raises(TeacherUnavailableError, match=r"no progress of the teacher for 0\.3 s"):
            await client.head_file(tmp_path)
        assert client.head_bytes_received == 4000
        assert names(tmp_path) == []


async def test_closing_ends_a_download_and_leaves_nothing_behind(connected, tmp_path: Path):
    script = Script(head=HEAD, head_piece_pause_s=60.0)
    async with connected(script, timing=Timing()) as (_, client):
        fetching = asyncio.create_task(client.head_file(tmp_path))
        await until(lambda: client.head_bytes_received)
        await client.close()
        with pytest.raises(TeacherUnavailableError, match="the teacher client was closed"):
            await fetching
        assert names(tmp_path) == []


async def test_a_closed_connection_says_so_of_a_head_that_was_on_its_way(teacher_type):
    async with teacher_type(Script(head=HEAD, head_piece_pause_s=60.0)) as teacher:
        address = parse_url(teacher.url)
        transport: Transport
        if address.speaks_http:
            transport = HttpTransport(address, api_key=None, tls_roots=None, traffic=Traffic(), max_connections=1)
        else:
            transport = GrpcTransport(address, api_key=None, tls_roots=None, traffic=Traffic())
        async with aclosing(transport.get_head()) as pieces:
            first = await anext(pieces)
            assert (len(first.data), first.num_bytes) == (4000, len(HEAD))
            reading = asyncio.create_task(anext(pieces))
            await asyncio.sleep(0.05)  # in which it begins to wait
            await transport.close()
            with pytest.raises(CallFailed, match="CANCELLED: the connection was closed"):
                await reading


async def test_a_cancelled_download_leaves_nothing_behind(connected, tmp_path: Path):
    script = Script(head=HEAD, head_piece_pause_s=60.0)
    async with connected(script, timing=Timing()) as (_, client):
        fetching = asyncio.create_task(client.head_file(tmp_path))
        await until(lambda: client.head_bytes_received)
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        assert names(tmp_path) == []
        script.head_piece_pause_s = 0.0
        assert (await client.head_file(tmp_path)).read_bytes() == HEAD


# ---------------------------------------------------------------- heads that are not right


async def test_another_head_than_announced_is_refused_with_both_checksums(connected, tmp_path: Path):
    announced = hashlib.sha256(b"another").hexdigest()
    async with connected(Script(head=HEAD, info={"head_sha256": announced})) as (teacher, client):
        with pytest.raises(HandshakeError, match=f"{HEAD_SHA256} instead of the announced {announced}"):
            await client.head_file(tmp_path)
        assert teacher.record.num_head_calls == 1
        assert names(tmp_path) == []


async def test_a_checksum_that_is_a_path_is_refused(connected, tmp_path: Path):
    async with connected(Script(head=HEAD, info={"head_sha256": "../head"})) as (teacher, client):
        with pytest.raises(HandshakeError, match=r"'\.\./head', which is none"):
            await client.head_file(tmp_path / "heads")
        assert teacher.record.num_head_calls == 0
        assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("announced", "complaint"),
    [
        (len(HEAD) + 1, f"output head of {len(HEAD) + 1} bytes and sent {len(HEAD)}$"),
        (100, "output head of 100 bytes and sent more"),
    ],
)
async def test_another_size_than_announced_is_refused(announced, complaint, tmp_path: Path):
    """Over HTTP it is a broken connection, which the protocol itself notices."""
    script = Script(head=HEAD, announce_head_bytes=announced)
    async with connected_to(FakeTeacher, script) as (teacher, client):
        with pytest.raises(HandshakeError, match=complaint):
            await client.head_file(tmp_path)
        assert teacher.record.num_head_calls == 1
        assert names(tmp_path) == []


async def test_a_head_that_is_too_long_is_not_read_to_its_end(tmp_path: Path):
    script = Script(head=bytes(100_000), announce_head_bytes=5000, head_piece_bytes=1000)
    async with connected_to(FakeTeacher, script) as (_, client):
        with pytest.raises(HandshakeError, match="sent more"):
            await client.head_file(tmp_path)
        assert client.head_bytes_received == 6000


@pytest.mark.parametrize("directory", ["file/heads", "to-nowhere"])
async def test_a_directory_that_cannot_be_written_to_is_said_before_anything_is_fetched(
    directory, connected, tmp_path: Path
):
    (tmp_path / "file").write_text("")
    (tmp_path / "to-nowhere").symlink_to(tmp_path / "gone" / "for" / "good")
    async with connected(Script(head=HEAD)) as (teacher, client):
        with pytest.raises(ConfigError, match=f"teacher's output head in {tmp_path}/{directory}"):
            await client.head_file(tmp_path / directory)
        assert teacher.record.num_head_calls == 0


async def test_a_replica_with_another_head_is_refused(teacher_type):
    async with teacher_type(Script(head=HEAD)) as first, teacher_type(Script(head=HEAD + b"\0")) as second:
        with pytest.raises(HandshakeError, match=f"output head '{HEAD_SHA256}' -> "):
            async with TeacherClient([first.url, second.url]):
                pass


async def test_a_download_that_breaks_begins_again_with_another_replica(teacher_type, tmp_path: Path):
    first, second = teacher_type(Script(head=HEAD)), teacher_type(Script(head=HEAD))
    for teacher in (first, second):
        teacher.script.break_head_after.append(4000)
    async with first, second, TeacherClient([first.url, second.url]) as client:
        path = await client.head_file(tmp_path)
        assert path.read_bytes() == HEAD
        assert min(first.record.num_head_calls, second.record.num_head_calls) == 1
        assert first.record.num_head_calls + second.record.num_head_calls == 3
