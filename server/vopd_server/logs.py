"""Logs to standard error: one line of text or one JSON object a message, with request ids and no prompt text."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vopd_server.config import LogFormat, LogLevel

# What every LogRecord has; anything else came in through `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure_logging(level: LogLevel, log_format: LogFormat) -> None:
    """Sends every logger of this process to standard error. Called once, by `main`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("vopd_server").setLevel(level.upper())


class TextFormatter(logging.Formatter):
    """`12:00:01 INFO Score request_id="a1" code="OK"`; values are JSON, so an id cannot break the line."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = "".join(f" {name}={_json(value)}" for name, value in _fields(record).items())
        line = f"{moment} {record.levelname} {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One object a line: time (seconds since the epoch), level, logger, message, and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return _json(fields)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    values = {name: value for name, value in vars(record).items() if name not in _STANDARD}
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=True, default=str)
