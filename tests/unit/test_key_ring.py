"""Who is let in by a keys file, also after it has changed or broken, and what strangers learn: nothing."""

from __future__ import annotations

import hmac
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vopd_server import key_ring
from vopd_server.config import ServerConfig
from vopd_server.errors import ConfigError, UnauthenticatedError
from vopd_server.key_file import KeyFile, new_key, utc_now, with_key, with_revoked
from vopd_server.key_ring import MAX_KEY_LENGTH, NO_KEY, WRONG_KEY, KeyRing, OpenDoor, open_doors
from vopd_server.key_storage import change_key_file, read_key_file
from vopd_server.tenancy import OPEN_TENANT, Doorkeeper, Tenant, TenantLimits


def create(path: Path, tenant_id: str, **limits: Any) -> str:
    """The key of a new tenant."""
    key, stored = new_key(tenant_id, TenantLimits(**limits), created_at=utc_now())
    change_key_file(path, lambda file: with_key(file, stored), create=True)
    return key


def revoke(path: Path, tenant_id: str) -> None:
    change_key_file(path, lambda file: with_revoked(file, tenant_id, revoked_at=utc_now()))


def ids(door: Doorkeeper) -> list[str]:
    return [tenant.id for tenant in door.tenants]


def refusal(door: Doorkeeper, key: str | None) -> str:
    with pytest.raises(UnauthenticatedError) as caught:
        door.authenticate(key)
    return str(caught.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


# ---------------------------------------------------------------- who is let in


def test_a_key_opens_for_its_tenant_with_its_limits(path: Path) -> None:
    alice, bob = create(path, "alice", weight=2.0, max_top_k=7), create(path, "bob")
    ring = KeyRing.from_file(path)
    assert ring.authenticate(alice).limits == TenantLimits(weight=2.0, max_top_k=7)
    assert [ring.authenticate(key) for key in (alice, bob)] == list(ring.tenants)
    assert ids(ring) == ["alice", "bob"]
    assert len({tenant.cache_salt for tenant in ring.tenants}) == 2
    assert ring.problem == ""


def test_strangers_are_not_told_what_is_wrong_with_their_key(path: Path) -> None:
    alice, bob = create(path, "alice"), create(path, "bob")
    revoke(path, "bob")
    ring = KeyRing.from_file(path)
    secret = alice.partition(".")[2]
    unlike = {
        "unknown tenant": f"carol.{secret}",
        "another's secret": f"alice.{bob.partition('.')[2]}",
        "revoked": bob,
        "no secret": "alice.",
        "no point": "alice",
        "no tenant": f".{secret}",
        "empty": "",
        "white space": f" {alice}",
        "too long": f"{alice}{'x' * MAX_KEY_LENGTH}",
        "not ASCII": f"{alice}ä",
        "no character": f"{alice}\ud800",
        "the hash": f"alice.{read_key_file(path).keys[0].secret_sha256}",
    }
    assert {what: refusal(ring, key) for what, key in unlike.items()} == dict.fromkeys(unlike, WRONG_KEY)
    assert refusal(ring, None) == NO_KEY


@pytest.fixture(scope="module")
def ring_of_alice(tmp_path_factory: pytest.TempPathFactory) -> KeyRing:
    path = tmp_path_factory.mktemp("ring") / "keys.json"
    create(path, "alice")
    return KeyRing.from_file(path)


@given(secret=st.text(max_size=2 * MAX_KEY_LENGTH), tenant=st.sampled_from(["", "alice.", "carol."]))
def test_no_text_is_a_key_and_none_is_an_error_of_another_kind(
    ring_of_alice: KeyRing, secret: str, tenant: str
) -> None:
    assert refusal(ring_of_alice, tenant + secret) == WRONG_KEY


def test_the_longest_key_that_is_made_is_not_too_long(path: Path) -> None:
    key = create(path, "x" * 64)
    assert KeyRing.from_file(path).authenticate(key).id == "x" * 64


def test_every_answer_takes_one_comparison_of_hashes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In constant time, and also for tenants that there are not: they cannot be told apart by the clock."""
    alice, bob = create(path, "alice"), create(path, "bob")
    revoke(path, "bob")
    ring = KeyRing.from_file(path)
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def counted(one: str, other: str) -> bool:
        compared.append((len(one), len(other)))
        return compare(one, other)

    monkeypatch.setattr(key_ring.hmac, "compare_digest", counted)
    ring.authenticate(alice)
    for key in (f"{alice}x", f"carol.{'x' * 43}", bob, "", "alice"):
        refusal(ring, key)
    assert compared == [(64, 64)] * 6
    refusal(ring, "x" * (MAX_KEY_LENGTH + 1))  # not hashed at all
    assert len(compared) == 6


# ---------------------------------------------------------------- the file changes


def test_a_new_and_a_revoked_key_are_noticed(path: Path) -> None:
    alice = create(path, "alice")
    ring = KeyRing.from_file(path)
    salt = ring.authenticate(alice).cache_salt
    assert not ring.reload_if_changed()
    bob = create(path, "bob")
    assert refusal(ring, bob) == WRONG_KEY  # not looked at yet
    assert ring.reload_if_changed()
    assert not ring.reload_if_changed()
    assert (ring.authenticate(bob).id, ring.authenticate(alice).cache_salt) == ("bob", salt)
    revoke(path, "alice")
    assert ring.reload_if_changed()
    assert (refusal(ring, alice), ids(ring)) == (WRONG_KEY, ["bob"])
    assert (ring.is_active("alice"), ring.is_active("bob"), ring.is_active("carol")) == (False, True, False)
    anew = create(path, "alice")
    assert ring.reload_if_changed()
    assert refusal(ring, alice) == WRONG_KEY
    assert ring.authenticate(anew).cache_salt != salt


def test_limits_that_were_edited_are_noticed_and_a_touch_is_no_change(path: Path) -> None:
    alice = create(path, "alice")
    ring = KeyRing.from_file(path)
    os.utime(path, ns=(1, 1))
    assert not ring.reload_if_changed()
    path.write_text(path.read_text().replace('"weight": 1.0', '"weight": 3.0'))
    assert ring.reload_if_changed()
    assert ring.authenticate(alice).limits.weight == 3.0


def test_a_file_that_is_unchanged_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create(path, "alice")
    ring = KeyRing.from_file(path)
    reads: list[Path] = []

    def read(path: Path) -> KeyFile:
        reads.append(path)
        return read_key_file(path)

    monkeypatch.setattr(key_ring, "read_key_file", read)
    assert not any(ring.reload_if_changed() for _ in range(3))
    assert reads == []
    create(path, "bob")
    ring.reload_if_changed()
    assert reads == [path]


def break_by_text(path: Path) -> None:
    path.write_text('{"version": 1, "keys": [')


def break_by_absence(path: Path) -> None:
    path.unlink()


def break_by_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_by_text, "not JSON: EOF while parsing a list at line 1 column 24"),
        (break_by_absence, "No such file or directory"),
        (break_by_a_directory, "Is a directory"),
    ],
)
def test_a_broken_file_keeps_the_keys_and_says_so_once(
    path: Path, caplog: pytest.LogCaptureFixture, damage: Any, words: str
) -> None:
    alice = create(path, "alice")
    ring = KeyRing.from_file(path)
    whole = path.read_bytes()
    damage(path)
    with caplog.at_level(logging.INFO):
        assert not any(ring.reload_if_changed() for _ in range(5))
    assert ring.problem == f"keys file {path}: {words}"
    errors = [record.getMessage() for record in caplog.records]
    assert errors == [f"{ring.problem}; the keys from before stay in force"]
    assert (ring.authenticate(alice).id, ids(ring)) == ("alice", ["alice"])
    caplog.clear()
    if path.is_dir():
        path.rmdir()
    path.write_bytes(whole)
    with caplog.at_level(logging.INFO):
        assert not ring.reload_if_changed()  # the same keys as before
    assert ring.problem == ""
    assert [record.getMessage() for record in caplog.records] == [f"keys file {path} can be read again"]
    break_by_text(path)
    ring.reload_if_changed()
    assert ring.problem


def test_a_file_that_becomes_readable_again_without_a_change_is_noticed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after chmod, which changes neither time, place nor size."""
    create(path, "alice")
    ring = KeyRing.from_file(path)
    create(path, "bob")
    with monkeypatch.context() as patch:
        patch.setattr(key_ring, "read_key_file", refuse_to_read)
        assert not ring.reload_if_changed()
    assert ring.problem == "Permission denied"
    assert ring.reload_if_changed()
    assert (ring.problem, ids(ring)) == ("", ["alice", "bob"])


def refuse_to_read(path: Path) -> KeyFile:
    raise ConfigError("Permission denied")


def test_another_problem_is_logged_as_well(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    create(path, "alice")
    ring = KeyRing.from_file(path)
    for text in ("", "{", "{"):
        path.write_text(text)
        ring.reload_if_changed()
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]


def at_most_two(tenants: Sequence[Tenant]) -> None:
    if len(tenants) > 2:
        raise ConfigError(f"{len(tenants)} tenants > 2")


def test_tenants_that_the_server_cannot_have_are_refused_as_a_broken_file_is(path: Path) -> None:
    for tenant_id in ("alice", "bob"):
        create(path, tenant_id)
    ring = KeyRing.from_file(path, at_most_two)
    carol = create(path, "carol")
    assert not ring.reload_if_changed()
    assert ring.problem == f"keys file {path}: 3 tenants > 2"
    assert (refusal(ring, carol), ids(ring)) == (WRONG_KEY, ["alice", "bob"])
    with pytest.raises(ConfigError, match=rf"^keys file {path}: 3 tenants > 2$"):
        KeyRing.from_file(path, at_most_two)
    revoke(path, "bob")  # revoked keys do not count
    assert ring.reload_if_changed()
    assert (ring.problem, ids(ring)) == ("", ["alice", "carol"])


def test_a_file_that_is_broken_at_the_start_is_an_error(path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^keys file {path}: No such file"):
        KeyRing.from_file(path)


def test_a_file_without_an_active_key_is_warned_of(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    alice = create(path, "alice")
    ring = KeyRing.from_file(path)
    assert caplog.records == []
    revoke(path, "alice")
    assert ring.reload_if_changed()
    KeyRing.from_file(path)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [f"keys file {path} has no active key: every call is refused"] * 2
    assert refusal(ring, alice) == WRONG_KEY


def test_a_change_is_logged_with_the_tenants_and_no_secret(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    alice = create(path, "alice")
    ring = KeyRing.from_file(path)
    revoke(path, "alice")
    bob = create(path, "bob")
    with caplog.at_level(logging.DEBUG):
        ring.reload_if_changed()
        for key in (alice, f"{bob}x"):
            refusal(ring, key)
        ring.authenticate(bob)
    (record,) = caplog.records
    told = vars(record)
    assert (told["num_tenants"], told["new"], told["gone"]) == (1, ["bob"], ["alice"])
    assert not [key for key in (alice, bob) if key.partition(".")[2] in str(told)]


# ---------------------------------------------------------------- which door


def config(**settings: Any) -> ServerConfig:
    return ServerConfig.model_validate({"model": "m", **settings})


@pytest.mark.parametrize("key", [None, "", "alice.secret"])
def test_a_server_without_keys_takes_every_call_as_one_tenants(key: str | None) -> None:
    door, said = open_doors(config())
    assert isinstance(door, OpenDoor)
    assert said == ""
    assert door.authenticate(key) is OPEN_TENANT
    assert (list(door.tenants), door.reload_if_changed(), door.problem) == ([OPEN_TENANT], False, "")
    assert (door.is_active("open"), door.is_active("alice")) == (True, False)


def test_a_server_with_keys_refuses_who_has_none(path: Path) -> None:
    alice = create(path, "alice")
    door, said = open_doors(config(keys_file=path))
    assert (said, door.authenticate(alice).id, refusal(door, None)) == ("", "alice", NO_KEY)
    with pytest.raises(ConfigError, match="3 tenants > 2"):
        open_doors(config(keys_file=three_tenants(path)), at_most_two)


def three_tenants(path: Path) -> Path:
    for tenant_id in ("bob", "carol"):
        create(path, tenant_id)
    return path


def test_a_missing_file_is_created_only_when_told_and_said(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=rf"^keys file {path}: No such file"):
        open_doors(config(keys_file=path))
    assert not path.exists()
    door, said = open_doors(config(keys_file=path, create_keys_file=True))
    key_path = path.with_name("default.key")
    assert said == f"created keys file {path}; the key of tenant default is in {key_path}"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("WARNING", said)]
    assert door.authenticate(key_path.read_text().strip()).id == "default"
    assert key_path.read_text().strip().partition(".")[2] not in caplog.text + said
    _, said = open_doors(config(keys_file=path, create_keys_file=True))
    assert said == ""
