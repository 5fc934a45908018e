"""A teacher in this process: the same answers as the model itself, without a wire."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from vopd_client.errors import (
    ConfigError,
    TeacherRequestError,
    TeacherUnavailableError,
    TeacherUnsupportedError,
)
from vopd_client.local_teacher import LocalTeacher
from vopd_client.types import Candidates, HiddenStates, NoSupport, SequenceToScore, TeacherTopK

TEMPERATURE = 0.7
CONTEXT = np.array([72, 101, 108, 108, 111])
COMPLETION = np.array([32, 119, 111, 114, 108, 100])


@pytest.fixture(scope="module")
def teacher(tiny_model_dir: Path) -> Iterator[LocalTeacher]:
    with LocalTeacher.load(str(tiny_model_dir), dtype="float32", device="cpu", temperature=TEMPERATURE) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def logprobs_TV(tiny_model_dir: Path) -> torch.Tensor:
    """From a plain forward of the whole sequence: row C - 1 + t predicts completion token t."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    with torch.no_grad():
        logits_SV = model(torch.tensor(np.concatenate([CONTEXT, COMPLETION]))[None]).logits[0]
    return (logits_SV[len(CONTEXT) - 1 : -1] / TEMPERATURE).log_softmax(-1)


def test_it_says_what_it_is(teacher: LocalTeacher):
    assert teacher.info.num_ids == teacher.info.vocab_size == 259
    assert teacher.info.supports == {"sampled", "teacher_top_k", "candidates", "hidden_states"}
    assert teacher.info.max_support_size == 259
    assert (teacher.bytes_sent, teacher.bytes_received, teacher.waiting_reason) == (0, 0, "")
    assert len(teacher.tokenizer()[0]) == 259


def test_every_support_agrees_with_a_plain_forward(teacher: LocalTeacher, logprobs_TV: torch.Tensor):
    candidates = Candidates(np.array([5, 6, 5, 200]), np.array([2, 0, 1, 0, 0, 1]))
    supports = (NoSupport(), TeacherTopK(4), candidates)
    sampled, top, ragged = teacher.score([SequenceToScore(CONTEXT, COMPLETION, support) for support in supports])
    expected_T = logprobs_TV[torch.arange(6), torch.tensor(COMPLETION)].numpy()
    for scores in (sampled, top, ragged):
        np.testing.assert_allclose(scores.sampled_logprobs_T, expected_T, atol=1e-4)
    top_TK = logprobs_TV.topk(4)
    assert top.support_ids.tolist() == top_TK.indices.flatten().tolist()
    np.testing.assert_allclose(top.support_logprobs, top_TK.values.flatten().numpy(), atol=1e-4)
    rows = torch.tensor([0, 0, 2, 5])
    np.testing.assert_allclose(
        ragged.support_logprobs, logprobs_TV[rows, torch.tensor(candidates.ids)].numpy(), atol=1e-4
    )
    assert sampled.counts_T.tolist() == [0] * 6


def test_hidden_states_through_the_head_are_the_whole_distribution(teacher: LocalTeacher, logprobs_TV: torch.Tensor):
    asked = SequenceToScore(CONTEXT, COMPLETION, HiddenStates())
    [scores] = teacher.score([asked])
    assert scores.hidden_states_TH is not None
    assert scores.hidden_states_TH.shape == (6, teacher.info.hidden_size)
    path = teacher.head_file()
    with safe_open(path, framework="pt") as head:
        logits_TV = torch.from_numpy(scores.hidden_states_TH) @ head.get_tensor("weight").T
        assert head.metadata() == {"logit_scale": "1.0"}
    torch.testing.assert_close((logits_TV / TEMPERATURE).log_softmax(-1), logprobs_TV, atol=1e-4, rtol=0)
    rows = torch.arange(6)
    np.testing.assert_allclose(
        scores.sampled_logprobs_T, logprobs_TV[rows, torch.tensor(COMPLETION)].numpy(), atol=1e-4
    )
    assert hashlib.sha256(path.read_bytes()).hexdigest() == teacher.info.head_sha256
    assert teacher.submit(SequenceToScore(CONTEXT, COMPLETION)).result().hidden_states_TH is None


