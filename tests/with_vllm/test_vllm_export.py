"""What a run exports, in vLLM: a merged model, and an adapter over the base model, with transformers' numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moved_weights import moved
from tiny_model import write_tiny_model
from vopd_client.export import save_student
from vopd_client.student import LoadedStudent, load_student

RANK = 4
NUM_TOKENS = 12
TOLERANCE_NATS = 1e-3  # float32 on both sides; LoRA is merged on one of them only
PROMPTS = [[11, 42, 7, 99], list(range(3, 40)), [200]]


@dataclass(frozen=True)
class Exports:
    """Two runs, the second of which starts from what the first one left.

    merged: of the first; adapter: of the second, over `merged`; both_merged: of the second, for transformers.
    """

    merged: Path
    adapter: Path
    both_merged: Path


def trained(base: Path) -> LoadedStudent:
    """LoRA's weights are others than at the start, so that base and student write different completions."""
    return moved(load_student(base, lora_rank=RANK, lora_alpha=8.0, device="cpu"))


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    directory = tmp_path_factory.mktemp("exports")
    # Heads of 32, the smallest that vLLM's CPU attention has; tied, as small models are.
    base = write_tiny_model(directory / "base", hidden_size=128, max_length=256)
    written = Exports(directory / "merged", directory / "adapter", directory / "both_merged")
    first = trained(base)
    save_student(first.module, first.tokenizer, written.merged)
    second = trained(written.merged)
    save_student(second.module, second.tokenizer, written.adapter, export="adapter")
    save_student(second.module, second.tokenizer, written.both_merged)
    return written


@pytest.fixture(scope="module")
def engine(exports: Exports) -> Iterator[Any]:
    """float32 has to be said: vLLM takes bfloat16 for files in float32. Nothing compiled, which would cost minutes."""
    from vllm import LLM

    running = LLM(
        str(exports.merged),
        dtype="float32",
        enable_lora=True,
        max_lora_rank=8,
        max_loras=1,
        enforce_eager=True,
        max_num_batched_tokens=256,
        max_num_seqs=4,
    )
    yield running
    running.llm_engine.engine_core.shutdown()


def completions(running: Any, lora: Any = None) -> list[tuple[list[int], list[float]]]:
    """Greedy ids, and their log-probabilities."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, logprobs=1, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    found = []
    for output in running.generate(prompts, params, lora_request=lora, use_tqdm=False):
        [completion] = output.outputs
        ids = list(completion.token_ids)
        found.append((ids, [row[token].logprob for token, row in zip(ids, completion.logprobs, strict=True)]))
    return found


@torch.no_grad()
def assert_transformers_numbers(model_dir: Path, found: list[tuple[list[int], list[float]]]) -> None:
    """The same greedy ids and log-probabilities as `model_dir` in transformers."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    for prompt, (ids, logprobs) in zip(PROMPTS, found, strict=True):
        logits_SV = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        best = logits_SV.log_softmax(-1).max(-1)
        assert len(ids) == NUM_TOKENS
        assert best.indices.tolist() == ids
        torch.testing.assert_close(torch.tensor(logprobs), best.values, atol=TOLERANCE_NATS, rtol=0)


def test_vllm_loads_a_merged_export(engine: Any, exports: Exports) -> None:
    assert "lm_head.weight" not in load_file(exports.merged / "model.safetensors")
    assert_transformers_numbers(exports.merged, completions(engine))
    # With its own tokenizer and chat template.
    [answer] = engine.chat([{"role": "user", "content": "Hello"}], use_tqdm=False)
    text = engine.get_tokenizer().decode(answer.prompt_token_ids)
    assert text == "<|start|>user\nHello<|end|><|start|>assistant\n"


def test_vllm_loads_an_adapter_over_its_base(engine: Any, exports: Exports) -> None:
    from vllm.lora.request import LoRARequest

    adapted = completions(engine, LoRARequest("distilled", 1, str(exports.adapter)))
    assert_transformers_numbers(exports.both_merged, adapted)
    assert [ids for ids, _ in adapted] != [ids for ids, _ in completions(engine)]
