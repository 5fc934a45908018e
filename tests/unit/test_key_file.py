"""The keys file: what it says, what is refused of it, and that nothing is lost when several write it."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vopd_server.errors import ConfigError
from vopd_server.key_file import (
    NO_KEYS,
    SECRET,
    KeyFile,
    StoredKey,
    hash_secret,
    new_key,
    parse,
    serialise,
    utc_now,
    with_key,
    with_revoked,
)
from vopd_server.key_storage import change_key_file, create_key_file, read_key_file, write_key
from vopd_server.tenancy import OPEN_TENANT_ID, TenantLimits

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
IDS = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True).filter(lambda text: text != OPEN_TENANT_ID)
TIMES = st.datetimes(timezones=st.just(UTC))
NUMBERS = st.none() | st.integers(1, 2**63)
LIMITS = st.builds(
    TenantLimits,
    weight=st.floats(0, exclude_min=True, allow_infinity=False),
    tokens_in_flight=NUMBERS,
    tokens_per_minute=NUMBERS,
    queue_tokens=NUMBERS,
    max_top_k=NUMBERS,
)


@st.composite
def key_files(draw: st.DrawFn) -> KeyFile:
    file = NO_KEYS
    for tenant_id in draw(st.lists(IDS, max_size=5, unique=True)):
        _, key = new_key(tenant_id, draw(LIMITS), created_at=draw(TIMES))
        file = with_key(file, key)
        if draw(st.booleans()):
            file = with_revoked(file, tenant_id, revoked_at=draw(TIMES))
    return file


def key(tenant_id: str = "alice") -> StoredKey:
    return new_key(tenant_id, TenantLimits(), created_at=NOON)[1]


def content(**changed: Any) -> dict[str, Any]:
    """A file with one key, of which some fields are other than they should be."""
    return {"version": 1, "keys": [{**json.loads(key().model_dump_json()), **changed}]}


# ---------------------------------------------------------------- values


@given(key_files())
def test_what_is_written_is_read_again(file: KeyFile) -> None:
    assert parse(serialise(file)) == file


@given(IDS, LIMITS)
def test_a_key_is_the_id_and_256_random_bits_of_which_the_hash_is_stored(tenant_id: str, limits: TenantLimits) -> None:
    handed_out, stored = new_key(tenant_id, limits, created_at=NOON)
    found, _, secret = handed_out.partition(".")
    assert found == tenant_id
    assert SECRET.fullmatch(secret)
    assert stored.secret_sha256 == hashlib.sha256(secret.encode()).hexdigest()
    assert (stored.id, stored.limits, stored.created_at, stored.is_active) == (tenant_id, limits, NOON, True)
    assert secret not in serialise(with_key(NO_KEYS, stored))
    assert new_key(tenant_id, limits, created_at=NOON)[0] != handed_out


def test_every_limit_of_a_tenant_is_a_field_of_the_file() -> None:
    fields = ["id", "secret_sha256", "created_at", "revoked_at", *(f.name for f in dataclasses.fields(TenantLimits))]
    assert list(StoredKey.model_fields) == fields
    assert {name: StoredKey.model_fields[name].default for name in fields[4:]} == dataclasses.asdict(TenantLimits())


def test_people_can_read_the_file_and_leave_out_what_is_not_limited() -> None:
    text = serialise(with_key(NO_KEYS, key()))
    assert '      "created_at": "2026-01-02T12:00:00Z",\n' in text
    assert text.endswith("}\n")
    shortest = {"id": "alice", "secret_sha256": hash_secret("x"), "created_at": "2026-01-02T12:00:00+00:00"}
    (read,) = parse(json.dumps({"version": 1, "keys": [shortest]})).keys
    assert (read.limits, read.created_at, read.is_active) == (TenantLimits(), NOON, True)


@pytest.mark.parametrize("tenant_id", ["", "a b", "a.b", "ä", "a\n", "x" * 65, "open"])
def test_an_id_that_cannot_be_is_refused(tenant_id: str) -> None:
    with pytest.raises(ConfigError, match=r"^tenant '.*': (must be 1 to 64 letters|'open' is everyone)"):
        new_key(tenant_id, TenantLimits(), created_at=NOON)


@pytest.mark.parametrize(
    "limits",
    [
        *(TenantLimits(weight=weight) for weight in (0.0, -1.0, float("inf"), float("nan"))),
        *(TenantLimits(**{field.name: 0}) for field in dataclasses.fields(TenantLimits) if field.name != "weight"),
    ],
)
def test_a_limit_that_cannot_be_is_refused(limits: TenantLimits) -> None:
    with pytest.raises(ConfigError, match=r"tenant 'alice': (weight|tokens_\w+|queue_tokens|max_top_k): input should"):
        new_key("alice", limits, created_at=NOON)


def test_a_tenant_has_one_active_key() -> None:
    file = with_key(with_key(NO_KEYS, key("alice")), key("bob"))
    expected = r"tenant 'alice' has an active key, created on 2026-01-02: revoke it first, .* than 'alice', 'bob'"
    with pytest.raises(ConfigError, match=expected):
        with_key(file, key("alice"))


def test_a_revoked_key_can_be_made_anew_and_is_another() -> None:
    first, second = key(), key()
    file = with_key(with_revoked(with_key(NO_KEYS, first), "alice", revoked_at=NOON), second)
    assert file.keys == (second,)
    assert first.secret_sha256 != second.secret_sha256


def test_only_an_active_key_can_be_revoked() -> None:
    file = with_key(with_key(NO_KEYS, key("alice")), key("bob"))
    revoked = with_revoked(file, "alice", revoked_at=NOON)
    assert [(stored.id, stored.revoked_at) for stored in revoked.keys] == [("alice", NOON), ("bob", None)]
    assert (len(file.active), len(revoked.active)) == (2, 1)
    with pytest.raises(ConfigError, match=r"the key of tenant 'alice' was revoked on 2026-01-02; active: 'bob'"):
        with_revoked(revoked, "alice", revoked_at=NOON)
    with pytest.raises(ConfigError, match=r"there is no tenant 'carol'; active: 'bob'"):
        with_revoked(revoked, "carol", revoked_at=NOON)
    with pytest.raises(ConfigError, match=r"there is no tenant 'carol'; active: none"):
        with_revoked(NO_KEYS, "carol", revoked_at=NOON)


def test_of_many_ids_a_message_names_the_first() -> None:
    file = KeyFile(version=1, keys=tuple(key(f"t{index}") for index in range(30)))
    with pytest.raises(ConfigError, match=r"'t18', 't19' and 10 more$"):
        with_revoked(file, "alice", revoked_at=NOON)


def test_the_cache_salt_is_the_tenants_own_and_stays() -> None:
    alice, bob = key("alice"), key("bob")
    limited = alice.model_copy(update={"weight": 3.0})
    assert alice.tenant.cache_salt == limited.tenant.cache_salt
    assert len({alice.tenant.cache_salt, bob.tenant.cache_salt, key("alice").tenant.cache_salt, ""}) == 4
    assert alice.secret_sha256 not in alice.tenant.cache_salt


@pytest.mark.parametrize(
    ("given_content", "words"),
    [
        ("", "not JSON: EOF while parsing"),
        (b"\xff\xfe", "not JSON: "),
        ('{"version": 1,\n "keys": [}', "not JSON: expected value at line 2 column 11"),
        ("[]", "input should be an object"),
        ({"version": 1}, "keys: field required"),
        ({"version": 2, "keys": [], "more": 1}, "version: must be 1, the version that is read here (and 1 more)"),
        ({"version": 1, "keys": [], "more": 1}, "more: no such field"),
        ({"version": 1, "keys": content()["keys"] * 2}, "more than one key of 'alice'"),
        (content(id="a b"), "keys[0].id: must be 1 to 64 letters (a-z), digits, '-' or '_'"),
        (content(id="open"), "keys[0].id: 'open' is everyone, on a server without keys"),
        (content(secret_sha256="ab" * 31), "keys[0].secret_sha256: must be a SHA-256: 64 digits, 0-9 and a-f"),
        (content(secret_sha256="AB" * 32), "keys[0].secret_sha256: must be a SHA-256: 64 digits, 0-9 and a-f"),
        (content(secret_sha256="ab" * 32 + "\n"), "keys[0].secret_sha256: must be a SHA-256"),
        (content(weight=0), "keys[0].weight: input should be greater than 0 (got 0)"),
        (content(weight=float("nan")), "keys[0].weight: input should be a finite number (got nan)"),
        (content(weight="2"), "keys[0].weight: input should be a valid number"),
        (content(queue_tokens=1.5), "keys[0].queue_tokens: input should be a valid integer"),
        (content(max_top_k=True), "keys[0].max_top_k: input should be a valid integer (got True)"),
        (content(created_at="2026-01-02T12:00:00"), "keys[0].created_at: input should have timezone info"),
        (content(created_at="2026-01-02T12:00:00+02:00"), "keys[0].created_at: must be a time in UTC"),
        (content(revoked_at="0001-01-01T00:00:00+14:00"), "keys[0].revoked_at: must be a time in UTC"),
        (content(revoked_at="yesterday"), "keys[0].revoked_at: input should be a valid datetime"),
        (content(wait=1), "keys[0].wait: no such field"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_in_a_line(tmp_path: Path, given_content: Any, words: str) -> None:
    path = tmp_path / "keys.json"
    raw = given_content if isinstance(given_content, bytes | str) else json.dumps(given_content)
    path.write_bytes(raw.encode() if isinstance(raw, str) else raw)
    with pytest.raises(ConfigError) as caught:
        read_key_file(path)
    assert str(caught.value).startswith(f"keys file {path}: {words}")
    assert "\n" not in str(caught.value)


def test_a_secret_in_the_wrong_place_is_not_repeated() -> None:
    secret = "alice.cd" + "Z" * 41
    for field in ("id", "secret_sha256", "created_at", "weight", secret[:4]):
        with pytest.raises(ConfigError) as caught:
            parse(json.dumps(content(**{field: secret})))
        assert secret not in str(caught.value)
        assert caught.value.__suppress_context__


# ---------------------------------------------------------------- files


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def add(path: Path, tenant_id: str) -> None:
    change_key_file(path, lambda file: with_key(file, key(tenant_id)), create=True)


def ids(path: Path) -> list[str]:
    return [stored.id for stored in read_key_file(path).keys]


def test_a_new_file_is_for_its_owner_alone_and_an_old_ones_mode_stays(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add(path, "alice")
    assert mode(path) == 0o600
    path.chmod(0o640)
    add(path, "bob")
    assert (mode(path), ids(path)) == (0o640, ["alice", "bob"])
    assert sorted(file.name for file in tmp_path.iterdir()) == [".keys.json.lock", "keys.json"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "keys.json"
    link.symlink_to(tmp_path / "real" / "keys.json")
    add(link, "alice")
    add(link, "bob")
    assert link.is_symlink()
    assert ids(tmp_path / "real" / "keys.json") == ["alice", "bob"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes files of others")
def test_what_root_changes_stays_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add(path, "alice")
    os.chown(path, 2000, 2001)
    add(path, "bob")
    for file in (path, tmp_path / ".keys.json.lock"):
        assert (file.stat().st_uid, file.stat().st_gid) == (2000, 2001)


def test_a_file_of_another_user_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.json"
    add(path, "alice")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ConfigError, match=rf"the keys file is user {path.stat().st_uid}'s, and this is user 12345"):
        add(path, "bob")
    assert ids(path) == ["alice"]
    assert list(tmp_path.glob("*.tmp")) == []


def test_a_change_that_is_refused_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add(path, "alice")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=rf"^keys file {path}: tenant 'alice' has an active key"):
        add(path, "alice")
    assert path.read_bytes() == before


def test_a_disk_that_is_full_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.json"
    add(path, "alice")

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(ConfigError, match=rf"^keys file {path}: No space left on device$"):
            add(path, "bob")
    assert ids(path) == ["alice"]
    assert list(tmp_path.glob("*.tmp")) == [] == list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("change", [add, lambda path, _: read_key_file(path), lambda path, _: revoke(path)])
def test_a_file_that_cannot_be_is_told_with_its_path(tmp_path: Path, change: Any) -> None:
    nowhere = tmp_path / "missing" / "keys.json"
    with pytest.raises(ConfigError, match=rf"^keys file {nowhere}: there is no directory {nowhere.parent}$"):
        change(nowhere, "alice")
    with pytest.raises(ConfigError, match=rf"^keys file {tmp_path}: Is a directory$"):
        change(tmp_path, "alice")


def revoke(path: Path) -> None:
    change_key_file(path, lambda file: with_revoked(file, "alice", revoked_at=NOON))


def test_nothing_is_left_beside_a_file_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    for look in (read_key_file, revoke):
        with pytest.raises(ConfigError, match=rf"^keys file {path}: No such file or directory$"):
            look(path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a fake, since root may read everything."""
    path = tmp_path / "keys.json"

    def forbidden(self: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(ConfigError, match=rf"^keys file {path}: Permission denied$"):
        read_key_file(path)


def test_processes_that_create_keys_at_the_same_time_lose_none(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    code = (
        "import sys\n"
        "from vopd_server.keys_command import run_keys\n"
        "input()\n"  # all of them are imported before the first one starts
        "for index in range(5):\n"
        "    run_keys(['create', '--keys-file', sys.argv[1], f'{sys.argv[2]}-{index}'])\n"
    )
    names = [f"process-{number}" for number in range(4)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    printed = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, printed
    keys = [line for out, _ in printed for line in out.splitlines()]
    assert sorted(ids(path)) == sorted(f"{name}-{index}" for name in names for index in range(5))
    stored = {entry.id: entry.secret_sha256 for entry in read_key_file(path).keys}
    assert stored == {name: hash_secret(secret) for name, _, secret in (line.partition(".") for line in keys)}


# ---------------------------------------------------------------- the first key


def test_a_keys_file_is_created_with_the_first_key_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key_path = create_key_file(path, "default")
    assert key_path == tmp_path / "default.key"
    assert (mode(path), mode(key_path)) == (0o600, 0o600)
    (stored,) = read_key_file(path).keys
    tenant_id, _, secret = key_path.read_text().strip().partition(".")
    assert (stored.id, stored.secret_sha256, stored.limits) == (tenant_id, hash_secret(secret), TenantLimits())
    assert abs(stored.created_at - utc_now()) < timedelta(minutes=1)
    before = (path.read_bytes(), key_path.read_bytes())
    assert create_key_file(path, "default") is None
    assert (path.read_bytes(), key_path.read_bytes()) == before


def test_a_first_key_that_is_there_already_is_the_one_that_counts(tmp_path: Path) -> None:
    """A start that was cut short between the two files, or a key that was prepared."""
    path, key_path = tmp_path / "keys.json", tmp_path / "default.key"
    assert create_key_file(path, "default") == key_path
    old, before = read_key_file(path).keys[0], key_path.read_bytes()
    path.unlink()
    assert create_key_file(path, "default") == key_path
    assert key_path.read_bytes() == before
    assert read_key_file(path).keys[0].secret_sha256 == old.secret_sha256


@pytest.mark.parametrize("text", ["", "default", "default.short", "other." + "x" * 43, "default." + "x" * 44])
def test_a_first_key_that_is_none_is_not_overwritten(tmp_path: Path, text: str) -> None:
    path, key_path = tmp_path / "keys.json", tmp_path / "default.key"
    key_path.write_text(text)
    with pytest.raises(ConfigError, match=rf"^{key_path} holds no key of tenant 'default': move it away$"):
        create_key_file(path, "default")
    assert (path.exists(), key_path.read_text()) == (False, text)


def test_a_keys_file_that_cannot_be_created_is_told(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "keys.json"
    with pytest.raises(ConfigError, match=rf"^keys file {path}: there is no directory {path.parent}$"):
        create_key_file(path, "default")


def test_a_key_is_written_to_a_new_file_only(tmp_path: Path) -> None:
    path = tmp_path / "alice.key"
    write_key(path, "alice.secret")
    assert (path.read_text(), mode(path)) == ("alice.secret\n", 0o600)
    with pytest.raises(ConfigError, match=rf"^{path}: File exists$"):
        write_key(path, "alice.other")
    assert path.read_text() == "alice.secret\n"


def test_times_are_utc_and_whole_seconds() -> None:
    now = utc_now()
    assert (now.utcoffset(), now.microsecond) == (timedelta(0), 0)
    with pytest.raises(ConfigError, match="must be a time in UTC"):
        new_key("alice", TenantLimits(), created_at=datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=1))))
