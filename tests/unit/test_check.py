"""`vopd-server check`: what it says of a configuration, and what it refuses, in a line each."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
from huggingface_hub.errors import LocalEntryNotFoundError

from tiny_model import write_tiny_model
from vopd_server.check import check, look_at_engine_args, look_at_keys, sequence_length
from vopd_server.config import ServerConfig
from vopd_server.engines import model_files
from vopd_server.errors import ConfigError
from vopd_server.main import main

Run = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code, standard output, and the lines of standard error."""

    def run_check(*flags: str) -> tuple[int, str, list[str]]:
        code = main(["check", *flags])
        told = capsys.readouterr()
        return code, told.out, told.err.splitlines()

    return run_check


@pytest.fixture
def own_model_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def config(**settings: Any) -> ServerConfig:
    return ServerConfig.model_validate({"model": "m", "engine": "transformers", **settings})


def test_a_good_configuration_is_summed_up(run: Run, tiny_model_dir: Path) -> None:
    code, out, err = run("--model", str(tiny_model_dir), "--engine", "transformers", "--device", "cpu", "--port", "7")
    assert (code, err) == (0, [])
    facts = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert facts["engine"] == "transformers"
    assert facts["model"] == f"{tiny_model_dir} (llama)"
    assert facts["vocabulary"] == "259 ids"
    assert facts["sequences"] == "up to 32768 tokens (the model's own)"
    assert facts["tokenizer"].startswith("259 tokens, ")
    assert facts["TLS"] == "off"
    assert facts["keys"] == "none: one open tenant"
    assert facts["listens"] == "gRPC 127.0.0.1:7, HTTP 127.0.0.1:8080, admin 127.0.0.1:9090"


def test_ports_that_are_taken_are_not_tried(run: Run, tiny_model_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = run("--model", str(tiny_model_dir), "--port", str(taken.getsockname()[1]))
    assert (code, err) == (0, [])


def test_every_problem_is_told_at_once_and_on_a_line_of_its_own(run: Run, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    code, out, err = run(
        *("--model", missing, "--engine", "transformers", "--device", "abacus"),
        *("--tls-cert-file", missing, "--tls-key-file", missing),
    )
    assert (code, out) == (2, "")
    assert err[:2] == [
        f"vopd-server: tls_cert_file {missing}: No such file or directory",
        f"vopd-server: model {missing}: no such directory",
    ]
    assert err[2].startswith("vopd-server: device 'abacus' is not a device")
    assert len(err) == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("model: [", "not YAML"),
        ("model: m\nmax_topk: 3", "unknown key 'max_topk'; did you mean 'max_top_k'?"),
        ("model: m\nmax_top_k: many", "max_top_k: input should be a valid integer"),
        ("model: m\nengine_args: 3", "engine_args: "),
        ("- model", "holds a list"),
        (None, "No such file or directory"),
    ],
)
def test_a_wrong_file_is_one_line(run: Run, tmp_path: Path, content: str | None, words: str) -> None:
    file = tmp_path / "teacher.yaml"
    if content is not None:
        file.write_text(content)
    code, out, err = run("--config", str(file))
    assert (code, out, len(err)) == (2, "", 1)
    assert words in err[0]
    assert str(file) in err[0]


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", None, "config.json: No such file or directory"),
        ("config.json", "{", "config.json: Expecting"),
        ("config.json", "[]", "config.json holds no JSON object"),
        ("config.json", '{"model_type": "abacus"}', "abacus"),
        ("config.json", '{"model_type": "vit"}', "vit is no language model"),
        ("tokenizer.json", "{", "cannot read the tokenizer"),
        ("model.safetensors", None, "holds no weights"),
    ],
)
def test_a_damaged_model_is_one_line(run: Run, own_model_dir: Path, file: str, content: str | None, words: str) -> None:
    (own_model_dir / file).unlink()
    if content is not None:
        (own_model_dir / file).write_text(content)
    code, out, err = run("--model", str(own_model_dir), "--engine", "transformers", "--device", "cpu")
    assert (code, out, len(err)) == (2, "", 1)
    assert words in err[0]


def test_a_hub_model_that_cannot_be_reached_is_told_and_passes(run: Run) -> None:
    code, out, err = run("--model", "somebody/some-model", "--engine", "transformers", "--device", "cpu")
    assert (code, err) == (0, [])
    assert "somebody/some-model: not in the cache, and no hub can be reached from here: not checked\n" in out


