"""`vopd-client eval`: one local model on one file of prompts, as a table for people and JSON for scripts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vopd_client.chat_templates import chat_options, check_has_chats
from vopd_client.command_config import EvalConfig
from vopd_client.errors import DataError, RunDirectoryError
from vopd_client.evaluation import Evaluation, evaluate_student
from vopd_client.judging import NO_KIND
from vopd_client.prompts import Prompt, PromptRow, RowFormat, load_prompts, render_prompts
from vopd_client.sampled_evaluation import SampledEvaluation, Sampling, Scores, evaluate_sampled
from vopd_client.sampled_metrics import INTERVAL_METHOD, Estimate
from vopd_client.student import LoadedStudent, load_student
from vopd_proto.fingerprint import token_table


def run_eval(config: EvalConfig, console: Console | None = None) -> Evaluation | SampledEvaluation:
    """Evaluates, prints, writes `config.json_file` if set; samples where `config.samples_per_prompt` is above 1.

    Raises: DataError, before the model is loaded, for malformed rows or when no row has an answer; ConfigError for a
        model that cannot be loaded; RunDirectoryError when the JSON file cannot be written.
    """
    row_format = RowFormat(config.prompt_column, config.answer_column, config.prompt_suffix, config.answer_form)
    rows = load_prompts(config.prompts, default_verifier=config.verifier, row_format=row_format)
    if all(row.answer is None for row in rows):
        raise DataError(f"{config.prompts}: no row has an answer to compare with")
    check_has_chats(chat_options(config), rows)
    rows = [only_what_is_seen(row, as_teacher=config.as_teacher) for row in rows]
    loaded = load_student(config.model, device=config.device, trust_remote_code=config.trust_remote_code)
    prompts = render_prompts(
        rows,
        tokenizer=loaded.tokenizer,
        teacher_chat_template=loaded.tokenizer.chat_template or "",
        max_prompt_tokens=loaded.max_length if config.as_teacher else config.max_prompt_tokens,
        max_new_tokens=config.max_new_tokens,
        student_max_length=loaded.max_length,
        teacher_max_length=loaded.max_length,
        chat_options=chat_options(config),
    )
    loaded.module.num_shared_ids = min(loaded.vocab_size, len(token_table(loaded.tokenizer)))
    console = console or Console()
    evaluation: Evaluation | SampledEvaluation
    if config.samples_per_prompt == 1:
        evaluation = _evaluate_greedily(config, loaded, prompts)
        answers_by_kind = Counter(row.kind or NO_KIND for row in rows if row.answer is not None)
        show_evaluation(evaluation, config, answers_by_kind, console)
    else:
        evaluation = _evaluate_samples(config, loaded, prompts)
        show_sampled_evaluation(evaluation, config, console)
    if config.json_file is not None:
        _write_json(config.json_file, evaluation, config)
    return evaluation


def _evaluate_greedily(config: EvalConfig, loaded: LoadedStudent, prompts: Sequence[Prompt]) -> Evaluation:
    return evaluate_student(
        loaded.module,
        loaded.tokenizer,
        prompts,
        step=0,
        end_ids=loaded.end_ids,
        pad_id=loaded.pad_id,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        sample_count=config.sample_count,
        mixed_precision=config.mixed_precision,
    )


def _evaluate_samples(config: EvalConfig, loaded: LoadedStudent, prompts: Sequence[Prompt]) -> SampledEvaluation:
    return evaluate_sampled(
        loaded.module,
        loaded.tokenizer,
        prompts,
        sampling=Sampling(
            samples_per_prompt=config.samples_per_prompt,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.sampling_top_k,
            seed=config.seed,
        ),
        end_ids=loaded.end_ids,
        pad_id=loaded.pad_id,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        sample_count=config.sample_count,
        mixed_precision=config.mixed_precision,
    )


def only_what_is_seen(row: PromptRow, *, as_teacher: bool) -> PromptRow:
    """The row with one context only: the student's, or what the teacher would see in its place."""
    if as_teacher and (row.teacher_prompt is not None or row.teacher_messages is not None):
        row = replace(row, prompt=row.teacher_prompt, messages=row.teacher_messages)
    return replace(row, teacher_prompt=None, teacher_messages=None)


