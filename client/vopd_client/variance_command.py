"""`vopd-client variance`: how noisy every objective's gradient is for a pair of models, on the student's own rollouts.

As a training run begins: the same prompts, sampler, handshake and requests, and no update.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

from vopd_client.alignment import BoolArray
from vopd_client.batch import collate, plan_microbatches
from vopd_client.command_config import VarianceConfig
from vopd_client.errors import ConfigError, OutOfMemory, RunDirectoryError
from vopd_client.interruption import StopRequest, stop_on_signals
from vopd_client.preparation import load_rows, make_sampler
from vopd_client.rollouts.base import Rollout, RolloutKey
from vopd_client.scoring import SentRollout, Waiter, send
from vopd_client.teachers import Connect, connect_teacher
from vopd_client.tracking import print_line
from vopd_client.types import TeacherInfo
from vopd_client.variance_measure import BlockNumbers, assemble, blocks_of_batch, choose_positions, numbers_of_block
from vopd_client.variance_pair import Pair, choose_rows, prepare_pair, training_settings
from vopd_client.variance_report import Owner, SupportRule, VarianceReport, make_report
from vopd_client.variance_tables import default_console, show_report

Chosen = tuple[Rollout, BoolArray]  # and which of its first rows are measured


def run_variance(
    config: VarianceConfig, *, console: Console | None = None, connect: Connect = connect_teacher
) -> VarianceReport:
    """Samples, scores, measures; prints, and writes and draws what the settings ask for.

    Raises: VopdError; Interrupted when a signal asks for the end.
    """
    console = console or default_console()
    for path in (config.json_file, config.plot_file):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path}: {path.parent} is not a directory")
    if not console.is_terminal:
        transformers_logging.disable_progress_bar()
    stop = StopRequest()
    with stop_on_signals(stop):
        try:
            report, info = _measure_pair(config, console, stop, connect)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"{error}; lower microbatch_tokens or rollout_batch_size") from error
    show_report(report, console)
    if config.json_file is not None:
        _write_json(config.json_file, report, config, info)
    if config.plot_file is not None:
        _draw(config.plot_file, report, title=f"{Path(config.student).name}, taught by {info.model_id}")
    return report


def _measure_pair(
    config: VarianceConfig, console: Console, stop: StopRequest, connect: Connect
) -> tuple[VarianceReport, TeacherInfo]:
    tell = partial(print_line, console)
    settings = training_settings(config)
    rows = load_rows(settings).train  # malformed rows are reported before anything is loaded
    rows = choose_rows(rows, max_prompts=config.max_prompts, seed=config.seed)
    tell(f"connecting to the teacher: {_teacher_name(config)}")
    with closing(connect(settings, config.device)) as teacher:
        pair = prepare_pair(config, settings, rows, teacher, tell)
        with _Progress(console) as progress:
            rollouts = sample(pair, stop, progress)
            chosen = choose(pair, rollouts, config.max_positions)
            waiter = Waiter(stop, {"": teacher}, lambda reason, _: progress.waiting(reason))
            blocks = list(measure(pair, chosen, support_rules(config), waiter, progress))
    measured = assemble(
        blocks,
        [rollout for rollout, _ in chosen],
        [rows_T for _, rows_T in chosen],
        float_type=config.score_float_type,
        completed=pair.completed,
    )
    return make_report(measured, sizes=config.support_sizes, masses=config.support_masses), teacher.info


def support_rules(config: VarianceConfig) -> list[SupportRule]:
    """All supports of the two tables, each once."""
    owners: tuple[Owner, ...] = ("student", "teacher")
    rules = [SupportRule(owner, size) for owner in owners for size in config.support_sizes]
    rules += [SupportRule("student", config.support_sizes[-1], mass) for mass in config.support_masses]
    return list(dict.fromkeys(rules))


def sample(pair: Pair, stop: StopRequest, progress: _Progress) -> list[Rollout]:
    """All completions, prompt by prompt. Raises: NonFiniteError, Interrupted."""
    keys = [
        RolloutKey(0, position, index)  # step 0: no draw of a training run
        for position in range(len(pair.prompts))
        for index in range(pair.settings.rollouts_per_prompt)
    ]
    progress.begin(f"sampling {len(keys)} completions of {len(pair.prompts)} prompts", total=len(keys))
    sampler = make_sampler(pair.settings, pair.student, seed=pair.settings.seed)
    sampled: dict[RolloutKey, Rollout] = {}
    for rollout in sampler.sample([(key, pair.prompts[key.prompt_index].student_ids) for key in keys]):
        sampled[rollout.key] = rollout
        progress.advance(1)
        stop.check()
    return [sampled[key] for key in keys]


def choose(pair: Pair, rollouts: Sequence[Rollout], max_positions: int) -> list[Chosen]:
    """The completions that are measured somewhere, and where.

    Raises: ConfigError when there is nothing to measure.
    """
    num_rows = []
    for rollout in rollouts:
        is_dropped = rollout.ended and int(rollout.completion_ids[-1]) in pair.request.drop_end_ids
        num_rows.append(len(rollout.completion_ids) - is_dropped)
    rows = choose_positions(num_rows, max_positions, pair.settings.seed)
    chosen = [(rollout, rows_T) for rollout, rows_T in zip(rollouts, rows, strict=True) if rows_T.any()]
    if not chosen:
        raise ConfigError("nothing to measure: every completion is an end token, which end_token drop leaves out")
    return chosen


def measure(
    pair: Pair, chosen: Sequence[Chosen], rules: Sequence[SupportRule], waiter: Waiter, progress: _Progress
) -> Iterator[BlockNumbers]:
    """What the tables are made of, block by block; `sequence_n` counts `chosen`.

    The teacher scores the next microbatch while this one is measured, and never more: its answers are large.

    Raises: TeacherError, NonFiniteError, AlignmentError, Interrupted.
    """
    num_positions = sum(int(rows_T.sum()) for _, rows_T in chosen)
    progress.begin(f"measuring {num_positions} positions of {len(chosen)} completions", total=num_positions)
    lengths = [len(rollout.prompt_ids) + len(rollout.completion_ids) for rollout, _ in chosen]
    plan = plan_microbatches(lengths, pair.settings.microbatch_tokens)

    def ask(indices: Sequence[int]) -> list[SentRollout]:
        rollouts = [chosen[index][0] for index in indices]
        prompts = [pair.prompts[rollout.key.prompt_index] for rollout in rollouts]
        pairs = zip(rollouts, prompts, strict=True)
        return [send(rollout, prompt, request=pair.request, teacher=pair.teacher) for rollout, prompt in pairs]

    sent = ask(plan[0])
    for indices, following in zip(plan, [*plan[1:], []], strict=True):
        current, sent = sent, ask(following)
        batch = collate(
            [item.rollout for item in current],
            [pair.request.swap.from_teacher(waiter.scores(item)) for item in current],
            prompt_names=[item.prompt.source for item in current],
            pad_id=pair.student.pad_id,
            num_shared_ids=pair.student.module.num_shared_ids,
            support=pair.request.support,
            max_support=pair.request.top_k,
            drop_end_ids=pair.request.drop_end_ids,
        )
        chosen_BT = torch.zeros_like(batch.loss_mask_BT)
        for row, index in enumerate(indices):
            rows_T = torch.from_numpy(chosen[index][1])
            chosen_BT[row, : len(rows_T)] = rows_T
        device = next(pair.student.module.parameters()).device
        blocks = blocks_of_batch(
            pair.student.module, batch.to(device), chosen_BT.to(device), pair.settings.mixed_precision
        )
        for block in blocks:
            waiter.stop.check()
            numbers = numbers_of_block(block, rules)
            progress.advance(len(numbers.kl_n))
            yield replace(numbers, sequence_n=np.array(indices)[numbers.sequence_n])


# ---------------------------------------------------------------- what people see and keep


class _Progress:
    """A bar for a terminal; elsewhere a line a phase, and one when the teacher keeps it waiting for another reason."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.description}", markup=False))
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=None)
        self._what = ""
        self._reason = ""

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, what: str, *, total: int) -> None:
        self._what = what
        self._bar.reset(self._task, total=total, description=what)
        if not self._console.is_terminal:
            print_line(self._console, what)

    def advance(self, steps: int) -> None:
        self._bar.update(self._task, advance=steps, description=self._what)

    def waiting(self, reason: str) -> None:
        """Why nothing moves: what the teacher's client says, or nothing in particular."""
        self._bar.update(self._task, description=reason or "waiting for the teacher's scores")
        if not self._console.is_terminal and reason and reason != self._reason:
            print_line(self._console, reason)
        self._reason = reason


def _teacher_name(config: VarianceConfig) -> str:
    return config.teacher_model or ", ".join(config.teacher_url)


def _write_json(path: Path, report: VarianceReport, config: VarianceConfig, info: TeacherInfo) -> None:
    settings = config.model_dump(mode="json", exclude={"json_file", "plot_file", "api_key_file"})
    teacher = {
        name: getattr(info, name) for name in ("model_id", "model_revision", "engine", "engine_version", "dtype")
    }
    content = {"settings": settings, "teacher": teacher, **report.to_json()}
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RunDirectoryError(f"cannot write {path}: {error.strerror}") from error


def _draw(path: Path, report: VarianceReport, *, title: str) -> None:
    from vopd_client.variance_plot import draw_report  # brings matplotlib

    try:
        draw_report(report, path, title=title)
    except OSError as error:
        raise RunDirectoryError(f"cannot write {path}: {error.strerror}") from error
