"""The largest forwards before serving: that they are the largest, and what happens when one does not fit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from vopd_server.engines.batching import PassPlan, Shape, plan_next_pass
from vopd_server.engines.contexts import ContextCache, ReadContext
from vopd_server.engines.forward import context_key
from vopd_server.engines.loading import load_model
from vopd_server.engines.scoring_model import ScoringModel, scoring_model
from vopd_server.engines.transformers import TransformersEngine
from vopd_server.engines.warm_up import largest_passes, warm_up
from vopd_server.errors import ConfigError
from vopd_server.types import ScoreRequest, TeacherTopK

VOCAB_SIZE = 300
LONG_OF_SHORT = {"max_context_length": 1000, "max_batch_tokens": 4096}  # a batch holds four of the longest
LONGER_THAN_A_BATCH = {"max_context_length": 5000, "max_batch_tokens": 4096}


@dataclass
class MeasuredModel:
    """Stands for a ScoringModel: each forward takes a byte a padded token, cached ones included."""

    device_bytes: int = 10**9
    can_share_contexts: bool = True
    error: type[RuntimeError] = torch.OutOfMemoryError
    head: Any = field(default_factory=lambda: SimpleNamespace(vocab_size=VOCAB_SIZE))
    backbone: Any = field(default_factory=lambda: SimpleNamespace(device=torch.device("cuda", 1)))
    forwards: list[int] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    supports: set[int] = field(default_factory=set)

    def read_contexts(self, requests: Sequence[ScoreRequest]) -> tuple[Any, None]:
        contexts = {context_key(request): len(request.context_ids) for request in requests}
        self.cached.append(len(contexts) * max(contexts.values()))
        layer = (torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
        return {key: ReadContext(1, torch.zeros(1), (layer,)) for key in contexts}, None

    def score(self, requests: Sequence[ScoreRequest], contexts: Any, *, keep_tokens: int) -> None:
        tokens = len(requests) * max(request.num_tokens - 1 for request in requests)
        self.supports |= {cast(TeacherTopK, request.support).k for request in requests}
        if tokens > self.device_bytes:
            raise self.error("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore than anyone wants to read.")
        self.forwards.append(tokens)


def run(
    model: MeasuredModel,
    *,
    max_top_k: int = 100,
    context_cache_tokens: int = 0,
    deterministic: bool = False,
    **limits: int,
) -> None:
    warm_up(
        cast(ScoringModel, model),
        max_top_k=max_top_k,
        context_cache_tokens=context_cache_tokens,
        deterministic=deterministic,
        **limits,
    )


def plans(*, can_share: bool, deterministic: bool, **limits: int) -> list[tuple[list[ScoreRequest], PassPlan]]:
    passes = largest_passes(k=5, vocab_size=VOCAB_SIZE, can_share=can_share, deterministic=deterministic, **limits)
    return [
        (
            requests,
            plan_next_pass(
                [Shape(context_key(one), len(one.context_ids), len(one.completion_ids)) for one in requests],
                max_tokens=limits["max_batch_tokens"],
                can_share=can_share,
                one_by_one=deterministic,
            ),
        )
        for requests in passes
    ]


@pytest.mark.parametrize(
    "limits", [LONG_OF_SHORT, LONGER_THAN_A_BATCH, {"max_context_length": 2, "max_batch_tokens": 1}]
)
@pytest.mark.parametrize("can_share", [True, False])
@pytest.mark.parametrize("deterministic", [True, False])
def test_every_list_is_one_pass_and_within_what_is_admitted(
    limits: dict[str, int], can_share: bool, deterministic: bool
) -> None:
    for requests, plan in plans(can_share=can_share, deterministic=deterministic, **limits):
        assert sorted(plan.members) == list(range(len(requests)))
        for request in requests:
            assert 1 <= len(request.context_ids) < request.num_tokens <= limits["max_context_length"]
            assert request.context_ids.max() < VOCAB_SIZE
            assert request.support == TeacherTopK(5)


def test_the_longest_sequence_and_a_full_batch_are_run_whole_and_on_cached_contexts() -> None:
    model = MeasuredModel()
    run(model, **LONG_OF_SHORT)
    assert model.forwards[0] == 999
    assert model.forwards.count(4 * 999) == 3  # read whole, with long and with short contexts, and on two contexts
    assert model.cached == [998, 2 * 998]
    assert model.supports == {100}


def test_the_memory_of_kept_contexts_is_there_before_the_first_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated: list[int] = []
    keep = ContextCache.keep

    def spy(cache: ContextCache, contexts: Any) -> None:
        assert model.forwards == []
        keep(cache, contexts)
        allocated.append(cache._pools[0][0].shape[1])  # type: ignore[index]

    monkeypatch.setattr(ContextCache, "keep", spy)
    model = MeasuredModel()
    run(model, context_cache_tokens=3100, **LONG_OF_SHORT)
    assert allocated == [3100]
    model = MeasuredModel(can_share_contexts=False)
    run(model, context_cache_tokens=3100, **LONG_OF_SHORT)
    run(MeasuredModel(), context_cache_tokens=0, **LONG_OF_SHORT)
    assert allocated == [3100]


def test_a_sequence_longer_than_a_batch_is_the_largest_forward() -> None:
    model = MeasuredModel()
    run(model, **LONGER_THAN_A_BATCH)
    assert set(model.forwards) == {4999}
    assert model.cached == [4998]


def test_forwards_of_one_row_are_warmed_up_with_one_row() -> None:
    model = MeasuredModel()
    run(model, deterministic=True, **LONG_OF_SHORT)
    assert model.forwards == [999, 999]
    assert model.cached == [1, 998]


def test_a_support_beyond_the_vocabulary_is_as_large_as_the_vocabulary() -> None:
    model = MeasuredModel(can_share_contexts=False)
    run(model, max_top_k=1024, **LONG_OF_SHORT)
    assert model.supports == {VOCAB_SIZE}
    assert model.cached == []


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize(("device_bytes", "what"), [(998, "1 x 1000 tokens"), (3000, "4 x 1000 tokens")])
def test_what_does_not_fit_is_refused_with_the_settings_to_lower(
    error: type[RuntimeError], device_bytes: int, what: str
) -> None:
    expected = (
        f"{what} with a support of 100 ids would be admitted and do not fit the memory of cuda:1: lower "
        "max_context_length (now 1000), max_batch_tokens (now 4096), context_cache_tokens (now 0) "
        "or max_top_k (now 100): "
        "CUDA out of memory. Tried to allocate 2.00 GiB."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}$") as refused:
        run(MeasuredModel(device_bytes, error=error), **LONG_OF_SHORT)
    assert refused.value.__suppress_context__


def test_another_failure_is_not_taken_for_a_lack_of_memory() -> None:
    class OtherError(RuntimeError):
        def __str__(self) -> str:
            return "device-side assert triggered"

    with pytest.raises(OtherError):
        run(MeasuredModel(1, error=OtherError), **LONG_OF_SHORT)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_real_model_runs_them_all(tiny_model_dir: Path, deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    longest, score = [], ScoringModel.score

    def spy(model: ScoringModel, requests: Sequence[ScoreRequest], contexts: Any, **settings: int) -> Any:
        longest.append(max(request.num_tokens for request in requests))
        return score(model, requests, contexts, **settings)

    monkeypatch.setattr(ScoringModel, "score", spy)
    loaded = load_model(
        str(tiny_model_dir),
        revision=None,
        dtype="float32",
        device=torch.device("cpu"),
        max_context_length=None,
        trust_remote_code=False,
    )
    warm_up(
        scoring_model(loaded),
        max_context_length=40,
        max_batch_tokens=200,
        context_cache_tokens=100,
        max_top_k=500,
        deterministic=deterministic,
    )
    assert len(longest) >= 2
    assert set(longest) == {40}


async def test_a_cpu_is_not_warmed_up(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vopd_server.engines.transformers.warm_up", None)  # calling it would fail the start
    engine = TransformersEngine(model=str(tiny_model_dir), device="cpu")
    await engine.start()
    await engine.close()
