"""The overlap benchmark's proxy shifts answers in time and changes nothing else; its ratios are what they say."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from overlap_plan import Case, cases, counted, ratios, summarise, train_config
from overlap_proxy import delayed, serve

DELAY_S = 0.5


async def handlers_have_ended() -> None:
    """Of all connections, so that nothing is left to the garbage collector."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.wait_for(asyncio.gather(*others, return_exceptions=True), 5.0)


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while block := await reader.read(1000):
        writer.write(block)
        await writer.drain()
    writer.close()


async def test_answers_come_one_delay_later_in_order_and_do_not_wait_for_one_another() -> None:
    echo = await asyncio.start_server(_echo, "127.0.0.1", 0)
    async with echo, await serve(*echo.sockets[0].getsockname(), DELAY_S) as proxy:
        reader, writer = await asyncio.open_connection(*proxy.sockets[0].getsockname())
        sent_at, answers = [], []
        for number in range(8):  # the last leaves before the first has come back
            sent_at.append(time.monotonic())
            writer.write(bytes([number]) * 3000)
            await asyncio.sleep(DELAY_S / 16)
        for number in range(8):
            answers.append(await reader.readexactly(3000))
            latency_s = time.monotonic() - sent_at[number]
            assert latency_s >= DELAY_S
            assert latency_s < 2 * DELAY_S, f"answer {number} waited for others"
        assert answers == [bytes([number]) * 3000 for number in range(8)]
        writer.close()
        await handlers_have_ended()


async def test_what_was_said_before_the_end_still_arrives_and_then_the_end() -> None:
    async def say_goodbye(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"goodbye")
        writer.close()

    server = await asyncio.start_server(say_goodbye, "127.0.0.1", 0)
    async with server, await serve(*server.sockets[0].getsockname(), 0.1) as proxy:
        reader, writer = await asyncio.open_connection(*proxy.sockets[0].getsockname())
        assert await reader.read() == b"goodbye"
        writer.close()
        await handlers_have_ended()


async def test_the_proxy_is_a_process_of_its_own_and_ends_with_its_block() -> None:
    echo = await asyncio.start_server(_echo, "127.0.0.1", 0)
    host, port = echo.sockets[0].getsockname()
    async with echo:
        with delayed(f"grpc://{host}:{port}", 0.0) as url:
            proxy_host, _, proxy_port = url.removeprefix("grpc://").rpartition(":")
            reader, writer = await asyncio.open_connection(proxy_host, int(proxy_port))
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            writer.close()
            await handlers_have_ended()
        with pytest.raises(OSError, match=r"refused|Connect call failed"):
            await asyncio.open_connection(proxy_host, int(proxy_port))


def step(step_s: float) -> dict[str, float]:
    return {
        "step_s": step_s, "rollout_s": 1.0, "update_s": 2.0, "teacher_wait_s": step_s - 3, "tokens_per_s": 100 / step_s,
        "staleness": 1, "importance_truncated_fraction": 0.25, "teacher_bytes_per_token": 200.0,
    }  # fmt: skip


def test_a_row_is_the_median_of_the_steps_that_are_like_one_another() -> None:
    rows = [step(seconds) for seconds in (50, 40, 4, 5, 9, 2)]
    row = summarise(Case(1, 2.0), counted(rows))
    assert (row["steps"], row["step_s"], row["step_s_min"], row["step_s_max"]) == (3, 5, 4, 9)
    assert (row["max_staleness"], row["latency_s"], row["teacher_wait_s"], row["tokens_per_s"]) == (1, 2.0, 2, 20)


def test_the_bars_are_a_hidden_latency_and_one_that_is_paid_once() -> None:
    seconds = {Case(0, 0.0): 5.0, Case(1, 0.0): 4.0, Case(0, 2.0): 7.7, Case(1, 2.0): 4.6}
    rows = [summarise(case, [step(step_s)] * 3) for case, step_s in seconds.items()]
    hidden, paid = ratios(rows, 2.0)
    assert (hidden.value, hidden.holds) == (pytest.approx(1.15), False)
    assert (paid.value, paid.holds) == (pytest.approx(1.1), True)
    assert hidden.to_row()["bar"] == 1.1


def test_every_case_differs_in_what_it_is_about_alone(tmp_path: Path) -> None:
    configs = [
        train_config(case, model="m", teacher_url="grpc://t:1", output_dir=tmp_path, counted_steps=4).model_dump()
        for case in cases(2.0)
    ]
    assert [case.latency_s for case in cases(2.0)] == [0.0, 0.0, 2.0, 2.0]
    differing = {name for config in configs for name in config if config[name] != configs[0][name]}
    assert differing == {"name", "max_staleness"}
