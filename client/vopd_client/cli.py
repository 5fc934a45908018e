"""The command `vopd-client`: what a teacher is, what it thinks of a text, training, evaluation, reports."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NamedTuple, TypeVar

from pydantic import BaseModel

from vopd_client.command_config import (
    CompareConfig,
    EvalConfig,
    ExportConfig,
    InfoConfig,
    ReportConfig,
    ScoreConfig,
    VarianceConfig,
)
from vopd_client.errors import VopdError
from vopd_client.train_config import TrainConfig
from vopd_settings import SettingsError, load_settings

ENV_PREFIX = "VOPD_CLIENT_"
S = TypeVar("S", bound=BaseModel)


# Each command imports what it needs when it runs: asking for scores must not wait for torch.
def _info(config: InfoConfig) -> int:
    from vopd_client.show import show_info

    show_info(config)
    return 0


def _score(config: ScoreConfig) -> int:
    from vopd_client.show import show_scores

    show_scores(config)
    return 0


def _train(config: TrainConfig) -> int:
    from vopd_client.training_run import run_training

    return run_training(config)


def _eval(config: EvalConfig) -> int:
    from vopd_client.eval_command import run_eval

    run_eval(config)
    return 0


def _variance(config: VarianceConfig) -> int:
    from vopd_client.variance_command import run_variance

    run_variance(config)
    return 0


def _report(config: ReportConfig) -> int:
    from vopd_client.report import write_report

    for path in write_report(config.run_dir):
        sys.stdout.write(f"{path}\n")
    return 0


def _export(config: ExportConfig) -> int:
    from vopd_client.export_command import run_export

    sys.stdout.write(f"{run_export(config)}\n")
    return 0


def _compare(config: CompareConfig) -> int:
    from vopd_client.compare_command import run_compare

    for path in run_compare(config):
        sys.stdout.write(f"{path}\n")
    return 0


class Command(NamedTuple):
    settings: type[BaseModel]
    run: Callable[..., int]
    summary: str


COMMANDS = {
    "info": Command(InfoConfig, _info, "What the teacher is and what it can do."),
    "score": Command(ScoreConfig, _score, "What the teacher thinks of a completion, token by token."),
    "train": Command(TrainConfig, _train, "Trains a student on its own completions, scored by the teacher."),
    "eval": Command(
        EvalConfig, _eval, "A model's greedy completions, or several samples of each prompt, against the answers."
    ),
    "variance": Command(
        VarianceConfig, _variance, "How noisy every objective's gradient is for a pair of models, by support size."
    ),
    "report": Command(
        ReportConfig, _report, "Draws curves.png, timeline.png and report.html from a run's own metrics."
    ),
    "export": Command(
        ExportConfig, _export, "Writes a run's student, as of a checkpoint, as a model that others load, with its card."
    ),
    "compare": Command(
        CompareConfig, _compare, "Runs, or results of evaluations, side by side: a picture, a page and tables."
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the return value is the exit code (2: something the user can put right)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = _command_name(arguments)
    command = COMMANDS[name]
    rest = arguments[1:]
    if name in {"report", "export"} and rest and not rest[0].startswith("-"):
        rest = ["--run-dir", *rest]  # `vopd-client report runs/demo`
    if name == "compare":  # `vopd-client compare runs/a runs/b`
        paths = list(takewhile(lambda word: not word.startswith("-"), rest))
        rest = [word for path in paths for word in ("--inputs", path)] + rest[len(paths) :]
    try:
        config = load_settings(
            command.settings,
            rest,
            prog=f"vopd-client {name}",
            env_prefix=ENV_PREFIX,
            description=command.summary,
            other_settings=[other.settings for other in COMMANDS.values()],
        )
        return command.run(config)
    except (SettingsError, VopdError) as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"vopd-client {name}: {line}\n")
        return 2
    except KeyboardInterrupt:
        return 130


def _command_name(arguments: Sequence[str]) -> str:
    """The subcommand; prints the list of them and exits when there is none."""
    parser = argparse.ArgumentParser(
        prog="vopd-client",
        usage="vopd-client COMMAND [--config FILE] [--some-setting VALUE ...]",
        description="Learn from a remote teacher. `vopd-client COMMAND --help` lists a command's settings.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(["commands:", *(f"  {name:<8} {command.summary}" for name, command in COMMANDS.items())]),
    )
    parser.add_argument("command", metavar="COMMAND", choices=list(COMMANDS))
    return str(parser.parse_args(arguments[:1]).command)


if __name__ == "__main__":
    sys.exit(main())