def test_a_name_that_no_hub_can_have_is_refused(run: Run) -> None:
    code, _, err = run("--model", "some model", "--engine", "transformers", "--device", "cpu")
    assert (code, err) == (2, ["vopd-server: model 'some model' is neither a directory nor a hub id"])


def test_of_a_hub_model_the_config_alone_is_looked_up(
    monkeypatch: pytest.MonkeyPatch, own_model_dir: Path, run: Run
) -> None:
    """A cache that holds the config and nothing else."""
    for file in own_model_dir.iterdir():
        if file.name != "config.json":
            file.unlink()
    cached = own_model_dir / "config.json"

    class Config:
        model_type, vocab_size, max_position_embeddings = "llama", 259, 1000

        def get_text_config(self) -> Config:
            return self

    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(model_files, "cached_file", lambda *what, revision: asked.append((*what, revision)) or cached)
    monkeypatch.setattr(model_files.AutoConfig, "from_pretrained", lambda *_, **__: Config())
    code, out, _ = run("--model", "somebody/some-model", "--revision", "v2", "--engine", "transformers")
    assert code == 0
    assert asked == [("somebody/some-model", "config.json", "v2")]
    assert "up to 1000 tokens (the model's own)" in out
    assert "tokenizer  not fetched" in out


def test_what_the_hub_answers_is_told_from_a_hub_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_from(cause: Exception | None) -> Callable[..., str]:
        def cached_file(*_: str, **__: str | None) -> str:
            raise OSError("what transformers says\nat length") from cause

        return cached_file

    monkeypatch.setattr(model_files, "cached_file", raise_from(LocalEntryNotFoundError("offline")))
    with pytest.raises(model_files.UnreachableError):
        model_files.look_up("a/b", None, trust_remote_code=False)
    monkeypatch.setattr(model_files, "cached_file", raise_from(None))
    with pytest.raises(ConfigError, match=r"the hub refuses 'a/b': what transformers says$"):
        model_files.look_up("a/b", None, trust_remote_code=False)


def test_a_tokenizer_that_fits_no_message_is_refused(run: Run, tmp_path: Path) -> None:
    tokens = tuple(f"<a token with a name of some length, number {index}>" for index in range(8_000))
    model = write_tiny_model(tmp_path / "wordy", extra_tokens=tokens)
    limits = ["--max-tokens-per-request", "100", "--max-sequences-per-request", "1", "--max-message-bytes", "1100000"]
    code, _, err = run("--model", str(model), "--engine", "transformers", "--device", "cpu", *limits)
    assert (code, len(err)) == (2, 1)
    assert "max_message_bytes 1100000 < " in err[0]
    assert "the tokenizer's table" in err[0]


@pytest.mark.parametrize(
    ("settings", "own", "expected"),
    [
        ({}, 1000, "up to 1000 tokens (the model's own)"),
        ({"engine": "vllm"}, 1000, "up to 999 tokens (the model's own, less the token that vLLM generates)"),
        ({"max_context_length": 500}, 1000, "up to 500 tokens (max_context_length)"),
        ({"max_context_length": 500}, None, "up to 500 tokens (max_context_length)"),
        ({"max_context_length": 2000}, 1000, "up to 1000 tokens (the model's own)"),
        ({"max_tokens_per_request": 300}, 1000, "up to 300 tokens (max_tokens_per_request)"),
    ],
)
def test_the_least_bound_on_a_sequence_is_told(settings: dict[str, Any], own: int | None, expected: str) -> None:
    assert sequence_length(config(**settings), own) == expected


def test_a_model_without_a_length_needs_one() -> None:
    with pytest.raises(ConfigError, match="states no maximum length: set max_context_length"):
        sequence_length(config(), None)


# ---------------------------------------------------------------- TLS


