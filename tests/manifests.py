"""deploy/kubernetes as Kustomize renders it, and a teacher's pod run on this machine instead of in a cluster.

Volumes become directories, filled as the kubelet does it; the process is that of the image's Dockerfile.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import REPOSITORY
from containers import BIN, NativeContainer, compose
from vopd_server.config import ServerConfig
from vopd_settings import load_settings

KUBERNETES = REPOSITORY / "deploy" / "kubernetes"
OVERLAYS = ("cpu", "single-gpu", "tensor-parallel")
SCRATCH = ("/tmp", "/dev/shm")  # this machine's own will do

Document = dict[str, Any]
Files = Mapping[str, bytes]


def kubectl(*arguments: str | Path, text: str | None = None) -> str:
    """What it prints; it knows no cluster. Raises: AssertionError when it fails, or warns."""
    command = [str(BIN / "kubectl"), *map(str, arguments)]
    env = {"PATH": os.environ["PATH"], "KUBECONFIG": os.devnull}
    ran = subprocess.run(command, input=text, env=env, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, ""), f"{command}: {ran.stderr}"
    return ran.stdout


@dataclass(frozen=True)
class Manifests:
    """What `kubectl apply -k` would send."""

    documents: tuple[Document, ...]

    def all(self, kind: str) -> list[Document]:
        return [document for document in self.documents if document["kind"] == kind]

    def one(self, kind: str, name: str = "vopd-teacher") -> Document:
        [found] = [document for document in self.all(kind) if document["metadata"]["name"] == name]
        return found

    @property
    def pod(self) -> Document:
        """Of the one StatefulSet: labels and spec."""
        template: Document = self.one("StatefulSet")["spec"]["template"]
        return template

    @property
    def container(self) -> Document:
        [container] = self.pod["spec"]["containers"]
        return container

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}

    @property
    def mounts(self) -> dict[str, Document]:
        """The volumes by the directories that they are in the container."""
        claims = self.one("StatefulSet")["spec"]["volumeClaimTemplates"]
        volumes = {claim["metadata"]["name"]: {"claim": claim["spec"]} for claim in claims}
        volumes |= {volume["name"]: volume for volume in self.pod["spec"]["volumes"]}
        return {mount["mountPath"]: volumes[mount["name"]] for mount in self.container["volumeMounts"]}

    @property
    def environment(self) -> dict[str, str]:
        """Of the container, in the kubelet's order: ConfigMaps first, then the container's own."""
        maps = [self.one("ConfigMap", source["configMapRef"]["name"]) for source in self.container["envFrom"]]
        env = {name: value for config_map in maps for name, value in config_map["data"].items()}
        return env | {entry["name"]: self._value(entry) for entry in self.container["env"]}

    def _value(self, entry: Document) -> str:
        if "value" in entry:
            return str(entry["value"])
        kind, _, resource = entry["valueFrom"]["resourceFieldRef"]["resource"].partition(".")
        return str(self.container["resources"][kind][resource])

    @property
    def service(self) -> Document:
        """The container as docker-compose.yml would write it, with the Dockerfile of its image there."""
        image = self.container["image"]
        [build] = [service["build"] for service in compose_services() if service["image"] == image]
        return {"build": build, "command": self.container["args"], "environment": self.environment}


@cache
def compose_services() -> list[Document]:
    """Those whose images are ours."""
    return [service for service in compose()["services"].values() if "build" in service]


def render(directory: Path) -> Manifests:
    return Manifests(tuple(yaml.safe_load_all(kubectl("kustomize", directory))))


@cache
def overlay(name: str) -> Manifests:
    return render(KUBERNETES / "overlays" / name)


class MountedFiles:
    """A ConfigMap or Secret in a pod: links to a directory that is replaced as a whole."""

    def __init__(self, directory: Path, files: Files) -> None:
        directory.mkdir(parents=True)
        self._directory = directory
        self._num_versions = 0
        self.replace(files)
        for name in files:
            (directory / name).symlink_to(Path("..data", name))

    def replace(self, files: Files) -> None:
        """As the kubelet does it when the object has changed."""
        self._num_versions += 1
        version = self._directory / f"..version_{self._num_versions}"
        version.mkdir()
        for name, content in files.items():
            (version / name).write_bytes(content)
        (self._directory / "..data_tmp").symlink_to(version.name)
        (self._directory / "..data_tmp").rename(self._directory / "..data")


class NativePod:
    """The teacher of an overlay below `root`.

    secrets: the files of those that exist, by the Secret's name.
    run_env: variables that only a test sets: ports that are free, a model that is here.
    """

    def __init__(
        self, manifests: Manifests, root: Path, secrets: Mapping[str, Files], run_env: Mapping[str, str]
    ) -> None:
        self._manifests = manifests
        volumes = {mount: volume for mount, volume in manifests.mounts.items() if mount not in SCRATCH}
        self._paths = {mount: root / mount.strip("/") for mount in volumes}
        self.secrets: dict[str, MountedFiles] = {}
        for mount, volume in volumes.items():
            if "configMap" in volume:
                data = manifests.one("ConfigMap", volume["configMap"]["name"])["data"]
                MountedFiles(self._paths[mount], {name: self._here(text) for name, text in data.items()})
            elif "secret" in volume:
                name, is_optional = volume["secret"]["secretName"], volume["secret"].get("optional", False)
                assert name in secrets or is_optional, f"the pod would wait for the secret {name}"
                self.secrets[name] = MountedFiles(self._paths[mount], secrets.get(name, {}))
            else:
                self._paths[mount].mkdir(parents=True, exist_ok=True)
        self.container = NativeContainer(manifests.service, self._paths, run_env)

    def _here(self, text: str) -> bytes:
        """A file of settings with the paths that its values are here."""
        settings = yaml.safe_load(text)
        for name, value in settings.items():
            for mount, here in self._paths.items():
                if str(value).startswith(f"{mount}/"):
                    settings[name] = str(here) + str(value).removeprefix(mount)
        return yaml.safe_dump(settings).encode()

    def succeeds(self, probe: str, ports: Mapping[str, int]) -> bool:
        """As the kubelet asks. ports: the real ones, by the names in the manifest."""
        http = self._manifests.container[probe]["httpGet"]
        assert http.get("scheme", "HTTP") == "HTTP"
        connection = HTTPConnection("127.0.0.1", ports[http["port"]], timeout=5)
        try:
            connection.request("GET", http["path"])
            return 200 <= connection.getresponse().status < 400
        except ConnectionRefusedError:
            return False
        finally:
            connection.close()


def seconds_until_given_up(probe: Document) -> float:
    return float(probe["periodSeconds"] * probe["failureThreshold"])


def code_blocks(page: str, language: str) -> Iterator[str]:
    """Of a page in docs/, with continued lines joined."""
    for block in (REPOSITORY / "docs" / page).read_text().split(f"```{language}\n")[1:]:
        yield block.partition("```")[0].replace("\\\n", " ")


def engine_args(manifests: Manifests) -> Document:
    args: Document = json.loads(manifests.environment.get("VOPD_SERVER_ENGINE_ARGS", "{}"))
    return args


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    assert selector, "an empty selector is everything"
    return selector.items() <= labels.items()


def load(arguments: Sequence[str], environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> ServerConfig:
    """What `vopd-server` reads from these arguments and variables. Raises: SettingsError."""
    command, *flags = arguments
    assert command == "serve"
    with monkeypatch.context() as patch:
        for variable, value in environment.items():
            patch.setenv(variable, value)
        return load_settings(ServerConfig, flags, prog="test", env_prefix="VOPD_SERVER_")


def settings_of(manifests: Manifests, monkeypatch: pytest.MonkeyPatch, directory: Path) -> ServerConfig:
    """The pod's settings, with paths as they are in the container. Raises: SettingsError."""
    command, flag, path = manifests.container["args"]
    assert flag == "--config"
    file = directory / Path(path).name
    config_map = manifests.mounts[str(Path(path).parent)]["configMap"]["name"]
    file.write_text(manifests.one("ConfigMap", config_map)["data"][file.name])
    return load([command, flag, str(file)], manifests.environment, monkeypatch)
