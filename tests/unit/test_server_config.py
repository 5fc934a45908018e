"""Configurations that are refused, and what the server imports before it has one."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from vopd_proto import MAX_MESSAGE_BYTES
from vopd_server.config import ServerConfig, is_loopback
from vopd_settings import SettingsError, load_settings

TLS_FILES = {"tls_cert_file": "c", "tls_key_file": "k"}


def config(**settings: Any) -> ServerConfig:
    return ServerConfig(model="m", **settings)


def test_the_defaults_go_together() -> None:
    assert config().max_message_bytes == MAX_MESSAGE_BYTES


def test_every_setting_says_what_it_is() -> None:
    assert [name for name, field in ServerConfig.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_tokens_per_request": 100, "queue_tokens": 99}, "max_tokens_per_request 100 > queue_tokens 99"),
        ({"max_context_length": 200_000}, "max_context_length 200000 > max_tokens_per_request 131072"),
        ({"max_message_bytes": 600_000}, "max_message_bytes 600000 < 1049856"),
        (
            {"max_message_bytes": 2**20 + 2**12, "max_top_k": 200_000},
            "max_message_bytes 1052672 < 1601288, .* max_top_k 200000",
        ),
        ({"host": "0.0.0.0"}, "host 0.0.0.0 can be reached from other machines.* no API keys .* --keys-file .* --open"),
        ({"host": "teacher.example"}, "host teacher.example can be reached"),
        ({"host": "0.0.0.0", "plaintext": True}, "no API keys are asked for"),
        ({"host": "0.0.0.0", "admin_open": True}, "no API keys are asked for"),
        ({"host": "0.0.0.0", **TLS_FILES}, "no API keys are asked for"),
        ({"host": "0.0.0.0", "keys_file": "k"}, "API keys would travel unencrypted: .* --tls-cert-file .* --plaintext"),
        ({"admin_host": "0.0.0.0"}, "admin_host 0.0.0.0 can be reached .* asks for no key: add --admin-open"),
        ({"admin_host": "0.0.0.0", "keys_file": "k", "plaintext": True}, "add --admin-open"),
        ({"keys_file": "k", "open": True}, "open serves everyone, keys_file those who have a key: leave one"),
        ({"create_keys_file": True}, "create_keys_file needs a keys_file"),
        ({"port": 65_536}, "less than or equal to 65535"),
        ({"max_topk": 5}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_with_the_numbers(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"host": "0.0.0.0", "admin_host": "0.0.0.0", "open": True},
        {"host": "0.0.0.0", "keys_file": "k", "plaintext": True},
        {"host": "0.0.0.0", "keys_file": "k", **TLS_FILES},
        {"host": "0.0.0.0", "keys_file": "k", "plaintext": True, **TLS_FILES},
        {"host": "localhost", "keys_file": "k", "create_keys_file": True},
        {"admin_host": "0.0.0.0", "admin_open": True},
        {"admin_host": "0.0.0.0", "admin_open": True, "keys_file": "k"},
    ],
)
def test_other_machines_are_served_by_key_and_encrypted_or_as_told(settings: dict[str, Any]) -> None:
    assert config(**settings).model_dump(include=settings.keys(), mode="json") == settings


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("::", False), ("10.0.0.1", False)],
)
def test_loopback_is_recognised(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected


def test_flags_files_and_the_environment_reach_the_settings(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "teacher.yaml"
    file.write_text("max_top_k: 7\nport: 1\n")
    monkeypatch.setenv("VOPD_SERVER_DTYPE", "float16")
    flags = ["--model", "m", "--config", str(file), "--port", "2", "--open"]
    loaded = load_settings(
        ServerConfig, flags, prog="vopd-server serve", env_prefix="VOPD_SERVER_", description="Serves."
    )
    assert (loaded.max_top_k, loaded.port, loaded.dtype, loaded.open) == (7, 2, "float16", True)
    with pytest.raises(SettingsError, match="did you mean '--max-top-k'"):
        load_settings(ServerConfig, ["--max-topk", "3"], prog="p", env_prefix="VOPD_SERVER_", description="")


def test_the_server_imports_without_torch_or_transformers() -> None:
    code = (
        "import sys, vopd_server.main, vopd_server.engine_choice\n"
        "print(sorted({'torch', 'transformers', 'vllm', 'vopd_client'} & {name.split('.')[0] for name in sys.modules}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
