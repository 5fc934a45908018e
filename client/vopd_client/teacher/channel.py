"""Addresses, encryption, API keys and channel options: everything about a connection but its use."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import grpc.aio

from vopd_client.errors import ConfigError
from vopd_proto import MAX_MESSAGE_BYTES

KEEPALIVE_INTERVAL_S = 20
KEEPALIVE_TIMEOUT_S = 10

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A machine that vanished sends no reset: without pings its connection looks idle for ever.
    ("grpc.keepalive_time_ms", KEEPALIVE_INTERVAL_S * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
    # A long prefill is minutes without a byte in either direction; the pings go on.
    ("grpc.http2.max_pings_without_data", 0),
    # Retries are ours: gRPC's stop at small buffered messages and know no overall time-out.
    ("grpc.enable_retries", 0),
    # A reconnect opens a new channel, which must not inherit the old one's back-off.
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a teacher listens, and whether the way there is encrypted."""

    host: str
    port: int
    secure: bool

    @property
    def target(self) -> str:
        """`host:port` as gRPC and people write it; IPv6 in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{'grpcs' if self.secure else 'grpc'}://{self.target}"

    @property
    def is_loopback(self) -> bool:
        """Names other than localhost count as remote: who answers to them is not known here."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_url(url: str) -> Address:
    """The address in `grpc://host:port` (plain) or `grpcs://host:port` (TLS).

    Raises: ConfigError naming what is wrong with the URL.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"teacher URL {url!r}: {error}") from error
    if parts.scheme not in ("grpc", "grpcs") or "://" not in url:
        raise ConfigError(
            f"teacher URL {url!r}: write grpc://host:port, or grpcs://host:port over TLS "
            "(this version speaks no other protocol)"
        )
    if not parts.hostname:
        raise ConfigError(f"teacher URL {url!r} names no host")
    if not port:
        raise ConfigError(f"teacher URL {url!r} names no port; the teacher's default is 50051")
    if parts.username is not None or parts.path.rstrip("/") or parts.query or parts.fragment:
        raise ConfigError(f"teacher URL {url!r} has more than scheme, host and port")
    return Address(parts.hostname, port, secure=parts.scheme == "grpcs")


def parse_urls(urls: str | list[str] | tuple[str, ...]) -> tuple[Address, ...]:
    """The addresses of a teacher's replicas, at least one.

    Raises: ConfigError for no URL, or one that cannot be read.
    """
    addresses = tuple(parse_url(url) for url in ([urls] if isinstance(urls, str) else urls))
    if not addresses:
        raise ConfigError("no teacher URL given")
    return addresses


def read_api_key(path: Path) -> str:
    """The API key in a file, without the white space around it.

    Raises: ConfigError when the file cannot be read, is empty, or cannot be a key.
    """
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"API key file {path}: {error}") from error
    if not key:
        raise ConfigError(f"API key file {path} is empty")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"API key file {path} holds more than one word of plain ASCII")
    return key


def check_key_may_travel(addresses: tuple[Address, ...], *, plaintext: bool) -> None:
    """Refuses to send a key where others could read it.

    Raises: ConfigError unless every address is encrypted or loopback, or `plaintext` says that it is meant.
    """
    exposed = [address.url for address in addresses if not (address.secure or address.is_loopback)]
    if exposed and not plaintext:
        raise ConfigError(
            f"the API key would travel unencrypted to {', '.join(exposed)}: use grpcs://, "
            "or say plaintext if the network in between is trusted"
        )


def read_tls_roots(path: Path | None) -> bytes | None:
    """The certificate authorities in a PEM file; None: the ones that gRPC ships.

    Raises: ConfigError when the file cannot be read or holds no certificate.
    """
    if path is None:
        return None
    try:
        pem = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"TLS CA file {path}: {error}") from error
    if b"BEGIN CERTIFICATE" not in pem:
        raise ConfigError(f"TLS CA file {path} holds no PEM certificate")
    return pem


def open_channel(address: Address, *, tls_roots: bytes | None = None) -> grpc.aio.Channel:
    """A new channel; nothing is sent before the first call."""
    # gRPC would send loopback traffic, key included, to the proxy that `http_proxy` names.
    options = (*CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0)) if address.is_loopback else CHANNEL_OPTIONS
    if not address.secure:
        return grpc.aio.insecure_channel(address.target, options=options)
    credentials = grpc.ssl_channel_credentials(root_certificates=tls_roots)
    return grpc.aio.secure_channel(address.target, credentials, options=options)


def call_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """What goes with every call."""
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()
