"""Output heads on disk: what is trusted, what is left behind, and what a full or foreign disk says. No sockets."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vopd_client.errors import ConfigError, HandshakeError
from vopd_client.teacher.head_cache import STALE_AFTER_S, HeadCache, default_cache_dir

HEAD = bytes(range(256)) * 40
SHA256 = hashlib.sha256(HEAD).hexdigest()


def store(cache: HeadCache, head: bytes = HEAD, sha256: str = SHA256, *, piece_bytes: int = 1000) -> Path:
    with cache.receive(sha256) as incoming:
        for first in range(0, len(head), piece_bytes):
            incoming.write(head[first : first + piece_bytes])
        return incoming.keep()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# ---------------------------------------------------------------- where


@pytest.mark.parametrize(
    ("environment", "directory"),
    [
        ({"XDG_CACHE_HOME": "/caches"}, Path("/caches/vopd/heads")),
        ({"XDG_CACHE_HOME": "relative"}, Path.home() / ".cache/vopd/heads"),  # which the specification ignores
        ({"XDG_CACHE_HOME": ""}, Path.home() / ".cache/vopd/heads"),
        ({}, Path.home() / ".cache/vopd/heads"),
    ],
)
def test_the_default_directory_is_the_users_cache(environment: dict[str, str], directory: Path):
    assert default_cache_dir(environment) == directory


def test_without_a_directory_the_environments_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store(HeadCache()) == tmp_path / "vopd" / "heads" / f"{SHA256}.safetensors"


def test_a_user_without_a_home_is_told_so(monkeypatch: pytest.MonkeyPatch):
    def no_home(_path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(ConfigError, match="output head in: Could not determine home directory"):
        default_cache_dir({})


# ---------------------------------------------------------------- finding


def test_what_was_kept_is_found_again_and_nothing_else_is_left(tmp_path: Path):
    directory = tmp_path / "not" / "there" / "yet"
    cache = HeadCache(directory)
    assert cache.find(SHA256) is None
    path = store(cache)
    assert path == directory / f"{SHA256}.safetensors"
    assert path.read_bytes() == HEAD
    assert HeadCache(directory).find(SHA256) == path
    assert names(directory) == [path.name]


@pytest.mark.parametrize("damage", [HEAD[:-1], HEAD + b"\0", b"\1" + HEAD[1:], b""])
def test_a_damaged_file_is_not_found_and_gives_way_to_a_good_one(damage: bytes, tmp_path: Path):
    cache = HeadCache(tmp_path)
    path = store(cache)
    path.write_bytes(damage)
    assert cache.find(SHA256) is None
    assert store(cache) == cache.find(SHA256) == path
    assert names(tmp_path) == [path.name]


def test_a_file_that_cannot_be_read_is_said_where_it_is(tmp_path: Path):
    (tmp_path / f"{SHA256}.safetensors").mkdir()
    with pytest.raises(ConfigError, match=rf"{tmp_path}/{SHA256}\.safetensors: Is a directory"):
        HeadCache(tmp_path).find(SHA256)


@pytest.mark.parametrize("name", ["../../etc/passwd", "", SHA256[1:], SHA256.upper(), SHA256 + "\n"])
def test_a_name_that_is_no_checksum_never_becomes_a_path(name: str, tmp_path: Path):
    cache = HeadCache(tmp_path / "heads")
    with pytest.raises(HandshakeError, match="which is none"):
        cache.find(name)
    with pytest.raises(HandshakeError, match="which is none"):
        store(cache, sha256=name)
    assert names(tmp_path) == []


# ---------------------------------------------------------------- receiving


def test_another_head_than_announced_is_refused_with_both_checksums_and_not_kept(tmp_path: Path):
    cache = HeadCache(tmp_path)
    other = hashlib.sha256(HEAD[:-1]).hexdigest()
    with pytest.raises(HandshakeError, match=rf"SHA-256 {other} instead of the announced {SHA256} \(10239 bytes\)"):
        store(cache, HEAD[:-1])
    assert names(tmp_path) == []


def test_what_breaks_in_the_middle_leaves_nothing(tmp_path: Path):
    def interrupted() -> None:
        with cache.receive(SHA256) as incoming:
            incoming.write(HEAD)
            assert len(names(tmp_path)) == 1
            raise KeyboardInterrupt

    cache = HeadCache(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []
    assert cache.find(SHA256) is None


def test_two_downloads_at_once_do_not_meet(tmp_path: Path):
    first, second = HeadCache(tmp_path), HeadCache(tmp_path)
    with first.receive(SHA256) as one, second.receive(SHA256) as other:
        one.write(HEAD[:5000])
        other.write(HEAD)
        path = other.keep()
        one.write(HEAD[5000:])
        assert second.find(SHA256) == path  # before the first one is done
        assert one.keep() == path
    assert first.find(SHA256) == path
    assert names(tmp_path) == [path.name]


def test_a_killed_download_leaves_nothing_that_counts_and_is_removed_later(tmp_path: Path):
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from vopd_client.teacher.head_cache import HeadCache\n"
        "with HeadCache(Path(sys.argv[1])).receive(sys.argv[2]) as incoming:\n"
        "    incoming.write(bytes(100_000))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path), SHA256], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    [left] = tmp_path.iterdir()
    cache = HeadCache(tmp_path)
    assert cache.find(SHA256) is None
    path = store(cache)
    assert names(tmp_path) == sorted([left.name, path.name])  # it might still be somebody's
    long_ago = time.time() - STALE_AFTER_S - 60
    os.utime(left, (long_ago, long_ago))
    assert store(cache) == path
    assert names(tmp_path) == [path.name]


# ---------------------------------------------------------------- disks


def test_a_directory_that_cannot_be_is_said(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=rf"cannot keep the teacher's output head in {tmp_path}/file/heads: Not a dir"
    ):
        store(HeadCache(tmp_path / "file" / "heads"))


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Files of this process may have 4000 bytes; beyond that a write fails as on a full disk, with another errno."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    ("num_bytes", "piece_bytes"),
    [(100_000, 1000), (100_000, 100_000), (4500, 4500)],  # the last fits the buffer: only `keep` finds out
)
def test_a_disk_that_takes_no_more_is_said_and_given_back_what_it_took(
    num_bytes: int, piece_bytes: int, tmp_path: Path, small_disk: None
):
    head = bytes(num_bytes)
    sha256 = hashlib.sha256(head).hexdigest()
    with pytest.raises(ConfigError, match=rf"cannot keep the teacher's output head in {tmp_path}: File too large"):
        store(HeadCache(tmp_path), head, sha256, piece_bytes=piece_bytes)
    assert names(tmp_path) == []
