"""What vLLM is compared with: a plain forward of one sequence through transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from vopd_server.types import Candidates, ScoreRequest, Scores, TeacherTopK


class Reference:
    """A causal LM, one sequence at a time, log-softmax in float32."""

    def __init__(self, model_dir: Path, dtype: torch.dtype) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()
        self.vocab_size: int = self._model.config.vocab_size

    @torch.inference_mode()
    def logprobs_TV(self, request: ScoreRequest) -> np.ndarray:
        ids = np.concatenate((request.context_ids, request.completion_ids))
        logits_SV = self._model(input_ids=torch.as_tensor(ids[None]), use_cache=False).logits[0]
        first, last = len(request.context_ids) - 1, len(ids) - 1
        return logits_SV[first:last].float().log_softmax(-1).numpy()

    def differences(self, request: ScoreRequest, scores: Scores) -> np.ndarray:
        """Absolute, in nats, of every log-probability in `scores`; the shapes must be the request's."""
        expected_TV = self.logprobs_TV(request)
        rows = np.arange(len(request.completion_ids))
        differences = [np.abs(scores.sampled_logprobs_T - expected_TV[rows, request.completion_ids])]
        match request.support:
            case TeacherTopK(k=k):
                assert scores.support_ids_TK is not None
                assert scores.support_logprobs is not None
                assert scores.support_ids_TK.shape == scores.support_logprobs.shape == (len(rows), k)
                expected = np.take_along_axis(expected_TV, scores.support_ids_TK, axis=1)
                differences.append(np.abs(scores.support_logprobs - expected).reshape(-1))
            case Candidates(ids=ids, counts_T=counts_T):
                assert scores.support_logprobs is not None
                differences.append(np.abs(scores.support_logprobs - expected_TV[np.repeat(rows, counts_T), ids]))
            case _:
                assert scores.support_logprobs is None
        return np.concatenate(differences)
