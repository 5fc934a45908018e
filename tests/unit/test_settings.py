"""Flags, environment and file set the same fields, in that order of priority, and wrong names are explained."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from vopd_settings import SettingsError, load_settings


class Oven(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    dish: str = Field(description="What is baked.")
    heat_celsius: float = Field(180.0, gt=0, description="Degrees Celsius.")
    fan: bool = Field(False, description="Fan on.")
    timer_s: int | None = Field(None, description="Seconds.")

    @model_validator(mode="after")
    def _not_both(self) -> Oven:
        if self.fan and self.heat_celsius > 250:
            raise ValueError(f"fan at {self.heat_celsius} Celsius is not possible")
        return self


class Fridge(BaseModel):
    frost: int = 0


def load(*argv: str) -> Oven:
    return load_settings(Oven, argv, prog="oven", env_prefix="OVEN_", other_settings=[Fridge])


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "oven.yaml"
    path.write_text("dish: bread\nheat_celsius: 200\ntimer_s: 60\n")
    return path


def test_flags_win_over_environment_over_file_over_default(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVEN_HEAT_CELSIUS", "210")
    monkeypatch.setenv("OVEN_TIMER_S", "90")
    oven = load("--config", str(config_file), "--timer-s", "120")
    assert oven == Oven(dish="bread", heat_celsius=210, fan=False, timer_s=120)


def test_config_file_can_come_from_the_environment(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVEN_CONFIG", str(config_file))
    assert load("--fan").heat_celsius == 200
    assert load("--no-fan").fan is False


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dish", "x", "--heat-celcius", "3"], "unknown flag '--heat-celcius'; did you mean '--heat-celsius'?"),
        (["--dish", "x", "stray"], "unknown argument 'stray'"),
        (["--dish"], "--dish: expected one argument"),
        ([], "--dish is required (or dish in the --config file, or OVEN_DISH)"),
        (["--dish", "x", "--heat-celsius", "0"], "--heat-celsius: input should be greater than 0 (got '0')"),
        (["--dish", "x", "--fan", "--heat-celsius", "300"], "fan at 300.0 Celsius is not possible"),
        (["--config", "/does/not/exist.yaml"], "--config /does/not/exist.yaml: No such file or directory"),
        (["--config"], "--config: expected one argument"),
    ],
)
def test_a_wrong_flag_is_explained(argv: list[str], message: str) -> None:
    with pytest.raises(SettingsError) as raised:
        load(*argv)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dish: x\nheat_celcius: 3", "unknown key 'heat_celcius'; did you mean 'heat_celsius'?"),
        ("dish: x\nheat_celsius: hot", "heat_celsius: input should be a valid number"),
        ("- dish", "holds a list; it must hold keys and values"),
        ("dish: [", "not YAML"),
    ],
)
def test_a_wrong_file_is_explained_and_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "oven.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as raised:
        load("--config", str(path))
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_wrong_variable_is_explained_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVEN_HEAT_CELSIUS", "-3")
    with pytest.raises(SettingsError, match=r"OVEN_HEAT_CELSIUS: input should be greater than 0 \(got '-3'\)"):
        load("--dish", "x")


def test_an_unknown_variable_is_refused_but_another_commands_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVEN_FROST", "1")
    assert load("--dish", "x").dish == "x"
    monkeypatch.setenv("OVEN_HEATCELSIUS", "1")
    with pytest.raises(SettingsError, match="'OVEN_HEATCELSIUS'; did you mean 'OVEN_HEAT_CELSIUS'"):
        load("--dish", "x")


def test_help_says_unit_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load("--help")
    assert stopped.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Degrees Celsius. (default: 180.0)" in printed
    assert "(default: None)" not in printed
