"""Teachers with names: in settings, in rows, in what a step adds up. Several of them in one run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from vopd_client.cli import main
from vopd_client.errors import DataError, TeacherUnavailableError
from vopd_client.losses import LossOutput
from vopd_client.preparation import of_each_teacher
from vopd_client.prompt_rows import PromptRow
from vopd_client.prompt_source import hash_prompts
from vopd_client.prompts import Prompt, choose_teachers, load_prompts
from vopd_client.run_directory import differing_settings, settings_hash
from vopd_client.scoring import about_teacher
from vopd_client.step_metrics import StepSums, StepTimes, metrics_row
from vopd_client.teachers import settings_of_each
from vopd_client.teaching_plan import plan_teachers_microbatches
from vopd_client.train_config import TrainConfig
from vopd_settings import SettingsError, load_settings

REQUIRED = ("--student", "s", "--prompts", "p")
TWO = {"math": ["grpc://a:1"], "code": ["grpc://b:1", "grpc://c:1"]}


def load(*flags: str) -> TrainConfig:
    return load_settings(TrainConfig, [*REQUIRED, *flags], prog="train", env_prefix="VOPD_CLIENT_")


# ---------------------------------------------------------------- settings


def test_flags_a_variable_and_a_file_name_the_same_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load("--teacher", "math=grpc://a:1", "--teacher", "code=grpc://b:1,grpc://c:1").teacher == TWO
    for text in ("teacher: {math: 'grpc://a:1', code: ['grpc://b:1', 'grpc://c:1']}", yaml.safe_dump({"teacher": TWO})):
        (tmp_path / "run.yaml").write_text(text)
        assert load("--config", str(tmp_path / "run.yaml")).teacher == TWO
    monkeypatch.setenv("VOPD_CLIENT_TEACHER", "math=grpc://a:1, code=grpc://b:1,grpc://c:1")
    assert load().teacher == TWO


def test_the_settings_that_a_run_writes_down_can_be_read_again(tmp_path: Path) -> None:
    config = load("--teacher", "math=grpc://a:1", "--teacher-key-file", "math=a.key")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert (
        load_settings(TrainConfig, ["--config", str(tmp_path / "run.yaml")], prog="train", env_prefix="VOPD_CLIENT_")
        == config
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "give one of teacher_url (a remote teacher), teacher (one or several, each with a name) and"),
        (("--teacher", "math=grpc://a:1", "--teacher-url", "grpc://b:1"), "give one of teacher_url"),
        (("--teacher", "math=grpc://a:1", "--teacher-model", "m"), "give one of teacher_url"),
        (("--teacher", "math=grpc://a:1", "--teacher", "math=grpc://b:1"), "--teacher: math is given twice"),
        (("--teacher", "grpc://a:1"), "--teacher: 'grpc://a:1' has no name: write name=value"),
        (("--teacher", "math="), "--teacher: math has no value"),
        (("--teacher", "maths/2=grpc://a:1"), "'maths/2=grpc://a:1' has no name"),
        (("--teacher", "2=grpc://a:1"), "--teacher: '2' is no name: a letter, then"),
        (("--teacher", "a=x:1", "--teacher", "b=x:1", "--prompt-column", "q"), "prompt_column reads no other columns"),
        (("--teacher", "a=x:1", "--teacher-key-file", "b=key"), "teacher_key_file: no teacher 'b'; there are a"),
        (("--teacher", "a=x:1", "--teacher-key-file", "a=k,l"), "teacher_key_file: a has 2 files and takes one: k, l"),
    ],
)
def test_what_is_wrong_with_the_teachers_is_said(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingsError) as raised:
        load(*flags)
    assert message in str(raised.value)


def test_each_teacher_is_reached_by_the_settings_of_a_run_that_has_no_other() -> None:
    flags = ("--teacher", "math=grpc://a:1", "--teacher", "code=grpc://b:1,grpc://c:1", "--api-key-file", "all.key")
    each = settings_of_each(load(*flags, "--teacher-key-file", "math=math.key"))
    assert list(each) == ["code", "math"]  # whatever the order in which they were given
    assert each["code"].teacher_url == ["grpc://b:1", "grpc://c:1"]
    assert (each["code"].api_key_file, each["math"].api_key_file) == (Path("all.key"), Path("math.key"))
    assert TrainConfig.model_validate(each["math"].model_dump()).teacher == {}
    alone = load("--teacher-url", "grpc://a:1")
    assert settings_of_each(alone) == {"": alone}


def test_variance_looks_at_one_pair_of_models_and_says_which_setting_names_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["variance", *REQUIRED, "--teacher", "math=grpc://a:1"]) == 2
    assert "unknown flag '--teacher'; did you mean '--teacher-url'?" in capsys.readouterr().err


def test_addresses_may_change_when_a_run_goes_on_and_a_run_from_before_there_were_names_still_can() -> None:
    before = load("--teacher", "math=grpc://a:1").model_dump(mode="json")
    moved = load("--teacher", "math=grpc://b:1").model_dump(mode="json")
    assert differing_settings(before, moved) == []
    alone = load("--teacher-url", "grpc://a:1").model_dump(mode="json")
    of_before = {name: value for name, value in alone.items() if name not in ("teacher", "teacher_key_file")}
    assert settings_hash(alone) == settings_hash(of_before)


def test_a_checkpoint_remembers_every_teacher_and_one_without_a_name_as_ever() -> None:
    assert of_each_teacher({"": "revision"}) == "revision"
    assert of_each_teacher({"math": "2", "code": "1"}) == "code=1, math=2"


# ---------------------------------------------------------------- rows


def row(teacher: str | None, number: int = 1) -> PromptRow:
    nothing: dict[str, Any] = dict.fromkeys(
        ("messages", "teacher_prompt", "teacher_messages", "answer", "verifier", "kind")
    )
    return PromptRow(index=number - 1, source=f"data.jsonl:{number}", prompt="a", teacher=teacher, **nothing)


def test_a_row_says_who_scores_it(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "teacher": "math"}\n{"prompt": "b"}\n')
    assert [row.teacher for row in load_prompts(str(path))] == ["math", None]


@pytest.mark.parametrize(
    ("named", "names", "chosen"),
    [("math", ["code", "math"], "math"), (None, ["math"], "math"), ("math", ["math"], "math"), (None, [], None)],
)
def test_a_row_finds_its_teacher(named: str | None, names: list[str], chosen: str | None) -> None:
    assert [found.teacher for found in choose_teachers([row(named)], names)] == [chosen]


@pytest.mark.parametrize(
    ("named", "names", "message"),
    [
        (None, ["code", "math"], "data.jsonl:12: no teacher is named; there are code, math"),
        ("cod", ["code", "math"], "data.jsonl:12: no teacher 'cod'; there are code, math; did you mean 'code'?"),
        ("code", ["math"], "data.jsonl:12: no teacher 'code'; there are math"),
        (
            "code",
            [],
            "data.jsonl:12: no teacher 'code'; the run's only teacher has no name; the setting teacher gives it one",
        ),
    ],
)
def test_a_row_without_a_teacher_of_its_own_is_reported_with_those_that_there_are(
    named: str | None, names: list[str], message: str
) -> None:
    with pytest.raises(DataError) as raised:
        choose_teachers([row(named, 12)], names)
    assert str(raised.value) == message


def prompt(teacher: str = "") -> Prompt:
    return Prompt(0, "p:1", np.array([1, 2]), np.array([3]), None, None, None, "", teacher)


def test_prompts_of_another_teacher_are_other_prompts() -> None:
    hashes = {hash_prompts([prompt(first), prompt(second)]) for first, second in [("a", "b"), ("b", "a"), ("a", "a")]}
    assert len(hashes) == 3
    assert hash_prompts([prompt()]) == hash_prompts([prompt()])


def test_an_error_says_which_teacher_it_is_about_and_stays_what_it_is() -> None:
    with pytest.raises(TeacherUnavailableError, match=r"^teacher math: gone$"), about_teacher("math"):
        raise TeacherUnavailableError("gone")
    with pytest.raises(TeacherUnavailableError, match=r"^gone$"), about_teacher(""):
        raise TeacherUnavailableError("gone")


# ---------------------------------------------------------------- steps


def sent(teacher: str, num_tokens: int, *, is_masked: bool = False) -> Any:
    return SimpleNamespace(prompt=SimpleNamespace(teacher=teacher), num_tokens=num_tokens, is_masked=is_masked)


def test_a_microbatch_is_of_one_teacher_and_every_rollout_is_in_one() -> None:
    items = [sent("math", 10), sent("code", 10), sent("math", 9), sent("code", 700), sent("math", 700)]
    plan = plan_teachers_microbatches(items, max_tokens=1000)
    assert sorted(index for indices in plan for index in indices) == [0, 1, 2, 3, 4]
    teachers = [{items[index].prompt.teacher for index in indices} for indices in plan]
    assert all(len(names) == 1 for names in teachers)
    assert [name for (name,) in teachers] == sorted(name for (name,) in teachers)
    assert plan_teachers_microbatches([sent("", 3)] * 3, max_tokens=100) == [[0, 1, 2]]


def test_a_masked_rollout_is_in_no_microbatch() -> None:
    items = [sent("math", 10, is_masked=True), sent("math", 10), sent("code", 10, is_masked=True)]
    assert plan_teachers_microbatches(items, max_tokens=1000) == [[1]]
    assert plan_teachers_microbatches(items[:1], max_tokens=1000) == []


SUMS = (
    "reverse_kl", "reward", "baseline", "advantage", "advantage_squared", "left_out_mass", "support_size", "variance",
    "opd_variance",
)  # fmt: skip


def add_microbatch(sums: StepSums, teacher: str, loss: float, num_tokens: int) -> None:
    batch: Any = SimpleNamespace(
        num_valid_tokens=num_tokens, behaviour_logprobs_BT=torch.zeros(1), loss_mask_BT=torch.ones(1, dtype=torch.bool)
    )
    student: Any = SimpleNamespace(sampled_logprobs_BT=torch.zeros(1))
    losses = LossOutput(torch.tensor(loss), {name: torch.tensor(2 * loss) for name in SUMS})
    sums.add_microbatch(losses, student, batch, teacher=teacher)


def metrics_of(sums: StepSums, waits: dict[str, float]) -> dict[str, Any]:
    sums.add_rollouts([], None, staleness=0)
    times = StepTimes(1.0, 1.0, sum(waits.values()), 3.0, waits)
    return metrics_row(1, sums.values, times, grad_norm=1.0, adam_variance=0.0, learning_rate=0.1)


def test_what_each_teacher_had_a_part_in_is_there_once_more_under_its_name() -> None:
    sums = StepSums()
    add_microbatch(sums, "code", 6.0, 3)
    add_microbatch(sums, "code", 2.0, 1)
    add_microbatch(sums, "math", 12.0, 4)
    sums.add_traffic({"code": 40, "math": 400, "idle": 7})
    row = metrics_of(sums, {"code": 0.25, "math": 0.5, "idle": 0.0})
    assert (row["loss"], row["kl_nats"], row["num_valid_tokens"]) == (2.5, 5.0, 8)
    assert (row["teacher/code/loss"], row["teacher/code/kl_nats"], row["teacher/code/num_valid_tokens"]) == (
        2.0,
        4.0,
        4,
    )
    assert (row["teacher/math/loss"], row["teacher/math/kl_nats"], row["teacher/math/num_valid_tokens"]) == (
        3.0,
        6.0,
        4,
    )
    assert (row["teacher/code/wait_s"], row["teacher/math/wait_s"]) == (0.25, 0.5)
    assert (row["teacher/code/bytes"], row["teacher/math/bytes"]) == (40, 400)
    assert row["teacher_bytes_per_token"] == pytest.approx(447 / 8)
    of_idle = {name: value for name, value in row.items() if name.startswith("teacher/idle/")}
    assert of_idle == {"teacher/idle/num_valid_tokens": 0, "teacher/idle/bytes": 7, "teacher/idle/wait_s": 0.0}


def test_a_teacher_without_a_name_has_no_metrics_but_the_runs() -> None:
    sums = StepSums()
    add_microbatch(sums, "", 6.0, 3)
    sums.add_traffic({"": 40})
    assert not [name for name in metrics_of(sums, {"": 0.25}) if name.startswith("teacher/")]
