"""`vopd-server keys`: what it prints and where, and what it refuses in a line."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vopd_server.key_file import hash_secret
from vopd_server.key_storage import read_key_file
from vopd_server.keys_command import KEYS_FILE_VARIABLE, run_keys
from vopd_server.main import main
from vopd_server.tenancy import TenantLimits

Run = Callable[..., tuple[int, str, str]]
KEY = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]{43})\n")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the variable says that the keys file is; there is none yet."""
    path = tmp_path / "keys.json"
    monkeypatch.setenv(KEYS_FILE_VARIABLE, str(path))
    return path


@pytest.fixture
def run(path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code, standard output and standard error."""

    def run_command(*words: str) -> tuple[int, str, str]:
        code = main(["keys", *words])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run_command


def key_of(run: Run, *words: str) -> str:
    code, out, _ = run("create", *words)
    assert code == 0
    return out.strip()


# ---------------------------------------------------------------- create


def test_a_key_is_all_that_standard_output_gets(run: Run, path: Path) -> None:
    code, out, err = run("create", "alice")
    assert code == 0
    tenant_id, secret = KEY.fullmatch(out).groups()  # type: ignore[union-attr]
    (stored,) = read_key_file(path).keys
    assert (tenant_id, stored.id, stored.secret_sha256) == ("alice", "alice", hash_secret(secret))
    assert stored.limits == TenantLimits()
    assert err == f"Tenant alice was added to {path}. Its key, shown this once (the file holds its hash):\n"


def test_limits_reach_the_file(run: Run, path: Path) -> None:
    flags = ("--weight", "2.5", "--tokens-in-flight", "1", "--tokens-per-minute", "2", "--queue-tokens", "3")
    assert run("create", "alice", *flags, "--max-top-k", "4")[0] == 0
    assert read_key_file(path).keys[0].limits == TenantLimits(2.5, 1, 2, 3, 4)


def test_the_flag_wins_over_the_variable(run: Run, path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    assert run("create", "--keys-file", str(other), "alice")[0] == 0
    assert (path.exists(), other.exists()) == (False, True)


def test_a_key_can_go_to_a_file_of_its_own_and_is_not_printed(run: Run, path: Path, tmp_path: Path) -> None:
    key_out = tmp_path / "alice.key"
    code, out, err = run("create", "alice", "--key-out", str(key_out))
    assert (code, out) == (0, "")
    assert str(key_out) in err
    _, secret = KEY.fullmatch(key_out.read_text()).groups()  # type: ignore[union-attr]
    assert secret not in err
    assert stat.S_IMODE(key_out.stat().st_mode) == 0o600
    assert read_key_file(path).keys[0].secret_sha256 == hash_secret(secret)


def test_no_key_is_left_of_a_tenant_that_could_not_be_added(run: Run, path: Path, tmp_path: Path) -> None:
    key_of(run, "alice")
    key_out = tmp_path / "alice.key"
    code, out, err = run("create", "alice", "--key-out", str(key_out))
    assert (code, out, key_out.exists()) == (2, "", False)
    assert "tenant 'alice' has an active key" in err
    key_out.write_text("somebody else's")
    assert run("create", "bob", "--key-out", str(key_out)) == (2, "", f"vopd-server: {key_out}: File exists\n")
    assert [key.id for key in read_key_file(path).keys] == ["alice"]


def test_a_revoked_tenant_gets_another_key(run: Run) -> None:
    first = key_of(run, "alice")
    assert run("revoke", "alice")[0] == 0
    assert key_of(run, "alice") != first


# ---------------------------------------------------------------- list and revoke


def test_the_list_is_a_table_of_tenants_and_limits(run: Run, path: Path) -> None:
    key_of(run, "alice", "--weight", "2", "--tokens-per-minute", "60000")
    key_of(run, "a-team-with-a-name")
    assert run("revoke", "alice") == (0, "", f"The key of tenant alice was revoked in {path}.\n")
    alice, team = read_key_file(path).keys
    code, out, err = run("list")
    assert code == 0
    assert out.splitlines() == [
        "TENANT              STATE               WEIGHT  IN FLIGHT  A MINUTE  QUEUE  SUPPORT  CREATED",
        f"alice               revoked {alice.revoked_at:%Y-%m-%d}       2          -     60000      -        -  "
        f"{alice.created_at:%Y-%m-%d %H:%M} UTC",
        "a-team-with-a-name  active                   1          -         -      -        -  "
        f"{team.created_at:%Y-%m-%d %H:%M} UTC",
    ]
    assert err.splitlines()[:2] == ["", f"1 tenant, 1 revoked key in {path}"]


def test_the_list_is_json_for_scripts(run: Run) -> None:
    key_of(run, "alice", "--max-top-k", "7")
    code, out, err = run("list", "--json")
    (row,) = json.loads(out)
    assert (code, err) == (0, "")
    assert (row["id"], row["revoked_at"], row["weight"], row["max_top_k"]) == ("alice", None, 1.0, 7)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["created_at"])


def test_an_empty_file_is_listed(run: Run, path: Path) -> None:
    path.write_text('{"version": 1, "keys": []}')
    assert run("list") == (
        0,
        "TENANT  STATE  WEIGHT  IN FLIGHT  A MINUTE  QUEUE  SUPPORT  CREATED\n",
        f"\n0 tenants in {path}\n",
    )
    assert run("list", "--json") == (0, "[]\n", "")


def test_neither_lists_nor_the_file_hold_secrets_or_lists_hashes(run: Run, path: Path) -> None:
    secrets = [key_of(run, tenant_id).partition(".")[2] for tenant_id in ("alice", "bob")]
    hashes = [key.secret_sha256 for key in read_key_file(path).keys]
    listed = "".join(str(run(*words)) for words in (["list"], ["list", "--json"], ["revoke", "alice"], ["list"]))
    assert not [text for text in (*secrets, *hashes) if text in listed]
    assert not [secret for secret in secrets if secret in path.read_text()]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("create alice", "tenant 'alice' has an active key, created on .*: revoke it first, .* than 'alice', 'bob'"),
        ("create a.b", r"tenant 'a\.b': must be 1 to 64 letters \(a-z\), digits, '-' or '_'"),
        ("create open", "tenant 'open': 'open' is everyone"),
        ("create c --weight 0", r"--weight: must be a number above 0 \(got '0'\)"),
        ("create c --weight inf", r"--weight: must be a number above 0 \(got 'inf'\)"),
        ("create c --weight much", r"--weight: must be a number above 0 \(got 'much'\)"),
        ("create c --queue-tokens 0", r"--queue-tokens: must be a whole number of at least 1 \(got '0'\)"),
        ("create c --max-top-k 1.5", r"--max-top-k: must be a whole number of at least 1 \(got '1\.5'\)"),
        ("create c --max-top", "unrecognized arguments: --max-top"),
        ("create", r"the following arguments are required: ID \(see vopd-server keys create --help\)"),
        ("revoke carol", "there is no tenant 'carol'; active: 'alice', 'bob'"),
        ("revoke zoe", "the key of tenant 'zoe' was revoked on .*; active: 'alice', 'bob'"),
        ("delete alice", "COMMAND: invalid choice: 'delete'"),
        ("list --keys-file /no/such/keys.json", "keys file /no/such/keys.json: there is no directory /no/such"),
        ("create c --keys-file /", "keys file /: Is a directory"),
    ],
)
def test_what_cannot_be_done_is_one_line(run: Run, path: Path, words: str, told: str) -> None:
    for tenant_id in ("alice", "bob", "zoe"):
        key_of(run, tenant_id)
    run("revoke", "zoe")
    before = path.read_bytes()
    code, out, err = run(*words.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.match(rf"vopd-server: (keys file {path}: )?{told}", err), err
    assert path.read_bytes() == before


def test_a_broken_file_is_not_written_over(run: Run, path: Path) -> None:
    path.write_text("{")
    for words in (["create", "alice"], ["revoke", "alice"], ["list"]):
        code, out, err = run(*words)
        assert (code, out) == (2, "")
        assert err.startswith(f"vopd-server: keys file {path}: not JSON: EOF while parsing")
    assert path.read_text() == "{"


def test_which_file_must_be_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS_FILE_VARIABLE)
    expected = f"vopd-server: which keys file? name it with --keys-file FILE, or in {KEYS_FILE_VARIABLE}\n"
    assert run("list") == (2, "", expected)


# ---------------------------------------------------------------- help


def test_without_a_command_it_explains_itself(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    assert re.findall(r"^    (\w+) ", out, re.MULTILINE) == ["create", "list", "revoke"]


@pytest.mark.parametrize("command", ["create", "list", "revoke"])
def test_every_command_has_help_with_every_flag_explained(
    command: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_keys([command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "--keys-file FILE" in out
    assert KEYS_FILE_VARIABLE in out
    assert not re.search(r"^  --\S+( \S+)?\n  -", out, re.MULTILINE)


def test_the_command_imports_no_server(tmp_path: Path) -> None:
    """It is run often, and by people who wait for it."""
    code = (
        "import sys, vopd_server.keys_command\n"
        "print(sorted({'grpc', 'fastapi', 'numpy', 'torch'} & {name.split('.')[0] for name in sys.modules}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert found.stdout.strip() == "[]"
