"""`make bench-teacher`: what it counts and compares, and that none of its servers is left behind.

No model is loaded; the servers are small ones of this file.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from rich.console import Console

import teacher_servers
from fake_engine import FakeEngine
from fake_server import fake_teacher
from null_teacher import null_ids, null_logprobs
from small_workload import MASSES, C, G, K, P, T, make_workload
from teacher_agreement import agreement
from teacher_clients import OurClient, Pass, StockClient, stock_scores
from teacher_measure import Figures, figures_of, forget_peaks, medians, peak_bytes, peak_memory_mib, tree_cpu_s
from teacher_plan import Row, rows_of
from teacher_report import bars_of, better_engine, paired, print_judgement, print_table, ratios_of
from teacher_run import Bench, DisagreementError, compare
from teacher_servers import Launch, ServerError, launch_of, running_server
from teacher_workload import (
    Play,
    Workload,
    sequences_of,
)
from vopd_client.types import SequenceScores, SequenceToScore, TeacherTopK


@pytest.fixture(scope="module")
def workload() -> Workload:
    return make_workload()


# ---------------------------------------------------------------- clients


def scores_for(sequence: SequenceToScore, seed: int = 0, k: int = K) -> SequenceScores:
    rng = np.random.default_rng(seed + int(sequence.completion_ids.sum()))
    num_rows = len(sequence.completion_ids)
    ids_TK = np.stack([rng.choice(3000, k, replace=False) for _ in range(num_rows)])
    logprobs_TK = -np.sort(rng.exponential(3, (num_rows, k)).astype(np.float32))
    sampled_T = -rng.exponential(3, num_rows).astype(np.float32) - 20
    for row, token in enumerate(sequence.completion_ids):
        if token in ids_TK[row]:
            sampled_T[row] = logprobs_TK[row, ids_TK[row].tolist().index(token)]
    return SequenceScores(sampled_T, ids_TK.ravel(), logprobs_TK.ravel(), np.full(num_rows, k))


def choice_of(sequence: SequenceToScore, scores: SequenceScores, index: int = 0) -> dict[str, Any]:
    """As vLLM writes it: null first, a dictionary a token, the actual token in it wherever it ranks."""
    num_rows, k = len(sequence.completion_ids), int(scores.counts_T[0])
    ids_TK, logprobs_TK = scores.support_ids.reshape(num_rows, k), scores.support_logprobs.reshape(num_rows, k)
    rows: list[dict[str, Any] | None] = [None]
    rows += [{"1": {"logprob": -1.0, "rank": 1, "decoded_token": "a"}}] * (len(sequence.context_ids) - 1)
    for row in range(num_rows):
        entries: dict[str, Any] = {
            str(sequence.completion_ids[row]): {"logprob": float(scores.sampled_logprobs_T[row]), "rank": 900}
        }
        for rank, (token_id, logprob) in enumerate(zip(ids_TK[row].tolist(), logprobs_TK[row].tolist(), strict=True)):
            entries[str(token_id)] = {"logprob": logprob, "rank": rank + 1, "decoded_token": "b"}
        rows.append(entries)
    return {"index": index, "prompt_logprobs": rows}


def assert_same(one: SequenceScores, other: SequenceScores) -> None:
    for name in ("sampled_logprobs_T", "support_ids", "support_logprobs", "counts_T"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_a_stock_reply_gives_the_rows_of_the_completion(workload: Workload) -> None:
    [sequence, *_] = sequences_of(workload, Play("shared", "top_k", 1, 0))
    expected = scores_for(sequence)
    choice = choice_of(sequence, expected)
    assert_same(stock_scores(choice, sequence, K), expected)
    del choice["prompt_logprobs"][C + 2][str(sequence.completion_ids[2])]
    with pytest.raises(ValueError, match=f"row 2 has 5 ids, of 5 and token {sequence.completion_ids[2]}"):
        stock_scores(choice, sequence, K)
    with pytest.raises(ValueError, match="longer"):
        stock_scores({"prompt_logprobs": choice_of(sequence, expected)["prompt_logprobs"][:-1]}, sequence, K)


@contextmanager
def stock_server(known: list[SequenceToScore], bodies: list[bytes], replies: list[bytes]) -> Iterator[str]:
    """Answers as vLLM does, choices in another order than they were asked for."""
    by_prompt = {(*one.context_ids.tolist(), *one.completion_ids.tolist()): one for one in known}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply({"data": [{"id": "the-model"}]})

        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            sequences = [by_prompt[tuple(prompt)] for prompt in json.loads(bodies[-1])["prompt"]]
            choices = [choice_of(one, scores_for(one), index) for index, one in enumerate(sequences)]
            replies.append(self.reply({"choices": choices[::-1]}))

        def reply(self, content: dict[str, Any]) -> bytes:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return body

        def log_message(self, *_: object) -> None:
            """Not into the test's output."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("per_request", "num_requests"), [(1, 8), (4, 2), (8, 1)])
