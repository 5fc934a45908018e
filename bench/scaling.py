"""How cost grows: one variable at a time away from a base point, against real teacher processes over gRPC.

Scored tokens a second, time a sequence, bytes a token and peak memory of the teacher, as context, completion, k,
group size, concurrency and vocabulary grow; then the largest request that keeps a memory budget. Rounds of sequences
that are all sent at once; the passes over all points are interleaved, and their medians are told.

    python bench/scaling.py --model .cache/smollm2-135m-instruct --json bench/results/scaling.json

Linux only: memory is read from /proc. A teacher keeps memory that it once needed, so each pass goes from the points
that are expected to need least to those that need most, and the first pass tells the memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from capacity_check import check
from capacity_engine import held_bytes
from capacity_figures import model_of_config
from machine import machine_facts
from scaling_memory import MEBIBYTE, MemoryProbe, largest_within
from scaling_models import model_config, with_longest_context, with_vocabulary
from scaling_plots import write_picture
from scaling_points import BASE, Curve, Point, curves, distinct_points
from scaling_report import Measured, growth, largest_row, medians, show
from scaling_rounds import play
from scaling_teacher import WatchedTeacher, watched_teacher
from vopd_client.teacher import TeacherClient
from vopd_client.types import TeacherInfo
from vopd_server.config import ServerConfig
from vopd_server.engines.head import CPU_CHUNK_ELEMENTS

GROUPS_FOR_MEMORY = (1, 8)
SHORTEST_TOKENS, LONGEST_TOKENS = 512, 32_768  # context and completion, of the search for the largest request
SHAPE_FIELDS = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
)
PACKAGES = ("torch", "transformers", "grpcio")


def measure(
    teacher: WatchedTeacher, point: Point, rng: np.random.Generator, least_s: float, runner: asyncio.Runner
) -> Measured:
    teacher.forget_peak()
    rounds = runner.run(play(teacher.url, point, rng, least_s))
    num_tokens = rounds.num_sequences * point.completion
    return Measured(
        seconds=rounds.seconds,
        num_sequences=rounds.num_sequences,
        scored_tokens_per_s=num_tokens / rounds.seconds,
        bytes_sent_per_token=rounds.bytes_sent / num_tokens,
        bytes_received_per_token=rounds.bytes_received / num_tokens,
        peak_bytes=teacher.peak_bytes(),
    )


def main() -> int:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends teachers, removes copies of models
    began_s = time.monotonic()
    all_curves = curves()
    with tempfile.TemporaryDirectory(prefix="scaling-") as directory, asyncio.Runner() as runner:
        rows, info, num_passes = _curves(arguments, all_curves, Path(directory), began_s, runner)
        largest = _largest(arguments, Path(directory), runner)
    content = {
        "machine": machine_facts(PACKAGES),
        "teacher": f"{arguments.model.name}, {info.dtype}, {info.engine} {info.engine_version}",
        "model_config": _shape_fields(model_config(arguments.model)),
        "engine": _engine_settings(),
        "base": asdict(BASE),
        "settings": {"passes": num_passes, "least_s": arguments.seconds},
        "rows": rows,
        "ratios": growth(rows),
        "largest": largest,
        "took_s": time.monotonic() - began_s,
    }
    show(content)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    if arguments.image:
        write_picture(content, check(content), arguments.image)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a directory")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one point in one pass, at least")
    parser.add_argument(
        "--most-minutes", type=float, default=9.0, help="no pass begins that would end later, by the time of the last"
    )
    parser.add_argument("--memory-budget-gib", type=float, default=1.25, help="for the largest request")
    parser.add_argument("--slowest-probe-s", type=float, default=40.0, help="of the search for it")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--image", type=Path, help="where the picture goes")
    return parser.parse_args()


def _engine_settings() -> dict[str, int]:
    """The server's defaults that bound its memory."""
    max_batch_tokens: int = ServerConfig.model_fields["max_batch_tokens"].default
    return {"max_batch_tokens": max_batch_tokens, "chunk_elements": CPU_CHUNK_ELEMENTS}


