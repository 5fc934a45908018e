"""The checked-in stubs are those of teacher.proto, and load under the oldest runtime that is admitted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from conftest import REPOSITORY

PROTO = REPOSITORY / "proto"


def test_checked_in_stubs_are_those_of_the_proto(tmp_path: Path) -> None:
    subprocess.run([PROTO / "generate.sh", tmp_path], check=True, env={**os.environ, "PYTHON": sys.executable})
    generated = sorted((tmp_path / "vopd_proto").iterdir())
    assert [path.name for path in generated] == ["teacher_pb2.py", "teacher_pb2.pyi", "teacher_pb2_grpc.py"]
    for path in generated:
        assert path.read_text() == (PROTO / "vopd_proto" / path.name).read_text(), (
            f"{path.name} is stale: run `make proto`"
        )


def test_stubs_do_not_need_a_newer_runtime_than_we_declare() -> None:
    dependencies = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    lower_bounds = dict(line.split(">=") for line in dependencies)
    generated_by = re.search(r"Protobuf Python Version: (\S+)", (PROTO / "vopd_proto" / "teacher_pb2.py").read_text())
    grpc_version = re.search(
        r"GRPC_GENERATED_VERSION = '(\S+)'", (PROTO / "vopd_proto" / "teacher_pb2_grpc.py").read_text()
    )
    assert generated_by is not None
    assert grpc_version is not None
    assert version_numbers(lower_bounds["protobuf"]) >= version_numbers(generated_by[1])[:2]
    assert version_numbers(lower_bounds["grpcio"]) >= version_numbers(grpc_version[1])


def version_numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]