def test_stock_is_asked_as_its_users_ask_it_and_its_bytes_are_counted(
    workload: Workload, per_request: int, num_requests: int
) -> None:
    sequences = sequences_of(workload, Play("shared", "top_k", 2, 0))
    bodies: list[bytes] = []
    replies: list[bytes] = []
    with stock_server(sequences, bodies, replies) as url:
        client = StockClient(url, k=K, concurrency=16)
        client.sequences_per_request = per_request
        found = client.play(sequences)
        client.close()
    assert len(bodies) == num_requests
    for body in bodies:
        asked = json.loads(body)
        assert len(asked.pop("prompt")) == per_request
        assert asked == {"model": "the-model", "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": K}
    for one, sequence in zip(found.scores, sequences, strict=True):
        assert_same(one, scores_for(sequence))
    assert found.bytes_sent == sum(map(len, bodies))
    assert found.bytes_received == sum(map(len, replies))
    assert found.num_tokens == 2 * G * T
    assert len(found.latencies_s) == 2 * G
    assert 0 < max(found.latencies_s) <= found.seconds


async def test_our_client_scores_every_sequence_and_counts_its_bytes(workload: Workload) -> None:
    sequences = [
        replace(one, context_ids=one.context_ids % 250, completion_ids=one.completion_ids % 250, support=TeacherTopK(3))
        for one in sequences_of(workload, Play("shared", "top_k", 2, 0))
    ]
    async with fake_teacher(FakeEngine()) as running:
        client = await asyncio.to_thread(OurClient, running.url, window=3)
        first = await asyncio.to_thread(client.play, sequences)
        second = await asyncio.to_thread(client.play, sequences)
        await asyncio.to_thread(client.close)
    assert [len(one.sampled_logprobs_T) for one in second.scores] == [T] * len(sequences)
    assert len(running.engine.requests) == 2 * len(sequences)
    # ids of 1 byte and 16-bit floats at least; what a pass took, not what the client has taken in its life
    assert second.num_tokens * 2 * 4 < second.bytes_received < 2 * first.bytes_received
    assert 0 < second.bytes_sent <= first.bytes_sent
    assert 0 < min(second.latencies_s) <= max(second.latencies_s) <= second.seconds


def test_the_null_engine_gives_what_a_service_accepts() -> None:
    ids_TK = null_ids(7, 100, 49_152)
    assert ids_TK.shape == (7, 100)
    assert all(len(set(row)) == 100 for row in ids_TK.tolist())
    assert 0 <= ids_TK.min() <= ids_TK.max() < 49_152
    assert null_logprobs(700).dtype == np.float32
    assert (null_logprobs(700) < 0).all()
    assert null_logprobs(700) is null_logprobs(700)  # nothing is computed while it is measured


# ---------------------------------------------------------------- figures


def figures(rate: float = 100.0, seconds: float = 10.0, sent: float = 200.0, received: float = 200.0) -> Figures:
    return Figures(seconds, rate, 1.0, 2.0, 3.0, 0.5, sent, received, 700.0)


def test_figures_are_of_a_pass_and_a_scored_token() -> None:
    scores = [SequenceScores(np.zeros(5, np.float32), np.zeros(0, int), np.zeros(0, np.float32), np.zeros(5, int))] * 2
    passes = [
        Pass(1.0, [0.5, 1.0], scores, bytes_sent=100, bytes_received=1000),
        Pass(3.0, [2.0, 3.0], scores, bytes_sent=300, bytes_received=1000),
    ]
    found = figures_of(passes, server_cpu_s=6.0, client_cpu_s=2.0, memory_mib=5.0)
    assert (found.seconds, found.scored_tokens_per_s) == (2.0, 20 / 4.0)
    assert (found.server_cpu_s, found.client_cpu_s) == (3.0, 1.0)
    assert (found.bytes_sent_per_token, found.bytes_received_per_token, found.bytes_per_token) == (20.0, 100.0, 120.0)
    assert (found.latency_p50_s, found.latency_p95_s) == (1.5, pytest.approx(2.85))


