"""The work of one training step, piece by piece, on the real parts: teacher forward, rollouts, update, optimizer.

Sizes near the demo's: 8 prompts of 40 to 256 tokens, 2 rollouts each, up to 64 new tokens; the teacher reads 16 whole
sequences of 320 tokens. Each piece says how many tokens it worked on, and how many of them were padding.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from floors import MachineRates, ModelShape, forward_floor_s, rollouts_floor_s, update_floor_s
from vopd_client.batch import Batch, collate, plan_microbatches
from vopd_client.losses import compute_loss
from vopd_client.optimization import make_optimizer, scale_and_clip
from vopd_client.rollouts.base import Rollout, RolloutKey
from vopd_client.rollouts.transformers import RolloutRequest, RolloutSampler
from vopd_client.student import LoadedStudent, load_student
from vopd_client.train_config import TrainConfig
from vopd_client.types import SequenceScores
from vopd_proto.arrays import IntArray
from vopd_server.engines.transformers import TransformersEngine
from vopd_server.types import ScoreRequest


@dataclass(frozen=True)
class Sizes:
    """Of one step, in tokens where nothing else is said."""

    num_prompts: int = 8
    rollouts_per_prompt: int = 2
    shortest_prompt: int = 40
    longest_prompt: int = 256
    max_new_tokens: int = 64
    teacher_sequences: int = 16
    teacher_context: int = 256
    teacher_completion: int = 64

    @property
    def prompt_lengths(self) -> list[int]:
        return [int(length) for length in np.linspace(self.shortest_prompt, self.longest_prompt, self.num_prompts)]


@dataclass(frozen=True)
class Piece:
    """One run of one piece of work.

    tokens: that it is about: read by the teacher, written by the rollouts, learnt from (prompts included) by an
        update. padded_tokens: what the model read for it, padding included, and needed_tokens: without.
    floor_s: None where there is no floor to be told.
    """

    tokens: int
    padded_tokens: int
    needed_tokens: int
    floor_s: float | None

    @property
    def padding(self) -> float | None:
        return 1 - self.needed_tokens / self.padded_tokens if self.padded_tokens else None


class TrainingStep:
    """The student's half of a step. Settings are the trainer's defaults; mixed precision is bf16."""

    def __init__(self, model: Path, sizes: Sizes, rates: MachineRates) -> None:
        self._config = TrainConfig(student=str(model), teacher_model=str(model), prompts="-")
        self._student: LoadedStudent = load_student(model, device="cpu")
        self._sizes, self._rates = sizes, rates
        self._shape = ModelShape.of(self._student.module.causal_lm.config)
        self._accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        optimizer = make_optimizer(self._student.module, learning_rate=1e-6, weight_decay=0.0)
        self._model, self._optimizer = self._accelerator.prepare(self._student.module, optimizer)
        self._requests = self._make_requests()
        self._rollouts: list[Rollout] = []
        self._step = 0

    def _make_requests(self) -> list[RolloutRequest]:
        """Prompts of real words: the opening of one text, cut to the lengths."""
        text = " ".join(f"Question {n}: what is {n} times {n + 3}? Answer: {n * (n + 3)}." for n in range(2, 60))
        ids = np.array(self._student.tokenizer(text)["input_ids"], np.int64)
        return [
            (RolloutKey(0, prompt, rollout), ids[:length])
            for prompt, length in enumerate(self._sizes.prompt_lengths)
            for rollout in range(self._sizes.rollouts_per_prompt)
        ]

    def rollouts(self) -> Piece:
        """All rollouts of a step; each run draws others."""
        config = self._config
        sampler = RolloutSampler(
            self._student.module.model,
            num_shared_ids=self._student.vocab_size,
            end_ids=self._student.end_ids,
            pad_id=self._student.pad_id,
            max_new_tokens=self._sizes.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            support_mass=config.support_mass,
            seed=config.seed,
            batch_size=config.rollout_batch_size,
            mixed_precision="bf16",
        )
        self._step += 1
        requests = [(RolloutKey(self._step, key.prompt_index, key.rollout_index), ids) for key, ids in self._requests]
        with tokens_read(self._student.module.causal_lm) as read:
            self._rollouts = list(sampler.sample(requests))
        prompts = {ids.tobytes(): len(ids) for _, ids in requests}
        rows = [(len(rollout.prompt_ids), len(rollout.completion_ids)) for rollout in self._rollouts]
        return Piece(
            tokens=sum(completion for _, completion in rows),
            padded_tokens=sum(read),
            needed_tokens=sum(prompts.values()) + sum(completion - 1 for _, completion in rows),
            floor_s=rollouts_floor_s(self._rates, self._shape, list(prompts.values()), rows, "bfloat16"),
        )

    def batches(self) -> list[Batch]:
        """The microbatches of the last rollouts, with scores that a teacher might have given."""
        lengths = [len(rollout.prompt_ids) + len(rollout.completion_ids) for rollout in self._rollouts]
        return [
            collate(
                [self._rollouts[index] for index in indices],
                [invented_scores(self._rollouts[index]) for index in indices],
                prompt_names=["bench"] * len(indices),
                pad_id=self._student.pad_id,
                num_shared_ids=self._student.vocab_size,
                max_support=self._config.top_k,
            )
            for indices in plan_microbatches(lengths, self._config.microbatch_tokens)
        ]

    def update(self, batches: Sequence[Batch]) -> Piece:
        """Forward and backward of all microbatches; gradients are there afterwards."""
        self._student.module.train()
        self._optimizer.zero_grad()
        for batch in batches:
            student = self._model(
                batch.input_ids_BS,
                batch.attention_mask_BS,
                batch.row_index_BT,
                batch.completion_ids_BT,
                batch.support_ids_BTK,
                batch.support_mask_BTK,
                batch.loss_mask_BT,
            )
            loss = compute_loss(self._config.objective, student, batch, tail=self._config.tail)
            self._accelerator.backward(loss.loss_sum)
        lengths = [int(length) for batch in batches for length in batch.attention_mask_BS.sum(dim=1)]
        scored = sum(batch.num_valid_tokens for batch in batches)
        return Piece(
            tokens=sum(lengths),
            padded_tokens=sum(batch.input_ids_BS.numel() for batch in batches),
            needed_tokens=sum(lengths),
            floor_s=update_floor_s(self._rates, self._shape, lengths, scored_tokens=scored, dtype="bfloat16"),
        )

    def optimizer(self, batches: Sequence[Batch]) -> Piece:
        """What becomes of the gradients: scaled, clipped, applied. Its floor is reading and writing what Adam keeps."""
        num_valid_tokens = sum(batch.num_valid_tokens for batch in batches)
        scale_and_clip(self._accelerator, self._model, num_valid_tokens=num_valid_tokens, max_grad_norm=1.0)
        self._optimizer.step()
        num_weights = sum(parameter.numel() for parameter in self._student.module.parameters())
        # float32: gradient, weight and both moments are read; weight and moments are written.
        floor_s = self._rates.bytes_s(num_weights * 4.0 * (4 + 3))
        lengths = [int(length) for batch in batches for length in batch.attention_mask_BS.sum(dim=1)]
        return Piece(tokens=sum(lengths), padded_tokens=0, needed_tokens=0, floor_s=floor_s)


class TeacherForward:
    """The service's own engine in this process, on whole sequences that share nothing."""

    def __init__(self, model: Path, sizes: Sizes, rates: MachineRates, shape: ModelShape) -> None:
        self._sizes, self._rates, self._shape = sizes, rates, shape
        self._engine = TransformersEngine(model=str(model), dtype="bfloat16", device="cpu")
        self._rng = np.random.default_rng(0)
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._engine.start())

    def score(self) -> Piece:
        sizes = self._sizes
        lengths = [sizes.teacher_context + sizes.teacher_completion] * sizes.teacher_sequences
        requests = [self._request(str(number), sizes) for number in range(sizes.teacher_sequences)]
        before = self._engine.stats
        self._loop.run_until_complete(self._score_all(requests))
        after = self._engine.stats
        padding = after.padding_tokens - before.padding_tokens
        read = after.tokens_forwarded - before.tokens_forwarded
        return Piece(
            tokens=sum(lengths),
            padded_tokens=read,
            needed_tokens=read - padding,
            floor_s=forward_floor_s(
                self._rates,
                self._shape,
                [length - 1 for length in lengths],  # the last token predicts nothing that is asked for
                scored_tokens=sizes.teacher_sequences * sizes.teacher_completion,
                dtype="bfloat16",
            ),
        )

    async def _score_all(self, requests: Sequence[ScoreRequest]) -> None:
        await asyncio.gather(*(self._engine.score(request) for request in requests))

    def _request(self, name: str, sizes: Sizes) -> ScoreRequest:
        ids = self._rng.integers(self._shape.vocab_size, size=sizes.teacher_context + sizes.teacher_completion)
        return ScoreRequest(name, ids[: sizes.teacher_context], ids[sizes.teacher_context :])

    def close(self) -> None:
        self._loop.run_until_complete(self._engine.close())
        self._loop.close()


@contextmanager
def tokens_read(model: nn.Module) -> Iterator[list[int]]:
    """Input tokens of every forward within the block, padding included."""
    read: list[int] = []

    def note(_: nn.Module, __: Any, inputs: dict[str, Any]) -> None:
        read.append(inputs["input_ids"].numel())

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield read
    finally:
        hook.remove()


def invented_scores(rollout: Rollout) -> SequenceScores:
    """A teacher that finds every id a little less likely than the student did; speed does not depend on it."""
    sampled_T = rollout.behaviour_logprobs_T - np.float32(0.1)
    ids: IntArray = rollout.support_ids
    logprobs = np.full(len(ids), np.float32(-6.0))
    return SequenceScores(sampled_T, ids, logprobs, rollout.support_counts_T)


def threads() -> int:
    return torch.get_num_threads()
