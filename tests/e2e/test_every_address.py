"""A student learns over every kind of address, and to the same bits: grpc, grpcs, http and https."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trustme

from teacher_process import RunningTeacher
from workplace import STEPS, Workplace, assert_same_run

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("addresses"))


@pytest.fixture(scope="module")
def teacher(place: Workplace) -> Iterator[RunningTeacher]:
    with place.teacher() as teacher:
        yield teacher


@pytest.fixture(scope="module")
def authority(place: Workplace) -> Path:
    """The certificate authority of `secure_teacher`."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(place.directory / "ca.pem")
    issued.cert_chain_pems[0].write_to_path(place.directory / "cert.pem")
    issued.private_key_pem.write_to_path(place.directory / "key.pem")
    return place.directory / "ca.pem"


@pytest.fixture(scope="module")
def secure_teacher(place: Workplace, authority: Path) -> Iterator[RunningTeacher]:
    files = authority.parent
    flags = ("--tls-cert-file", str(files / "cert.pem"), "--tls-key-file", str(files / "key.pem"))
    with place.teacher(*flags) as teacher:
        yield teacher


@pytest.fixture(scope="module")
def over_grpc(place: Workplace, teacher: RunningTeacher) -> str:
    """The name of a run over plain gRPC, in a Python of its own: no seed of hashes is shared with those compared."""
    place.complete("grpc", teacher.url, afresh=True)
    assert place.num_steps("grpc") == STEPS
    return "grpc"


def test_http_teaches_what_grpc_does(place: Workplace, teacher: RunningTeacher, over_grpc: str) -> None:
    assert teacher.http_url.startswith("http://")
    place.complete("http", teacher.http_url)
    assert_same_run(place, "http", over_grpc)


@pytest.mark.parametrize("scheme", ["grpcs", "https"])
def test_over_tls_too(
    place: Workplace, secure_teacher: RunningTeacher, authority: Path, over_grpc: str, scheme: str
) -> None:
    url = {urlsplit(url).scheme: url for url in (secure_teacher.url, secure_teacher.http_url)}[scheme]
    place.complete(scheme, url, "--tls-ca-file", str(authority))
    assert_same_run(place, scheme, over_grpc)


def test_a_teacher_that_was_killed_and_comes_back_costs_nothing_over_http_either(
    place: Workplace, over_grpc: str
) -> None:
    with place.teacher() as first, place.trainer("http-restarted", first.http_url) as trainer:
        trainer.wait_until(lambda: place.num_steps("http-restarted") >= 6)
        first.kill()
        trainer.wait_until(lambda: "teacher unavailable" in trainer.log())
        assert place.num_steps("http-restarted") < STEPS
        with place.teacher(http_port=urlsplit(first.http_url).port or 0):
            assert trainer.wait() == 0, trainer.log()
    assert_same_run(place, "http-restarted", over_grpc)


def test_replicas_of_both_kinds_are_one_teacher(place: Workplace, teacher: RunningTeacher, over_grpc: str) -> None:
    """The first one of the list goes away; the run ends with the other, over the other transport."""
    with place.teacher() as leaving:
        addresses = f"{leaving.http_url},{teacher.url}"
        with place.trainer("mixed", addresses) as trainer:
            trainer.wait_until(lambda: place.num_steps("mixed") >= 6)
            assert leaving.terminate() == 0, leaving.log()
            assert trainer.wait() == 0, trainer.log()
    assert_same_run(place, "mixed", over_grpc)
