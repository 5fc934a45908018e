"""How fast a teacher process scores, over the network, and how many bytes a token that takes.

Groups of completions that share a context against as many completions with a context of their own, the same number
of scored tokens in both, interleaved; dense candidates of every position. Random ids: speed does not depend on them.

    python bench/scoring.py --model .cache/smollm2-135m-instruct --json bench/results/scoring.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from machine import machine_facts, teacher_process
from vopd_client.teacher import RemoteTeacher
from vopd_client.types import Candidates, SequenceToScore


@dataclass(frozen=True)
class Workload:
    """`num_groups` groups of `group_size` completions, a context a group."""

    name: str
    num_groups: int
    group_size: int
    context_tokens: int
    completion_tokens: int
    k: int

    def sequences(self, vocab_size: int, rng: np.random.Generator) -> list[SequenceToScore]:
        """Fresh random sequences, so that nothing computed before can help."""
        counts_T = np.full(self.completion_tokens, self.k)
        made = []
        for _ in range(self.num_groups):
            context_ids = rng.integers(vocab_size, size=self.context_tokens)
            for _ in range(self.group_size):
                completion_ids = rng.integers(vocab_size, size=self.completion_tokens)
                ids = rng.integers(vocab_size, size=self.completion_tokens * self.k)
                made.append(SequenceToScore(context_ids, completion_ids, Candidates(ids, counts_T)))
        return made


def measure(teacher: RemoteTeacher, workload: Workload, rng: np.random.Generator) -> dict[str, float]:
    """One pass over the workload through the stream: scored tokens a second, bytes a token each way."""
    sequences = workload.sequences(teacher.info.vocab_size, rng)
    sent, received, began = teacher.bytes_sent, teacher.bytes_received, time.perf_counter()
    for future in [teacher.submit(sequence) for sequence in sequences]:
        future.result()
    seconds = time.perf_counter() - began
    num_tokens = sum(len(sequence.completion_ids) for sequence in sequences)
    return {
        "scored_tokens_per_s": num_tokens / seconds,
        "bytes_sent_per_token": (teacher.bytes_sent - sent) / num_tokens,
        "bytes_received_per_token": (teacher.bytes_received - received) / num_tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where the results go")
    arguments = parser.parse_args()

    workloads = [
        Workload(
            "8 completions a context", num_groups=2, group_size=8, context_tokens=256, completion_tokens=64, k=100
        ),
        Workload(
            "1 completion a context", num_groups=16, group_size=1, context_tokens=256, completion_tokens=64, k=100
        ),
    ]
    rng = np.random.default_rng(0)
    runs: dict[str, list[dict[str, float]]] = {workload.name: [] for workload in workloads}
    with tempfile.TemporaryDirectory() as scratch:
        log_path = Path(scratch) / "teacher.log"
        with teacher_process(arguments.model, log_path, dtype=arguments.dtype) as url:
            teacher = RemoteTeacher.connect(url, float_type="float16")
            info = teacher.info
            for repetition in range(arguments.repetitions + 1):  # the first is a warm-up
                for workload in workloads:
                    result = measure(teacher, workload, rng)
                    if repetition:
                        runs[workload.name].append(result)
            teacher.close()

    rows: list[dict[str, Any]] = []
    for name, results in runs.items():
        medians = {key: statistics.median(result[key] for result in results) for key in results[0]}
        rows.append({"workload": name, **medians})
    ratio = statistics.median(
        shared["scored_tokens_per_s"] / alone["scored_tokens_per_s"]
        for shared, alone in zip(*runs.values(), strict=True)
    )
    show(rows, ratio)
    if arguments.json:
        content = {
            "machine": machine_facts(),
            "teacher": f"{info.model_id}, {info.dtype}, {info.engine} {info.engine_version}",
            "repetitions": arguments.repetitions,
            "rows": rows,
            "ratios": {"shared over alone, median of pairs": ratio},
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


def show(rows: list[dict[str, Any]], ratio: float) -> None:
    table = Table("256 tokens of context, 64 of completion, k = 100, float16", "tokens/s", "bytes out", "bytes back")
    for row in rows:
        numbers = (row["scored_tokens_per_s"], row["bytes_sent_per_token"], row["bytes_received_per_token"])
        table.add_row(row["workload"], *(f"{number:.0f}" for number in numbers))
    console = Console()
    console.print(table)
    console.print(f"A shared context is scored {ratio:.2f} times as fast (median of pairs).")


if __name__ == "__main__":
    main()
