"""What a pod of deploy/kubernetes runs, with the secrets that docs/kubernetes.md makes, on this machine.

What only a cluster can show is not shown here: that a read-only file system and these rights are enough, that what is
asked for is enough, and who is let in.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Mapping
from pathlib import Path
from urllib.request import urlopen

import pytest
import yaml

from containers import BIN, teacher_ports
from fake_engine import FakeEngine
from manifests import OVERLAYS, NativePod, code_blocks, load, overlay
from vopd_server.lifecycle import TeacherServer

COMMANDS = list(code_blocks("kubernetes.md", "sh"))
[INSTALL], [ASK], [KEYS] = ([block for block in COMMANDS if word in block] for word in ("openssl", " info ", " bob "))
ANY_PORTS = {"VOPD_SERVER_PORT": "0", "VOPD_SERVER_HTTP_PORT": "0", "VOPD_SERVER_ADMIN_PORT": "0"}
Secrets = dict[str, dict[str, bytes]]


def run(command: str, directory: Path) -> str:
    """What a line of the page prints, without a cluster."""
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "KUBECONFIG": os.devnull}
    ran = subprocess.run(command, shell=True, cwd=directory, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{command}: {ran.stderr}"
    return ran.stdout


def secrets_made_by(commands: str, directory: Path) -> Secrets:
    """Runs what needs no cluster, as it stands, and of `kubectl` what makes secrets: their files, by their names."""
    secrets: Secrets = {}
    for command in commands.splitlines():
        if not command.startswith("kubectl"):
            run(command, directory)
        elif " create secret " in command:
            printed = run(f"{command.partition(' --dry-run')[0]} --dry-run=client --output yaml", directory)
            secret = yaml.safe_load(printed)
            assert secret["metadata"]["namespace"] == "vopd"
            secrets[secret["metadata"]["name"]] = {name: b64decode(data) for name, data in secret["data"].items()}
    return secrets


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands of the page are called."""
    return tmp_path_factory.mktemp("desk")


@pytest.fixture(scope="module")
def secrets(desk: Path) -> Secrets:
    return secrets_made_by(INSTALL, desk)


def client_says(desk: Path, port: str, key_file: str = "alice.key") -> subprocess.CompletedProcess[str]:
    """`vopd-client info` as on the page, by the port that there is."""
    [command] = [line for line in ASK.splitlines() if line.startswith("vopd-client")]
    words = command.replace(":50051", f":{port}").replace("alice.key", key_file).split()
    return subprocess.run([BIN / words[0], *words[1:]], cwd=desk, capture_output=True, text=True, check=False)


def test_a_teacher_starts_from_the_pages_secrets_takes_new_keys_and_drains(
    desk: Path, secrets: Secrets, tiny_model_dir: Path, tmp_path: Path
) -> None:
    ports = teacher_ports()
    by_name = {"admin": int(ports["VOPD_SERVER_ADMIN_PORT"])}
    pod = NativePod(overlay("cpu"), tmp_path, secrets, {**ports, "VOPD_SERVER_MODEL": str(tiny_model_dir)})
    assert not pod.succeeds("livenessProbe", by_name)
    with pod.container.start() as running:
        give_up_s = time.monotonic() + 120
        while not pod.succeeds("startupProbe", by_name):
            assert running.is_running, running.log()
            assert time.monotonic() < give_up_s, running.log()
            time.sleep(0.2)
        assert pod.succeeds("readinessProbe", by_name)
        assert pod.succeeds("livenessProbe", by_name)

        told = client_says(desk, ports["VOPD_SERVER_PORT"])
        assert told.returncode == 0, told.stderr
        assert "transformers" in told.stdout
        for name in ("vopd-teacher.vopd.svc", *(f"vopd-teacher-{i}.vopd-teacher-replicas.vopd.svc" for i in (0, 7))):
            assert is_known_as(name, int(ports["VOPD_SERVER_HTTP_PORT"]), desk / "teacher.crt")
        assert not is_known_as("vopd-teacher.other.svc", int(ports["VOPD_SERVER_HTTP_PORT"]), desk / "teacher.crt")
        with urlopen(f"http://127.0.0.1:{by_name['admin']}/metrics", timeout=10) as metrics:
            assert b"vopd_ready 1.0" in metrics.read()

        changed = secrets_made_by(KEYS, desk)
        refused = client_says(desk, ports["VOPD_SERVER_PORT"], "bob.key")
        assert refused.returncode != 0
        assert "this API key is not known here" in refused.stderr
        pod.secrets["vopd-teacher-keys"].replace(changed["vopd-teacher-keys"])
        give_up_s = time.monotonic() + 30
        while client_says(desk, ports["VOPD_SERVER_PORT"], "bob.key").returncode != 0:
            assert time.monotonic() < give_up_s, running.log()

        assert running.terminate() == 0, running.log()
        assert '"draining"' in running.log()
    assert (tmp_path / "cache" / "golden.json").exists()


def is_known_as(name: str, port: int, ca_file: Path) -> bool:
    """Whether the certificate that the teacher shows is good for this name."""
    context = ssl.create_default_context(cafile=str(ca_file))
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        try:
            with context.wrap_socket(connection, server_hostname=name):
                return True
        except ssl.SSLCertVerificationError:
            return False


@pytest.mark.parametrize("name", OVERLAYS)
async def test_the_probes_follow_the_teacher_from_its_start_to_the_end_of_its_drain(
    name: str, secrets: Secrets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = NativePod(overlay(name), tmp_path, secrets, ANY_PORTS)
    engine = FakeEngine()
    engine.hold()
    program, *arguments = pod.container.command
    assert program == "vopd-server"
    server = TeacherServer(load(arguments, pod.container.env, monkeypatch), engine)
    await server.start()
    ports = {"admin": int(server.admin_url.rpartition(":")[2])}

    async def succeeding() -> set[str]:
        """What the kubelet is told now."""
        probes = ("startupProbe", "readinessProbe", "livenessProbe")
        return {probe for probe in probes if await asyncio.to_thread(pod.succeeds, probe, ports)}

    loading = asyncio.create_task(server.load())
    assert await succeeding() == {"livenessProbe"}
    engine.let_go()
    await loading
    assert await succeeding() == {"startupProbe", "readinessProbe", "livenessProbe"}
    await server.drain(1.0)
    assert await succeeding() == {"livenessProbe"}
    await server.close()
    assert await succeeding() == set()


@pytest.mark.parametrize("token", [None, "hf_not_a_real_one"])
def test_the_hub_token_is_a_file_of_a_secret_and_optional(token: str | None, secrets: Secrets, tmp_path: Path) -> None:
    hub: Mapping[str, dict[str, bytes]] = {"vopd-hub-token": {"token": f"{token}\n".encode()}} if token else {}
    pod = NativePod(overlay("single-gpu"), tmp_path, {**secrets, **hub}, {})
    read = "from huggingface_hub import get_token; print(get_token())"
    env = {**os.environ, **pod.container.env}
    found = subprocess.run([sys.executable, "-c", read], env=env, capture_output=True, text=True, check=False)
    assert found.stdout.strip() == str(token), found.stderr