def test_medians_are_of_each_figure_for_itself() -> None:
    found = medians([figures(rate=1, seconds=9), figures(rate=2, seconds=7), figures(rate=30, seconds=8)])
    assert (found.scored_tokens_per_s, found.seconds, found.bytes_per_token) == (2, 8, 400)


def test_a_peak_counts_shared_pages_once_and_what_has_been_given_back() -> None:
    status = "Name:\tx\nVmHWM:\t  5000 kB\nVmRSS:\t  4000 kB\n"
    assert peak_bytes(status, pss_bytes=3_000_000, rss_bytes=4000 * 1024) == 3_000_000 + 1000 * 1024
    assert peak_bytes(status, pss_bytes=3_000_000, rss_bytes=6000 * 1024) == 3_000_000


def test_memory_and_processor_time_are_those_of_all_processes() -> None:
    child = (
        "import time; x = bytearray(60 << 20); y = bytearray(40 << 20); del y; print('up', flush=True); time.sleep(60)"
    )
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = psutil.Popen([sys.executable, "-c", code], stdout=-1)
    try:
        assert process.stdout.readline() == b"up\n"
        with_peak_mib = peak_memory_mib(process.pid)
        forget_peaks(process.pid)
        without_mib = peak_memory_mib(process.pid)
        assert 60 < without_mib < with_peak_mib - 35
        assert tree_cpu_s(process.pid) > 0
    finally:
        tree = teacher_servers.tree_of(process.pid)
        assert len(tree) == 2
        for one in tree:
            one.kill()
        process.wait()
        process.stdout.close()
    assert peak_memory_mib(process.pid) == tree_cpu_s(process.pid) == 0


# ---------------------------------------------------------------- agreement


def noisy(scores: SequenceScores, nats: float) -> SequenceScores:
    rng = np.random.default_rng(1)
    return replace(
        scores,
        sampled_logprobs_T=scores.sampled_logprobs_T + rng.normal(0, nats, len(scores.sampled_logprobs_T)),
        support_logprobs=scores.support_logprobs + rng.normal(0, nats, len(scores.support_logprobs)),
    )


def test_engines_that_differ_by_noise_agree_and_a_shifted_row_or_anothers_scores_do_not(workload: Workload) -> None:
    scores = [scores_for(one) for one in sequences_of(workload, Play("shared", "top_k", P, 0))]
    assert agreement("same", scores, scores).sampled_largest_nats == 0
    assert agreement("same", scores, scores).common == K
    assert agreement("noise", scores, [noisy(one, 0.06) for one in scores]).holds
    assert not agreement("others", scores, scores[1:] + scores[:1]).holds
    rolled = [replace(one, sampled_logprobs_T=np.roll(one.sampled_logprobs_T, 1)) for one in scores]
    assert not agreement("shifted", scores, rolled).holds
    wrong_support = [replace(one, support_logprobs=np.roll(one.support_logprobs, K)) for one in scores]
    assert not agreement("wrong supports", scores, wrong_support).holds
    broken = [replace(one, sampled_logprobs_T=one.sampled_logprobs_T * np.nan) for one in scores]
    assert not agreement("NaN", scores, broken).holds
    with pytest.raises(ValueError, match="shorter"):
        agreement("one is missing", scores, scores[1:])


def test_supports_are_compared_by_position_and_id_whatever_their_order_and_size() -> None:
    nothing = np.zeros(2, np.float32)
    one = SequenceScores(nothing, np.array([7, 8, 9, 7]), np.array([-1, -2, -3, -4], np.float32), np.array([3, 1]))
    other = SequenceScores(nothing, np.array([9, 7, 8]), np.array([-3.5, -1, -9], np.float32), np.array([2, 1]))
    found = agreement("", [one], [other])
    assert (found.support_mean_nats, found.common) == (0.25, 1.0)  # 7 and 9 of the first row
    none = SequenceScores(nothing, np.array([1, 1]), nothing, np.array([1, 1]))
    assert not agreement("", [one], [none]).holds


