"""What a complete run leaves behind: the student as a model directory, summary.json, plots and a report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from vopd_client.checkpoint import TrainerState
from vopd_client.errors import RunDirectoryError
from vopd_client.evaluation_rows import sampled_lines, summary_of_samples
from vopd_client.export import dtype_to_export, weights_to_export, write_export
from vopd_client.model_card import Exported, render_card
from vopd_client.model_files import read_card
from vopd_client.preparation import Run
from vopd_client.provenance import Provenance, read_provenance
from vopd_client.run_directory import read_rows, write_atomically
from vopd_client.student import LoadedStudent
from vopd_client.train_config import TrainConfig


def finish_run(run: Run, state: TrainerState, show: Callable[[str | Table], None]) -> None:
    """Writes everything that a complete run leaves behind. Doing it twice changes nothing.

    Raises: RunDirectoryError when the disk is full by now.
    """
    is_main_process = run.accelerator.is_main_process
    weights = weights_to_export(run.student.module, run.config.export, is_main_process=is_main_process)
    if run.accelerator.is_main_process:
        from vopd_client.report import write_report  # brings matplotlib

        evaluations = read_rows(run.directory.evals_file)
        summary = summarise(evaluations, state)
        try:
            export_model(
                run.student,
                weights,
                run.directory.model,
                run.config,
                read_provenance(run.directory.provenance_file),
                summary,
            )
            write_atomically(run.directory.summary_file, json.dumps(summary, indent=2) + "\n")
        except OSError as error:
            raise RunDirectoryError(f"cannot write the result to {run.directory.path}: {error}") from error
        write_report(run.directory.path)
        for part in (summary_table(summary), samples_table(evaluations)):
            if part is not None:
                show(part)
        num_bytes = summary["teacher_bytes_per_token"]  # 0 for a teacher in this process
        show(
            f"{state.step} steps in {state.train_seconds:.0f} s, {state.teacher_wait_seconds:.0f} s of them spent "
            "waiting for the teacher" + (f"; {num_bytes:.0f} bytes a token on the wire" if num_bytes else "")
        )
        show(f"The model, curves.png, report.html and summary.json are in {run.directory.path}")
    run.accelerator.wait_for_everyone()


def export_model(
    student: LoadedStudent,
    weights: Mapping[str, Tensor],
    directory: Path,
    config: TrainConfig,
    provenance: Provenance,
    summary: Mapping[str, Any],
) -> None:
    """The student as others read it, with its card, complete or not at all. config: with the export's own settings."""
    dtype = dtype_to_export(config.export_dtype, student)
    exported = Exported(config.export, str(dtype).removeprefix("torch."), chats=bool(student.tokenizer.chat_template))
    card = render_card(config, provenance, summary, exported, base_card=read_card(config.student))
    write_export(student, weights, directory, export=config.export, dtype=dtype, card=card)


def summarise(evaluations: Sequence[Mapping[str, Any]], state: TrainerState) -> dict[str, Any]:
    """summary.json: before and after, from the first and the last evaluation; null for what was not measured."""
    student = sorted((row for row in evaluations if row["who"] == "student"), key=lambda row: row["step"])
    teacher = [row for row in evaluations if row["who"] == "teacher"]
    before = next((row for row in student if row["step"] == 0), {})
    after = next((row for row in student if row["step"] == state.step), {})
    summary: dict[str, Any] = {"steps": state.step}
    for name, row in (("before", before), ("after", after), ("teacher", teacher[0] if teacher else {})):
        summary[f"exact_match_{name}"] = row.get("exact_match")
        summary[f"exact_match_{name}_by_kind"] = row.get("exact_match_by_kind", {})
        summary[f"exact_match_{name}_by_teacher"] = row.get("exact_match_by_teacher", {})
    for name, row in (("before", before), ("after", after)):
        summary[f"kl_nats_{name}"] = row.get("kl_nats")
        summary[f"kl_nats_{name}_by_kind"] = row.get("kl_by_kind", {})
        summary[f"kl_nats_{name}_by_teacher"] = row.get("kl_by_teacher", {})
    return summary | {
        **summary_of_samples(before, after),
        "train_seconds": state.train_seconds,
        "teacher_wait_seconds": state.teacher_wait_seconds,
        "teacher_bytes_per_token": state.teacher_bytes / max(state.num_valid_tokens, 1),
        "num_valid_tokens": state.num_valid_tokens,
    }


def summary_table(summary: Mapping[str, Any]) -> Table | None:
    """Before, after and the teacher, by kind and by teacher; None when nothing was evaluated."""
    measured = [summary["exact_match_before"], summary["kl_nats_before"], summary.get("avg_at_n_before")]
    if all(value is None for value in measured):
        return None
    table = Table("held-out prompts", box=box.SIMPLE_HEAD)
    for name in ("before", "after", "teacher"):
        table.add_column(name, justify="right")
    if summary["exact_match_before"] is not None:
        columns = [f"exact_match_{name}" for name in ("before", "after", "teacher")]
        table.add_row("exact match", *(_cell(summary[column], "{:.0%}") for column in columns))
        _add_parts(table, summary, columns, "kind", "{:.0%}")
        _add_parts(table, summary, columns, "teacher", "{:.0%}")
    for label, *cells in sampled_lines(summary):
        table.add_row(label, *cells, "")
    columns = ["kl_nats_before", "kl_nats_after"]
    table.add_row("KL to the teacher, nats a token", *(_cell(summary[column], "{:.3f}") for column in columns), "")
    _add_parts(table, summary, columns, "teacher", "{:.3f}")
    return table


def _add_parts(
    table: Table, summary: Mapping[str, Any], columns: Sequence[str], by: Literal["kind", "teacher"], form: str
) -> None:
    """A row for each kind, or for each teacher that has a name."""
    for part in summary[f"{columns[0]}_by_{by}"]:
        label = part if by == "kind" else f"teacher {part}"
        cells = [_cell(summary[f"{column}_by_{by}"].get(part), form) for column in columns]
        table.add_row(Text(f"  {label}", style="dim"), *cells, *[""] * (3 - len(cells)))


def samples_table(evaluations: Sequence[Mapping[str, Any]]) -> Table | None:
    """The samples of the first and the last evaluation beside one another; None when there are none."""
    student = sorted((row for row in evaluations if row["who"] == "student"), key=lambda row: row["step"])
    if not student or not student[0]["samples"]:
        return None
    table = Table("prompt", "before", "after", "answer", box=box.SIMPLE_HEAD, show_lines=True)
    after = {sample["prompt"]: sample["completion"] for sample in student[-1]["samples"]}
    for sample in student[0]["samples"]:
        texts = (sample["prompt"], sample["completion"], after.get(sample["prompt"], ""), sample["answer"] or "")
        table.add_row(*(Text(text) for text in texts))
    return table


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
