"""Addresses, keys and what may travel where."""

import subprocess
import sys
from pathlib import Path

import pytest

from vopd_client.errors import ConfigError
from vopd_client.teacher import TeacherClient
from vopd_client.teacher.channel import (
    CHANNEL_OPTIONS,
    Address,
    call_metadata,
    parse_url,
    parse_urls,
    read_api_key,
    read_tls_roots,
)
from vopd_proto import MAX_MESSAGE_BYTES


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("grpc://localhost:50051", Address("localhost", 50051, secure=False)),
        ("grpcs://teacher.example.org:443/", Address("teacher.example.org", 443, secure=True)),
        ("grpc://[::1]:5", Address("::1", 5, secure=False)),
    ],
)
def test_urls_are_read(url, address):
    assert parse_url(url) == address


def test_an_address_writes_itself_as_it_is_read():
    for url in ("grpc://[::1]:5", "grpcs://host:7"):
        assert parse_url(url).url == url


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("http://host:1", "write grpc://host:port, or grpcs://"),
        ("https://host:1", "write grpc://host:port, or grpcs://"),
        ("host:50051", "write grpc://host:port"),
        ("grpc:host:1", "write grpc://host:port"),
        ("", "write grpc://host:port"),
        ("grpc://host", "names no port"),
        ("grpc://:50051", "names no host"),
        ("grpc://host:http", "Port could not be cast"),
        ("grpc://host:99999", "Port out of range"),
        ("grpc://[::1:50051", "Invalid IPv6 URL"),
        ("grpc://host:1/v1", "more than scheme, host and port"),
        ("grpc://me@host:1", "more than scheme, host and port"),
        ("grpc://host:1?x=1", "more than scheme, host and port"),
    ],
)
def test_a_wrong_url_is_refused_and_named(url, complaint):
    with pytest.raises(ConfigError, match=complaint) as caught:
        parse_url(url)
    assert repr(url) in str(caught.value)


def test_no_url_at_all_is_refused():
    with pytest.raises(ConfigError, match="no teacher URL"):
        parse_urls([])


@pytest.mark.parametrize(
    ("url", "is_loopback"),
    [
        ("grpc://localhost:1", True),
        ("grpc://127.3.2.1:1", True),
        ("grpc://[::1]:1", True),
        ("grpc://10.0.0.1:1", False),
        ("grpc://localhost.example.org:1", False),
    ],
)
def test_loopback_is_told_from_names_that_resemble_it(url, is_loopback):
    assert parse_url(url).is_loopback == is_loopback


def test_a_key_travels_over_tls_and_to_loopback_only(tmp_path):
    TeacherClient("grpcs://far.example.org:1", api_key="id.secret")
    TeacherClient("grpc://127.0.0.1:1", api_key="id.secret")
    TeacherClient("grpc://far.example.org:1")  # no key, nothing to give away
    with pytest.raises(ConfigError, match=r"unencrypted to grpc://far\.example\.org:1"):
        TeacherClient(["grpc://127.0.0.1:1", "grpc://far.example.org:1"], api_key="id.secret")
    TeacherClient("grpc://far.example.org:1", api_key="id.secret", plaintext=True)


def test_the_key_travels_as_a_bearer_token():
    assert call_metadata("id.secret") == (("authorization", "Bearer id.secret"),)
    assert call_metadata(None) == ()


def test_a_key_file_is_read_without_its_newline(tmp_path):
    path = tmp_path / "key"
    path.write_text("  id.secret\n")
    assert read_api_key(path) == "id.secret"


@pytest.mark.parametrize("content", ["", " \n", "two words", "schlüssel", "a\nb"])
def test_a_file_without_a_key_is_refused(tmp_path, content):
    path = tmp_path / "key"
    path.write_text(content)
    with pytest.raises(ConfigError, match="API key file"):
        read_api_key(path)


def test_a_missing_key_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_api_key(tmp_path / "missing")


def test_tls_roots_are_read_or_refused(tmp_path):
    assert read_tls_roots(None) is None
    wrong = tmp_path / "ca.pem"
    wrong.write_text("not a certificate")
    with pytest.raises(ConfigError, match="no PEM certificate"):
        read_tls_roots(wrong)
    with pytest.raises(ConfigError, match="No such file"):
        read_tls_roots(tmp_path / "missing.pem")


def test_message_limits_and_pings_are_explicit():
    options = dict(CHANNEL_OPTIONS)
    assert options["grpc.max_send_message_length"] == options["grpc.max_receive_message_length"] == MAX_MESSAGE_BYTES
    assert options["grpc.keepalive_time_ms"] == 20_000
    assert options["grpc.http2.max_pings_without_data"] == 0


def test_the_teacher_client_imports_without_torch_and_without_the_server():
    program = (
        "import sys, vopd_client.teacher, vopd_client.show\n"
        "heavy = {'torch', 'transformers', 'vopd_server', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent)