def show_evaluation(
    evaluation: Evaluation, config: EvalConfig, answers_by_kind: Mapping[str, int], console: Console
) -> None:
    """A table of the kinds, then the samples."""
    _show_subject(config, console)
    table = Table("kind")
    table.add_column("prompts", justify="right")
    table.add_column("exact match", justify="right")
    for kind, share in evaluation.exact_match_by_kind.items():
        table.add_row(Text(kind), str(answers_by_kind[kind]), f"{share:.1%}")
    if len(evaluation.exact_match_by_kind) > 1:
        table.add_section()
        table.add_row("all kinds", str(sum(answers_by_kind.values())), f"{evaluation.exact_match:.1%}")
    console.print(table)
    for sample in evaluation.samples:
        verdict = {True: "right", False: f"wrong, expected {sample.answer!r}", None: "no answer to compare with"}
        console.print(
            f"\n{sample.prompt}\n  -> {sample.completion!r}  ({verdict[sample.correct]})", markup=False, highlight=False
        )


def show_sampled_evaluation(evaluation: SampledEvaluation, config: EvalConfig, console: Console) -> None:
    """A table of the kinds with intervals, how it was sampled, then the first completion of some prompts."""
    n = evaluation.samples_per_prompt
    _show_subject(config, console)
    table = Table("kind")
    for column in ("prompts", f"avg@{n}", f"pass@{n}", f"maj@{n}"):
        table.add_column(column, justify="right")
    for kind, scores in evaluation.scores_by_kind.items():
        table.add_row(Text(kind), *_cells(scores))
    if len(evaluation.scores_by_kind) > 1:
        table.add_section()
        table.add_row("all kinds", *_cells(evaluation.scores))
    console.print(table)
    top_k = f", top_k {config.sampling_top_k}" if config.sampling_top_k else ""
    console.print(
        f"temperature {config.temperature}, top_p {config.top_p}{top_k}, seed {config.seed}; {evaluation.num_cut} of "
        f"{evaluation.num_completions} completions cut at {config.max_new_tokens} tokens\n"
        f"in parentheses: {INTERVAL_METHOD}",
        markup=False, highlight=False,
    )  # fmt: skip
    for position in evaluation.shown:
        prompt = evaluation.prompts[position]
        majority = "no answer" if prompt.majority is None else f"majority {prompt.answers[prompt.majority]!r}"
        console.print(
            f"\n{prompt.prompt}\n  -> {prompt.first_completion!r}\n"
            f"  ({sum(prompt.correct)} of {n} right, {majority}, expected {prompt.answer!r})",
            markup=False, highlight=False,
        )  # fmt: skip


def _show_subject(config: EvalConfig, console: Console) -> None:
    seen = "the teacher's context" if config.as_teacher else "the student's prompt"
    console.print(f"{config.model} on {config.prompts}, given {seen}:", markup=False, highlight=False)


def _cells(scores: Scores) -> list[str]:
    def cell(estimate: Estimate) -> str:
        return f"{estimate.mean:.1%} ({100 * estimate.low:.0f}–{100 * estimate.high:.0f})"

    return [str(scores.num_prompts), cell(scores.avg_at_n), cell(scores.pass_at_n), cell(scores.maj_at_n)]


def _write_json(path: Path, evaluation: Evaluation | SampledEvaluation, config: EvalConfig) -> None:
    result: dict[str, Any] = {"model": config.model, "prompts": config.prompts, "as_teacher": config.as_teacher}
    how: tuple[str, ...] = ("max_new_tokens", "verifier")
    if isinstance(evaluation, SampledEvaluation):
        how = ("samples_per_prompt", "temperature", "top_p", "sampling_top_k", "seed", *how)
    result |= {name: getattr(config, name) for name in how}
    text = json.dumps(result | evaluation.to_row(), indent=2, ensure_ascii=False)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RunDirectoryError(f"cannot write {path}: {error.strerror}") from error
