"""`vopd-client`: commands, their settings, and mistakes explained in one line with exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vopd_client.cli import COMMANDS, main
from vopd_client.train_config import TrainConfig
from vopd_settings import load_settings


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"  {name}" in printed for name in COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_setting_of_every_command_has_a_description(command: str) -> None:
    fields = COMMANDS[command].settings.model_fields
    assert [name for name, field in fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["train", "--top-kk", "3"], "vopd-client train: unknown flag '--top-kk'; did you mean '--top-k'?"),
        (["info"], "vopd-client info: --teacher-url is required (or teacher_url in the --config file"),
        (["info", "--teacher-url", "ftp://host"], "ftp://host"),
        (["report", "does/not/exist"], "does/not/exist"),
        (
            [
                *("train", "--student", "s", "--prompts", "p", "--teacher-url", "grpc://x:1"),
                *("--objective", "full-kl", "--advantage-clip", "2"),
            ],
            "advantage clipping does not go with objective full-kl",
        ),
        (["eval", "--model", "m", "--prompts", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_a_mistake_is_explained_and_exits_with_2(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert complaint in printed
    assert "Traceback" not in printed


def test_no_and_yes_can_be_written_plainly_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "student: s\nprompts: p\nteacher_url: grpc://x:1, grpc://y:1\nmixed_precision: no\neval_teacher: yes\n"
    )
    config = load_settings(TrainConfig, ["--config", str(path)], prog="vopd-client train", env_prefix="VOPD_CLIENT_")
    assert (config.mixed_precision, config.eval_teacher) == ("no", "yes")
    assert config.teacher_url == ["grpc://x:1", "grpc://y:1"]


@pytest.mark.parametrize(
    ("flag", "value"), [("--temperature", "inf"), ("--temperature", "1e-9"), ("--learning-rate", "inf")]
)
def test_numbers_that_no_teacher_or_optimizer_takes_are_refused(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--student", "s", "--prompts", "p", "--teacher-url", "grpc://x:1", flag, value]) == 2
    assert f"vopd-client train: {flag}: input should be" in capsys.readouterr().err


def test_a_malformed_row_is_reported_before_any_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "data.jsonl"
    prompts.write_text('{"prompt": "fine"}\n{"promt": "not fine"}\n')
    settings = ["--student", "no/such/model", "--teacher-url", "grpc://127.0.0.1:1", "--output-dir", str(tmp_path)]
    assert main(["train", *settings, "--prompts", str(prompts)]) == 2
    printed = capsys.readouterr().err
    assert f"{prompts}:2" in printed or "data.jsonl:2" in printed
    assert "prompt" in printed


def test_the_command_line_starts_without_torch() -> None:
    program = "import sys, vopd_client.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
