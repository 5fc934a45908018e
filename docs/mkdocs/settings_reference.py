"""Every setting of the server and the client as tables, from the models that read them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from vopd_client.command_config import (
    CompareConfig,
    EvalConfig,
    ExportConfig,
    InfoConfig,
    ReportConfig,
    ScoreConfig,
    VarianceConfig,
)
from vopd_client.train_config import TrainConfig
from vopd_server.config import ServerConfig

COMMANDS: dict[str, type[BaseModel]] = {
    "vopd-server serve": ServerConfig,
    "vopd-client train": TrainConfig,
    "vopd-client info": InfoConfig,
    "vopd-client score": ScoreConfig,
    "vopd-client eval": EvalConfig,
    "vopd-client variance": VarianceConfig,
    "vopd-client report": ReportConfig,
    "vopd-client export": ExportConfig,
    "vopd-client compare": CompareConfig,
}


def settings_page() -> str:
    """The page, in Markdown."""
    return "\n".join(_lines())


def _lines() -> Iterable[str]:
    yield "# Settings\n"
    yield (
        "Each is a flag (`--top-k 50`), a key of a `--config` file (`top_k: 50`) and a variable "
        "(`VOPD_CLIENT_TOP_K=50`, for the server `VOPD_SERVER_…`); a flag wins over a variable, a variable over the "
        "file. This page is made of the models that read them; `--help` says the same.\n"
    )
    for command, model in COMMANDS.items():
        yield f"## {command}\n"
        yield "| flag | default | |\n| --- | --- | --- |"
        for name, field in model.model_fields.items():
            yield f"| `--{name.replace('_', '-')}` | {_default(field)} | {_cell(field.description or '')} |"
        yield ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value: Any = field.get_default(call_default_factory=True, validated_data={})
    if value is None or value is PydanticUndefined or value in ({}, [], ()):
        return "–"
    return f"`{_cell(str(value).lower() if isinstance(value, bool) else str(value))}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