def test_no_speed_is_reported_of_an_engine_that_is_wrong(workload: Workload) -> None:
    rows = [row for row in rows_of(MASSES, ["stock", "vllm"]) if row.sharing == "shared"]
    scores = [scores_for(one) for one in sequences_of(workload, Play("shared", "top_k", P, 0))]
    bench = Bench(workload, P, rows, Console(quiet=True))
    bench.scores = {rows[0]: scores, rows[1]: [noisy(one, 0.06) for one in scores]}
    [found] = compare(bench, repetitions=1)
    assert found.who == "vllm and stock, shared contexts"
    bench.scores[rows[1]] = scores[::-1]
    with pytest.raises(DisagreementError, match="no speed is reported: vllm and stock, shared contexts: "):
        compare(bench, repetitions=1)


# ---------------------------------------------------------------- the report

STOCK, STOCK_ALONE = Row("stock", "shared", "top_k", 0), Row("stock", "alone", "top_k", 1)
VLLM, TRANSFORMERS = Row("vllm", "shared", "top_k", 0), Row("transformers", "shared", "dense", 0)
TRANSFORMERS_ALONE = Row("transformers", "alone", "dense", 1)
ADAPTIVE = Row("transformers", "shared", 0.9, 2)
NULL, NULL_TOP_K = Row("null", "shared", "dense", 0, 10), Row("null", "shared", "top_k", 0, 10)


def found_figures() -> dict[Row, list[Figures]]:
    return {
        STOCK: [figures(50, seconds=20), figures(25, seconds=40), figures(50, seconds=20)],
        STOCK_ALONE: [figures(40)] * 3,
        VLLM: [figures(200, sent=2, received=402), figures(100, sent=2, received=402), figures(200)],
        TRANSFORMERS: [figures(600, seconds=2), figures(200, seconds=4), figures(550, seconds=2)],
        TRANSFORMERS_ALONE: [figures(120)] * 3,
        ADAPTIVE: [figures(700, sent=40, received=55)] * 3,
        NULL: [figures(9000, seconds=0.03), figures(9000, seconds=0.2), figures(9000, seconds=0.3)],
        NULL_TOP_K: [figures(9000, seconds=1.0)] * 3,
    }


def test_ratios_are_taken_within_a_repetition() -> None:
    found = found_figures()
    assert paired(found, TRANSFORMERS, STOCK, "scored_tokens_per_s") == 11  # of 12, 8 and 11; the medians' is 11 too
    found[STOCK] = found[STOCK][::-1]
    found[STOCK][0] = figures(300)
    assert paired(found, TRANSFORMERS, STOCK, "scored_tokens_per_s") == 8  # of 2, 8 and 11
    assert paired(found, TRANSFORMERS, None, "seconds") is None
    with pytest.raises(ValueError, match="shorter"):
        paired(found | {STOCK: found[STOCK][:2]}, TRANSFORMERS, STOCK, "seconds")


def test_our_overhead_is_against_the_better_engine_asked_for_the_same_support() -> None:
    found = found_figures()
    assert better_engine(found, "shared") == TRANSFORMERS
    assert ratios_of(found)["null_over_better_seconds"] == pytest.approx(0.05)  # of 0.015, 0.05 and 0.15
    found[VLLM] = [figures(5000, seconds=4.0)] * 3
    assert better_engine(found, "shared") == VLLM
    assert ratios_of(found)["null_over_better_seconds"] == pytest.approx(0.25)
    assert better_engine(found, "alone") == TRANSFORMERS_ALONE


def bars_by_name(found: dict[Row, list[Figures]]) -> dict[str, tuple[str, bool]]:
    sizes = dict.fromkeys(found, 100.0) | ({ADAPTIVE: 23.4} if ADAPTIVE in found else {})
    labels = {row: row.label(8, 100) for row in found}
    bars = bars_of(found, ratios_of(found), sizes, labels)
    return {bar.what: (bar.found, bar.holds) for bar in bars}


def test_every_bar_says_what_was_found_and_whether_it_is_held() -> None:
    assert bars_by_name(found_figures()) == {
        "the better engine (transformers) over stock, shared contexts": ("11.00 times", True),
        "our vllm over stock, shared contexts": ("4.00 times", True),
        "the better engine (transformers) over stock, own contexts": ("3.00 times", False),
        "null over the better engine's (transformers) time": ("5.00%", True),
        "vllm, G = 8, the teacher's 100": ("404 bytes (100.0 ids a position)", True),
        "transformers, G = 8, the student's 100": ("400 bytes (100.0 ids a position)", True),
        "transformers, G = 8, the student's for 0.9": ("95 bytes (23.4 ids a position)", True),
    }


