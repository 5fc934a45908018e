"""docker-compose.yml and the Dockerfiles as their parsers see them, and a service's command line run without Docker.

What a container would run is put together as Compose does it, from the Dockerfile's ENTRYPOINT, CMD and ENV and the
service's command and environment; paths inside the container become directories here.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from dockerfile_parse import DockerfileParser

from conftest import REPOSITORY
from teacher_process import RunningTeacher

BIN = Path(sys.executable).parent
COMPOSE_FILE = REPOSITORY / "docker-compose.yml"


def compose(**variables: str) -> dict[str, Any]:
    """docker-compose.yml, every profile, with `variables` as the environment of whoever calls `docker compose`."""
    profiles = [word for profile in ("cpu", "example", "monitoring") for word in ("--profile", profile)]
    command = [
        *(str(BIN / "podman-compose"), "--dry-run"),  # which does without podman: `config` runs nothing
        *("--env-file", os.devnull, "--file", str(COMPOSE_FILE), *profiles, "config"),
    ]
    env = {"PATH": os.environ["PATH"], **variables}
    printed = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
    assert printed.returncode == 0, printed.stderr
    config: dict[str, Any] = yaml.safe_load(printed.stdout)
    for service in config["services"].values():
        # A name without a value is taken from the caller, or left out.
        inside = service.get("environment", {})
        given = {**{name: variables.get(name) for name in inside}, **_set(inside)}
        service["environment"] = _set(given)
    return config


def _set(environment: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in environment.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Dockerfile:
    """What the last stage of a Dockerfile says, and every instruction of all of them."""

    base_images: list[str]
    instructions: list[tuple[str, str]]
    env: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Dockerfile:
        parser = DockerfileParser(fileobj=io.BytesIO(path.read_bytes()))
        steps = [(step["instruction"], step["value"]) for step in parser.structure if step["instruction"] != "COMMENT"]
        stages = {words[2] for name, value in steps if name == "FROM" and len(words := value.split()) == 3}
        images = [value.split()[0] for name, value in steps if name == "FROM"]
        return cls([image for image in images if image not in stages], steps, dict(parser.envs))

    def last(self, instruction: str) -> str:
        """The value that stands; stages build on one another here, so that is the last one written."""
        return [value for name, value in self.instructions if name == instruction][-1]

    def words(self, instruction: str) -> list[str]:
        """ENTRYPOINT or CMD in the form that is no shell's."""
        words: list[str] = json.loads(self.last(instruction))
        return words

    def copied(self) -> list[str]:
        """What COPY takes from the repository."""
        copies = [shlex.split(value) for name, value in self.instructions if name == "COPY"]
        return [source for words in copies if not words[0].startswith("--from=") for source in words[:-1]]


def dockerfile_of(service: Mapping[str, Any]) -> Dockerfile:
    return Dockerfile.read(REPOSITORY / service["build"]["dockerfile"])


class NativeContainer:
    """A service of docker-compose.yml on this machine instead of in a container.

    paths: what lies where: directories in the container and here. The working directory is the repository.
    run_env: further variables, as `docker compose run --env` adds them.
    """

    def __init__(self, service: Mapping[str, Any], paths: Mapping[str, Path], run_env: Mapping[str, str]) -> None:
        dockerfile = dockerfile_of(service)
        # The most particular directory first.
        self._paths = sorted(paths.items(), key=lambda item: len(item[0]), reverse=True)
        command = [*dockerfile.words("ENTRYPOINT"), *service.get("command", dockerfile.words("CMD"))]
        self.command = [self._here(word) for word in command]
        inside = {**dockerfile.env, **service["environment"], **run_env}
        self.env = {name: self._here(value) for name, value in inside.items()}
        kind, *self.health_command = service.get("healthcheck", {"test": ["NONE"]})["test"]
        assert kind in {"CMD", "NONE"}

    def _here(self, word: str) -> str:
        for inside, here in self._paths:
            if word == inside or word.startswith(f"{inside}/"):
                return str(here) + word[len(inside) :]
        return word

    def _process_env(self) -> dict[str, str]:
        """Commands of this environment, wherever their names are the container's."""
        return {**os.environ, **self.env, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}

    def start(self) -> RunningTeacher:
        """Runs it as a process group; the caller ends it by using it as a context manager."""
        with tempfile.NamedTemporaryFile(prefix="container-", suffix=".log", delete=False) as log_file:
            process = subprocess.Popen(
                [str(BIN / self.command[0]), *self.command[1:]],
                cwd=REPOSITORY,
                env=self._process_env(),
                stdout=log_file,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        return RunningTeacher(process, Path(log_file.name))

    def is_healthy(self) -> bool:
        return subprocess.run(self.health_command, env=self._process_env(), capture_output=True).returncode == 0

    def wait_until_healthy(self, running: RunningTeacher, timeout_s: float) -> None:
        """Raises: AssertionError, with the log, when it ends or does not get healthy."""
        give_up_s = time.monotonic() + timeout_s
        while not self.is_healthy():
            assert running.is_running, f"{self.command} ended:\n{running.log()}"
            assert time.monotonic() < give_up_s, f"{self.command} not healthy in {timeout_s} s:\n{running.log()}"
            time.sleep(0.5)


def free_ports(*names: str) -> dict[str, str]:
    """A free TCP port for each name."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in names]
    try:
        return {name: str(probe.getsockname()[1]) for name, probe in zip(names, probes, strict=True)}
    finally:
        for probe in probes:
            probe.close()


def teacher_ports() -> dict[str, str]:
    return free_ports("VOPD_SERVER_PORT", "VOPD_SERVER_HTTP_PORT", "VOPD_SERVER_ADMIN_PORT")
