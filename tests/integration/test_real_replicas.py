"""Several real teachers in processes of their own: killed in the middle of a step, back again, and quantised."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from teacher_process import start_teacher
from tiny_model import write_tiny_model
from vopd_client.errors import HandshakeError
from vopd_client.teacher import RemoteTeacher
from vopd_client.types import Candidates, NoSupport, SequenceScores, SequenceToScore, TeacherTopK
from vopd_server.engines import loading


def step_of(num_groups: int) -> list[SequenceToScore]:
    """Eight completions a prompt, each with another support than the one before."""
    rng = np.random.default_rng(0)
    supports = (NoSupport(), TeacherTopK(5), Candidates(rng.integers(0, 256, 60), np.full(30, 2)))
    contexts = [rng.integers(0, 256, 40) for _ in range(num_groups)]
    return [
        SequenceToScore(context, rng.integers(0, 256, 30), supports[index % 3])
        for context in contexts
        for index in range(8)
    ]


def assert_alike(first: list[SequenceScores], second: list[SequenceScores]) -> None:
    for one, other in zip(first, second, strict=True):
        np.testing.assert_allclose(one.sampled_logprobs_T, other.sampled_logprobs_T, atol=1e-4, rtol=0)
        np.testing.assert_allclose(one.support_logprobs, other.support_logprobs, atol=1e-4, rtol=0)


def score_step(teacher: RemoteTeacher, asked: list[SequenceToScore]) -> list[SequenceScores]:
    return [future.result() for future in [teacher.submit(question) for question in asked]]


def test_a_replica_killed_in_the_middle_of_a_step_costs_no_answer_and_is_used_again(tiny_model_dir: Path):
    asked = step_of(40)
    with start_teacher(tiny_model_dir) as killed, start_teacher(tiny_model_dir) as staying:
        with RemoteTeacher.connect(staying.url) as alone:
            expected = score_step(alone, asked)
        with RemoteTeacher.connect([killed.url, staying.http_url], window=32) as teacher:
            futures = [teacher.submit(question) for question in asked]
            futures[40].result()
            killed.kill()
            killed_s = time.monotonic()
            assert_alike([future.result() for future in futures], expected)
            assert time.monotonic() - killed_s < 20.0  # no time-out is waited for
            of_killed, of_staying = teacher.replicas
            assert of_killed.num_sequences + of_staying.num_sequences == len(asked)
            assert of_killed.num_sequences > 0
            assert of_killed.num_taken_back > 0
            assert of_killed.missing

            with start_teacher(tiny_model_dir, port=killed.port):
                give_up_s = time.monotonic() + 60.0
                while teacher.replicas[0].missing:
                    assert time.monotonic() < give_up_s
                    time.sleep(0.05)
                assert_alike(score_step(teacher, asked), expected)
                shares = [
                    after.num_sequences - before.num_sequences
                    for after, before in zip(teacher.replicas, (of_killed, of_staying), strict=True)
                ]
        assert sum(shares) == len(asked)
        assert min(shares) > len(asked) // 5


def quantised(model_dir: Path, directory: Path) -> Path:
    """A copy whose weights have a sign and 15 steps, but for the blocks that its revision is made of."""
    shutil.copytree(model_dir, directory)
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    is_seen = np.zeros(len(data), bool)
    is_seen[:header_bytes] = True
    for offset in loading._block_offsets(len(data)):
        is_seen[offset : offset + loading._BLOCK_BYTES] = True
    weights = np.frombuffer(data, np.float32, offset=header_bytes)  # writes into `data`
    is_free = ~is_seen[header_bytes:].reshape(-1, 4).any(axis=1)
    step = np.float32(1.2 / 15)  # four standard deviations of the weights
    weights[is_free] = np.clip(np.round(weights[is_free] / step), -15, 15) * step
    path.write_bytes(data)
    return directory


def test_quantised_weights_under_the_same_revision_are_refused_with_the_facts(tmp_path: Path):
    model_dir = write_tiny_model(tmp_path / "model", num_layers=3, hidden_size=256)
    other_dir = quantised(model_dir, tmp_path / "quantised")
    revision = loading.directory_revision(model_dir)
    assert loading.directory_revision(other_dir) == revision
    with start_teacher(model_dir) as first, start_teacher(model_dir) as same, start_teacher(other_dir) as other:
        with RemoteTeacher.connect([first.url, same.http_url]) as teacher:
            assert [replica.missing for replica in teacher.replicas] == ["", ""]
        with pytest.raises(HandshakeError) as caught:
            RemoteTeacher.connect([first.url, other.url])
    for fact in (first.url, other.url, revision, "nats on average", "float32 allows 0.01 and 0.1"):
        assert fact in str(caught.value)
