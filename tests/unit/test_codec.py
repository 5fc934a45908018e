"""Messages to values and back, without a transport."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fake_engine import FAKE_HIDDEN_SIZE, FakeEngine, fake_scores
from vopd_proto import teacher_pb2 as pb
from vopd_proto.arrays import pack_floats, unpack_floats, unpack_uints
from vopd_server.answer_codec import (
    SEQUENCE_OVERHEAD_BYTES,
    AnswerFormat,
    answer_bytes,
    answer_format_of,
    check_answer_fits,
    json_format,
    pack_chunks,
    pack_info,
    plan_chunks,
)
from vopd_server.codec import (
    check_float_type,
    check_no_unknown_fields,
    parse,
    request_id_of,
    shape_of,
    shapes_of_request,
    temperature_of,
    unpack_request,
)
from vopd_server.errors import InvalidRequestError
from vopd_server.types import (
    Candidates,
    HeadFile,
    HiddenStates,
    NoSupport,
    ScoreRequest,
    Scores,
    Support,
    TeacherTopK,
    empty_scores,
)
from vopd_server.validation import Limits
from wire_client import Question, ids, score_request, sequence_message, stream_sequence

CONTEXTS = [[5, 6, 7], [300, 70_000]]
FLOAT32 = AnswerFormat(pb.FLOAT32, pb.FLOAT32, FAKE_HIDDEN_SIZE)


def array(*values: int) -> Any:
    return np.asarray(values, np.int64)


# ---------------------------------------------------------------- in


def test_a_request_is_unpacked_as_it_was_meant() -> None:
    request = score_request(
        CONTEXTS,
        [Question([1, 2], k=3), Question([9], context=1, candidates=[[4, 4]]), Question([], context=1)],
        temperature=0.5,
    )
    top_k, candidates, empty = unpack_request(request, "id")
    assert (top_k.request_id, top_k.temperature, top_k.support) == ("id", 0.5, TeacherTopK(3))
    assert top_k.context_ids.tolist() == [5, 6, 7]
    assert top_k.completion_ids.tolist() == [1, 2]
    assert isinstance(candidates.support, Candidates)
    assert (candidates.support.ids.tolist(), candidates.support.counts_T.tolist()) == ([4, 4], [2])
    assert candidates.context_ids.tolist() == [300, 70_000]
    assert empty.support == NoSupport()
    assert empty.num_tokens == 2
    assert empty.context_ids is candidates.context_ids, "a shared context is one array"


def test_the_shape_is_known_without_unpacking() -> None:
    broken = score_request(CONTEXTS, [Question([1, 2], candidates=[[1], [2, 3]])])
    broken.sequences[0].candidates.counts.data = b"not counts"
    (shape,) = shapes_of_request(broken)
    assert (shape.context_length, shape.completion_length, shape.num_candidates) == (3, 2, 3)
    assert shape.field == "sequences[0]"


@pytest.mark.parametrize("field", ["context_length", "completion_length", "num_candidates"])
def test_declared_lengths_that_disagree_with_the_arrays_are_named(field: str) -> None:
    message = sequence_message(Question([1, 2], candidates=[[1], [2]]), CONTEXTS)
    setattr(message, field, 77)
    with pytest.raises(InvalidRequestError, match=f"sequence.{field}: declared 77; the message holds"):
        shape_of(message, field="sequence", num_context_ids=3)


def test_a_context_index_out_of_range_is_named() -> None:
    request = score_request(CONTEXTS, [Question([1]), Question([1], context=2)])
    with pytest.raises(InvalidRequestError, match=r"sequences\[1\].context_index: 2; the request holds 2 contexts"):
        shapes_of_request(request)


def test_bytes_that_are_no_whole_items_are_named() -> None:
    request = score_request(CONTEXTS, [Question([1, 2], context=1)])
    request.contexts[1].data += b"x"
    with pytest.raises(InvalidRequestError, match=r"contexts\[1\]: 7 bytes are not a whole number of 3-byte items"):
        unpack_request(request, "id")


def test_an_unset_temperature_is_one_and_a_zero_stays_zero() -> None:
    assert temperature_of(pb.ScoreRequest()) == 1
    assert temperature_of(pb.StreamSettings(temperature=0)) == 0


def test_a_request_without_an_id_gets_one_of_its_own() -> None:
    assert request_id_of(pb.ScoreRequest(request_id="mine")) == "mine"
    assert request_id_of(pb.ScoreRequest()) != request_id_of(pb.ScoreRequest()) != ""
    with pytest.raises(InvalidRequestError, match="request_id: 257 characters > 256"):
        request_id_of(pb.ScoreRequest(request_id="x" * 257))


def test_an_unknown_float_type_is_refused_by_naming_the_known_ones() -> None:
    with pytest.raises(InvalidRequestError, match="float_type: 9 is not known; FLOAT32, FLOAT16, BFLOAT16 are"):
        check_float_type(9)


def test_bytes_that_are_no_message_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="5 bytes that are no ScoreRequest message"):
        parse(pb.ScoreRequest, b"\xff\xff\xff\xff\xff")


def with_unknown(message: Any, number: int) -> bytes:
    """`message` with one more varint field of this number."""
    tag = number << 3
    tag_bytes = bytes([tag & 0x7F | 0x80, tag >> 7])
    return bytes(message.SerializeToString() + tag_bytes + b"\x01")


def nested(depth: str) -> pb.ScoreRequest:
    """A request whose `depth` holds an unknown field 99."""
    sequence = sequence_message(Question([1], candidates=[[1]]), CONTEXTS)
    request = pb.ScoreRequest(contexts=[ids([1])], sequences=[sequence, sequence])
    place = {
        "ScoreRequest": request,
        "contexts[0]": request.contexts[0],
        "sequences[1]": request.sequences[1],
        "sequences[1].candidates.ids": request.sequences[1].candidates.ids,
    }[depth]
    place.MergeFromString(with_unknown(place, 99))
    return request


@pytest.mark.parametrize("depth", ["ScoreRequest", "contexts[0]", "sequences[1]", "sequences[1].candidates.ids"])
def test_an_unknown_field_is_found_at_any_depth_and_named(depth: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"unknown fields in .*, by number: 99$") as refused:
        check_no_unknown_fields(nested(depth))
    assert refused.value.field == depth


def test_a_message_full_of_unknown_fields_makes_a_short_error() -> None:
    data = b"".join(with_unknown(pb.GetInfoRequest(), number) for number in range(100, 1100))
    with pytest.raises(InvalidRequestError, match=r"100, 101, .* and 992 more"):
        check_no_unknown_fields(pb.GetInfoRequest.FromString(data))


def test_known_fields_of_every_kind_are_not_unknown() -> None:
    question = Question([1, 2], candidates=[[1], [2]])
    check_no_unknown_fields(score_request(CONTEXTS, [question], temperature=2.0))
    check_no_unknown_fields(stream_sequence(question, CONTEXTS))


@given(st.binary(max_size=80))
def test_any_bytes_are_a_request_or_an_error_of_ours(data: bytes) -> None:
    with suppress(InvalidRequestError):
        request = parse(pb.ScoreRequest, data)
        check_no_unknown_fields(request)
        shapes_of_request(request)
        unpack_request(request, request_id_of(request))


# ---------------------------------------------------------------- out


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 60))
def test_chunks_cover_all_rows_in_order_within_their_size(row_bytes: list[int], max_bytes: int) -> None:
    chunks = plan_chunks(np.asarray(row_bytes, np.int64), max_bytes=max_bytes)
    covered = [row for rows in chunks for row in range(rows.start, rows.stop)]
    assert covered == list(range(len(row_bytes)))
    assert len(chunks) == 1 or all(rows.stop > rows.start for rows in chunks)
    for rows, following in zip(chunks, [*chunks[1:], None], strict=True):
        size = sum(row_bytes[rows])
        assert size <= max_bytes or rows.stop - rows.start == 1
        if following is not None:
            assert size + row_bytes[following.start] > max_bytes, "the next row would have fitted"


@pytest.mark.parametrize(
    "support",
    [NoSupport(), TeacherTopK(7), Candidates(array(5, 5, 9, 1, 0, 2), array(2, 0, 1, 3, 0)), HiddenStates()],
    ids=["sampled", "teacher_top_k", "candidates", "hidden_states"],
)
@pytest.mark.parametrize("max_bytes", [1, 12, 2**20])
def test_chunks_put_together_are_the_answer(support: Support, max_bytes: int) -> None:
    request = ScoreRequest("r", array(1, 2), array(3, 4, 5, 6, 7), support)
    scores = fake_scores(request)
    chunks = list(pack_chunks("name", request, scores, FLOAT32, max_bytes=max_bytes))
    assert [chunk.is_last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert [chunk.first_row for chunk in chunks] == np.cumsum([0] + [c.scores.num_rows for c in chunks])[:-1].tolist()
    assert (len(chunks) == 1) == (max_bytes == 2**20)
    sampled = np.concatenate([unpack_floats(chunk.scores.sampled_logprobs) for chunk in chunks])
    assert np.array_equal(sampled, scores.sampled_logprobs_T)
    if scores.support_logprobs is not None:
        logprobs = np.concatenate([unpack_floats(chunk.scores.support_logprobs) for chunk in chunks])
        assert np.array_equal(logprobs, scores.support_logprobs.reshape(-1))
    if scores.support_ids_TK is not None:
        found = np.concatenate([unpack_uints(chunk.scores.support_ids) for chunk in chunks])
        assert np.array_equal(found, scores.support_ids_TK.reshape(-1))
        assert {chunk.scores.k for chunk in chunks} == {7}
    if scores.hidden_states_TH is not None:
        hidden = np.concatenate([unpack_floats(chunk.scores.hidden_states) for chunk in chunks])
        assert np.array_equal(hidden, scores.hidden_states_TH.reshape(-1))
    assert {chunk.scores.HasField("hidden_states") for chunk in chunks} == {isinstance(support, HiddenStates)}


@pytest.mark.parametrize(
    ("dtype", "asked", "travels_as"),
    [
        ("bfloat16", pb.FLOAT32, pb.BFLOAT16),
        ("bfloat16", pb.FLOAT16, pb.BFLOAT16),
        ("float16", pb.BFLOAT16, pb.FLOAT16),
        ("float32", pb.FLOAT_TYPE_UNSPECIFIED, pb.FLOAT32),
        ("float32", pb.BFLOAT16, pb.BFLOAT16),
    ],
)
def test_hidden_states_of_a_16_bit_model_keep_their_bits_whatever_is_asked_for(
    dtype: str, asked: Any, travels_as: Any
) -> None:
    answer_format = answer_format_of(FakeEngine(dtype=dtype).info, asked)
    own = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[dtype]
    hidden_TH = torch.randn(2, FAKE_HIDDEN_SIZE, generator=torch.Generator().manual_seed(0)).to(own).float().numpy()
    request = ScoreRequest("r", array(1), array(3, 4), HiddenStates())
    scores = Scores(np.array([-1.2345678, -2], np.float32), hidden_states_TH=hidden_TH)
    (chunk,) = pack_chunks("n", request, scores, answer_format)
    assert chunk.scores.hidden_states == pack_floats(hidden_TH, travels_as)
    assert chunk.scores.hidden_states.type == travels_as
    assert chunk.scores.sampled_logprobs.type == (asked or pb.FLOAT32)
    found_TH = unpack_floats(chunk.scores.hidden_states).reshape(hidden_TH.shape)
    is_narrowed = dtype == "float32" and asked == pb.BFLOAT16
    assert np.array_equal(found_TH, hidden_TH) != is_narrowed
    assert len(chunk.scores.hidden_states.data) == 2 * answer_format.hidden_row_bytes


@given(
    st.integers(1, 30),
    st.one_of(st.none(), st.just("hidden"), st.integers(1, 20)),
    st.sampled_from([pb.FLOAT32, pb.FLOAT16]),
    st.sampled_from(["float32", "bfloat16"]),
    st.data(),
)
def test_an_answer_is_never_larger_than_foreseen(
    num_rows: int, support: int | str | None, float_type: Any, dtype: str, data: Any
) -> None:
    k = support if isinstance(support, int) else None
    candidates = None
    if support is None:
        candidates = data.draw(
            st.lists(st.lists(st.integers(0, 299), max_size=20), min_size=num_rows, max_size=num_rows)
        )
    name = "\u20ac" * 256
    answer_format = answer_format_of(FakeEngine(dtype=dtype).info, float_type)
    request = score_request(
        [[1, 2]], [Question([7] * num_rows, k=k, candidates=candidates, hidden=support == "hidden", name=name)]
    )
    (shape,) = shapes_of_request(request)
    (unpacked,) = unpack_request(request, "id")
    chunks = list(pack_chunks(name, unpacked, fake_scores(unpacked), answer_format))
    foreseen = answer_bytes(shape, answer_format)
    assert len(chunks) == 1
    assert foreseen - SEQUENCE_OVERHEAD_BYTES <= chunks[0].ByteSize() <= foreseen or k is not None
    check_answer_fits([shape], answer_format, foreseen)
    with pytest.raises(InvalidRequestError, match=f"up to {foreseen} bytes > max_message_bytes .*ScoreStream"):
        check_answer_fits([shape], answer_format, foreseen - 1)


def test_an_answer_in_json_is_bounded_as_if_its_numbers_were_float32() -> None:
    info = FakeEngine(dtype="bfloat16").info
    (shape,) = shapes_of_request(score_request([[1, 2]], [Question([7] * 5, hidden=True)]))
    as_floats = answer_bytes(shape, json_format(info)) - SEQUENCE_OVERHEAD_BYTES
    assert as_floats == 5 * 4 * (1 + FAKE_HIDDEN_SIZE)


def test_an_empty_completion_is_answered_by_one_chunk_without_rows() -> None:
    request = ScoreRequest("r", array(1), array(), TeacherTopK(2))
    (chunk,) = pack_chunks("e", request, empty_scores(request, hidden_size=3), FLOAT32)
    assert (chunk.is_last, chunk.first_row, chunk.scores.num_rows) == (True, 0, 0)
    assert not chunk.scores.HasField("hidden_states")
    request = ScoreRequest("r", array(1), array(), HiddenStates())
    (chunk,) = pack_chunks("e", request, empty_scores(request, hidden_size=3), FLOAT32)
    assert (chunk.is_last, chunk.scores.num_rows) == (True, 0)
    assert chunk.scores.HasField("hidden_states")


def test_the_handshake_says_what_the_engine_and_the_limits_are() -> None:
    engine = FakeEngine(vocab_size=40)
    limits = Limits(1000, 5, 6000, 64, SEQUENCE_OVERHEAD_BYTES)
    info = pack_info(engine.info, engine.tokenizer, limits, "1.2.3")
    assert (info.model_id, info.vocab_size, info.max_context_length, info.server_version) == ("fake", 40, 1000, "1.2.3")
    assert info.limits.max_support_size == 40, "never more than there are ids"
    assert (info.limits.max_sequences_per_request, info.limits.max_tokens_per_request) == (5, 6000)
    assert info.supports.candidates
    assert not info.supports.hidden_states
    assert info.head_sha256 == ""
    assert (info.tokenizer.begin_id, list(info.tokenizer.end_ids)) == (0, [1, 2])
    assert info.tokenizer.HasField("begin_id"), "id 0 is not the same as none"
    assert not info.tokenizer.HasField("pad_id")
    assert info.tokenizer.fingerprint == engine.tokenizer.fingerprint


def test_the_handshake_tells_the_checksum_of_a_head_that_is_given_away() -> None:
    engine = FakeEngine()
    with_head = replace(engine.info, head=HeadFile(Path("nowhere"), "abc123", 7), supports=frozenset({"hidden_states"}))
    info = pack_info(with_head, engine.tokenizer, Limits(1000, 5, 6000, 64, 2**20), "1.2.3")
    assert (info.head_sha256, info.supports.hidden_states) == ("abc123", True)
