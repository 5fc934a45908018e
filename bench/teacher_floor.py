"""The floor beneath `bench-teacher`, and where the time above it goes.

The same recorded rollouts, scored by the transformers engine in this process: without a service, a network or another
contestant. The least time is that of their floating-point operations at the matrix rates that this machine has at the
same shapes. Written into the results of the bench, beside the figures that it explains.

    python bench/teacher_floor.py --model .cache/smollm2-135m-instruct --json bench/results/teacher.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from floors import (
    DtypeName,
    MachineRates,
    ModelShape,
    attention_flops,
    causal_pairs,
    forward_floor_s,
    head_flops,
    layer_flops,
    measure_rates,
)
from teacher_workload import Play, Sharing, Workload, load_workload, sequences_of
from trainer_profile import profile_of
from vopd_client.types import Candidates
from vopd_server.engines.transformers import TransformersEngine
from vopd_server.types import Candidates as ServedCandidates
from vopd_server.types import ScoreRequest

DTYPE: DtypeName = "bfloat16"
FIRST_PASS = 1000  # passes of numbers that the bench has not played
REPETITIONS = 5


def shared_floor_s(
    rates: MachineRates, shape: ModelShape, *, num_contexts: int, group_size: int, context: int, completion: int
) -> float:
    """Contexts in one forward, then their completions, whose last tokens predict nothing that is asked for."""
    num_rollouts = num_contexts * group_size
    fed = num_rollouts * (completion - 1)
    parts = {
        num_contexts * context: num_contexts * causal_pairs(context),
        fed: num_rollouts * causal_pairs(completion - 1, context),
    }
    below_head_s = sum(
        (layer_flops(shape, tokens) + attention_flops(shape, pairs)) / rates.flops_per_s(DTYPE, tokens)
        for tokens, pairs in parts.items()
    )
    scored = num_rollouts * completion
    return below_head_s + head_flops(shape, scored) / rates.flops_per_s(DTYPE, scored, of="head")


def alone_floor_s(rates: MachineRates, shape: ModelShape, *, num_rollouts: int, context: int, completion: int) -> float:
    lengths = [context + completion - 1] * num_rollouts
    return forward_floor_s(rates, shape, lengths, scored_tokens=num_rollouts * completion, dtype=DTYPE)


def requests_of(workload: Workload, play: Play) -> list[ScoreRequest]:
    requests = []
    for sequence in sequences_of(workload, play):
        assert isinstance(sequence.support, Candidates)
        support = ServedCandidates(sequence.support.ids, sequence.support.counts_T)
        requests.append(ScoreRequest("floor", sequence.context_ids, sequence.completion_ids, support))
    return requests


def measure(model: str, workload: Workload, num_contexts: int, vocab_size: int) -> dict[Sharing, dict[str, Any]]:
    """Median seconds of one pass, and its profile."""
    with asyncio.Runner() as runner:
        engine = TransformersEngine(model=model, dtype=DTYPE)
        runner.run(engine.start())

        async def score(play: Play) -> None:
            await asyncio.gather(*map(engine.score, requests_of(workload, play)))

        found: dict[Sharing, dict[str, Any]] = {}
        sharings: tuple[Sharing, ...] = ("shared", "alone")
        for sharing in sharings:
            seconds = []
            for number in range(REPETITIONS + 1):
                began = time.perf_counter()
                runner.run(score(Play(sharing, "dense", num_contexts, FIRST_PASS + number)))
                seconds.append(time.perf_counter() - began)
            last = Play(sharing, "dense", num_contexts, FIRST_PASS + REPETITIONS + 1)
            profiled = profile_of(lambda last=last: runner.run(score(last)), vocab_size=vocab_size, is_sampling=False)
            found[sharing] = {"seconds": statistics.median(seconds[1:]), "profile": profiled}
        runner.run(engine.close())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--workload", type=Path, default=Path(__file__).parent / "data" / "teacher_rollouts.npz")
    parser.add_argument("--contexts", type=int, default=2, help="of the workload, as in the bench")
    parser.add_argument("--json", type=Path, required=True, help="the bench's results, which get the part `floor`")
    arguments = parser.parse_args()
    console = Console()
    workload, content = load_workload(arguments.workload), json.loads(arguments.json.read_text())
    shape = ModelShape.of(AutoConfig.from_pretrained(arguments.model))
    rates = measure_rates(shape, dtypes=(DTYPE,), tell=console.print)
    settings = workload.settings
    num_rollouts = arguments.contexts * settings.group_size
    lengths = {"context": settings.context_tokens, "completion": settings.completion_tokens}
    floors: dict[Sharing, float] = {
        "shared": shared_floor_s(
            rates, shape, num_contexts=arguments.contexts, group_size=settings.group_size, **lengths
        ),
        "alone": alone_floor_s(rates, shape, num_rollouts=num_rollouts, **lengths),
    }
    measured = measure(arguments.model, workload, arguments.contexts, shape.vocab_size)
    num_tokens = num_rollouts * settings.completion_tokens
    rows = [
        {
            "contexts": sharing,
            "scored_tokens_per_s": num_tokens / found["seconds"],
            "floor_tokens_per_s": num_tokens / floors[sharing],
            "over_floor": found["seconds"] / floors[sharing],
            **found,
        }
        for sharing, found in measured.items()
    ]
    content["floor"] = {
        "matrix_gflops_at_rows": {str(rate.rows): rate.gflops for rate in rates.layers[DTYPE]},
        "rows": rows,
    }
    arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    table = Table("contexts", "tokens/s", "floor, tokens/s", "times the floor", "where the time goes")
    for row in rows:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in list(row["profile"]["shares"].items())[:6])
        numbers = (row["scored_tokens_per_s"], row["floor_tokens_per_s"])
        table.add_row(row["contexts"], *(f"{number:,.0f}" for number in numbers), f"{row['over_floor']:.1f}", shares)
    console.print(table)


if __name__ == "__main__":
    main()
