"""Candidates through vLLM's V2 model runner, whose kernels are interpreted here: a tiny vocabulary, a real engine.

The runner is chosen when vLLM is imported, so the engine runs in a process whose environment has the stub backend.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from plain_forward import Reference
from vopd_server.types import Candidates, EngineInfo, NoSupport, ScoreRequest, Scores, Support, TeacherTopK

HERE = Path(__file__).parent
VOCAB_SIZE = 128
BLOCK_SIZE = 32
TOLERANCE_NATS = 1e-5
# Small enough that requests are preempted; see test_vllm_engine.
ENGINE_ARGS = {
    "enforce_eager": True,
    "block_size": BLOCK_SIZE,
    "num_gpu_blocks_override": 9,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 128,
    "long_prefill_token_threshold": BLOCK_SIZE,
    "scheduler_reserve_full_isl": False,
}


def write_model(directory: Path) -> Path:
    """Two Llama layers with heads of 32, the smallest that vLLM's CPU attention has."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=160,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    words = {f"w{index}": index for index in range(VOCAB_SIZE)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="w1"
    )
    tokenizer.save_pretrained(directory)
    return directory


def ids(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, length)


def candidates(seed: int, num_rows: int) -> Candidates:
    """Ragged, some positions without any, ids that repeat, ids that are the sampled token."""
    counts_T = np.random.default_rng(seed).integers(0, 9, num_rows)
    return Candidates(ids(seed, int(counts_T.sum())), counts_T)


def requests() -> list[ScoreRequest]:
    """Completions of two contexts that begin with the same 40 tokens, in each support; one-token contexts."""
    asked = []
    for n in range(4):
        for context in (1, 2):
            completion = np.concatenate((ids(3, 40), ids(10 + n, 5 + 7 * n)))
            supports: tuple[Support, ...] = (candidates(n, len(completion)), NoSupport(), TeacherTopK(1 + 5 * n))
            asked += [ScoreRequest("test", ids(context, 31 + context), completion, support) for support in supports]
    asked += [ScoreRequest("test", ids(4, 1), ids(5, length), candidates(length, length)) for length in (1, 70)]
    no_candidates = Candidates(np.empty(0, np.int64), np.zeros(3, np.int64))
    return [*asked, ScoreRequest("test", ids(4, 20), ids(5, 3), no_candidates)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "vocabulary-of-128")


@pytest.fixture(scope="module")
def answers(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[EngineInfo, list[list[Scores]]]:
    """What the engine is, and its answers to `requests`, scored all at once, twice."""
    directory = tmp_path_factory.mktemp("answers")
    requests_path, answers_path = directory / "requests.pickle", directory / "answers.pickle"
    requests_path.write_bytes(pickle.dumps(requests()))
    environment = {
        "PYTHONPATH": str(HERE / "triton_cpu_stub"),
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
    }
    arguments = [model_dir, requests_path, answers_path, json.dumps(ENGINE_ARGS)]
    subprocess.run([sys.executable, HERE / "score_in_process.py", *arguments], env=os.environ | environment, check=True)
    info, rounds = pickle.loads(answers_path.read_bytes())
    return info, rounds


def test_the_runner_that_has_candidates_says_so(answers: tuple[EngineInfo, list[list[Scores]]]) -> None:
    info, _ = answers
    assert info.supports == {"sampled", "teacher_top_k", "candidates"}
    assert info.max_context_length == 159


@pytest.mark.parametrize("kind", ["candidates", "sampled", "teacher_top_k"])
def test_every_support_equals_a_plain_forward(
    answers: tuple[EngineInfo, list[list[Scores]]], model_dir: Path, kind: str
) -> None:
    reference = Reference(model_dir, torch.float32)
    _, rounds = answers
    for scores_of_round in rounds:
        of_kind = [
            (request, scores)
            for request, scores in zip(requests(), scores_of_round, strict=True)
            if request.support.kind == kind
        ]
        differences = np.concatenate([reference.differences(request, scores) for request, scores in of_kind])
        assert len(of_kind) >= 8
        assert differences.max() < TOLERANCE_NATS
