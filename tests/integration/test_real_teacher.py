"""The client against the real server in a process of its own: killed, drained, restarted, with other weights."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from teacher_process import RunningTeacher, start_teacher
from vopd_client.errors import (
    HandshakeError,
    TeacherRequestError,
    TeacherUnsupportedError,
)
from vopd_client.teacher import RemoteTeacher
from vopd_client.types import Candidates, HiddenStates, NoSupport, SequenceScores, SequenceToScore, TeacherTopK


@pytest.fixture(params=["grpc", "http"])
def scheme(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def lasting(tiny_model_dir: Path) -> Iterator[RunningTeacher]:
    """For the tests that leave it as it was."""
    with start_teacher(tiny_model_dir) as server:
        yield server


@pytest.fixture(scope="module")
def giving_its_head(tiny_model_dir: Path) -> Iterator[RunningTeacher]:
    with start_teacher(tiny_model_dir, "--allow-full-vocab") as server:
        yield server


def url_of(server: RunningTeacher, scheme: str) -> str:
    return server.url if scheme == "grpc" else server.http_url


def ports_of(server: RunningTeacher) -> dict[str, int]:
    return {"port": server.port, "http_port": int(server.http_url.rpartition(":")[2])}


def real_sequences() -> list[SequenceToScore]:
    rng = np.random.default_rng(0)
    contexts = [rng.integers(0, 256, 20) for _ in range(4)]
    supports = (
        NoSupport(),
        TeacherTopK(5),
        Candidates(rng.integers(0, 256, 60), np.full(30, 2)),
    )
    return [SequenceToScore(contexts[index % 4], rng.integers(0, 256, 30), supports[index % 3]) for index in range(60)]


def assert_equal_scores(first: list[SequenceScores], second: list[SequenceScores], tolerance_nats: float) -> None:
    for one, other in zip(first, second, strict=True):
        np.testing.assert_allclose(one.sampled_logprobs_T, other.sampled_logprobs_T, atol=tolerance_nats, rtol=0)
        np.testing.assert_allclose(one.support_logprobs, other.support_logprobs, atol=tolerance_nats, rtol=0)
        np.testing.assert_array_equal(one.support_ids, other.support_ids)


def test_a_real_teacher_gives_the_same_scores_by_request_and_by_stream(scheme: str, lasting: RunningTeacher):
    asked = real_sequences()
    with RemoteTeacher.connect(url_of(lasting, scheme), window=16) as teacher:
        streamed = [future.result() for future in [teacher.submit(question) for question in asked]]
        assert_equal_scores(teacher.score(asked), streamed, tolerance_nats=1e-4)
        assert streamed[1].counts_T.tolist() == [5] * 30
        assert teacher.info.num_ids == 259
        tokens, tokenizer_json = teacher.tokenizer()
        assert len(tokens) == 259
        assert tokenizer_json


def test_a_real_teacher_killed_in_the_middle_and_restarted_gives_the_same_bits(scheme: str, tiny_model_dir: Path):
    asked = real_sequences()
    with start_teacher(tiny_model_dir, "--deterministic") as server:
        with RemoteTeacher.connect(url_of(server, scheme), window=8) as teacher:
            undisturbed = [future.result() for future in [teacher.submit(question) for question in asked]]
            futures = [teacher.submit(question) for question in asked]
            futures[5].result()
            server.kill()
            with start_teacher(tiny_model_dir, "--deterministic", **ports_of(server)):
                disturbed = [future.result() for future in futures]
        assert_equal_scores(undisturbed, disturbed, tolerance_nats=0)


def test_a_real_teacher_that_drains_answers_what_it_took_and_the_rest_waits(scheme: str, tiny_model_dir: Path):
    asked = real_sequences()
    with start_teacher(tiny_model_dir) as server, RemoteTeacher.connect(url_of(server, scheme), window=8) as teacher:
        futures = [teacher.submit(question) for question in asked]
        futures[5].result()
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        with start_teacher(tiny_model_dir, **ports_of(server)):
            answers = [future.result() for future in futures]
        assert [len(answer.sampled_logprobs_T) for answer in answers] == [30] * 60


def test_a_real_teacher_with_other_weights_is_refused_after_a_restart(
    scheme: str, tiny_model_dir: Path, tmp_path: Path
):
    from tiny_model import write_tiny_model

    other = write_tiny_model(tmp_path / "other", seed=1)
    with start_teacher(tiny_model_dir) as server, RemoteTeacher.connect(url_of(server, scheme)) as teacher:
        teacher.submit(real_sequences()[0]).result()
        server.kill()
        with start_teacher(other, **ports_of(server)), pytest.raises(HandshakeError, match="model revision"):
            teacher.submit(real_sequences()[0]).result()


def test_a_real_teachers_hidden_states_and_head_are_its_whole_distribution(
    scheme: str, giving_its_head: RunningTeacher, tmp_path: Path
):
    rng = np.random.default_rng(1)
    context, completion = rng.integers(0, 256, 20), rng.integers(0, 256, 30)
    temperature, k = 0.7, 259
    with RemoteTeacher.connect(url_of(giving_its_head, scheme), temperature=temperature) as teacher:
        asked = SequenceToScore(context, completion, HiddenStates())
        [scores, whole] = teacher.score([asked, SequenceToScore(context, completion, TeacherTopK(k))])
        streamed = teacher.submit(asked).result()
        path = teacher.head_file(tmp_path)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem == teacher.info.head_sha256
        assert teacher.head_bytes_received == path.stat().st_size
    weight_VH = load_file(path)["weight"].float().numpy()
    for answer in (scores, streamed):
        assert answer.hidden_states_TH is not None
        logits_TV = answer.hidden_states_TH @ weight_VH.T / temperature
        logprobs_TV = logits_TV - np.logaddexp.reduce(logits_TV, axis=1, keepdims=True)
        np.testing.assert_allclose(
            np.take_along_axis(logprobs_TV, whole.support_ids.reshape(30, k), axis=1).reshape(-1),
            whole.support_logprobs,
            atol=1e-4,
            rtol=0,
        )


def test_a_real_teacher_that_was_not_told_to_keeps_its_head(scheme: str, lasting: RunningTeacher, tmp_path: Path):
    with RemoteTeacher.connect(url_of(lasting, scheme)) as teacher:
        with pytest.raises(TeacherUnsupportedError, match="--allow-full-vocab"):
            teacher.head_file(tmp_path)
        with pytest.raises(TeacherUnsupportedError, match="hidden_states"):
            teacher.submit(SequenceToScore(np.arange(3), np.arange(3), HiddenStates())).result()


def test_a_real_teacher_names_the_field_that_is_wrong(scheme: str, lasting: RunningTeacher):
    with RemoteTeacher.connect(url_of(lasting, scheme)) as teacher:
        wrong = SequenceToScore(np.array([1]), np.array([100_000]))
        with pytest.raises(TeacherRequestError, match="completion_ids"):
            teacher.submit(wrong).result()
        with pytest.raises(TeacherRequestError, match="completion_ids"):
            teacher.score([wrong])
        with pytest.raises(TeacherRequestError, match="context"):
            teacher.submit(SequenceToScore(np.empty(0, np.int64), np.array([1]))).result()
        assert len(teacher.submit(real_sequences()[0]).result().sampled_logprobs_T) == 30
