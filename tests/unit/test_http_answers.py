"""What answers and broken connections over HTTP mean: no sockets."""

import json
import ssl
from datetime import UTC, datetime

import grpc
import httpx2
import pytest

from vopd_client.errors import TeacherRequestError
from vopd_client.teacher.channel import parse_url
from vopd_client.teacher.http_answers import CODE_OF_STATUS, HttpAnswer, retry_after_s
from vopd_client.teacher.http_failures import failure_of_connection
from vopd_client.teacher.http_transport import proxy_of, request_headers
from vopd_client.teacher.transport import CallFailed
from vopd_proto import teacher_pb2 as pb
from vopd_server.errors import InvalidRequestError, OverloadedError, TeacherError, UnavailableError
from vopd_server.http_errors import HTTP_STATUSES, error_response

NOW = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
HERE = parse_url("http://here:8080")


def error_body(code: str, message: str = "why", **more: object) -> bytes:
    return json.dumps({"error": {"code": code, "message": message, **more}}).encode()


# ---------------------------------------------------------------- statuses


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "INVALID_ARGUMENT"),
        (401, "UNAUTHENTICATED"),
        (403, "PERMISSION_DENIED"),
        (404, "NOT_FOUND"),
        (405, "UNIMPLEMENTED"),
        (408, "UNAVAILABLE"),
        (409, "FAILED_PRECONDITION"),
        (413, "INVALID_ARGUMENT"),
        (415, "INVALID_ARGUMENT"),
        (418, "UNKNOWN"),
        (422, "INVALID_ARGUMENT"),
        (429, "RESOURCE_EXHAUSTED"),
        (500, "INTERNAL"),
        (502, "UNAVAILABLE"),
        (503, "UNAVAILABLE"),
        (504, "UNAVAILABLE"),
        (599, "UNKNOWN"),
    ],
)
def test_a_status_without_a_teachers_body_says_the_class(status, code):
    failure = HttpAnswer(status, b"<html>", content_type="text/html").failure(now=NOW)
    assert failure.code.name == code
    assert failure.message.startswith(f"HTTP {status}")


def test_nothing_but_a_full_queue_and_an_absent_teacher_is_tried_again():
    retried = {status for status in CODE_OF_STATUS if HttpAnswer(status, b"").failure(now=NOW).is_retryable}
    assert retried == {408, 429, 502, 503, 504}


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_the_code_in_a_teachers_body_counts_whatever_the_status(code):
    assert HttpAnswer(500, error_body(code.name)).failure(now=NOW).code is code


def test_a_teachers_deadline_is_told_from_a_gateways():
    assert not HttpAnswer(504, error_body("DEADLINE_EXCEEDED")).failure(now=NOW).is_retryable
    assert HttpAnswer(504, b"").failure(now=NOW).is_retryable


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'{"error": "why"}',
        b'{"error": {"message": "why"}}',
        b'{"error": {"code": "NOT_FOUND"}}',
        b'{"error": {"code": "NOT_FOUND", "message": 5}}',
        b'{"error": {"code": "NOT_FOUND", "message": "why", "field": 5}}',
        b'{"error": {"code": ["NOT_FOUND"], "message": "why"}}',
        b'{"error": {"code": "rate_limited", "message": "why"}}',
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_an_error_of_somebody_else_is_no_teachers(body):
    failure = HttpAnswer(503, body).failure(now=NOW)
    assert (failure.code, failure.message) == (grpc.StatusCode.UNAVAILABLE, "HTTP 503 Service Unavailable")


def test_a_field_is_named_once():
    named = HttpAnswer(422, error_body("INVALID_ARGUMENT", "a.b: too long", field="a.b")).failure(now=NOW)
    unnamed = HttpAnswer(422, error_body("INVALID_ARGUMENT", "too long", field="a.b")).failure(now=NOW)
    assert named.message == unnamed.message == "a.b: too long"


@pytest.mark.parametrize("error", list(HTTP_STATUSES))
def test_every_error_of_a_teacher_is_read_as_it_was_meant(error: type[TeacherError]):
    if issubclass(error, InvalidRequestError):
        raised: TeacherError = error("name", "why")
    elif issubclass(error, OverloadedError):
        raised = error("why", retry_delay_s=1.0)
    else:
        raised = error("why")
    response = error_response(raised)
    code = json.loads(bytes(response.body))["error"]["code"]
    failure = HttpAnswer(response.status_code, bytes(response.body)).failure(now=NOW)
    assert failure.code.name == code
    assert "why" in failure.message


