"""`docker compose up client` without Docker: the two command lines of docker-compose.yml, on the real language model.

What only Docker can show is not shown here: that the images build, and that a read-only file system is enough.
"""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest

from conftest import REPOSITORY
from containers import NativeContainer, compose, teacher_ports
from vopd_client.run_directory import read_rows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

MODEL = "/opt/vopd/models/smollm2-135m-instruct"


def directories(place: Path, demo_model_dir: Path) -> dict[str, Path]:
    """Volumes and what the image holds, by their paths in the container."""
    paths = {mount: place / mount.strip("/") for mount in ("/cache", "/runs", "/keys")}
    for directory in paths.values():
        directory.mkdir()
    return {**paths, "/run/secrets/hub_token": Path("/dev/null"), MODEL: demo_model_dir, "/opt/vopd": REPOSITORY}


def test_the_client_trains_against_the_cpu_teacher_which_then_drains(demo_model_dir: Path, tmp_path: Path) -> None:
    # As somebody in a hurry would call it; everything else is as the file has it.
    services = compose(
        VOPD_CLIENT_STEPS="2",
        VOPD_CLIENT_PROMPTS_PER_STEP="2",
        VOPD_CLIENT_NAME="short",
        VOPD_CLIENT_EVAL_PROMPTS="None",
    )["services"]
    paths = directories(tmp_path, demo_model_dir)
    ports = teacher_ports()
    teacher = NativeContainer(services["teacher-cpu"], paths, ports)
    assert not teacher.is_healthy()
    with teacher.start() as running:
        teacher.wait_until_healthy(running, timeout_s=120)
        assert f"the key of tenant default is in {tmp_path}/keys/default.key" in running.log()
        key = (tmp_path / "keys" / "default.key").read_text().strip()
        url = f"http://127.0.0.1:{ports['VOPD_SERVER_HTTP_PORT']}/v1/info"
        info = httpx2.get(url, headers={"Authorization": f"Bearer {key}"}).json()
        assert info["engine"] == "transformers"
        client = NativeContainer(services["client"], paths, {})
        # The name that the teacher has in the network of the containers.
        address = f"127.0.0.1:{ports['VOPD_SERVER_PORT']}"
        client.command = [word.replace("teacher-cpu:50051", address) for word in client.command]
        without_key = {"VOPD_CLIENT_API_KEY_FILE": "None", "VOPD_CLIENT_NAME": "refused"}
        stranger = NativeContainer(services["client"], paths, without_key)
        stranger.command = client.command
        with stranger.start() as refused:
            assert refused.wait(120) != 0
            assert "no API key came with the call" in refused.log()
        with client.start() as training:
            assert training.wait(300) == 0, training.log()
        assert running.terminate() == 0, running.log()
        assert "draining" in running.log()
    assert not teacher.is_healthy()
    assert [row["step"] for row in read_rows(tmp_path / "runs" / "short" / "metrics.jsonl")] == [1, 2]
    assert (tmp_path / "runs" / "short" / "model" / "model.safetensors").exists()
