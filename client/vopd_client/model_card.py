"""The model card: README.md of an exported student, made of what its run wrote down, and of nothing else.

A card is made to be published: of a path on this machine it shows the last part alone. No torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from vopd_client.evaluation_rows import sampled_lines
from vopd_client.provenance import Provenance
from vopd_client.report import duration
from vopd_client.train_config import TrainConfig

NOT_MEASURED, NOT_RECORDED = "not measured", "not recorded"
LICENSE_KEYS = ("license", "license_name", "license_link")
LORA_RANKS_OF_VLLM = (8, 16, 32, 64, 128, 256, 320, 512)  # values of its max_lora_rank
_PROMPT_FILES = (".jsonl", ".parquet")
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---(?:\r?\n|\Z)", re.DOTALL)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")


class ModelName(NamedTuple):
    """A model as a card names it. is_local: `text` is the last part of a path."""

    text: str
    is_local: bool


class Row(NamedTuple):
    """A measure on held-out prompts, before and after training and of the teacher itself, as text."""

    label: str
    before: str
    after: str
    teacher: str


@dataclass(frozen=True)
class Exported:
    """What the files beside the card are. chats: whether the tokenizer has a chat template."""

    export: Literal["merged", "adapter"]
    dtype: str
    chats: bool


def render_card(
    config: TrainConfig, provenance: Provenance, summary: Mapping[str, Any], exported: Exported, *, base_card: str
) -> str:
    """The card, metadata and Markdown. summary: as `ending.summarise` makes it; base_card: the base's own, or ""."""
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("vopd_client", package_path=""),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters.update(code=code, quoted=json.dumps)
    student = model_name(config.student)
    return templates.get_template("model_card_template.md.j2").render(
        metadata=yaml.safe_dump(card_metadata(student, exported, base_card), sort_keys=False, allow_unicode=True),
        student=student,
        student_revision=provenance.get("student_revision"),
        teachers=[{**teacher, "shown": model_name(teacher["model_id"])} for teacher in provenance.get("teachers", [])],
        config=config,
        prompts=prompts_name(config.prompts),
        held_out=prompts_name(config.eval_prompts or ""),
        provenance=provenance,
        summary=summary,
        rows=measured_rows(summary),
        training_time=duration(summary["train_seconds"]),
        waiting_time=duration(summary["teacher_wait_seconds"]),
        support=_support(config, provenance),
        exported=exported,
        max_lora_rank=next((rank for rank in LORA_RANKS_OF_VLLM if rank >= config.lora_rank), config.lora_rank),
        NOT_RECORDED=NOT_RECORDED,
    )


def card_metadata(student: ModelName, exported: Exported, base_card: str) -> dict[str, Any]:
    """The hub's keys. The base is named only if a hub can know it, the license only if the base's card says one."""
    is_adapter = exported.export == "adapter"
    base = (
        {}
        if student.is_local
        else {"base_model": student.text, "base_model_relation": "adapter" if is_adapter else "finetune"}
    )
    return {
        **base,
        **license_of(base_card),
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["vopd", "on-policy-distillation", "distillation", *(["lora"] if is_adapter else [])],
    }


def license_of(card: str) -> dict[str, str]:
    """The license that a card's metadata states; nothing where it states none."""
    found = _FRONT_MATTER.match(card)
    try:
        stated = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    if not isinstance(stated, dict) or not isinstance(stated.get("license"), str):
        return {}
    return {key: stated[key] for key in LICENSE_KEYS if isinstance(stated.get(key), str)}


def model_name(given: str) -> ModelName:
    """Of a hub id the id, of a path its last part."""
    if _HUB_NAME.fullmatch(given) and not Path(given).exists():
        return ModelName(given, is_local=False)
    return ModelName(_last_part(given), is_local=True)


def prompts_name(given: str) -> str:
    """Of a file its name, of a data set its own."""
    is_path = given.endswith(_PROMPT_FILES) or given.startswith(("/", ".", "~")) or Path(given).exists()
    return _last_part(given) if is_path else given


def measured_rows(summary: Mapping[str, Any]) -> list[Row]:
    """Everything that was measured on held-out prompts, by kind and by teacher; empty where nothing was."""
    rows = [
        *_rows(summary, "exact match", "exact_match", "{:.1%}", ("before", "after", "teacher")),
        *(Row(label, _said(before), _said(after), NOT_MEASURED) for label, before, after in sampled_lines(summary)),
        *_rows(summary, "KL to the teacher, nats a token", "kl_nats", "{:.4f}", ("before", "after")),
    ]
    return [row._replace(label=cell(row.label)) for row in rows]


def code(text: object) -> str:
    """Text from outside as a code span, whatever is in it."""
    return "`" + " ".join(str(text).split()).replace("`", "'") + "`"


def cell(text: str) -> str:
    """Text from outside in a table."""
    return re.sub(r"([\\|<>\[\]*_`])", r"\\\1", " ".join(text.split()))


def _rows(summary: Mapping[str, Any], label: str, key: str, form: str, sides: Sequence[str]) -> list[Row]:
    columns = [f"{key}_{side}" for side in sides]
    if all(summary.get(column) is None for column in columns):
        return []
    shown = [_number(summary.get(column), form) for column in columns]
    rows = [_row(label, shown)]
    for by, prefix in (("kind", ""), ("teacher", "teacher ")):
        of_columns = [summary.get(f"{column}_by_{by}") or {} for column in columns]
        names = dict.fromkeys(name for of_column in of_columns for name in of_column)
        if len(names) > 1:
            rows += [
                _row(f"{label}: {prefix}{name}", [_number(of_column.get(name), form) for of_column in of_columns])
                for name in names
            ]
    return rows


def _row(label: str, shown: Sequence[str]) -> Row:
    before, after, teacher = [*shown, ""][:3]  # a teacher is no distance away from itself
    return Row(label, before, after, teacher)


def _said(text: str) -> str:
    return NOT_MEASURED if text == "-" else text


def _number(value: float | None, form: str) -> str:
    return NOT_MEASURED if value is None else form.format(value)


def _support(config: TrainConfig, provenance: Provenance) -> str:
    """What each position was compared on, as the handshake settled it."""
    size = f"the {{}} {config.top_k} most likely tokens of each position"
    if config.support_mass < 1:
        size += f" (as many as reach a probability of {config.support_mass:g} to the student)"
    names = {
        "student": size.format("student's"),
        "teacher": f"the teacher's {config.top_k} most likely tokens of each position",
        "vocabulary": "the whole vocabulary",
        "none": "the sampled tokens alone",
    }
    supports = dict.fromkeys(teacher["support"] for teacher in provenance.get("teachers", []))
    return ", ".join(names[support] for support in supports) or NOT_RECORDED


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or path