def test_the_head_lasts_as_long_as_its_teacher(tiny_model_dir: Path, tmp_path: Path):
    with LocalTeacher.load(str(tiny_model_dir), device="cpu") as teacher:
        path = teacher.head_file(tmp_path)
        assert path.is_file()
    assert not path.exists()
    assert list(tmp_path.iterdir()) == []  # which is for heads that come over a wire


def test_without_leave_there_are_neither_hidden_states_nor_a_head(tiny_model_dir: Path):
    with LocalTeacher.load(str(tiny_model_dir), device="cpu", allow_full_vocab=False) as teacher:
        assert teacher.info.head_sha256 == ""
        assert "hidden_states" not in teacher.info.supports
        with pytest.raises(TeacherUnsupportedError, match="allow_full_vocab"):
            teacher.head_file()
        with pytest.raises(TeacherUnsupportedError, match="hidden_states"):
            teacher.score([SequenceToScore(CONTEXT, COMPLETION, HiddenStates())])


def test_futures_of_many_submits_are_each_answered_their_own(teacher: LocalTeacher):
    completions = [COMPLETION[:length] for length in range(7)]
    futures = [teacher.submit(SequenceToScore(CONTEXT, completion)) for completion in completions]
    whole = teacher.score([SequenceToScore(CONTEXT, COMPLETION)])[0].sampled_logprobs_T
    for length, future in enumerate(futures):
        np.testing.assert_allclose(future.result().sampled_logprobs_T, whole[:length], atol=1e-4)


@pytest.mark.parametrize(
    ("sequence", "complaint"),
    [
        (SequenceToScore(np.empty(0, np.int64), COMPLETION), "context_ids: empty"),
        (SequenceToScore(CONTEXT, np.array([259])), "completion_ids: id 259 at position 0"),
        (SequenceToScore(CONTEXT, np.zeros(40_000, np.int64)), "max_context_length"),
        (SequenceToScore(CONTEXT, COMPLETION, TeacherTopK(260)), r"must lie in \[1, 259\]"),
        (SequenceToScore(CONTEXT, COMPLETION, Candidates(np.array([1]), np.array([1]))), "1 counts for 6"),
    ],
)
def test_bad_input_is_refused_as_over_the_wire_and_the_next_is_answered(
    teacher: LocalTeacher, sequence: SequenceToScore, complaint: str
):
    with pytest.raises(TeacherRequestError, match=complaint):
        teacher.submit(sequence).result()
    with pytest.raises(TeacherRequestError, match=complaint):
        teacher.score([sequence])
    assert len(teacher.score([SequenceToScore(CONTEXT, COMPLETION)])[0].sampled_logprobs_T) == 6


def test_a_temperature_that_is_none_is_refused_when_loading_and_leaves_no_head_behind(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(TeacherRequestError, match="temperature"):
        LocalTeacher.load(str(tiny_model_dir), device="cpu", temperature=0.0)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_there_is_a_setting_to_put_right(tmp_path: Path):
    with pytest.raises(ConfigError, match="missing"):
        LocalTeacher.load(str(tmp_path / "missing"), device="cpu")


def test_a_closed_teacher_answers_nothing_more(tiny_model_dir: Path):
    teacher = LocalTeacher.load(str(tiny_model_dir), device="cpu")
    teacher.close()
    teacher.close()
    with pytest.raises(TeacherUnavailableError):
        teacher.submit(SequenceToScore(CONTEXT, COMPLETION))


def test_a_deterministic_teacher_gives_the_same_bits_in_any_company(tiny_model_dir: Path):
    with LocalTeacher.load(str(tiny_model_dir), device="cpu", deterministic=True) as teacher:
        assert teacher.info.deterministic
        alone = teacher.score([SequenceToScore(CONTEXT, COMPLETION)])[0].sampled_logprobs_T
        many = teacher.score([SequenceToScore(CONTEXT, COMPLETION[:length]) for length in (6, 3, 5)])
        assert many[0].sampled_logprobs_T.tobytes() == alone.tobytes()


def test_without_the_servers_packages_the_error_says_what_to_install():
    program = (
        "import sys\n"
        "sys.modules['torch'] = None  # as if it were not installed\n"
        "from vopd_client.local_teacher import LocalTeacher\n"
        "from vopd_client.errors import ConfigError\n"
        "try:\n"
        "    LocalTeacher.load('any')\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "needs the package torch: pip install 'vopd[server]'" in ended.stdout
