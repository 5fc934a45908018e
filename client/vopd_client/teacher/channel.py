"""Addresses, API keys and certificates: everything about a connection that is known before it is made."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args
from urllib.parse import urlsplit

from vopd_client.errors import ConfigError

Scheme = Literal["grpc", "grpcs", "http", "https"]

DEFAULT_PORTS: dict[str, int] = {"http": 80, "https": 443}  # gRPC has none, and no paths


@dataclass(frozen=True, slots=True)
class Address:
    """Where a teacher listens, and what it speaks there.

    prefix: path that a gateway puts in front of the teacher's own, without a slash at its end; HTTP only.
    """

    scheme: Scheme
    host: str
    port: int
    prefix: str = ""

    @property
    def secure(self) -> bool:
        """Whether the way there is encrypted."""
        return self.scheme in ("grpcs", "https")

    @property
    def speaks_http(self) -> bool:
        return self.scheme in ("http", "https")

    @property
    def target(self) -> str:
        """`host:port` as gRPC and people write it; IPv6 in brackets."""
        return f"{self._bracketed_host}:{self.port}"

    @property
    def url(self) -> str:
        has_default_port = DEFAULT_PORTS.get(self.scheme) == self.port
        return f"{self.scheme}://{self._bracketed_host if has_default_port else self.target}{self.prefix}"

    @property
    def is_loopback(self) -> bool:
        """Names other than localhost count as remote: who answers to them is not known here."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def _bracketed_host(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


def parse_url(url: str) -> Address:
    """The address in `grpc://host:port` or `http://host[:port][/prefix]`; `grpcs://` and `https://` are the same
    over TLS.

    Raises: ConfigError naming what is wrong with the URL.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"teacher URL {url!r}: {error}") from error
    if "://" not in url or parts.scheme not in get_args(Scheme):
        raise ConfigError(
            f"teacher URL {url!r}: write grpc://host:port or http://host:port, or over TLS grpcs:// or https://"
        )
    if not parts.hostname:
        raise ConfigError(f"teacher URL {url!r} names no host")
    if parts.username is not None:  # not shown: a password may stand there
        raise ConfigError(f"teacher URL of {parts.hostname} holds a user name; a key belongs into api_key_file")
    if port is None and parts.scheme not in DEFAULT_PORTS:
        raise ConfigError(f"teacher URL {url!r} names no port; the teacher's default is 50051")
    if port == 0:
        raise ConfigError(f"teacher URL {url!r} names port 0, at which nothing listens")
    prefix = parts.path.rstrip("/")
    if parts.scheme not in DEFAULT_PORTS and (prefix or parts.query or parts.fragment):
        raise ConfigError(f"teacher URL {url!r} has more than scheme, host and port")
    if parts.query or parts.fragment:
        raise ConfigError(f"teacher URL {url!r} has a query or a fragment")
    return Address(cast(Scheme, parts.scheme), parts.hostname, port or DEFAULT_PORTS[parts.scheme], prefix)


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
            f"the API key would travel unencrypted to {', '.join(exposed)}: use grpcs:// or https://, "
            "or say plaintext if the network in between is trusted"
        )


def read_tls_roots(path: Path | None) -> bytes | None:
    """The certificate authorities in a PEM file; None: those that the transport knows by itself.

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
    try:
        tls_context(pem)
    except ssl.SSLError as error:
        raise ConfigError(f"TLS CA file {path} holds a damaged certificate: {error}") from error
    return pem


def tls_context(roots: bytes) -> ssl.SSLContext:
    """Trusts the certificate authorities in this PEM text and no others. Raises: ssl.SSLError."""
    # Bundles carry names as remarks between the certificates, which need not be ASCII as the certificates are.
    return ssl.create_default_context(cadata=roots.decode("ascii", "ignore"))
