"""TRL's own trainer for vLLM servers learns from our teacher by its address alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trl.experimental.server_distillation import ServerDistillationConfig, ServerDistillationTrainer
from trl.generation.vllm_client import VLLMClient

from fake_engine import fake_logprobs_TV
from teacher_process import RunningTeacher
from tenants import shared_teacher
from tiny_model import NUM_IDS
from vopd_client.teacher import RemoteTeacher
from vopd_client.types import SequenceToScore, TeacherTopK
from vopd_server.tenancy import TenantLimits

Settings = Callable[..., dict[str, Any]]
TOLERANCE_NATS = 1e-5  # JSON carries float32 exactly; what a request is batched with changes the last bits


@pytest.fixture(autouse=True)
def no_vllm_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's client asks whether the package vllm is there before it does anything; scoring uses nothing of it."""
    monkeypatch.setattr("trl.generation.vllm_client.is_vllm_available", lambda: True)


def own_trainer(student_dir: Path, settings: Settings, url: str, **changes: Any) -> ServerDistillationTrainer:
    # The student's output layer has rows that no token belongs to; the teacher knows none of them.
    sampling = {"suppress_tokens": list(range(NUM_IDS, NUM_IDS + 5))}
    arguments = settings(ServerDistillationConfig, teacher_model_server_url=url, generation_kwargs=sampling, **changes)
    return ServerDistillationTrainer(str(student_dir), **arguments)


def listen(trainer: ServerDistillationTrainer) -> list[tuple[dict[str, Any], dict[str, list[Any]]]]:
    """What TRL's client was asked from now on, and what it made of the teacher's answers."""
    heard: list[tuple[dict[str, Any], dict[str, list[Any]]]] = []
    ask = trainer.teacher_client.get_sequence_logprobs

    def heard_ask(**asked: Any) -> dict[str, list[Any]]:
        heard.append((asked, ask(**asked)))
        return heard[-1][1]

    trainer.teacher_client.get_sequence_logprobs = heard_ask
    return heard


@pytest.mark.parametrize(("beta", "top_k"), [(1.0, 1), (0.5, 1), (0.0, 8)])
def test_it_trains_two_steps_on_the_log_probabilities_that_our_own_client_gets(
    settings: Settings, student_dir: Path, teacher: RunningTeacher, beta: float, top_k: int
) -> None:
    trainer = own_trainer(student_dir, settings, teacher.http_url, beta=beta, loss_top_k=top_k)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    heard = listen(trainer)
    trainer.train()

    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in trainer.model.named_parameters())

    assert len(heard) == 4  # two steps of two microbatches of two completions
    with RemoteTeacher.connect(teacher.url) as ours:
        for asked, answered in heard:
            for row, (ids, prompt_length) in enumerate(zip(asked["sequences"], asked["prompt_lengths"], strict=True)):
                context, completion = np.array(ids[:prompt_length]), np.array(ids[prompt_length:])
                [scores] = ours.score([SequenceToScore(context, completion, TeacherTopK(top_k))])
                np.testing.assert_allclose(
                    np.array(answered["actual_logprobs"][row])[:, 0], scores.sampled_logprobs_T, atol=TOLERANCE_NATS
                )
                np.testing.assert_allclose(
                    np.array(answered["logprobs"][row]).ravel(), scores.support_logprobs, atol=TOLERANCE_NATS
                )
                assert np.array(answered["logprob_token_ids"][row]).ravel().tolist() == scores.support_ids.tolist()


def test_its_temperature_reaches_the_scores(settings: Settings, student_dir: Path, teacher: RunningTeacher) -> None:
    trainer = own_trainer(student_dir, settings, teacher.http_url, max_steps=1, temperature=2.0)
    heard = listen(trainer)
    trainer.train()
    asked, answered = heard[0]
    ids, prompt_length = asked["sequences"][0], asked["prompt_lengths"][0]
    with RemoteTeacher.connect(teacher.url, temperature=2.0) as ours:
        [scores] = ours.score([SequenceToScore(np.array(ids[:prompt_length]), np.array(ids[prompt_length:]))])
    np.testing.assert_allclose(
        np.array(answered["actual_logprobs"][0])[:, 0], scores.sampled_logprobs_T, atol=TOLERANCE_NATS
    )


async def test_a_key_travels_in_the_address(tmp_path: Path) -> None:
    """TRL has no setting for a key."""
    async with shared_teacher(tmp_path, {"job": TenantLimits()}) as shared:
        url = shared.teacher.server.http_url
        client = await asyncio.to_thread(VLLMClient, url.replace("//", f"//job:{shared.keys['job']}@"))
        answered = await asyncio.to_thread(
            client.get_sequence_logprobs, sequences=[[65, 66, 67]], prompt_lengths=[1], top_logprobs=2
        )
        with pytest.raises(Exception, match="Request failed: 401"):
            await asyncio.to_thread(VLLMClient, url)
    expected_TV = fake_logprobs_TV(np.array([65]), np.array([66, 67]))
    np.testing.assert_allclose(np.ravel(answered["actual_logprobs"][0]), expected_TV[[0, 1], [66, 67]], atol=1e-5)