@pytest.fixture
def pems(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A certificate, its key, and the key of another one."""
    authority = trustme.CA()
    ours, other = authority.issue_cert("localhost"), authority.issue_cert("localhost")
    paths = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "other.pem"
    ours.cert_chain_pems[0].write_to_path(str(paths[0]))
    ours.private_key_pem.write_to_path(str(paths[1]))
    other.private_key_pem.write_to_path(str(paths[2]))
    return paths


def tls_problems(cert: Path, key: Path) -> list[str]:
    report = check(config(model="/no/model", tls_cert_file=cert, tls_key_file=key))
    return [problem for problem in report.problems if "tls" in problem]


def test_a_certificate_and_its_key_pass_and_another_key_does_not(pems: tuple[Path, Path, Path]) -> None:
    cert, key, other = pems
    assert tls_problems(cert, key) == []
    (problem,) = tls_problems(cert, other)
    assert problem.startswith(f"tls_cert_file {cert}, tls_key_file {other}: the key is not the certificate's")
    (problem,) = tls_problems(key, cert)
    assert "not PEM, or damaged" in problem


def test_an_encrypted_key_is_refused_and_nobody_asked_for_its_password(
    pems: tuple[Path, Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cert, key, _ = pems
    locked = tmp_path / "locked.pem"
    command = ["openssl", "pkey", "-in", str(key), "-aes256", "-passout", "pass:secret", "-out", str(locked)]
    subprocess.run(command, check=True)
    (problem,) = tls_problems(cert, locked)
    assert problem.startswith(f"tls_cert_file {cert}, tls_key_file {locked}: ")
    assert capfd.readouterr().err == ""


# ---------------------------------------------------------------- keys


def add_key(path: Path, tenant_id: str) -> None:
    assert main(["keys", "create", "--keys-file", str(path), tenant_id]) == 0


def revoke_key(path: Path, tenant_id: str) -> None:
    assert main(["keys", "revoke", "--keys-file", str(path), tenant_id]) == 0


def test_tenants_and_revoked_keys_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add_key(path, "alice")
    assert look_at_keys(config(keys_file=path)) == [("keys", f"{path}: 1 tenant")]
    add_key(path, "bob")
    add_key(path, "carol")
    revoke_key(path, "bob")
    assert look_at_keys(config(keys_file=path)) == [("keys", f"{path}: 2 tenants, 1 revoked key")]
    revoke_key(path, "alice")
    revoke_key(path, "carol")
    assert look_at_keys(config(keys_file=path)) == [("keys", f"{path}: 0 tenants, 3 revoked keys")]


def test_a_keys_file_that_cannot_be_read_is_one_line(run: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    flags = ["--model", str(tiny_model_dir), "--engine", "transformers", "--device", "cpu", "--keys-file", str(path)]
    assert run(*flags) == (2, "", [f"vopd-server: keys file {path}: No such file or directory"])
    path.write_text('{"version": 3, "keys": []}')
    expected = f"vopd-server: keys file {path}: version: must be 1, the version that is read here"
    assert run(*flags) == (2, "", [expected])


def test_a_keys_file_that_serve_would_create_is_told_and_not_created(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    told = look_at_keys(config(keys_file=path, create_keys_file=True))
    assert told == [("keys", f"{path}: serve creates it, with a key for the tenant default")]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match=r"keys.json: cannot be created, .*missing is missing or not ours to write"):
        look_at_keys(config(keys_file=tmp_path / "missing" / "keys.json", create_keys_file=True))
    add_key(path, "alice")
    assert look_at_keys(config(keys_file=path, create_keys_file=True)) == [("keys", f"{path}: 1 tenant")]


# ---------------------------------------------------------------- the engine


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find_spec(name))


@pytest.mark.usefixtures("no_vllm")
def test_arguments_that_are_never_passed_through_are_refused_without_vllm_too() -> None:
    with pytest.raises(ConfigError, match=r"engine_args.model cannot be set: use the setting model"):
        look_at_engine_args(config(engine="vllm", engine_args={"model": "m"}))


@pytest.mark.usefixtures("no_vllm")
def test_an_engine_that_is_not_installed_is_refused(run: Run, tiny_model_dir: Path) -> None:
    code, _, err = run("--model", str(tiny_model_dir), "--engine", "vllm", "--engine-args", '{"seed": 1}')
    assert (code, len(err)) == (2, 1)
    assert "engine vllm needs the package vllm" in err[0]


def test_check_imports_neither_torch_nor_transformers_until_it_looks_at_a_model(tmp_path: Path) -> None:
    code = (
        "import json, sys\n"
        "from vopd_server.main import main\n"
        "returned = main(['check', '--model', './missing', '--engine', 'vllm', '--engine-args', '{\"model\": 1}'])\n"
        "print(json.dumps([returned, sorted({'torch', 'transformers'} & set(sys.modules))]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(found.stdout) == [2, []]
