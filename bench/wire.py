"""What each way of sending scores costs, in bytes a token and in nats.

The recorded rollouts are scored by the engine itself; then the same numbers are packed in every way there is, and in
some that there are not: ids as gaps, bytes through zlib. What rounding does is measured on the teacher's own numbers.

    python bench/wire.py --model .cache/smollm2-135m-instruct --json bench/results/wire.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from machine import machine_facts
from teacher_workload import Play, Workload, load_workload, sequences_of
from vopd_client.types import Candidates, SequenceToScore
from vopd_proto import teacher_pb2 as pb
from vopd_proto.arrays import Float32Array, IntArray, pack_floats, pack_uints, unpack_floats
from vopd_server import types as served
from vopd_server.engines.transformers import TransformersEngine

FLOAT_TYPES: dict[str, pb.FloatType] = {"float32": pb.FLOAT32, "float16": pb.FLOAT16, "bfloat16": pb.BFLOAT16}
LARGE_VOCABULARY = 151_936  # rows of a common one that needs three bytes an id
ZLIB_LEVELS = (1, 6)

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Scored:
    """Rollouts with the teacher's numbers, one after the other. N rows, M ids over all of them."""

    sampled_N: Float32Array
    ids_M: IntArray
    counts_N: IntArray
    support_M: Float32Array


def gaps(ids_M: IntArray, counts_N: IntArray) -> tuple[IntArray, IntArray]:
    """Each row's ids in ascending order, the first as it is and the others as gaps; and the order, [M] each."""
    rows_M = np.repeat(np.arange(len(counts_N)), counts_N)
    order_M = np.lexsort((ids_M, rows_M))
    ascending_M = ids_M[order_M]
    gaps_M = np.diff(ascending_M, prepend=0)
    first_of_row = np.cumsum(counts_N) - counts_N
    first_of_row = first_of_row[counts_N > 0]
    gaps_M[first_of_row] = ascending_M[first_of_row]
    return gaps_M, order_M


