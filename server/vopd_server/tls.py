"""The certificate that gRPC and HTTP show, checked before either uses it."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from vopd_server.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: the certificate chain and its private key."""

    cert: Path
    key: Path


def check_tls_files(files: TlsFiles) -> None:
    """Raises: ConfigError for a file that cannot be read, is no PEM, or a key that is not the certificate's."""
    for name, path in (("tls_cert_file", files.cert), ("tls_key_file", files.key)):
        try:
            path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{name} {path}: {error.strerror}") from error
    try:
        # Without a password given, OpenSSL would ask for the one of an encrypted key on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(files.cert, files.key, password="")
    except ssl.SSLError as error:
        what = "the key is not the certificate's" if error.reason == "KEY_VALUES_MISMATCH" else "not PEM, or damaged"
        raise ConfigError(f"tls_cert_file {files.cert}, tls_key_file {files.key}: {what} ({error.reason})") from error
