"""The settings of `vopd-client variance`: lists, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from vopd_client.command_config import VarianceConfig
from vopd_client.errors import ConfigError
from vopd_client.schedule import prompts_of_step
from vopd_client.types import TeacherInfo
from vopd_client.variance_command import support_rules
from vopd_client.variance_pair import MAX_COMPLETED_SIZE, choose_rows, settings_for, training_settings
from vopd_client.variance_report import SupportRule
from vopd_settings import SettingsError, load_settings

NEEDED = ("--student", "s", "--prompts", "p", "--teacher-url", "grpc://x:1")


def load(*flags: str) -> VarianceConfig:
    return load_settings(VarianceConfig, [*NEEDED, *flags], prog="vopd-client variance", env_prefix="VOPD_CLIENT_")


def test_lists_come_with_commas_or_repeated_and_are_sorted():
    assert load().support_sizes == [1, 4, 16, 100]
    assert load().support_masses == [1.0, 0.9999, 0.99, 0.9]
    assert load("--support-sizes", "8,2,8").support_sizes == [2, 8]
    assert load("--support-sizes", "8", "--support-sizes", "2").support_sizes == [2, 8]
    assert load("--support-masses", "0.5,0.9").support_masses == [0.9, 0.5]


def test_lists_in_a_file_may_be_one_number(tmp_path: Path):
    path = tmp_path / "v.yaml"
    path.write_text("support_sizes: 5\nsupport_masses: [1, 0.5]\n")
    config = load("--config", str(path))
    assert (config.support_sizes, config.support_masses) == ([5], [1.0, 0.5])


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--support-sizes", "0,4"), "at least 1 id"),
        (("--support-sizes", "4.5"), "--support-sizes"),
        (("--support-sizes", ","), "--support-sizes"),
        (("--support-masses", "1.1"), r"lies in \(0, 1\]"),
        (("--support-masses", "nan"), r"lies in \(0, 1\]"),
        (("--plot-file", "v.bmp"), ".png, .svg or .pdf"),
        (("--teacher-model", "m"), "either teacher_url"),
    ],
)
def test_what_is_refused(flags: tuple[str, ...], complaint: str):
    with pytest.raises(SettingsError, match=complaint):
        load(*flags)


def test_every_support_of_both_tables_comes_once():
    config = load("--support-sizes", "1,4", "--support-masses", "1,0.9")
    assert support_rules(config) == [
        SupportRule("student", 1), SupportRule("student", 4), SupportRule("teacher", 1), SupportRule("teacher", 4),
        SupportRule("student", 4, 0.9),
    ]  # fmt: skip


def test_rows_are_those_that_training_begins_with():
    rows = list(range(50))
    chosen = choose_rows(rows, max_prompts=8, seed=3)
    assert chosen == prompts_of_step(3, 1, 50, 8)
    assert sorted(choose_rows(rows, max_prompts=80, seed=3)) == rows


def test_the_settings_of_a_run_are_those_of_the_measurement():
    config = load("--temperature", "0.5", "--max-new-tokens", "7", "--prompt-suffix", "!", "--end-token", "drop")
    settings = training_settings(config)
    shared = VarianceConfig.model_fields.keys() & type(settings).model_fields.keys()
    assert {name: getattr(settings, name) for name in shared} == {name: getattr(config, name) for name in shared}
    assert settings.objective == "vopd-full"


def teacher(supports: set[str], max_support_size: int) -> TeacherInfo:
    return SimpleNamespace(supports=supports, max_support_size=max_support_size, model_id="t")  # type: ignore[return-value]


def test_a_teacher_without_hidden_states_is_asked_for_as_much_as_may_be():
    settings = training_settings(load())
    assert settings_for(settings, teacher({"hidden_states"}, 10), 100) == settings
    for max_support_size, size in ((128, 128), (50_000, MAX_COMPLETED_SIZE)):
        asked = settings_for(settings, teacher({"candidates"}, max_support_size), 100)
        assert (asked.objective, asked.top_k, asked.support_mass) == ("vopd", size, 1.0)
    with pytest.raises(ConfigError, match=r"K = 100 > K' = 99.*max_support_size is 99"):
        settings_for(settings, teacher({"candidates"}, 99), 100)
