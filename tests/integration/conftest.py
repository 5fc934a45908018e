"""Fixtures that several modules of this folder take."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from asking import connected_to
from fake_http_teacher import FakeHttpTeacher
from fake_teacher import FakeTeacher


@pytest.fixture(params=[FakeTeacher, FakeHttpTeacher], ids=["grpc", "http"])
def teacher_type(request: pytest.FixtureRequest) -> type[FakeTeacher]:
    """What speaks one of the protocols; a test that takes it, or `connected`, holds for each."""
    kind: type[FakeTeacher] = request.param
    return kind


@pytest.fixture
def connected(teacher_type: type[FakeTeacher]) -> Any:
    return partial(connected_to, teacher_type)