# ---------------------------------------------------------------- when to try again


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        (" 120 ", 120.0),
        ("Wed, 04 Mar 2026 05:06:37 GMT", 30.0),
        ("Wed, 04 Mar 2026 05:06:37 -0000", 30.0),
        ("Wednesday, 04-Mar-26 05:06:37 GMT", 30.0),
        ("", None),
        ("0", None),
        ("-3", None),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("Wed, 04 Mar 2026 05:06:00 GMT", None),  # past
    ],
)
def test_retry_after_holds_seconds_or_a_date(value, seconds):
    assert retry_after_s(value, NOW) == seconds


@pytest.mark.parametrize(
    "error", [OverloadedError("full", retry_delay_s=0.3), UnavailableError("x", retry_delay_s=0.3)]
)
def test_the_teachers_own_delay_is_finer_than_the_header(error: TeacherError):
    response = error_response(error)
    assert response.headers["Retry-After"] == "1"
    answer = HttpAnswer(response.status_code, bytes(response.body), retry_after=response.headers["Retry-After"])
    assert answer.failure(now=NOW).retry_delay_s == 0.3


@pytest.mark.parametrize("delay_s", [None, 0, -1, "2", [], True])
def test_a_delay_that_is_none_leaves_the_header(delay_s):
    answer = HttpAnswer(429, error_body("RESOURCE_EXHAUSTED", retry_delay_s=delay_s), retry_after="5")
    assert answer.failure(now=NOW).retry_delay_s == 5.0


# ---------------------------------------------------------------- messages


def test_a_message_is_read_whatever_the_parameters_of_its_type():
    info = pb.GetInfoResponse(model_id="m")
    answer = HttpAnswer(200, info.SerializeToString(), content_type="Application/X-Protobuf; charset=utf-8")
    assert answer.message(pb.GetInfoResponse) == info


def test_an_answer_of_another_type_is_no_message():
    with pytest.raises(CallFailed, match="UNKNOWN: HTTP 200 OK, application/json"):
        HttpAnswer(200, b"", content_type="application/json").message(pb.GetInfoResponse)


def test_a_failure_survives_its_way_through_the_emulated_stream():
    failure = HttpAnswer(429, error_body("RESOURCE_EXHAUSTED", retry_delay_s=0.5)).failure(now=NOW)
    message = failure.to_message("7")
    assert (message.sequence_id, message.code, message.message, message.retry_delay_s) == ("7", 8, "why", 0.5)


# ---------------------------------------------------------------- connections


def subclasses(cls: type) -> list[type]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in subclasses(child))]


@pytest.mark.parametrize("error", subclasses(httpx2.RequestError))
def test_every_error_of_the_library_is_a_failure_and_only_our_own_fault_is_not_tried_again(error):
    failure = failure_of_connection(error("why"), HERE)
    assert failure.is_retryable == (error is not httpx2.LocalProtocolError)
    assert failure.message == "why"


def caused_by(cause: BaseException) -> httpx2.ConnectError:
    """As the library raises it: its own error, which hides the one that names the cause."""
    try:
        try:
            raise OSError("All connection attempts failed") from cause
        except OSError as error:
            raise httpx2.ConnectError(str(error)) from None
    except httpx2.ConnectError as error:
        return error


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (ConnectionRefusedError(111, "Connection refused"), "connection refused"),
        (
            ExceptionGroup("two addresses", [OSError(101, "Network is unreachable"), ConnectionRefusedError()]),
            "connection refused",
        ),
        (OSError(113, "No route to host"), "no route to host"),
        (ssl.SSLError(1, "handshake"), "TLS: "),
    ],
)
def test_the_reason_is_the_first_cause(cause, reason):
    assert failure_of_connection(caused_by(cause), HERE).reason.startswith(reason)


def test_an_error_of_ours_says_what_is_wrong_with_the_request():
    error = failure_of_connection(httpx2.LocalProtocolError("Illegal header value"), HERE).to_error()
    assert not isinstance(error, TeacherRequestError)
    assert "Illegal header value" in str(error)


# ---------------------------------------------------------------- headers and proxies


def test_the_key_travels_as_a_bearer_token():
    assert request_headers("id.secret")["Authorization"] == "Bearer id.secret"
    assert "Authorization" not in request_headers(None)


def test_a_proxy_is_used_where_the_environment_names_one_and_never_for_loopback(monkeypatch):
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert proxy_of(HERE) is None
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "near")
    assert proxy_of(HERE) == "http://proxy:3128"
    monkeypatch.setenv("https_proxy", "proxy:3129")
    assert proxy_of(parse_url("https://here")) == "http://proxy:3129"
    assert proxy_of(parse_url("http://near")) is None
    assert proxy_of(parse_url("http://127.0.0.1:8080")) is None
    assert proxy_of(parse_url("http://localhost")) is None
