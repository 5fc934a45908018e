"""Which engine a configuration gets, and the arguments that go to vLLM."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vopd_server.check import look_at_engine
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
        (("vllm",), {"allow_full_vocab": True}, "transformers"),
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
    every = reasons_against_vllm(config(deterministic=True, device="cuda:1", allow_full_vocab=True))
    assert every == [
        "cannot be deterministic",
        "chooses its devices itself: leave device cuda:1 out",
        "does not give hidden states away, as allow_full_vocab asks: transformers does",
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"engine": "vllm", "deterministic": True}, "engine vllm cannot be deterministic"),
        ({"engine": "vllm", "device": "cpu"}, "engine vllm chooses its devices itself: leave device cpu out"),
        (
            {"engine": "vllm", "allow_full_vocab": True},
            "engine vllm does not give hidden states away, as allow_full_vocab asks: transformers does",
        ),
        ({"allow_full_vocab": True, "engine_args": {"seed": 1}}, "engine_args are vLLM's, which does not give hidden"),
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


def test_serving_hidden_states_with_vllm_is_one_line_and_exit_code_2(
    installed: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    installed("vllm", "torch", "transformers")
    assert main(["serve", "--model", "m", "--engine", "vllm", "--allow-full-vocab"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "engine vllm does not give hidden states away, as allow_full_vocab asks: transformers does" in line


def test_full_vocabularies_are_allowed_to_the_engine_that_is_made(
    installed: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("vllm", "torch", "transformers")
    given: list[bool] = []
    monkeypatch.setattr(TransformersEngine, "__init__", lambda _, **options: given.append(options["allow_full_vocab"]))
    make_engine(config(engine="transformers"))
    make_engine(config(allow_full_vocab=True))
    assert given == [False, True]


def test_check_says_that_the_head_is_given_away(installed: Install) -> None:
    installed("vllm", "torch", "transformers")
    assert look_at_engine(config()) == [("engine", "vllm (chosen by auto)")]
    assert look_at_engine(config(allow_full_vocab=True)) == [
        ("engine", "transformers (chosen by auto)"),
        ("gives away", "the model's output head, and hidden states"),
    ]


def test_serve_without_vllm_is_one_line_and_exit_code_2(installed: Install, capsys: pytest.CaptureFixture[str]) -> None:
    installed("torch", "transformers")
    assert main(["serve", "--model", "m", "--engine", "vllm"]) == 2
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", f"vopd-server: {NO_VLLM}\n")
