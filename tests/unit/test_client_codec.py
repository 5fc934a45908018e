"""Messages, request planning and the stream's state machine, without a wire."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vopd_client.errors import AlignmentError, NonFiniteError, TeacherInternalError, TeacherRequestError
from vopd_client.teacher.codec import decode_scores, pack_ids, sequence_message, teacher_info
from vopd_client.teacher.outbox import ContextTable, Entry, Outbox
from vopd_client.teacher.requests import RequestLimits, plan_requests, score_request
from vopd_client.types import Candidates, HiddenStates, NoSupport, SequenceToScore, TeacherTopK
from vopd_proto import MAX_MESSAGE_BYTES
from vopd_proto import teacher_pb2 as pb
from vopd_proto.arrays import pack_floats, pack_uints, unpack_uints
from vopd_server.answer_codec import AnswerFormat, check_answer_fits
from vopd_server.codec import shapes_of_request

LIMITS = RequestLimits(max_sequences=4, max_tokens=100, max_message_bytes=2**20, hidden_size=2)


def sequence(context=(1, 2), completion=(3, 4, 5), support=None):
    return SequenceToScore(np.array(context), np.array(completion, np.int64), support or NoSupport())


def answer(sampled=(-1.0, -2.0, -3.0), support=(), ids=(), k=0, num_rows=None, float_type=pb.FLOAT32):
    return pb.SequenceScores(
        num_rows=len(sampled) if num_rows is None else num_rows,
        sampled_logprobs=pack_floats(np.array(sampled), float_type),
        support_logprobs=pack_floats(np.array(support), float_type),
        support_ids=pack_uints(np.array(ids, np.int64)),
        k=k,
    )


def decode(asked, *chunks):
    return decode_scores(asked, chunks, vocab_size=10, hidden_size=2)


def hidden_answer(rows, float_type=pb.FLOAT32):
    scores = answer(sampled=[-1.0] * len(rows))
    scores.hidden_states.CopyFrom(pack_floats(np.array(rows), float_type))
    return scores


RAGGED = Candidates(np.array([7, 8, 9]), np.array([2, 0, 1]))

# ---------------------------------------------------------------- requests


def test_candidates_travel_ragged_with_their_lengths_first():
    message = sequence_message(sequence(support=RAGGED), sequence_id="a", context_index=3)
    assert (message.context_length, message.completion_length, message.num_candidates) == (2, 3, 3)
    assert message.context_index == 3
    assert unpack_uints(message.completion_ids).tolist() == [3, 4, 5]
    assert unpack_uints(message.candidates.ids).tolist() == [7, 8, 9]
    assert unpack_uints(message.candidates.counts).tolist() == [2, 0, 1]


def test_no_support_and_top_k_are_told_apart():
    assert sequence_message(sequence(), sequence_id="").WhichOneof("support") is None
    assert sequence_message(sequence(support=TeacherTopK(5)), sequence_id="").teacher_top_k.k == 5
    asks_for_states = sequence_message(sequence(support=HiddenStates()), sequence_id="")
    assert pb.Sequence.FromString(asks_for_states.SerializeToString()).WhichOneof("support") == "hidden_states"


@pytest.mark.parametrize(
    ("support", "complaint"),
    [
        (Candidates(np.array([1]), np.array([1, 0])), "2 counts for a completion of 3 tokens"),
        (Candidates(np.array([1]), np.array([1, 1, 0])), "add up to 2, but there are 1 ids"),
    ],
)
def test_ragged_candidates_that_do_not_add_up_are_refused(support, complaint):
    with pytest.raises(AlignmentError, match=complaint):
        sequence_message(sequence(support=support), sequence_id="")


def test_impossible_requests_are_refused_before_they_travel():
    with pytest.raises(TeacherRequestError, match="completion_ids"):
        sequence_message(sequence(completion=(-1,)), sequence_id="")
    with pytest.raises(TeacherRequestError, match=r"k is 0"):
        sequence_message(sequence(support=TeacherTopK(0)), sequence_id="")


# ---------------------------------------------------------------- answers


def test_top_k_comes_back_ragged_like_everything_else():
    scores = decode(sequence(support=TeacherTopK(2)), answer(support=[-1, -2] * 3, ids=[5, 6, 7, 8, 9, 0], k=2))
    assert scores.counts_T.tolist() == [2, 2, 2]
    assert scores.support_ids.tolist() == [5, 6, 7, 8, 9, 0]
    assert scores.support_logprobs.tolist() == [-1, -2] * 3


def test_candidates_keep_the_order_of_the_request():
    scores = decode(sequence(support=RAGGED), answer(support=[-1, -2, -3]))
    assert scores.support_ids.tolist() == [7, 8, 9]
    assert scores.counts_T.tolist() == [2, 0, 1]


def test_without_a_support_every_row_is_empty():
    scores = decode(sequence(), answer())
    assert scores.sampled_logprobs_T.tolist() == [-1, -2, -3]
    assert scores.counts_T.tolist() == [0, 0, 0]
    assert len(scores.support_ids) == len(scores.support_logprobs) == 0


@pytest.mark.parametrize(
    "support",
    [NoSupport(), TeacherTopK(3), Candidates(np.empty(0, np.int64), np.empty(0, int)), HiddenStates()],
)
def test_an_empty_completion_has_an_empty_answer(support):
    scores = decode(sequence(completion=(), support=support), answer(sampled=()))
    assert len(scores.sampled_logprobs_T) == len(scores.counts_T) == 0
    if isinstance(support, HiddenStates):
        assert scores.hidden_states_TH is not None
        assert scores.hidden_states_TH.shape == (0, 2)
    else:
        assert scores.hidden_states_TH is None


def test_chunks_join_in_row_order():
    scores = decode(sequence(support=RAGGED), answer([-1.0], [-4.0, -5.0]), answer([-2.0]), answer([-3.0], [-6.0]))
    assert scores.sampled_logprobs_T.tolist() == [-1, -2, -3]
    assert scores.support_logprobs.tolist() == [-4, -5, -6]


@pytest.mark.parametrize("float_type", [pb.FLOAT32, pb.FLOAT16, pb.BFLOAT16])
def test_hidden_states_come_as_a_float32_matrix_whatever_their_type_and_their_chunks(float_type):
    rows = [[1.0, 2.0], [-3.0, 0.5], [0.25, 6.0]]
    asked = sequence(support=HiddenStates())
    for chunks in ([rows], [rows[:1], rows[1:]], [rows[:2], [], rows[2:]]):
        scores = decode(asked, *(hidden_answer(chunk, float_type) for chunk in chunks))
        assert scores.hidden_states_TH is not None
        assert scores.hidden_states_TH.dtype == np.float32
        assert scores.hidden_states_TH.tolist() == rows
        assert scores.sampled_logprobs_T.tolist() == [-1.0] * 3
        assert scores.counts_T.tolist() == [0, 0, 0]


@pytest.mark.parametrize("float_type", [pb.FLOAT16, pb.BFLOAT16])
def test_narrow_floats_are_widened(float_type):
    scores = decode(sequence(), answer([-1.0, -2.5, -4.0], float_type=float_type))
    assert scores.sampled_logprobs_T.dtype == np.float32
    assert scores.sampled_logprobs_T.tolist() == [-1.0, -2.5, -4.0]


@pytest.mark.parametrize(
    ("asked", "answered", "complaint"),
    [
        (sequence(), answer([-1.0, -2.0]), "2 rows of scores for a completion of 3"),
        (sequence(), answer(num_rows=4), "4 rows holds 3"),
        (sequence(support=RAGGED), answer(support=[-1, -2]), "support of 3 ids over 3 rows, answered with 3 ids and 2"),
        (sequence(support=RAGGED), answer(), "answered with 3 ids and 0"),
        (sequence(), answer(support=[-1.0]), "support of 0 ids"),
        (
            sequence(support=TeacherTopK(2)),
            answer(support=[-1] * 3, ids=[1] * 3, k=1),
            "top 2, answered with its top 1",
        ),
        (sequence(support=TeacherTopK(1)), answer(support=[-1] * 3, ids=[1, 2], k=1), "2 ids and 3 log-prob"),
        (sequence(support=TeacherTopK(1)), answer(support=[-1] * 3, ids=[1, 2, 10], k=1), "id 10 of 10"),
        (sequence(), pb.SequenceScores(num_rows=3, sampled_logprobs={"type": 1, "data": b"123"}), "3 bytes"),
        (sequence(), hidden_answer([[1, 2]] * 3), "asked for no hidden states, answered with 3 x 2"),
        (sequence(support=HiddenStates()), answer(), "asked for 3 x 2 hidden states, answered with none"),
        (sequence(support=HiddenStates()), hidden_answer([[1, 2, 3]] * 3), "3 rows holds 9 numbers .* not 3 x 2"),
        (sequence(support=HiddenStates()), hidden_answer([[1, 2]] * 2), "2 rows of scores for a completion of 3"),
        (sequence(), pb.SequenceScores(num_rows=3, sampled_logprobs={"type": 0, "data": b"1234"}), "float type 0"),
    ],
)
def test_answers_of_the_wrong_shape_are_refused(asked, answered, complaint):
    with pytest.raises(AlignmentError, match=complaint):
        decode(asked, answered)


def test_a_sampled_token_of_probability_zero_is_an_error_that_names_it():
    with pytest.raises(NonFiniteError, match="log-probability -inf of token 4 at position 1"):
        decode(sequence(), answer([-1.0, -np.inf, -3.0]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_plus_infinity_are_errors_everywhere(value):
    with pytest.raises(NonFiniteError, match="token 5 at position 2"):
        decode(sequence(), answer([-1.0, -2.0, value]))
    with pytest.raises(NonFiniteError, match="support id 9 at position 2"):
        decode(sequence(support=RAGGED), answer(support=[-1.0, -2.0, value]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_hidden_states_that_cannot_be_computed_with_are_errors_that_say_where(value):
    with pytest.raises(NonFiniteError, match=r"-?(nan|inf) in dimension 1 at position 2 .*\(1 such values\)"):
        decode(sequence(support=HiddenStates()), hidden_answer([[1, 2], [3, 4], [5, value]]))


def test_one_chunk_without_its_hidden_states_spoils_the_answer():
    with pytest.raises(AlignmentError, match="2 rows holds 0 numbers of hidden states, not 2 x 2"):
        decode(sequence(support=HiddenStates()), hidden_answer([[1, 2]]), answer([-1.0, -2.0]))


def test_a_candidate_of_probability_zero_is_a_fact():
    assert decode(sequence(support=RAGGED), answer(support=[-1, -np.inf, -3])).support_logprobs[1] == -np.inf


def test_absent_begin_and_pad_tokens_are_none_and_id_zero_is_not_absent():
    info = teacher_info(pb.GetInfoResponse(tokenizer=pb.TokenizerInfo(begin_id=0, end_ids=[2, 3])))
    assert (info.begin_id, info.pad_id, info.end_ids) == (0, None, (2, 3))
    assert info.supports == frozenset()


# ---------------------------------------------------------------- splitting


def indices(plan):
    return sorted(index for request in plan for index in request)


def test_requests_stay_within_the_number_of_sequences_and_tokens():
    plan = plan_requests([sequence(context=range(10), completion=range(20)) for _ in range(10)], LIMITS)
    assert [len(request) for request in plan] == [3, 3, 3, 1]
    assert [len(request) for request in plan_requests([sequence()] * 10, LIMITS)] == [4, 4, 2]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=30))
def test_every_sequence_is_sent_exactly_once_and_no_request_exceeds_the_limits(shapes):
    sequences = [sequence(context=[context] * 5, completion=range(length)) for context, length in shapes]
    plan = plan_requests(sequences, LIMITS)
    assert indices(plan) == list(range(len(sequences)))
    assert all(request for request in plan)
    for request in plan:
        tokens = sum(5 + len(sequences[index].completion_ids) for index in request)
        assert len(request) <= 4
        assert tokens <= 100


def test_a_sequence_beyond_the_limits_goes_alone():
    plan = plan_requests([sequence(), sequence(completion=range(200)), sequence()], LIMITS)
    assert indices(plan) == [0, 1, 2]
    assert [1] in plan


def test_large_answers_are_spread_over_requests():
    limits = RequestLimits(max_sequences=0, max_tokens=0, max_message_bytes=5000, hidden_size=200)
    plan = plan_requests([sequence(support=TeacherTopK(100))] * 4, limits)  # 3 rows x 100 x 8 bytes each
    assert [len(request) for request in plan] == [1, 1, 1, 1]
    plan = plan_requests([sequence(support=HiddenStates())] * 4, limits)  # 3 rows x 200 x 4 bytes each
    assert [len(request) for request in plan] == [1, 1, 1, 1]
    assert len(plan_requests([sequence()] * 3, limits)) == 1


def test_sequences_of_one_context_travel_together_and_the_context_once():
    sequences = [sequence(context=[index % 2 + 1]) for index in range(8)]
    plan = plan_requests(sequences, LIMITS)
    assert plan == [[0, 2, 4, 6], [1, 3, 5, 7]]
    request = score_request(
        [sequences[index] for index in [0, 1, 2]],
        request_id="r",
        temperature=0.5,
        float_type=pb.FLOAT16,
        max_message_bytes=2**20,
    )
    assert [unpack_uints(context).tolist() for context in request.contexts] == [[1], [2]]
    assert [message.context_index for message in request.sequences] == [0, 1, 0]
    assert (request.temperature, request.float_type) == (0.5, pb.FLOAT16)


def test_a_message_over_the_limit_is_refused_with_both_sizes():
    with pytest.raises(TeacherRequestError, match=r"\d+ bytes exceeds the teacher's limit of 100"):
        score_request(
            [sequence(completion=range(200))],
            request_id="",
            temperature=1.0,
            float_type=pb.FLOAT32,
            max_message_bytes=100,
        )


# ---------------------------------------------------------------- contexts of a stream


def test_a_context_is_sent_once_while_it_is_used_and_kept_a_little_longer():
    table = ContextTable(max_idle=1)
    assert table.use(b"a", 1) == (0, True)
    assert table.use(b"a", 1) == (0, False)
    table.done(b"a")
    table.done(b"a")
    assert table.release_surplus() == []
    assert table.use(b"a", 1) == (0, False)
    table.done(b"a")
    assert table.use(b"b", 1) == (1, True)
    table.done(b"b")
    assert table.release_surplus() == [0]
    assert table.use(b"a", 1) == (2, True)


def test_idle_contexts_make_room_and_used_ones_do_not():
    table = ContextTable(max_tokens=10)
    table.use(b"a", 6)
    assert not table.has_room_for(b"b", 6)
    assert table.has_room_for(b"b", 4)
    assert table.has_room_for(b"a", 6)
    table.done(b"a")
    assert table.has_room_for(b"b", 6)
    table.use(b"b", 6)
    assert table.release_surplus() == [0]


def test_one_context_is_always_admitted_however_long():
    assert ContextTable(max_tokens=10).has_room_for(b"a", 11)


# ---------------------------------------------------------------- the stream's state machine


def entry(name, context=(1,)):
    asked = sequence(context=context)
    message = sequence_message(asked, sequence_id=name)
    return Entry(name, asked, message, pack_ids("context_ids", asked.context_ids))


def chunk(name, first_row=0, num_rows=3, is_last=True):
    return pb.ScoreChunk(
        scores=pb.SequenceScores(sequence_id=name, num_rows=num_rows), first_row=first_row, is_last=is_last
    )


def sent(outbox):
    """Everything it wants to send now: `cI` a context, `rI` a release, a name a sequence."""
    names = []
    while messages := outbox.next_messages():
        for message in messages:
            match message.WhichOneof("message"):
                case "context":
                    names.append(f"c{message.context.context_index}")
                case "release_context":
                    names.append(f"r{message.release_context.context_index}")
                case _:
                    names.append(message.sequence.sequence_id)
    return names


def test_no_more_than_the_window_is_in_flight():
    outbox = Outbox(window=2)
    for name in "abc":
        outbox.add(entry(name))
    assert sent(outbox) == ["c0", "a", "b"]
    finished = outbox.receive(chunk("a"))
    assert finished is not None
    assert finished.sequence_id == "a"
    assert sent(outbox) == ["c"]


def test_what_is_unanswered_is_sent_again_in_order_and_partial_answers_are_dropped():
    outbox = Outbox(window=3)
    for name in "abcd":
        outbox.add(entry(name))
    sent(outbox)
    outbox.receive(chunk("b"))
    outbox.receive(chunk("c", num_rows=2, is_last=False))
    outbox.connection_lost()
    assert sent(outbox) == ["c0", "a", "c", "d"]
    finished = outbox.receive(chunk("c"))
    assert finished is not None
    assert len(finished.chunks) == 1


def test_chunks_must_come_in_row_order():
    outbox = Outbox(window=1)
    outbox.add(entry("a"))
    sent(outbox)
    assert outbox.receive(chunk("a", num_rows=1, is_last=False)) is None
    with pytest.raises(AlignmentError, match="starts at row 2, not at 1"):
        outbox.receive(chunk("a", first_row=2, num_rows=1))


def test_an_answer_to_nothing_and_a_second_answer_are_refused():
    outbox = Outbox(window=1)
    with pytest.raises(TeacherInternalError, match="'x', which is not waiting"):
        outbox.receive(chunk("x"))
    outbox.add(entry("a"))
    sent(outbox)
    outbox.receive(chunk("a"))
    with pytest.raises(TeacherInternalError, match="'a', which is not waiting"):
        outbox.receive(chunk("a"))


def test_an_abandoned_sequence_is_not_sent_or_keeps_its_place_until_it_is_answered():
    outbox = Outbox(window=1)
    first, second, third = entry("a"), entry("b"), entry("c")
    for each in (first, second, third):
        outbox.add(each)
    assert sent(outbox) == ["c0", "a"]
    outbox.abandon(second.sequence_id)
    outbox.abandon(first.sequence_id)
    assert sent(outbox) == []
    outbox.receive(chunk("a"))
    assert sent(outbox) == ["c"]


def test_an_abandoned_sequence_is_not_sent_again():
    outbox = Outbox(window=2)
    first = entry("a")
    outbox.add(first)
    outbox.add(entry("b"))
    sent(outbox)
    outbox.abandon(first.sequence_id)
    outbox.connection_lost()
    assert sent(outbox) == ["c0", "b"]


def test_contexts_wait_for_room_at_the_server():
    outbox = Outbox(window=9, max_context_tokens=5)
    outbox.add(entry("a", context=[1] * 3))
    outbox.add(entry("b", context=[2] * 3))
    assert sent(outbox) == ["c0", "a"]
    outbox.receive(chunk("a"))
    assert sent(outbox) == ["r0", "c1", "b"]


def test_a_leaving_replica_finishes_what_it_has_and_gets_no_more():
    outbox = Outbox(window=3)
    for name in "abc":
        outbox.add(entry(name))
    sent(outbox)
    refused = outbox.failed("b")
    outbox.send_again(refused)
    outbox.stop_sending()
    assert sent(outbox) == []
    outbox.receive(chunk("a"))
    assert not outbox.is_drained
    outbox.receive(chunk("c"))
    assert outbox.is_drained
    outbox.connection_lost()
    assert sent(outbox) == ["c0", "b"]


def test_what_is_not_sent_or_not_answered_can_go_to_another_replica():
    outbox, other = Outbox(window=2), Outbox(window=9)
    for name in "abcd":
        outbox.add(entry(name))
    sent(outbox)
    outbox.receive(chunk("a", num_rows=2, is_last=False))
    assert not outbox.abandon("a")
    assert [each.sequence_id for each in outbox.unanswered] == ["b", "c", "d"]
    assert [each.sequence_id for each in outbox.take_waiting()] == ["c", "d"]
    outbox.connection_lost()
    [taken] = outbox.take_waiting()
    assert not outbox.owes_answers
    for each in (entry("x", context=[7]), taken.copy()):
        other.add(each)
    assert sent(other) == ["c0", "x", "c1", "b"]
    assert taken.message.context_index == 0  # a copy's travels with the copy


@pytest.mark.parametrize("support", [TeacherTopK(100), HiddenStates()])
def test_no_planned_request_is_refused_for_the_size_of_its_answer(support):
    """The client plans by upper bounds; the teacher refuses by its own. They must count alike."""
    hidden_size = 576
    sequences = [sequence(context=range(50), completion=range(373), support=support) for _ in range(300)]
    limits = RequestLimits(
        max_sequences=256, max_tokens=131_072, max_message_bytes=MAX_MESSAGE_BYTES, hidden_size=hidden_size
    )
    plan = plan_requests(sequences, limits)
    assert len(plan) > 1
    for indices_of_request in plan:
        request = score_request(
            [sequences[index] for index in indices_of_request],
            request_id="r",
            temperature=1.0,
            float_type=pb.FLOAT32,
            max_message_bytes=MAX_MESSAGE_BYTES,
        )
        check_answer_fits(
            shapes_of_request(request), AnswerFormat(pb.FLOAT32, pb.FLOAT32, hidden_size), MAX_MESSAGE_BYTES
        )
