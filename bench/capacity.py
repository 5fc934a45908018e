"""What a teacher needs: tokens a second, memory and network, for GPUs, a model and a load; and how far that holds.

    python bench/capacity.py --gpu h100 --gpus 4 --model qwen3-32b --students 8 --rollouts 64 --completion 16384
    python bench/capacity.py --check bench/results/scaling.json --json bench/results/capacity.json

The first predicts. The second compares the same formulae with curves that were measured on a CPU, prints predicted
over measured for every point, and writes that beside the worked examples of docs/performance.md. GPU peaks are
published figures; `--mfu`, the share of them that is reached, is an assumption: nothing was measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from capacity_check import Check, check
from capacity_figures import ACCELERATORS, MODELS, model_of_config
from capacity_gpu import Deployment, Prediction, predict
from capacity_model import Load, SupportName, TeacherModel, uint_bytes

GIGA = 1e9
# The load of the worked example, and where nothing else is said.
EXAMPLE_LOAD = Load(
    students=8,
    rollouts=64,
    group=8,
    context=1024,
    completion=16_384,
    k=100,
    mean_support=100,
    id_bytes=3,
    logprob_bytes=2,
)
EXAMPLE = Deployment(
    accelerator=ACCELERATORS["h100"],
    gpus=4,
    tensor_parallel=4,
    mfu=0.4,
    step_tokens=8192,
    reserved_share=0.08,
    network_bytes_s=10 * GIGA / 8,
)
EXAMPLE_MODEL = "qwen3-32b"
EXAMPLES: Mapping[str, tuple[Deployment, Load]] = {
    "4 H100": (EXAMPLE, EXAMPLE_LOAD),
    "8 H100": (replace(EXAMPLE, gpus=8), EXAMPLE_LOAD),
    "4 H100, 20 ids a position": (EXAMPLE, replace(EXAMPLE_LOAD, mean_support=20)),
    "4 H100, few-shot context of 8k": (EXAMPLE, replace(EXAMPLE_LOAD, context=8192)),
    "the same, not shared": (EXAMPLE, replace(EXAMPLE_LOAD, context=8192, group=1)),
}


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    console = Console(width=120)
    if arguments.check is not None:
        found = check(json.loads(arguments.check.read_text()))
        show_check(found, console)
        if arguments.json:
            write(arguments.json, found)
        return 0
    try:
        model, deployment, load = _asked_for(arguments)
        predicted = predict(model, deployment, load)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    show_prediction(model, deployment, load, predicted, console)
    return 0 if predicted.fits else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=ACCELERATORS, default="h100")
    parser.add_argument("--gpus", type=int, default=EXAMPLE.gpus)
    parser.add_argument(
        "--tensor-parallel", type=int, help="GPUs that share one copy of the weights; default: 4, 2 or 1"
    )
    parser.add_argument(
        "--mfu", type=float, default=EXAMPLE.mfu, help="share of the peak that is reached: an assumption"
    )
    parser.add_argument("--step-tokens", type=int, default=EXAMPLE.step_tokens, help="of one forward, at most")
    parser.add_argument("--reserved-share", type=float, default=EXAMPLE.reserved_share, help="of each GPU's memory")
    parser.add_argument("--network-gbit-s", type=float, default=10.0, help="to the teacher, each way")
    parser.add_argument("--model", default=EXAMPLE_MODEL, help=f"{', '.join(MODELS)}, or a config.json")
    for name in ("students", "rollouts", "group", "context", "completion", "k"):
        parser.add_argument(f"--{name}", type=int, default=getattr(EXAMPLE_LOAD, name))
    parser.add_argument("--mean-support", type=float, help="ids a position on average; default: k")
    parser.add_argument("--support", choices=get_args(SupportName), default=EXAMPLE_LOAD.support)
    parser.add_argument("--logprob-bytes", type=int, choices=(2, 4), default=EXAMPLE_LOAD.logprob_bytes)
    parser.add_argument(
        "--check", type=Path, metavar="SCALING.JSON", help="compare with what bench/scaling.py measured"
    )
    parser.add_argument("--json", type=Path, help="where --check writes the comparison and the worked examples")
    return parser


def _asked_for(arguments: argparse.Namespace) -> tuple[TeacherModel, Deployment, Load]:
    """Raises: ValueError, OSError."""
    if arguments.model in MODELS:
        model = MODELS[arguments.model]
    else:
        model = model_of_config(json.loads(Path(arguments.model).read_text()))
    gpus = arguments.gpus
    deployment = Deployment(
        accelerator=ACCELERATORS[arguments.gpu],
        gpus=gpus,
        tensor_parallel=arguments.tensor_parallel or next(size for size in (4, 2, 1) if gpus % size == 0),
        mfu=arguments.mfu,
        step_tokens=arguments.step_tokens,
        reserved_share=arguments.reserved_share,
        network_bytes_s=arguments.network_gbit_s * GIGA / 8,
    )
    load = Load(
        students=arguments.students,
        rollouts=arguments.rollouts,
        group=arguments.group,
        context=arguments.context,
        completion=arguments.completion,
        k=arguments.k,
        mean_support=arguments.k if arguments.mean_support is None else arguments.mean_support,
        id_bytes=uint_bytes(model.shape.vocab_size - 1),
        logprob_bytes=arguments.logprob_bytes,
        support=arguments.support,
    )
    return model, deployment, load


def show_prediction(
    model: TeacherModel, deployment: Deployment, load: Load, predicted: Prediction, console: Console
) -> None:
    card, memory, flops = deployment.accelerator, predicted.memory, predicted.flops
    lines = {
        "teacher": f"{model.parameters / GIGA:.1f}B parameters on {deployment.gpus} x {card.name}, "
        f"{deployment.replicas} replica{'s' if deployment.replicas > 1 else ''}",
        "assumed": f"{card.peak_flops_s / 1e12:.0f} TFLOP/s a GPU ({card.source}) x {deployment.mfu:g}",
        "operations a scored token": f"{flops.total / GIGA:.1f} GFLOP: layers {flops.layers / GIGA:.1f}, "
        f"attention {flops.attention / GIGA:.1f}, head {flops.head / GIGA:.1f}",
        "tokens read a scored token": f"{predicted.tokens_read:.2f}",
        "scored tokens a second": f"{predicted.scored_tokens_per_s:,.0f}, bound by {predicted.bound} ("
        + ", ".join(f"{name} alone {rate:,.0f}" for name, rate in predicted.rates.items())
        + ")",
        "a step of all students": f"{load.scored_tokens:,} tokens in {predicted.step_s:,.0f} s",
        "memory of a GPU, GB": f"weights {memory.weights / GIGA:.1f}, forward {memory.activations / GIGA:.1f}, "
        f"log-probabilities {memory.logprobs / GIGA:.1f}, kept free {memory.reserved / GIGA:.1f}",
        "KV cache of a replica": f"{model.kv_bytes_a_token / 1e3:.0f} kB a token, room for {memory.kv_room_tokens:,} "
        f"tokens: {predicted.sequences_at_once} sequences at a time",
        "network": f"{predicted.wire.sent:.0f} bytes a token out, {predicted.wire.received:.0f} back: "
        f"{predicted.sent_mbit_s:.0f} and {predicted.received_mbit_s:.0f} Mbit/s",
    }
    table = Table(show_header=False)
    for name, line in lines.items():
        table.add_row(name, line)
    console.print(table)
    if not predicted.fits:
        console.print("[bold red]It does not fit: one sequence needs more KV cache than there is room for.")


def show_check(found: Check, console: Console) -> None:
    columns = ("curve", "", "measured tokens/s", "one rate", "off", "five costs", "off", "bytes", "memory")
    table = Table(*columns, title="predicted, and predicted over measured; * gave the five costs")
    for point in found.points:
        table.add_row(
            point.curve,
            f"{point.value}{' *' if point.calibrates else ''}",
            f"{point.measured_tokens_per_s:.0f}",
            f"{point.one_rate_tokens_per_s:.0f}",
            off(point.one_rate_ratio),
            f"{point.fitted_tokens_per_s:.0f}",
            off(point.fitted_ratio),
            f"{point.wire_ratio:.2f}",
            f"{point.memory_ratio:.2f}",
        )
    console.print(table)
    for name, value in found.summary().items():
        console.print(f"{name.replace('_', ' ')}: {value:.3g}")


def off(ratio: float) -> str:
    """1.2 as +20%."""
    percent = round(100 * (ratio - 1))
    return f"{percent:+}%" if percent else "0"


def write(path: Path, found: Check) -> None:
    """The comparison, and the worked examples. Raises: OSError."""
    model = MODELS[EXAMPLE_MODEL]
    examples = []
    for name, (deployment, load) in EXAMPLES.items():
        asked = {"deployment": asdict(deployment), "load": asdict(load)}
        examples.append({"name": name, **asked, "predicted": asdict(predict(model, deployment, load))})
    content: dict[str, Any] = {"model": {"name": EXAMPLE_MODEL, **asdict(model)}, "examples": examples}
    content["check"] = found.to_json()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
