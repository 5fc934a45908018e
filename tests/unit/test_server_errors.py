"""Every error of the tree has a status, and a log line holds what it should."""

from __future__ import annotations

import json
import logging
import sys

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from vopd_server import errors
from vopd_server.errors import InvalidRequestError, OverloadedError, TeacherError
from vopd_server.grpc_errors import STATUS_CODES, STATUS_METADATA_KEY, score_failure, status_code, status_metadata
from vopd_server.http_errors import HTTP_STATUSES
from vopd_server.logs import JsonFormatter, TextFormatter


def test_every_error_of_the_tree_is_in_the_table_of_every_transport() -> None:
    tree = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, TeacherError)}
    assert tree == set(STATUS_CODES) == set(HTTP_STATUSES)


def test_a_subclass_has_the_status_of_its_parent() -> None:
    class NewLimitError(OverloadedError):
        pass

    assert status_code(NewLimitError("full", retry_delay_s=1)) is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_status_tells_field_delay_and_request() -> None:
    key, data = status_metadata(InvalidRequestError("sequences[3].k", "0"), "r1")
    status = status_pb2.Status.FromString(data)
    violations, about = error_details_pb2.BadRequest(), error_details_pb2.RequestInfo()
    assert key == STATUS_METADATA_KEY == "grpc-status-details-bin"
    assert (status.code, status.message) == (3, "sequences[3].k: 0")
    assert status.details[0].Unpack(violations)
    assert violations.field_violations[0].field == "sequences[3].k"
    assert status.details[1].Unpack(about)
    assert about.request_id == "r1"

    _, data = status_metadata(OverloadedError("full", retry_delay_s=1.25), "")
    delay = error_details_pb2.RetryInfo()
    (detail,) = status_pb2.Status.FromString(data).details
    assert detail.Unpack(delay)
    assert delay.retry_delay.ToTimedelta().total_seconds() == 1.25


def test_a_failure_within_a_stream_tells_the_same() -> None:
    failure = score_failure("s", InvalidRequestError("sequence.k", "0"))
    assert (failure.sequence_id, failure.code, failure.field) == ("s", 3, "sequence.k")
    assert score_failure("s", OverloadedError("full", retry_delay_s=1.5)).retry_delay_s == 1.5


def test_a_message_that_would_not_fit_a_header_is_cut() -> None:
    metadata = status_metadata(InvalidRequestError("field", "x" * 100_000), "r")
    assert len(metadata[1]) < 4096


def record(**fields: object) -> logging.LogRecord:
    try:
        raise KeyError("inner")
    except KeyError:
        exc_info = sys.exc_info() if fields.pop("failed", False) else None
    made = logging.LogRecord("vopd_server.x", logging.INFO, "file.py", 1, "%s done", ("Score",), exc_info)
    vars(made).update(fields)
    return made


def test_a_json_line_is_one_object_with_the_fields() -> None:
    line = JsonFormatter().format(record(request_id="a\nb", seconds=0.123456789, failed=True))
    assert "\n" not in line
    told = json.loads(line)
    assert (told["message"], told["level"], told["request_id"], told["seconds"]) == (
        "Score done",
        "info",
        "a\nb",
        0.123457,
    )
    assert "KeyError: 'inner'" in told["traceback"]


@pytest.mark.parametrize("request_id", ["plain", "two\nlines ERROR forged", "\x1b[31m"])
def test_a_clients_id_cannot_break_a_text_line(request_id: str) -> None:
    line = TextFormatter().format(record(request_id=request_id))
    assert line.isprintable()
    assert line.endswith(f"INFO Score done request_id={json.dumps(request_id)}")
