"""Whether a teacher can teach a student: pure comparisons."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vopd_client.errors import HandshakeError
from vopd_client.handshake import (
    IdSwap,
    check_capabilities,
    check_revision,
    check_same_teacher,
    check_tokenizers,
    compare_end_tokens,
    differing_ids,
    end_token_swap,
    num_shared_ids,
)
from vopd_client.types import Candidates, NoSupport, SequenceScores, SequenceToScore, TeacherInfo, TeacherTopK
from vopd_proto.fingerprint import tokenizer_fingerprint

INFO = TeacherInfo(
    model_id="teacher",
    model_revision="1",
    fingerprint="f",
    num_ids=100,
    begin_id=None,
    end_ids=(2,),
    pad_id=None,
    chat_template="",
    vocab_size=128,
    hidden_size=8,
    max_context_length=1000,
    dtype="float32",
    engine="fake",
    engine_version="0",
    server_version="0",
    supports=frozenset({"sampled", "teacher_top_k", "candidates"}),
    any_temperature=True,
    deterministic=False,
    max_sequences_per_request=8,
    max_tokens_per_request=2000,
    max_support_size=100,
    head_sha256="aa",
)

# ---------------------------------------------------------------- tokenizers


def check(student, teacher):
    fetched = []

    def fetch():
        fetched.append(True)
        return teacher

    check_tokenizers(student, teacher_fingerprint=tokenizer_fingerprint(teacher), fetch_teacher_tokens=fetch)
    return fetched


def test_equal_tables_pass_and_are_not_fetched():
    assert check([b"a", b"b"], [b"a", b"b"]) == []


def test_differing_tokens_are_named_five_at_most():
    student = [b"a", *(b"s%d" % i for i in range(7)), "ü".encode()]
    teacher = [b"a", *(b"t%d" % i for i in range(7)), "ü".encode()]
    with pytest.raises(HandshakeError) as caught:
        check(student, teacher)
    message = str(caught.value)
    assert "9 and 9 entries, 7 of them different" in message
    assert "id 1: student 's0', teacher 't0'" in message
    assert "id 5: student 's4', teacher 't4'" in message
    assert "s5" not in message
    assert "and 2 more" in message


def test_a_longer_table_differs_and_says_which_ids_it_has_alone():
    with pytest.raises(HandshakeError, match=r"(?s)2 and 3 entries.*id 2: student has no such id, teacher 'c'"):
        check([b"a", b"b"], [b"a", b"b", b"c"])


def test_a_token_that_is_not_utf8_can_be_shown():
    with pytest.raises(HandshakeError, match="id 0"):
        check([b"\xff"], [b"\xfe"])


def test_differing_ids_are_in_order():
    assert differing_ids([b"a", b"x", b"c"], [b"a", b"y"]) == [1, 2]


def test_ids_are_shared_up_to_the_smallest_of_heads_and_table():
    assert num_shared_ids(student_vocab_size=320, teacher_vocab_size=259, num_ids=300) == 259
    assert num_shared_ids(student_vocab_size=320, teacher_vocab_size=512, num_ids=300) == 300


# ---------------------------------------------------------------- end tokens


def test_equal_end_tokens_need_nothing():
    ends = compare_end_tokens((2,), (2, 3))
    assert (ends.swap, ends.unknown_to_teacher, ends.message) == (None, frozenset(), "")


def test_an_end_that_the_teacher_lists_but_hardly_ever_writes_is_mapped_to_its_main_one():
    """A base model against the chat model of its family, which lists the base's end behind its own."""
    ends = compare_end_tokens((3,), (2, 3))
    assert ends.swap == (3, 2)
    assert ends.unknown_to_teacher == {3}
    assert ends.message


def test_disjoint_end_tokens_are_swapped_and_said():
    ends = compare_end_tokens((0,), (2, 3))
    assert ends.swap == (0, 2)
    assert ends.unknown_to_teacher == {0}
    assert ends.message == "student ends with 0, teacher with 2, 3"


def test_with_one_end_token_in_common_nothing_is_swapped():
    ends = compare_end_tokens((0, 2), (2,))
    assert ends.swap is None
    assert ends.unknown_to_teacher == {0}
    assert ends.message


def test_a_teacher_without_end_token_cannot_be_mapped_to():
    ends = compare_end_tokens((0,), ())
    assert ends.swap is None
    assert ends.message == "student ends with 0, teacher with no token"


def test_only_map_swaps():
    ends = compare_end_tokens((0,), (2,))
    assert [end_token_swap(ends, mode).pair for mode in ("map", "drop", "keep")] == [(0, 2), None, None]


@given(st.lists(st.integers(0, 9)), st.integers(0, 9), st.integers(0, 9))
def test_a_swap_is_a_permutation_and_its_own_inverse(ids, first, second):
    swap = IdSwap((first, second))
    array = np.array(ids, np.int64)
    assert np.array_equal(swap.ids(swap.ids(array)), array)
    assert sorted(swap.ids(np.arange(10)).tolist()) == list(range(10))


