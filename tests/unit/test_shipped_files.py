"""Every configuration that ships parses, and the server's service file says what the settings say."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest
import yaml

from conftest import REPOSITORY
from vopd_client.command_config import EvalConfig
from vopd_client.train_config import TrainConfig
from vopd_server.config import ServerConfig

DEPLOY = REPOSITORY / "deploy"


EXAMPLES = sorted(REPOSITORY.glob("examples/**/*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_an_example_parses_and_its_files_exist(path: Path) -> None:
    settings = EvalConfig if path.name.startswith("eval-") else TrainConfig
    config = settings.model_validate(yaml.safe_load(path.read_text()))
    files = [spec for spec in (config.prompts, getattr(config, "eval_prompts", None)) if spec and "jsonl" in spec]
    assert files or path.parent.name == "paper"  # whose data sets are of the hub
    assert all((REPOSITORY / file).exists() for file in files)


def test_the_teachers_settings_parse_and_leave_systemd_time_to_drain() -> None:
    config = ServerConfig.model_validate(yaml.safe_load((DEPLOY / "teacher.yaml").read_text()))
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(DEPLOY / "vopd-teacher.service")
    assert "vopd-server serve --config" in unit["Service"]["ExecStart"]
    assert float(unit["Service"]["TimeoutStopSec"]) > config.drain_timeout_s
    # By default systemd sends SIGTERM to vLLM's processes as well, and they abort what is to be finished.
    assert unit["Service"]["KillMode"] == "mixed"
    # Whatever is a cache may be cleared.
    environment = dict(pair.split("=", 1) for pair in unit["Service"]["Environment"].split())
    assert environment["VOPD_SERVER_GOLDEN_FILE"].startswith(f"/var/lib/{unit['Service']['StateDirectory']}/")
    caches = {environment[name] for name in ("HOME", "HF_HOME")}
    assert caches == {f"/var/cache/{unit['Service']['CacheDirectory']}"}