@pytest.mark.parametrize(
    ("row", "changed", "bar"),
    [
        (TRANSFORMERS, figures(300, seconds=2), "the better engine (transformers) over stock, shared contexts"),
        (VLLM, figures(100), "our vllm over stock, shared contexts"),
        (NULL, figures(9000, seconds=0.5), "null over the better engine's (transformers) time"),
        (VLLM, figures(200, sent=2, received=699), "vllm, G = 8, the teacher's 100"),
        (TRANSFORMERS, figures(600, seconds=2, sent=300, received=401), "transformers, G = 8, the student's 100"),
        (ADAPTIVE, figures(700, sent=50, received=51), "transformers, G = 8, the student's for 0.9"),
    ],
)
def test_a_bar_that_is_missed_says_so(row: Row, changed: Figures, bar: str) -> None:
    assert bars_by_name(found_figures())[bar][1]
    assert not bars_by_name(found_figures() | {row: [changed] * 3})[bar][1]


def test_contestants_that_were_left_out_have_no_bars() -> None:
    only = {row: found for row, found in found_figures().items() if row.contestant in ("null", "transformers")}
    assert set(bars_by_name(only)) == {
        "null over the better engine's (transformers) time",
        "transformers, G = 8, the student's 100",
        "transformers, G = 8, the student's for 0.9",
    }
    assert bars_by_name({NULL: [figures()]}) == {}


def test_the_report_shows_every_row_and_what_was_missed() -> None:
    found = found_figures()
    console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    labels = {row: row.label(8, 100) for row in found}
    print_table(console, found, dict.fromkeys(found, 100.0), labels, "a title")
    bars = bars_of(found, ratios_of(found), dict.fromkeys(found, 100.0), labels)
    scores = [scores_for(SequenceToScore(np.arange(3), np.arange(4)))]
    print_judgement(console, bars, [agreement("vllm and stock", scores, scores)])
    console.file.close()
    said = console.export_text()
    assert all(label in said for label in labels.values())
    assert said.count("missed") == sum(not bar.holds for bar in bars) == 1
    assert "vllm and stock: 0.000 nats apart on sampled tokens (largest 0.00), 0.000 on supports (5 common" in said


# ---------------------------------------------------------------- servers


def test_a_missing_environment_says_how_it_is_made(tmp_path: Path) -> None:
    for contestant in ("stock", "vllm"):
        with pytest.raises(ServerError, match=r"`make test-vllm` or `sh deploy/vllm-env\.sh \.venv-vllm`"):
            launch_of(contestant, model="m", k=100, vllm_python=tmp_path / "python")
    assert launch_of("transformers", model="m", k=100, vllm_python=tmp_path / "python").command[0] == sys.executable


def test_stock_is_the_openai_server_with_the_same_model_and_lengths(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.touch()
    stock, ours = (launch_of(name, model="m", k=100, vllm_python=python) for name in ("stock", "vllm"))
    said = " ".join(stock.command)
    assert "-m vllm.entrypoints.openai.api_server --model m" in said
    assert "--dtype bfloat16 --max-model-len 1024 --max-logprobs 100" in said
    assert "--dtype bfloat16 --engine vllm --model m" in " ".join(ours.command)
    assert "--max-context-length 1023" in " ".join(ours.command)
    assert stock.environment == ours.environment


def test_a_server_that_does_not_start_says_what_it_wrote(tmp_path: Path) -> None:
    launch = Launch([sys.executable, "-c", "raise SystemExit('no such model')"])
    with (
        pytest.raises(ServerError, match=r"the null server ended with 1:\nno such model"),
        running_server("null", launch, tmp_path / "log", os.environ),
    ):
        pass


def test_no_process_of_a_server_is_left_even_of_one_that_does_not_listen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_servers, "END_TIMEOUT_S", 0.3)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    child = deaf + "print('child is up', flush=True); time.sleep(60)"
    code = f"{deaf}import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
    code += "print('ready at grpc://127.0.0.1:1: x', flush=True); time.sleep(60)"
    log_path = tmp_path / "log"
    with running_server("null", Launch([sys.executable, "-c", code]), log_path, os.environ) as server:
        assert server.url == "grpc://127.0.0.1:1"
        while "child is up" not in log_path.read_text():
            time.sleep(0.05)
        tree = teacher_servers.tree_of(server.pid)
        assert len(tree) == 2
    assert [is_alive(one) for one in tree] == [False, False]


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
