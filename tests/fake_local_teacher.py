"""A teacher in this process with exact numbers: one fp32 forward a request, no engine, no network.

It implements what a training run needs of a teacher, and can be told to hold answers back or to be gone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from vopd_client.errors import TeacherError, TeacherUnsupportedError
from vopd_client.types import (
    Candidates,
    HiddenStates,
    NoSupport,
    SequenceScores,
    SequenceToScore,
    TeacherInfo,
    TeacherTopK,
)
from vopd_proto.fingerprint import token_table, tokenizer_fingerprint


class FakeLocalTeacher:
    """Scores with the model in `directory`; `calls` counts requests.

    on_submit: called with the number of each request, from 1, before it is answered; a TeacherError it raises becomes
        the answer, and an interrupt it causes happens in the middle of the trainer's sampling.
    answer_in_reverse: answers are handed out newest first, and not before `batch` of them are owed.
    """

    def __init__(
        self,
        directory: Path,
        *,
        on_submit: Callable[[int], None] = lambda number: None,
        answer_in_reverse: int = 0,
        **info: object,
    ) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        self._tokens = token_table(self._tokenizer)
        self._on_submit = on_submit
        self._hold_back = answer_in_reverse
        self._held: list[tuple[Future[SequenceScores], SequenceScores]] = []
        self.calls = 0
        self.bytes_sent = 0
        self.bytes_received = 0
        self.waiting_reason = ""
        self.closed = False
        self._head_path = directory.with_name(f"{directory.name}-head.safetensors")
        weight_VH = self._model.get_output_embeddings().weight.detach().clone()
        save_file({"weight": weight_VH}, self._head_path, metadata={"logit_scale": "1.0"})
        self.info = replace(self._info(), **info)  # type: ignore[arg-type]

    def tokenizer(self) -> tuple[list[bytes], str]:
        return self._tokens, "{}"

    def head_file(self, cache_dir: Path | None = None) -> Path:
        if not self.info.head_sha256:
            raise TeacherUnsupportedError("the teacher does not give its output head away")
        return self._head_path

    def submit(self, sequence: SequenceToScore) -> Future[SequenceScores]:
        self.calls += 1
        future: Future[SequenceScores] = Future()
        try:
            self._on_submit(self.calls)
        except TeacherError as error:
            future.set_exception(error)
            return future
        scores = self._score(sequence)
        self.bytes_sent += 100
        self.bytes_received += 4 * (len(scores.sampled_logprobs_T) + len(scores.support_logprobs))
        if scores.hidden_states_TH is not None:
            self.bytes_received += scores.hidden_states_TH.nbytes
        self._held.append((future, scores))
        if len(self._held) >= self._hold_back:
            while self._held:
                held, answer = self._held.pop()
                held.set_result(answer)
        return future

    def close(self) -> None:
        self.closed = True

    @torch.no_grad()
    def _score(self, sequence: SequenceToScore) -> SequenceScores:
        ids = np.concatenate([sequence.context_ids, sequence.completion_ids])
        output = self._model(torch.from_numpy(ids)[None], output_hidden_states=True)
        first_row = len(sequence.context_ids) - 1
        scored = slice(first_row, first_row + len(sequence.completion_ids))
        logprobs_TV = output.logits[0, scored].float().log_softmax(-1)
        sampled_T = logprobs_TV.gather(1, torch.from_numpy(sequence.completion_ids)[:, None])[:, 0].numpy()
        rows = np.arange(len(sequence.completion_ids))
        match sequence.support:
            case NoSupport() | HiddenStates() as support:
                hidden_TH = output.hidden_states[-1][0, scored].numpy() if isinstance(support, HiddenStates) else None
                return SequenceScores(sampled_T, np.empty(0, np.int64), np.empty(0, np.float32), 0 * rows, hidden_TH)
            case TeacherTopK(k=k):
                top = logprobs_TV.topk(k)
                counts_T = np.full(len(rows), k, np.int64)
                return SequenceScores(
                    sampled_T, top.indices.reshape(-1).numpy(), top.values.reshape(-1).numpy(), counts_T
                )
            case Candidates(ids=candidates, counts_T=counts_T):
                logprobs = logprobs_TV.numpy()[np.repeat(rows, counts_T), candidates]
                return SequenceScores(sampled_T, candidates, logprobs, counts_T)

    def _info(self) -> TeacherInfo:
        return TeacherInfo(
            model_id="fake",
            model_revision="1",
            fingerprint=tokenizer_fingerprint(self._tokens),
            num_ids=len(self._tokens),
            begin_id=self._tokenizer.bos_token_id,
            end_ids=(self._tokenizer.eos_token_id,),
            pad_id=self._tokenizer.pad_token_id,
            chat_template=self._tokenizer.chat_template,
            vocab_size=self._model.config.vocab_size,
            hidden_size=self._model.config.hidden_size,
            max_context_length=4096,
            dtype="float32",
            engine="fake",
            engine_version="0",
            server_version="0",
            supports=frozenset({"sampled", "teacher_top_k", "candidates", "hidden_states"}),
            any_temperature=True,
            deterministic=True,
            max_sequences_per_request=64,
            max_tokens_per_request=8192,
            max_support_size=256,
            head_sha256=hashlib.sha256(self._head_path.read_bytes()).hexdigest(),
        )