def varint_bytes(values: IntArray) -> int:
    """Bytes of non-negative integers at seven bits a byte, as in protobuf."""
    bits = np.floor(np.log2(np.maximum(values, 1))).astype(np.int64) + 1
    return int(((bits + 6) // 7).sum())


def rounding(scored: Scored, float_type: pb.FloatType) -> dict[str, float]:
    """What a float type does to log-probabilities, in nats.

    In a mean over a support, as baselines and the exact part of vopd-rb are, errors of either sign cancel: it is taken
    under the teacher's own probabilities.
    """
    sampled_N, support_M = (
        unpack_floats(pack_floats(values, float_type)) for values in (scored.sampled_N, scored.support_M)
    )
    rows_M = np.repeat(np.arange(len(scored.counts_N)), scored.counts_N)
    error_M = (support_M - scored.support_M).astype(np.float64)
    mean_N = np.bincount(rows_M, np.exp(scored.support_M) * error_M, minlength=len(scored.counts_N))
    return {
        "sampled_mean_nats": float(np.abs(sampled_N - scored.sampled_N).mean()),
        "sampled_max_nats": float(np.abs(sampled_N - scored.sampled_N).max()),
        "support_mean_nats": float(np.abs(error_M).mean()),
        "support_max_nats": float(np.abs(error_M).max()),
        "support_value_max_nats": float(np.abs(mean_N).max()),
    }


def id_rows(scored: Scored, vocab_size: int, name: str) -> list[dict[str, Any]]:
    """Bytes a token for the ids of a support. Ids are spread over `vocab_size` as they are over their own.

    Gaps need each row's ids in order. Finding that order alone takes a client the time that is set against the bytes it
    saves; to write the gaps, and to add them up again, comes on top.
    """
    largest = int(scored.ids_M.max())
    ids_M = scored.ids_M * (vocab_size - 1) // largest if vocab_size > largest + 1 else scored.ids_M
    (gaps_M, _), gaps_s = timed(lambda: gaps(ids_M, scored.counts_N))
    num_rows = len(scored.counts_N)
    narrowest = len(pack_uints(ids_M).data)
    ways = {
        "four bytes": 4 * len(ids_M),
        "narrowest whole bytes": narrowest,
        "gaps, narrowest whole bytes": len(pack_uints(gaps_M).data),
        "gaps, seven bits a byte": varint_bytes(gaps_M),
    }
    return [
        {
            "what": "ids",
            "support": name,
            "vocabulary": vocab_size,
            "way": way,
            "bytes_a_token": size / num_rows,
            "saves_time_below_mbit_per_s": 8 * max(0, narrowest - size) / gaps_s / 1e6 if "gaps" in way else None,
        }
        for way, size in ways.items()
    ]


def zlib_rows(scored: Scored, name: str) -> list[dict[str, Any]]:
    """The packed arrays of all rollouts, compressed: what is left of them, and the link on which that saves time."""
    rows = []
    packed = {
        "ids": pack_uints(scored.ids_M).data,
        "float16": pack_floats(scored.support_M, pb.FLOAT16).data,
        "float32": pack_floats(scored.support_M, pb.FLOAT32).data,
    }
    for array, data in packed.items():
        for level in ZLIB_LEVELS:
            compressed, pack_s = timed(lambda data=data, level=level: zlib.compress(data, level))
            _, unpack_s = timed(lambda compressed=compressed: zlib.decompress(compressed))
            saved = len(data) - len(compressed)
            rows.append(
                {
                    "what": "zlib",
                    "support": name,
                    "array": array,
                    "level": level,
                    "ratio": len(compressed) / len(data),
                    "mb_per_s_both_ways": len(data) / (pack_s + unpack_s) / 1e6,
                    "saves_time_below_mbit_per_s": 8 * saved / (pack_s + unpack_s) / 1e6,
                }
            )
    return rows


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """The best of five: what else runs on the machine only adds."""
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - began)
    return result, min(seconds)


# ---------------------------------------------------------------- the teacher


async def score(model: str, sequences: Sequence[SequenceToScore]) -> Scored:
    """In float32: what rounding does is to be told from what the model's own dtype does."""
    engine = TransformersEngine(model=model, dtype="float32", max_batch_tokens=4096)
    await engine.start()
    try:
        answers = await asyncio.gather(*(engine.score(_request(sequence)) for sequence in sequences))
    finally:
        await engine.close()
    supports = [sequence.support for sequence in sequences]
    candidates = [support for support in supports if isinstance(support, Candidates)]
    logprobs: list[npt.NDArray[np.float32]] = [
        answer.support_logprobs for answer in answers if answer.support_logprobs is not None
    ]
    return Scored(
        np.concatenate([answer.sampled_logprobs_T for answer in answers]),
        np.concatenate([support.ids for support in candidates]),
        np.concatenate([support.counts_T for support in candidates]),
        np.concatenate(logprobs),
    )


def _request(sequence: SequenceToScore) -> served.ScoreRequest:
    assert isinstance(sequence.support, Candidates)
    support = served.Candidates(sequence.support.ids, sequence.support.counts_T)
    return served.ScoreRequest("wire", sequence.context_ids, sequence.completion_ids, support)


def measure(model: str, workload: Workload) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, support in [("dense", "dense"), *((f"mass {mass:g}", mass) for mass in workload.settings.masses)]:
        sequences = sequences_of(workload, Play("shared", support, workload.num_contexts, 0))  # type: ignore[arg-type]
        scored = asyncio.run(score(model, sequences))
        vocab_size = int(scored.ids_M.max()) + 1
        rows += [
            {
                "what": "floats",
                "support": name,
                "ids_a_token": len(scored.ids_M) / len(scored.counts_N),
                "way": way,
                "bytes_a_token": len(pack_floats(scored.support_M, float_type).data) / len(scored.counts_N),
                **rounding(scored, float_type),
            }
            for way, float_type in FLOAT_TYPES.items()
        ]
        for size in (vocab_size, LARGE_VOCABULARY):
            rows += id_rows(scored, size, name)
        rows += zlib_rows(scored, name)
    return rows


def show(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    for what in ("floats", "ids", "zlib"):
        chosen = [row for row in rows if row["what"] == what]
        columns = [name for name in chosen[0] if name != "what"]
        table = Table(*(name.replace("_", " ") for name in columns), title=what)
        for row in chosen:
            table.add_row(*(_told(row[name]) for name in columns))
        console.print(table)


def _told(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "-" if value is None else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--workload", type=Path, default=Path(__file__).parent / "data" / "teacher_rollouts.npz")
    parser.add_argument("--json", type=Path, help="where the results go")
    arguments = parser.parse_args()
    rows = measure(arguments.model, load_workload(arguments.workload))
    if arguments.json:
        content = {"machine": machine_facts(("numpy",)), "rows": rows}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    show(Console(), rows)


if __name__ == "__main__":
    main()