def test_completion_and_candidates_are_swapped_on_the_way_out_and_the_context_is_not():
    swap = IdSwap((0, 2))
    sequence = SequenceToScore(np.array([0, 2]), np.array([5, 0]), Candidates(np.array([2, 5, 0]), np.array([2, 1])))
    sent = swap.to_teacher(sequence)
    assert sent.context_ids.tolist() == [0, 2]
    assert sent.completion_ids.tolist() == [5, 2]
    assert isinstance(sent.support, Candidates)
    assert sent.support.ids.tolist() == [0, 5, 2]
    assert swap.to_teacher(SequenceToScore(np.array([1]), np.array([0]), TeacherTopK(3))).support == TeacherTopK(3)


def test_support_ids_are_swapped_on_the_way_back_and_their_logprobs_stay():
    logprobs = np.array([-0.1, -3.0], np.float32)
    scores = SequenceScores(np.array([-1.0], np.float32), np.array([2, 0]), logprobs, np.array([2]))
    back = IdSwap((0, 2)).from_teacher(scores)
    assert back.support_ids.tolist() == [0, 2]
    assert back.support_logprobs is logprobs


def test_no_swap_changes_nothing():
    sequence = SequenceToScore(np.array([1]), np.array([0]), NoSupport())
    assert IdSwap(None).to_teacher(sequence) is sequence
    assert IdSwap(None).ids(sequence.completion_ids) is sequence.completion_ids


# ---------------------------------------------------------------- capabilities


def capabilities(info=INFO, **changes):
    settings = {
        "support": "student",
        "top_k": 100,
        "temperature": 1.0,
        "objective": "vopd",
        "max_prompt_tokens": 500,
        "max_new_tokens": 500,
        **changes,
    }
    return check_capabilities(info, **settings)


def test_a_teacher_that_can_do_everything_is_asked_for_what_was_wanted():
    assert capabilities().support == "candidates"
    assert capabilities(support="teacher").support == "teacher_top_k"
    assert capabilities().message == capabilities(support="teacher").message == ""


def test_a_teacher_that_cannot_gather_gives_its_own_top_k_and_says_so():
    plan = capabilities(replace(INFO, supports=frozenset({"sampled", "teacher_top_k"})))
    assert plan.support == "teacher_top_k"
    assert "its own top-k" in plan.message


def test_without_a_support_only_opd_can_train():
    info = replace(INFO, supports=frozenset({"sampled"}))
    assert capabilities(info, objective="opd").support == "sampled"
    with pytest.raises(HandshakeError, match="vopd needs a support; this teacher offers sampled"):
        capabilities(info)


@pytest.mark.parametrize(
    ("info", "changes", "complaint"),
    [
        (INFO, {"top_k": 101}, "top-k 101 > max_support_size 100"),
        (replace(INFO, any_temperature=False), {"temperature": 0.7}, "temperature 0.7"),
        (INFO, {"max_new_tokens": 501}, "prompt 500 . completion 501 tokens > max_context_length 1000"),
        (replace(INFO, max_tokens_per_request=900), {}, "> max_tokens_per_request 900"),
        (INFO, {"deterministic": True}, "needs a deterministic teacher"),
    ],
)
def test_what_the_teacher_cannot_do_is_refused_with_both_numbers(info, changes, complaint):
    with pytest.raises(HandshakeError, match=complaint):
        capabilities(info, **changes)


def test_a_limit_that_is_just_met_is_no_problem():
    capabilities(replace(INFO, any_temperature=False, deterministic=True), deterministic=True)


def test_everything_that_does_not_fit_is_said_at_once():
    with pytest.raises(HandshakeError, match=r"top-k.*") as caught:
        capabilities(top_k=1000, max_new_tokens=10_000)
    assert "max_context_length" in str(caught.value)


# ---------------------------------------------------------------- reconnects


def test_the_same_teacher_passes_even_with_other_limits():
    check_same_teacher(INFO, replace(INFO, max_sequences_per_request=1, server_version="2"), where="x")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_revision": "2"}, "model revision '1' -> '2'"),
        ({"fingerprint": "g"}, "tokenizer fingerprint 'f' -> 'g'"),
        ({"vocab_size": 256}, "vocabulary size 128 -> 256"),
        ({"head_sha256": "bb"}, "output head 'aa' -> 'bb'"),
        ({"head_sha256": ""}, "output head 'aa' -> ''"),
        ({"supports": frozenset({"sampled", "candidates"})}, "no longer offers teacher_top_k"),
    ],
)
def test_another_teacher_is_refused_and_the_change_named(change, complaint):
    with pytest.raises(HandshakeError, match=complaint):
        check_same_teacher(INFO, replace(INFO, **change), where="grpc://other:1")


def test_a_teacher_that_gives_more_away_than_before_is_still_the_same():
    check_same_teacher(replace(INFO, head_sha256=""), INFO, where="x")


def test_a_deterministic_teacher_must_stay_so():
    with pytest.raises(HandshakeError, match="no longer deterministic"):
        check_same_teacher(replace(INFO, deterministic=True), INFO, where="x")


def test_an_answer_of_another_revision_is_refused():
    check_revision("1", "1", where="x")
    with pytest.raises(HandshakeError, match="changed from '1' to '2' in the middle of the run"):
        check_revision("1", "2", where="x")
