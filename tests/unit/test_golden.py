"""The golden probe on an engine whose scores are a formula: what it lets pass, what it refuses, what it keeps."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fake_engine import FakeEngine, fake_scores
from fake_vllm import BLOCK_SIZE, FakeVllm, Output
from vopd_proto.arrays import Float32Array
from vopd_server.engines.vllm import VllmEngine
from vopd_server.errors import ConfigError, EngineDeadError, EngineError
from vopd_server.golden import Difference, difference, flat_logprobs, golden_requests, run_golden_probe, tolerance_of
from vopd_server.golden_record import GoldenEntry, check_golden_file, recall_or_record
from vopd_server.types import Candidates, ScoreRequest, Scores, SupportKind, TeacherTopK
from vopd_server.validation import Limits, check_request

EVERY_SUPPORT: frozenset[SupportKind] = frozenset({"sampled", "teacher_top_k", "candidates"})
RUNS = "11 runs of 4 sequences"


def engine_like(**info: Any) -> FakeEngine:
    """A FakeEngine that says these things of itself; it promises no bits unless told."""
    engine = FakeEngine()
    engine.info = replace(engine.info, **{"deterministic": False, **info})
    return engine


def shifted(scores: Scores, shift: Callable[[Float32Array], None]) -> Scores:
    """With `shift` applied to a copy of the sampled log-probabilities."""
    sampled_T = scores.sampled_logprobs_T.copy()
    shift(sampled_T)
    return replace(scores, sampled_logprobs_T=sampled_T)


def all_by(nats: float) -> Callable[[Float32Array], None]:
    return lambda sampled_T: sampled_T.__isub__(np.float32(nats))


def one_by(nats: float) -> Callable[[Float32Array], None]:
    def shift(sampled_T: Float32Array) -> None:
        sampled_T[0] -= nats

    return shift


class CrowdedEngine(FakeEngine):
    """Scores differently what is in it together."""

    def __init__(self, shift: Callable[[Float32Array], None], **info: Any) -> None:
        super().__init__()
        self.info = replace(self.info, **{"deterministic": False, **info})
        self._shift = shift
        self._num_inside = 0
        self.most_inside = 0

    async def score(self, request: ScoreRequest) -> Scores:
        self._num_inside += 1
        await asyncio.sleep(0)  # whoever comes at the same time is in now
        self.most_inside = max(self.most_inside, self._num_inside)
        is_crowded = self._num_inside > 1
        await asyncio.sleep(0)
        self._num_inside -= 1
        scores = await super().score(request)
        return shifted(scores, self._shift) if is_crowded else scores


# ---------------------------------------------------------------- the requests


@pytest.mark.parametrize("vocab_size", [1, 2, 259, 7919, 151_936])
@pytest.mark.parametrize("max_length", [2, 3, 7, 64, 65, 100_000])
def test_the_requests_are_valid_for_the_smallest_models_and_limits(vocab_size: int, max_length: int) -> None:
    info = replace(FakeEngine().info, vocab_size=vocab_size, max_context_length=max_length)
    limits = Limits(max_length, 1, max_length, max_top_k=1, max_message_bytes=2**20)
    requests = golden_requests(vocab_size=vocab_size, max_context_length=max_length, supports=EVERY_SUPPORT)
    for request in requests:
        check_request(request, field="golden", info=info, limits=limits)
        assert request.num_tokens <= max_length
        assert min(len(request.context_ids), len(request.completion_ids)) >= 1
        if len(request.context_ids) >= 40 and vocab_size > 100:
            assert np.ptp(request.context_ids) > 0.9 * vocab_size
            assert len(set(request.context_ids.tolist())) == len(request.context_ids)


def test_a_model_without_room_for_a_completion_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_context_length 1: a context and a completion take 2 tokens"):
        golden_requests(vocab_size=10, max_context_length=1, supports=EVERY_SUPPORT)


def test_the_supports_are_those_that_the_engine_has() -> None:
    def kinds(*supports: SupportKind) -> list[str]:
        return [request.support.kind for request in golden_requests_for(frozenset(supports))]

    def golden_requests_for(supports: frozenset[SupportKind]) -> list[ScoreRequest]:
        return golden_requests(vocab_size=300, max_context_length=500, supports=supports)

    assert kinds("sampled") == ["sampled"] * 4
    assert kinds("sampled", "teacher_top_k") == ["teacher_top_k", "sampled", "sampled", "sampled"]
    assert kinds("sampled", "teacher_top_k", "candidates")[2] == "candidates"
    golden, sibling, longer, _ = golden_requests_for(EVERY_SUPPORT)
    assert golden.support == TeacherTopK(1)
    assert isinstance(longer.support, Candidates)
    # The sibling's context can be found in a prefix cache, and its completion cannot.
    np.testing.assert_array_equal(golden.context_ids, sibling.context_ids)
    assert golden.completion_ids[0] != sibling.completion_ids[0]


# ---------------------------------------------------------------- differences


def test_a_difference_is_over_all_tokens_and_minus_infinity_equals_itself() -> None:
    expected = np.asarray([-1.0, -2.0, -np.inf, -4.0], np.float32)
    assert difference(expected, expected) == Difference(0.0, 0.0)
    assert difference(np.asarray([-1.0, -4.0, -np.inf, -4.0], np.float32), expected) == Difference(0.5, 2.0)
    masked = difference(np.asarray([-np.inf, -2.0, -np.inf, -4.0], np.float32), expected)
    assert masked.largest_nats == np.inf
    assert not masked.is_within(tolerance_of("bfloat16"))


@pytest.mark.parametrize("both", [False, True])
def test_nan_is_within_no_tolerance(both: bool) -> None:
    spoilt = np.asarray([-1.0, np.nan], np.float32)
    found = difference(spoilt, spoilt if both else np.asarray([-1.0, -2.0], np.float32))
    assert not found.is_within(Difference(np.inf, np.inf))


def test_the_mean_and_the_largest_difference_are_bounded_each() -> None:
    assert Difference(0.1, 1.0).is_within(Difference(0.1, 1.0))
    assert not Difference(0.2, 1.0).is_within(Difference(0.1, 1.0))
    assert not Difference(0.1, 1.1).is_within(Difference(0.1, 1.0))
    assert tolerance_of("float32").is_within(tolerance_of("float16"))


# ---------------------------------------------------------------- within one start


async def test_an_engine_that_agrees_with_itself_passes_and_leaves_a_reference() -> None:
    engine = CrowdedEngine(all_by(0.0), deterministic=True)
    result = await run_golden_probe(engine, record_file=None)
    assert result.description == f"{RUNS} agree within 0 nats"
    assert result.duration_s >= 0
    assert len(engine.requests) == 11
    assert engine.most_inside == 6  # three copies of the golden one, and three others
    reference = result.reference
    np.testing.assert_array_equal(reference.logprobs_N, flat_logprobs(fake_scores(reference.request)))
    assert len(reference.logprobs_N) == 2 * len(reference.request.completion_ids)


async def test_differences_within_the_tolerance_pass_and_are_told() -> None:
    for shift, info in (
        (all_by(0.005), {"dtype": "float32"}),
        (all_by(0.1), {"dtype": "bfloat16"}),
        (one_by(2.0), {"dtype": "float16"}),
    ):
        result = await run_golden_probe(CrowdedEngine(shift, **info), record_file=None)
        told = re.fullmatch(rf"{RUNS} agree within (\S+) nats", result.description)
        assert told is not None
        assert float(told[1]) == pytest.approx({"float32": 0.005, "bfloat16": 0.1, "float16": 2.0}[info["dtype"]])


@pytest.mark.parametrize(
    ("shift", "info", "words"),
    [
        (all_by(0.5), {}, r"by 0\.\d+ nats on average and 0\.5 at most \(float32 allows 0\.01 nats on average"),
        (one_by(0.2), {}, r"0\.2 at most \(float32 allows .* and 0\.1 at most\)"),
        (all_by(0.75), {"dtype": "bfloat16"}, r"and 0\.75 at most \(bfloat16 allows 0\.25 nats on average"),
        (one_by(3.0), {"dtype": "float16"}, r"and 3 at most \(float16 allows .* and 2\.5 at most\)"),
        (all_by(1e-6), {"deterministic": True}, "it promises the same bits"),
        (one_by(np.inf), {"dtype": "bfloat16"}, "inf nats on average"),
    ],
)
async def test_an_engine_that_scores_differently_in_company_is_refused(
    shift: Callable[[Float32Array], None], info: dict[str, Any], words: str, tmp_path: Path
) -> None:
    record = tmp_path / "golden.json"
    model = r"model fake \(revision formula-1\) in \w+ by fake 1 is not safe to learn from: what it scores in company"
    with pytest.raises(ConfigError, match=f"{model} differs .*{words}"):
        await run_golden_probe(CrowdedEngine(shift, **info), record_file=record)
    assert not record.exists()


async def test_an_engine_that_scores_differently_a_second_time_is_refused() -> None:
    engine = engine_like()
    seen: list[str] = []

    def drift(request: ScoreRequest) -> Scores:
        seen.append(request.request_id)
        return shifted(fake_scores(request), all_by(0.5 if seen.count(request.request_id) == 2 else 0.0))

    engine.answer(drift)
    with pytest.raises(ConfigError, match="what it scores alone a second time differs"):
        await run_golden_probe(engine, record_file=None)


async def test_nan_and_a_failing_engine_are_refused_and_a_dead_one_says_so() -> None:
    spoilt = engine_like()
    spoilt.answer(lambda request: shifted(fake_scores(request), all_by(np.nan)))
    with pytest.raises(ConfigError, match=r"cannot be scored with: .* NaN: the model's logits are broken"):
        await run_golden_probe(spoilt, record_file=None)
    failing = engine_like()
    failing.fail(lambda _: EngineError("no kernel"))
    with pytest.raises(ConfigError, match=r"by fake 1 cannot be scored with: no kernel"):
        await run_golden_probe(failing, record_file=None)
    dead = engine_like()
    dead.fail(lambda _: EngineDeadError("died"))
    with pytest.raises(EngineDeadError):
        await run_golden_probe(dead, record_file=None)


async def test_tiny_models_are_probed_as_well(tmp_path: Path) -> None:
    for vocab_size, max_length in ((1, 2), (2, 3), (5, 17)):
        engine = FakeEngine(vocab_size=vocab_size, max_context_length=max_length)
        for _ in range(2):
            result = await run_golden_probe(engine, record_file=tmp_path / "golden.json")
            assert result.description.startswith(f"{RUNS} agree within 0 nats")


@pytest.mark.parametrize("runner", ["v1", "v2"])
async def test_the_prefix_cache_of_vllm_is_read_from(runner: str) -> None:
    fake = FakeVllm(runner)
    engine = VllmEngine(model="fake", launch=lambda: fake)
    await engine.start()
    fake.asked.clear()
    cached_tokens: list[int | None] = []

    def look(output: Output) -> None:
        cached_tokens.append(output.num_cached_tokens)

    fake.spoil = look
    result = await run_golden_probe(engine, record_file=None)
    await engine.close()
    assert result.description == f"{RUNS} agree within 0 nats"
    assert len(fake.asked) == 11  # none had to be asked again
    golden, *_ = golden_requests(vocab_size=50, max_context_length=999, supports=EVERY_SUPPORT)
    assert cached_tokens[1] == len(golden.context_ids) // BLOCK_SIZE * BLOCK_SIZE > 0


# ---------------------------------------------------------------- with earlier starts


def entries(path: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return found


async def described(engine: FakeEngine, path: Path) -> str:
    return (await run_golden_probe(engine, record_file=path)).description


async def test_the_first_start_records_and_the_next_ones_are_compared_with_it(tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    assert await described(engine_like(), path) == f"{RUNS} agree within 0 nats; recorded in {path} for later starts"
    text = path.read_text()
    [entry] = entries(path).values()
    assert (entry["model"], entry["revision"], entry["dtype"]) == ("fake", "formula-1", "float32")
    assert (entry["engine"], entry["engine_version"]) == ("fake", "1")
    assert text.count("\n") == 12  # a line a field, for people
    said = await described(engine_like(), path)
    told = re.fullmatch(rf"{RUNS} agree within 0 nats; within (\S+) nats of the start of (\S+)", said)
    assert told is not None
    assert float(told[1]) < 1e-5  # the file's decimals
    assert date.fromisoformat(told[2])
    assert path.read_text() == text


async def test_an_engine_that_drifts_between_starts_is_refused_until_its_entry_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    await described(engine_like(), path)
    text = path.read_text()
    [key] = entries(path)
    drifted = engine_like(engine_version="2")
    drifted.answer(lambda request: shifted(fake_scores(request), all_by(0.5)))
    with pytest.raises(ConfigError) as refused:
        await run_golden_probe(drifted, record_file=path)
    message = str(refused.value)
    assert "by fake 2 scores differently from the start of" in message
    assert "with fake 1, by 0.25 nats on average and 0.5 at most (float32 allows 0.01 nats" in message
    assert f"remove entry {key} from golden_file {path}" in message
    assert path.read_text() == text
    path.write_text("{}")
    assert "recorded in" in await described(drifted, path)
    assert "of the start of" in await described(drifted, path)


async def test_small_differences_between_starts_pass_and_do_not_add_up(tmp_path: Path) -> None:
    """Each start is compared with the first one, not with the one before it."""
    path = tmp_path / "golden.json"
    for nats, passes in ((0.0, True), (0.015, True), (0.03, False), (0.015, True)):
        engine = engine_like()
        engine.answer(lambda request, nats=nats: shifted(fake_scores(request), all_by(nats)))
        if passes:
            await described(engine, path)
        else:
            with pytest.raises(ConfigError, match="scores differently"):
                await described(engine, path)


@pytest.mark.parametrize(
    "other",
    [
        {"model_id": "another"},
        {"model_revision": "formula-2"},
        {"dtype": "bfloat16"},
        {"engine": "another"},
        {"max_context_length": 20},
        {"vocab_size": 299},
    ],
)
async def test_another_model_in_the_same_file_has_an_entry_of_its_own(other: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    await described(engine_like(), path)
    engine = engine_like(**other)
    engine.answer(lambda request: shifted(fake_scores(request), all_by(3.0)))
    assert "recorded in" in await described(engine, path)
    assert len(entries(path)) == 2
    assert "of the start of" in await described(engine_like(), path)


async def test_another_version_of_the_engine_is_compared_with_the_first(tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    await described(engine_like(), path)
    assert "of the start of" in await described(engine_like(engine_version="2"), path)


async def test_minus_infinity_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    engine = engine_like()
    engine.answer(lambda request: shifted(fake_scores(request), one_by(np.inf)))
    await described(engine, path)
    assert '"-Infinity"' in path.read_text()  # strict JSON has no such number
    assert "of the start of" in await described(engine, path)
    with pytest.raises(ConfigError, match="inf nats on average"):
        await described(engine_like(), path)


async def test_replicas_that_start_together_on_one_file_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    same = [described(engine_like(), path) for _ in range(4)]
    others = [described(engine_like(model_id=f"model-{index}"), path) for index in range(4)]
    said = await asyncio.gather(*same, *others)
    assert len(entries(path)) == 5
    assert sum("recorded in" in description for description in said) == 5
    assert sum("of the start of" in description for description in said) == 3


def test_entries_that_are_written_at_once_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda index: recall_or_record(path, entry_of(f"model-{index}")), range(64)))
    assert {entry["model"] for entry in entries(path).values()} == {f"model-{index}" for index in range(64)}


def entry_of(model: str) -> GoldenEntry:
    return GoldenEntry(
        model=model,
        revision="r",
        dtype="float32",
        engine="fake",
        engine_version="1",
        recorded_on=date(2026, 11, 20),
        sequence="s",
        logprobs_nats=[-1.0],
    )


# ---------------------------------------------------------------- files that cannot be used


BROKEN = {
    "empty": b"",
    "cut off": b'{"a": {"model": "m", "rev',
    "a list": b"[]",
    "no entry": b'{"a": 1}',
    "unknown field": b'{"a": {"model": "m", "colour": "red"}}',
    "not text": b"\xff\xfe",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
async def test_a_broken_file_is_named_and_left_alone(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"golden_file {path} is damaged: .*the next start records anew"):
        await described(engine_like(), path)
    with pytest.raises(ConfigError, match=f"golden_file {path} is damaged"):
        check_golden_file(path)
    assert path.read_bytes() == content


async def test_an_entry_of_another_length_is_named(tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    await described(engine_like(), path)
    [(key, entry)] = entries(path).items()
    path.write_text(json.dumps({key: {**entry, "logprobs_nats": entry["logprobs_nats"][:-1]}}))
    with pytest.raises(ConfigError, match=f"damaged: 47 log-probabilities in entry {key} instead of 48; remove"):
        await described(engine_like(), path)


async def test_a_file_that_cannot_be_read_or_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"golden_file {tmp_path} cannot be read: Is a directory"):
        await described(engine_like(), tmp_path)
    missing = tmp_path / "missing" / "golden.json"
    with pytest.raises(ConfigError, match=f"golden_file {missing} cannot be written: No such file or directory"):
        await described(engine_like(), missing)
    with pytest.raises(ConfigError, match=f"golden_file {missing} cannot be written: {missing.parent}: no such dir"):
        check_golden_file(missing)


async def test_a_file_with_its_entry_need_not_be_writable(tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    await described(engine_like(), path)
    (tmp_path / ".golden.json.lock").unlink()
    (tmp_path / ".golden.json.lock").mkdir()  # as good as a read-only directory, for root too
    assert "of the start of" in await described(engine_like(), path)
    with pytest.raises(ConfigError, match=f"golden_file {path} cannot be written: Is a directory"):
        await described(engine_like(model_id="another"), path)
    assert len(entries(path)) == 1


def test_a_file_that_is_there_or_can_be_made_passes_and_is_not_made(tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    check_golden_file(path)
    assert list(tmp_path.iterdir()) == []
    recall_or_record(path, entry_of("m"))
    check_golden_file(path)
