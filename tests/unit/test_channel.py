"""Addresses, keys and what may travel where."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trustme

from vopd_client.errors import ConfigError
from vopd_client.teacher import TeacherClient
from vopd_client.teacher.channel import Address, parse_url, parse_urls, read_api_key, read_tls_roots
from vopd_client.teacher.grpc_transport import CHANNEL_OPTIONS, call_metadata
from vopd_client.teacher.http_transport import IDLE_CONNECTION_S, socket_options
from vopd_proto import MAX_MESSAGE_BYTES
from vopd_server.http_listener import KEEP_ALIVE_S


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("grpc://localhost:50051", Address("grpc", "localhost", 50051)),
        ("grpcs://teacher.example.org:443/", Address("grpcs", "teacher.example.org", 443)),
        ("grpc://[::1]:5", Address("grpc", "::1", 5)),
        ("http://localhost:8080", Address("http", "localhost", 8080)),
        ("http://localhost", Address("http", "localhost", 80)),
        ("https://teacher.example.org/", Address("https", "teacher.example.org", 443)),
        ("https://example.org:8443/teams/a/", Address("https", "example.org", 8443, "/teams/a")),
        ("HTTP://Example.org", Address("http", "example.org", 80)),
    ],
)
def test_urls_are_read(url, address):
    assert parse_url(url) == address


def test_an_address_writes_itself_as_it_is_read():
    for url in (
        "grpc://[::1]:5",
        "grpcs://host:7",
        "http://host",
        "https://[::1]/a/b",
        "http://host:443",
        "grpc://h:80",
    ):
        assert parse_url(url).url == url
    assert parse_url("https://host:443/").url == "https://host"


def test_what_is_encrypted_and_what_is_http_follows_from_the_scheme():
    addresses = [parse_url(f"{scheme}://host:1") for scheme in ("grpc", "grpcs", "http", "https")]
    assert [address.secure for address in addresses] == [False, True, False, True]
    assert [address.speaks_http for address in addresses] == [False, False, True, True]


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("ftp://host:1", "write grpc://host:port or http://host:port, or over TLS"),
        ("http:host:1", "write grpc://host:port"),
        ("host:50051", "write grpc://host:port"),
        ("grpc:host:1", "write grpc://host:port"),
        ("", "write grpc://host:port"),
        ("grpc://host", "names no port"),
        ("grpc://:50051", "names no host"),
        ("grpc://host:http", "Port could not be cast"),
        ("grpc://host:99999", "Port out of range"),
        ("grpc://[::1:50051", "Invalid IPv6 URL"),
        ("grpc://host:1/v1", "more than scheme, host and port"),
        ("grpc://host:1?x=1", "more than scheme, host and port"),
        ("http://host/v?x=1", "a query or a fragment"),
        ("https://host/v#part", "a query or a fragment"),
        ("http://", "names no host"),
        ("http://host:0", "names port 0"),
    ],
)
def test_a_wrong_url_is_refused_and_named(url, complaint):
    with pytest.raises(ConfigError, match=complaint) as caught:
        parse_url(url)
    assert repr(url) in str(caught.value)


@pytest.mark.parametrize("url", ["grpc://me:secret@host:1", "https://me:secret@host"])
def test_a_password_in_a_url_is_refused_and_not_shown(url):
    with pytest.raises(ConfigError, match="of host holds a user name; a key belongs into api_key_file") as caught:
        parse_url(url)
    assert "secret" not in str(caught.value)


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


def test_a_key_does_not_travel_over_plain_http_to_another_machine():
    TeacherClient("https://far.example.org", api_key="id.secret")
    TeacherClient("http://127.0.0.1:8080", api_key="id.secret")
    with pytest.raises(ConfigError, match=r"unencrypted to http://far\.example\.org/a: use grpcs:// or https://"):
        TeacherClient(["https://far.example.org", "http://far.example.org/a"], api_key="id.secret")
    TeacherClient("http://far.example.org", api_key="id.secret", plaintext=True)


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
    authority = trustme.CA().cert_pem.bytes()
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes("# Müllers Zertifikat\n".encode() + authority)
    assert read_tls_roots(bundle) == bundle.read_bytes()
    damaged = tmp_path / "damaged.pem"
    damaged.write_bytes(authority[:200] + authority[260:])
    with pytest.raises(ConfigError, match=r"damaged\.pem holds a damaged certificate"):
        read_tls_roots(damaged)
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


def test_a_machine_that_vanished_is_noticed_by_tcp_within_a_minute():
    options = {(level, name): value for level, name, value in socket_options()}
    assert options[socket.SOL_SOCKET, socket.SO_KEEPALIVE] == 1
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        assert options[socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT] <= 60_000
        probes = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        idle_s, interval_s, count = (options[socket.IPPROTO_TCP, name] for name in probes)
        assert idle_s + interval_s * count <= 60
    with socket.socket() as here:
        for option in socket_options():
            here.setsockopt(*option)


def test_an_idle_connection_is_given_up_before_the_teacher_ends_it():
    assert IDLE_CONNECTION_S < KEEP_ALIVE_S


def test_the_teacher_client_imports_without_torch_and_without_the_server():
    program = (
        "import sys, vopd_client.teacher, vopd_client.show\n"
        "heavy = {'torch', 'transformers', 'vopd_server', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent)