def _shape_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the capacity model needs of a config.json."""
    return {name: config[name] for name in SHAPE_FIELDS if name in config}


def _curves(
    arguments: argparse.Namespace,
    all_curves: Sequence[Curve],
    scratch: Path,
    began_s: float,
    runner: asyncio.Runner,
) -> tuple[list[dict[str, Any]], TeacherInfo, int]:
    """Rows, what the base point's teacher says of itself, and how many passes there was time for."""
    model, engine = model_of_config(model_config(arguments.model)), _engine_settings()
    points = sorted(distinct_points(list(all_curves)), key=lambda point: held_bytes(model, point, **engine))
    found: dict[Point, list[Measured]] = {point: [] for point in points}
    rng = np.random.default_rng(0)
    with ExitStack() as stack:
        teachers: dict[int, WatchedTeacher] = {}
        for vocab_size in sorted({point.vocabulary for point in points}):
            directory = arguments.model
            if vocab_size != model.shape.vocab_size:
                directory = with_vocabulary(arguments.model, scratch / f"vocabulary-{vocab_size}", vocab_size)
            log_path = scratch / f"{vocab_size}.log"
            teachers[vocab_size] = stack.enter_context(watched_teacher(directory, log_path))
            print(f"a teacher with {vocab_size} rows in its head is ready", flush=True)
        idle_bytes = {vocab_size: teacher.memory_bytes() for vocab_size, teacher in teachers.items()}
        info = runner.run(_info(teachers[BASE.vocabulary].url))
        num_passes = 0
        while num_passes < arguments.passes:
            pass_began_s = time.monotonic()
            for number, point in enumerate(points, 1):
                one = measure(teachers[point.vocabulary], point, rng, arguments.seconds, runner)
                found[point].append(one)
                told = f"{one.scored_tokens_per_s:.0f} tokens/s, peak {one.peak_bytes / MEBIBYTE:.0f} MiB"
                print(f"[pass {num_passes + 1}, {number}/{len(points)}] {_told(point)}: {told}", flush=True)
            num_passes += 1
            now_s = time.monotonic()
            if now_s - began_s + (now_s - pass_began_s) > 60 * arguments.most_minutes:
                break
    rows = [
        medians(curve, point, found[point], idle_bytes[point.vocabulary])
        for curve in all_curves
        for point in curve.points
    ]
    return rows, info, num_passes


async def _info(url: str) -> TeacherInfo:
    async with TeacherClient(url) as client:
        return client.info


def _told(point: Point) -> str:
    return (
        ", ".join(f"{name} {value}" for name, value in asdict(point).items() if value != getattr(BASE, name)) or "base"
    )


def _largest(arguments: argparse.Namespace, scratch: Path, runner: asyncio.Runner) -> list[dict[str, Any]]:
    """The search for each group size, with a model that takes longer sequences than it was trained on."""
    budget_bytes = int(arguments.memory_budget_gib * 2**30)
    model = with_longest_context(arguments.model, scratch / "long", LONGEST_TOKENS)
    vocab_size = int(model_config(arguments.model)["vocab_size"])
    rows = []
    for group in GROUPS_FOR_MEMORY:
        print(f"the largest request in {budget_bytes / MEBIBYTE:.0f} MiB, {group} a context", flush=True)
        point = replace(BASE, group=group, concurrency=group, vocabulary=vocab_size)
        with MemoryProbe(model, scratch, point, runner) as probe:
            found = largest_within(
                probe,
                budget_bytes=budget_bytes,
                shortest_tokens=SHORTEST_TOKENS,
                longest_tokens=LONGEST_TOKENS,
                slowest_s=arguments.slowest_probe_s,
            )
        rows.append(largest_row(group, budget_bytes, found))
    return rows


if __name__ == "__main__":
    sys.exit(main())
