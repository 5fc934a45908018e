"""Which engine a configuration gets, and the arguments that go to vLLM."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vopd_server.config import ServerConfig, reasons_against_vllm
from vopd_server.engine_choice import choose_engine, make_engine
from vopd_server.engines.transformers import TransformersEngine
from vopd_server.engines.vllm import VllmEngine
from vopd_server.errors import ConfigError
from vopd_server.main import main
from vopd_settings import SettingsError, load_settings

NO_VLLM = "engine vllm needs the package vllm, in an environment of its own; on a CPU see deploy/vllm-env.sh"

Install = Callable[..., None]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes the packages it is called with look installed, and no other that an engine needs."""

    def install(*packages: str) -> None:
        find_spec = importlib.util.find_spec
        engines_own = {"vllm", "torch", "transformers"}
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name: (object() if name in packages else None) if name in engines_own else find_spec(name),
        )

    return install


def config(**settings: Any) -> ServerConfig:
    return ServerConfig(model="m", **settings)


@pytest.mark.parametrize(
    ("packages", "settings", "expected"),
    [
        ((), {}, "transformers"),
        (("vllm",), {}, "vllm"),
        (("vllm",), {"engine_args": {"seed": 1}}, "vllm"),
        (("vllm",), {"deterministic": True}, "transformers"),
        (("vllm",), {"device": "cpu"}, "transformers"),
        (("vllm",), {"engine": "transformers"}, "transformers"),
        ((), {"engine": "vllm"}, "vllm"),
    ],
)
def test_auto_is_vllm_where_it_is_there_and_can_do_it_and_a_name_is_taken_at_its_word(
    installed: Install, packages: tuple[str, ...], settings: dict[str, Any], expected: str
) -> None:
    installed(*packages)
    assert choose_engine(config(**settings)) == expected


def test_why_auto_is_not_vllm_is_logged(installed: Install, caplog: pytest.LogCaptureFixture) -> None:
    installed("vllm")
    with caplog.at_level("INFO", logger="vopd_server"):
        choose_engine(config(deterministic=True))
    assert "engine auto is transformers, since vllm cannot be deterministic" in caplog.text


def test_arguments_for_a_vllm_that_is_not_there_are_refused(installed: Install) -> None:
    installed("torch", "transformers")
    with pytest.raises(ConfigError, match="engine_args are vLLM's, which is not installed here"):
        choose_engine(config(engine_args={"seed": 1}))


@pytest.mark.parametrize(
    ("packages", "engine", "message"),
    [
        (("torch", "transformers"), "vllm", NO_VLLM),
        (("transformers",), "auto", "engine transformers needs the package torch: pip install 'vopd[server]'"),
        (("torch",), "transformers", "engine transformers needs the package transformers: pip install"),
    ],
)
def test_a_package_that_is_missing_is_told_by_name(
    installed: Install, packages: tuple[str, ...], engine: Any, message: str
) -> None:
    installed(*packages)
    with pytest.raises(ConfigError) as refused:
        make_engine(config(engine=engine))
    assert str(refused.value).startswith(message)


def test_the_engine_that_is_chosen_is_made(installed: Install) -> None:
    installed("torch", "transformers")
    assert isinstance(make_engine(config()), TransformersEngine)
    installed("vllm", "torch", "transformers")
    assert isinstance(make_engine(config()), VllmEngine)


def test_what_vllm_cannot_do_is_named() -> None:
    assert reasons_against_vllm(config()) == []
    both = reasons_against_vllm(config(deterministic=True, device="cuda:1"))
    assert both == ["cannot be deterministic", "chooses its devices itself: leave device cuda:1 out"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"engine": "vllm", "deterministic": True}, "engine vllm cannot be deterministic"),
        ({"engine": "vllm", "device": "cpu"}, "engine vllm chooses its devices itself: leave device cpu out"),
        (
            {"engine": "transformers", "engine_args": {"seed": 1}},
            "engine_args are vLLM's: engine transformers has none",
        ),
        ({"deterministic": True, "engine_args": {"seed": 1}}, "engine_args are vLLM's, which cannot be deterministic"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(**settings)


# ---------------------------------------------------------------- engine_args


def loaded(*flags: str) -> dict[str, Any]:
    return load_settings(ServerConfig, ["--model", "m", *flags], prog="p", env_prefix="VOPD_SERVER_").engine_args


def test_engine_args_are_json_as_a_flag_and_a_variable_and_a_mapping_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "teacher.yaml"
    file.write_text("engine_args:\n  tensor_parallel_size: 4\n  distributed_executor_backend: ray\n")
    assert loaded() == {}
    assert loaded("--config", str(file)) == {"tensor_parallel_size": 4, "distributed_executor_backend": "ray"}
    monkeypatch.setenv("VOPD_SERVER_ENGINE_ARGS", '{"seed": 2, "compilation_config": {"level": 0}}')
    assert loaded("--config", str(file)) == {"seed": 2, "compilation_config": {"level": 0}}
    assert loaded("--engine-args", '{"enforce_eager": true}', "--config", str(file)) == {"enforce_eager": True}


@pytest.mark.parametrize("told", ["{seed: 1}", "", "seed=1", "[1]", "3", "null"])
def test_engine_args_that_are_no_json_object_are_one_line(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"^--engine-args: [^\n]*$"):
        loaded("--engine-args", told)
    monkeypatch.setenv("VOPD_SERVER_ENGINE_ARGS", told)
    with pytest.raises(SettingsError, match=r"^VOPD_SERVER_ENGINE_ARGS: [^\n]*$"):
        loaded()


def test_serve_without_vllm_is_one_line_and_exit_code_2(installed: Install, capsys: pytest.CaptureFixture[str]) -> None:
    installed("torch", "transformers")
    assert main(["serve", "--model", "m", "--engine", "vllm"]) == 2
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", f"vopd-server: {NO_VLLM}\n")
