"""Memory, time and gradients of the loss against the plain log_softmax, for every objective.

From last hidden states to the gradients of the hidden states and of the output head, B x T = 4096 rows,
V = 49,152, H = 576, K = 100. Peak memory: what a fresh process needs beyond its inputs. Time: both versions take
turns in one process, medians, and the median of the pairs' ratios. Gradients: |ours - plain| / |plain|, over both.
In float32 the yardstick is the plain version; under bfloat16 autocast it is that of float32, for both versions.

    python bench/memory.py --json bench/results/memory.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from machine import machine_facts
from memory_versions import Inputs, Shape, ours, plain, write_inputs
from vopd_client.config import Objective

OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
PRECISIONS = ("float32", "bf16 autocast")
VERSIONS: dict[str, Callable[[Objective, Inputs, int], None]] = {"ours": ours, "plain": plain}
MOST_MEMORY, MOST_TIME, MOST_ERROR = 0.2, 1.3, 1e-5  # of the plain version's; the error in float32
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def main() -> int:
    arguments = _arguments()
    shape = Shape(arguments.batch, arguments.tokens, arguments.vocab, arguments.hidden, arguments.k)
    if arguments.measure:
        print(json.dumps(_measure(arguments, shape)))
        return 0
    rows = []
    cases = [(precision, objective) for precision in PRECISIONS for objective in OBJECTIVES]
    with tempfile.TemporaryDirectory() as scratch:
        inputs_path = Path(scratch) / "inputs.safetensors"
        write_inputs(inputs_path, shape)
        for precision, objective in track(cases, description="memory and time", console=Console(stderr=True)):
            child = [sys.executable, *sys.argv, "--inputs", str(inputs_path), "--precision", precision]
            child += ["--objective", objective, "--measure"]
            peaks = {version: _run([*child, version])["peak_bytes"] for version in VERSIONS}
            rows.append({"precision": precision, "objective": objective, **_row(peaks, _run([*child, "time"]))})
    console = Console(width=110)
    for precision in PRECISIONS:
        show([row for row in rows if row["precision"] == precision], precision, shape, console)
    if arguments.json:
        content = {
            "machine": machine_facts(("torch",)) | {"device": arguments.device},
            "shape": asdict(shape),
            "repetitions": arguments.repetitions,
            "bars": {"memory_ratio": MOST_MEMORY, "time_ratio": MOST_TIME, "gradient_error": MOST_ERROR},
            "rows": rows,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where the results go")
    # a measurement in a process of its own
    parser.add_argument("--measure", choices=[*VERSIONS, "time"], help=argparse.SUPPRESS)
    parser.add_argument("--inputs", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--objective", choices=OBJECTIVES, help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=PRECISIONS, help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _row(peaks: dict[str, int], timed: dict[str, Any]) -> dict[str, Any]:
    seconds = timed["seconds"]
    ratios = [mine / other for mine, other in zip(seconds["ours"], seconds["plain"], strict=True)]
    return {
        "peak_bytes": peaks,
        "memory_ratio": peaks["ours"] / peaks["plain"],
        "seconds": {version: statistics.median(values) for version, values in seconds.items()},
        "time_ratio": statistics.median(ratios),
        "gradient_error": timed["gradient_error"],
    }


# ---------------------------------------------------------------- in a process of its own


def _measure(arguments: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    is_float32 = arguments.precision == "float32"
    inputs = Inputs.load(arguments.inputs, arguments.device, torch.float32 if is_float32 else torch.bfloat16)

    def run(version: str, on: Inputs, batch_size: int) -> None:
        on.drop_gradients()
        with nullcontext() if is_float32 else torch.autocast(arguments.device, dtype=torch.bfloat16):
            VERSIONS[version](arguments.objective, on, batch_size)
        _wait_for(arguments.device)

    few = inputs.first_rows(8)
    for version in VERSIONS:
        run(version, few, 1)  # kernels and threads are there from now on
    few.drop_gradients()
    inputs.drop_gradients()
    if arguments.measure != "time":
        return {"peak_bytes": _peak_bytes(lambda: run(arguments.measure, inputs, shape.batch), arguments.device)}

    seconds: dict[str, list[float]] = {version: [] for version in VERSIONS}
    gradients: dict[str, tuple[torch.Tensor, ...]] = {}
    for _ in range(arguments.repetitions):
        for version in VERSIONS:
            began = time.perf_counter()
            run(version, inputs, shape.batch)
            seconds[version].append(time.perf_counter() - began)
            gradients[version] = tuple(gradient.clone() for gradient in inputs.gradients)
    if is_float32:
        yardstick = gradients.pop("plain")
    else:
        exact = Inputs.load(arguments.inputs, arguments.device, torch.float32)
        plain(arguments.objective, exact, shape.batch)
        yardstick = exact.gradients
    return {
        "seconds": seconds,
        "gradient_error": {version: relative_error(found, yardstick) for version, found in gradients.items()},
    }


def relative_error(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    """|found - expected| / |expected|, all tensors as one vector."""
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, expected, strict=True))
    norm = sum(float(b.double().square().sum()) for b in expected)
    return float((difference / norm) ** 0.5)


def _peak_bytes(work: Callable[[], None], device: str) -> int:
    """What `work` needs beyond what is there before it; what it returns, the gradients, included."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    if not CLEAR_REFS.exists():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        unit = 1 if sys.platform == "darwin" else 1024
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    CLEAR_REFS.write_text("5")  # the peak so far is forgotten
    before = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ---------------------------------------------------------------- the table


def show(rows: list[dict[str, Any]], precision: str, shape: Shape, console: Console) -> None:
    """One row an objective; a bar that does not hold is marked."""
    title = f"{precision}: {shape.rows} rows, V = {shape.vocab}, H = {shape.hidden}, K = {shape.k}"
    table = Table(title=title)
    for column in ("objective", "peak MB", "plain", "ratio", "seconds", "plain", "ratio", "error", "plain"):
        table.add_column(column, justify="left" if column == "objective" else "right", no_wrap=True)
    for row in rows:
        error = row["gradient_error"]
        table.add_row(
            row["objective"],
            *(f"{row['peak_bytes'][version] / 1e6:.0f}" for version in VERSIONS),
            _judged(row["memory_ratio"], MOST_MEMORY),
            *(f"{row['seconds'][version]:.2f}" for version in VERSIONS),
            _judged(row["time_ratio"], MOST_TIME),
            _judged(error["ours"], MOST_ERROR if precision == "float32" else None, ".1e"),
            f"{error['plain']:.1e}" if "plain" in error else "-",
        )
    console.print(table)
    if precision == "float32":
        bars = {"memory_ratio": MOST_MEMORY, "time_ratio": MOST_TIME}
        for name, most in bars.items():
            worst = max(row[name] for row in rows)
            console.print(f"{name} <= {most}: {'holds' if worst <= most else 'does not hold'}, worst {worst:.3f}")
        worst = max(row["gradient_error"]["ours"] for row in rows)
        holds = "holds" if worst <= MOST_ERROR else "does not hold"
        console.print(f"gradient_error <= {MOST_ERROR:g}: {holds}, worst {worst:.1e}")


def _judged(value: float, most: float | None, form: str = ".2f") -> str:
    return f"{value:{form}}" + (" (!)" if most is not None and value > most else "")


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # of the children
    sys.exit(main())
