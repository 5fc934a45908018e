"""What a program of its own may import from vopd_client, what that costs, and what ships for type checkers."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

import vopd_client
from conftest import REPOSITORY

NEED_NO_TORCH = ("TeacherClient", "RemoteTeacher", "ScoreStream", "types", "errors", "sequence_of_text", "TeacherTopK")


def modules_after(program: str) -> set[str]:
    """Top-level modules, none of Python's own, that a fresh interpreter holds after `program`."""
    told = f"{program}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}} - sys.stdlib_module_names)"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_else() -> None:
    cost = modules_after("import vopd_client") - modules_after("")
    assert cost == {"vopd_client"}


def test_asking_a_teacher_needs_neither_torch_nor_transformers() -> None:
    loaded = modules_after(f"from vopd_client import {', '.join(NEED_NO_TORCH)}")
    assert "grpc" in loaded  # the client itself is there
    assert not {"torch", "transformers", "vopd_server"} & loaded


def test_a_type_checker_is_told_the_names_that_are_there() -> None:
    tree = ast.parse(Path(vopd_client.__file__).read_text())
    [for_type_checkers] = [node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name)]
    told = {
        alias.name: statement.module
        for statement in for_type_checkers.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert sorted(told) == sorted(vopd_client.__all__)
    for name, home in told.items():
        found = getattr(vopd_client, name)
        assert found is (
            getattr(import_module(home), name) if home != "vopd_client" else import_module(f"{home}.{name}")
        )
    assert set(vopd_client.__all__) <= set(dir(vopd_client))


def test_a_name_that_there_is_not_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'vopd_client' has no attribute 'TeacherCleint'"):
        vopd_client.TeacherCleint  # noqa: B018


def test_without_torch_a_loss_says_what_to_install() -> None:
    program = "import sys; sys.modules['torch'] = None\nfrom vopd_client import losses"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: vopd_client.losses needs the package torch: pip install 'vopd[train]'"
    )


# ---------------------------------------------------------------- types

CONSUMER = """\
import torch
from vopd_client import TeacherClient, TeacherTopK, losses, sequence_of_text


async def loss_of_text(tokenizer: object, logits: torch.Tensor) -> torch.Tensor:
    sequence = sequence_of_text(tokenizer, "a", "b", TeacherTopK(8))
    async with TeacherClient("grpc://127.0.0.1:50051") as teacher:
        scores = await teacher.score([sequence])
    reveal_type(scores)
    loss = losses.loss_from_logits("vopd-rb", logits, [sequence], scores)
    reveal_type(loss.sums)
    return loss.loss_sum
"""
MISTAKEN = """\
import torch
from vopd_client import Nonsense, RemoteTeacher, SequenceScores, SequenceToScore, losses


def mistakes(teacher: RemoteTeacher, sequence: SequenceToScore, scores: SequenceScores, logits: torch.Tensor) -> None:
    teacher.score(sequence)
    losses.loss_from_logits("vopd_rb", logits, [sequence], [scores])
    scores.sampled_logprobs
"""


def test_the_installed_package_type_checks_strictly_from_outside(tmp_path: Path) -> None:
    """In a directory of its own mypy finds the package as an installed one, which it reads only with a py.typed."""
    (tmp_path / "consumer.py").write_text(CONSUMER)
    (tmp_path / "mistaken.py").write_text(MISTAKEN)
    options = ["--config-file", REPOSITORY / "pyproject.toml", "--cache-dir", REPOSITORY / ".mypy_cache"]
    options += ["--no-error-summary", "--no-pretty"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "consumer.py", "mistaken.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = [line.split(": ", 1) for line in done.stdout.splitlines()]
    assert [message for where, message in found if where.startswith("consumer.py")] == [
        'note: Revealed type is "list[vopd_client.types.SequenceScores]"',
        'note: Revealed type is "dict[str, torch._tensor.Tensor]"',
    ]
    mistakes = [(where, message.rsplit("  ", 1)[-1]) for where, message in found if message.startswith("error: ")]
    assert mistakes == [
        ("mistaken.py:2", "[attr-defined]"),
        ("mistaken.py:6", "[arg-type]"),
        ("mistaken.py:7", "[arg-type]"),
        ("mistaken.py:8", "[attr-defined]"),
    ]


def test_the_wheel_ships_every_package_with_its_types(tmp_path: Path) -> None:
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", tmp_path]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, REPOSITORY], check=True)
    [wheel] = tmp_path.glob("vopd-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("server/vopd_server", "client/vopd_client", "proto/vopd_proto", "settings/vopd_settings"):
        sources = {
            path.relative_to((REPOSITORY / package).parent).as_posix() for path in (REPOSITORY / package).rglob("*.py")
        }
        assert sources <= names
        assert f"{package.split('/')[1]}/py.typed" in names
