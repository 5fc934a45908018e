"""Contexts that stay in the transformers engine for completions that arrive after the first of their group."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from scoring_checks import (
    assert_close_to_plain,
    counting,
    request,
    score_all,
)
from vopd_server.types import Candidates, TeacherTopK


@pytest.fixture(scope="module")
def tiny_model(tiny_model_dir: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


async def test_a_group_that_arrives_one_by_one_reads_its_context_once(tiny_model_dir: Path, tiny_model: Any) -> None:
    group = [request(np.arange(50), np.arange(seed, seed + 9), TeacherTopK(5)) for seed in range(3)]
    async with counting(tiny_model_dir) as (engine, tokens_read):
        scores = [await engine.score(one) for one in group]
        assert engine.stats.context_tokens_reused == 2 * 50
    assert tokens_read == [50 + 8, 8, 8]
    for asked, answer in zip(group, scores, strict=True):
        assert_close_to_plain(tiny_model, asked, answer)


async def test_late_members_of_several_groups_go_on_together_from_contexts_of_unlike_length(
    tiny_model_dir: Path, tiny_model: Any
) -> None:
    contexts = [np.arange(length) for length in (50, 7, 33)]
    late = [request(ids, np.arange(seed, seed + 9), TeacherTopK(5)) for seed, ids in enumerate(contexts * 2)]
    async with counting(tiny_model_dir) as (engine, tokens_read):
        await score_all(engine, [request(ids, np.arange(4)) for ids in contexts[:2]])
        tokens_read.clear()
        scores = await score_all(engine, late)
    assert tokens_read == [33, 6 * 8]  # the third group's context was new
    for asked, answer in zip(late, scores, strict=True):
        assert_close_to_plain(tiny_model, asked, answer)


async def test_the_same_tokens_again_get_the_same_scores_and_only_their_completion_is_read(
    tiny_model_dir: Path, tiny_model: Any
) -> None:
    asked = request(np.arange(50), np.arange(9), Candidates(np.arange(18), np.full(9, 2)))
    async with counting(tiny_model_dir) as (engine, tokens_read):
        first, second = await engine.score(asked), await engine.score(asked)
    assert tokens_read == [58, 8]
    for answer in (first, second):
        assert_close_to_plain(tiny_model, asked, answer)


async def test_another_tenants_context_is_read_anew(tiny_model_dir: Path) -> None:
    mine = request(np.arange(50), np.arange(9))
    async with counting(tiny_model_dir) as (engine, tokens_read):
        await engine.score(replace(mine, cache_salt="mine"))
        await engine.score(replace(mine, cache_salt="yours"))
        assert engine.stats.context_tokens_reused == 0
    assert tokens_read == [58, 58]


async def test_no_more_contexts_are_kept_than_there_is_room_for(tiny_model_dir: Path) -> None:
    contexts = [np.arange(first, first + 40) for first in range(3)]
    async with counting(tiny_model_dir, context_cache_tokens=100) as (engine, tokens_read):
        for ids in (*contexts, contexts[2], contexts[1], contexts[0], np.arange(101), np.arange(101)):
            await engine.score(request(ids, np.arange(9)))
        assert engine._kept.num_tokens <= 100
    # The first went when the third came; what is longer than the whole room is read again each time.
    assert tokens_read == [48, 48, 48, 8, 8, 48, 109, 109]
    assert engine._kept.num_tokens == 0  # closed


async def test_nothing_is_kept_where_it_is_switched_off(tiny_model_dir: Path) -> None:
    async with counting(tiny_model_dir, context_cache_tokens=0) as (engine, tokens_read):
        for _ in range(2):
            await engine.score(request(np.arange(50), np.arange(9)))
    assert tokens_read == [58, 58]
