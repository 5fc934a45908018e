"""The command line of docker-compose.yml's `teacher`, on this machine's CPU instead of on a GPU in a container."""

from __future__ import annotations

import json
from pathlib import Path

import httpx2

from conftest import REPOSITORY
from containers import NativeContainer, compose, teacher_ports

# Compiled kernels cost minutes here, and a CPU has no memory to spare for long sequences.
ENGINE_ARGS = {"enforce_eager": True, "max_num_batched_tokens": 256}


def test_it_gets_healthy_scores_with_vllm_and_drains(demo_model_dir: Path, tmp_path: Path) -> None:
    service = compose(
        VOPD_MODEL=str(demo_model_dir),
        VOPD_SERVER_MAX_CONTEXT_LENGTH="512",
        VOPD_SERVER_ENGINE_ARGS=json.dumps(ENGINE_ARGS),
    )["services"]["teacher"]
    cache, keys = tmp_path / "cache", tmp_path / "keys"
    cache.mkdir()
    keys.mkdir()
    paths = {"/cache": cache, "/keys": keys, "/run/secrets/hub_token": Path("/dev/null"), "/opt/vopd": REPOSITORY}
    ports = teacher_ports()
    teacher = NativeContainer(service, paths, ports)
    url = f"http://127.0.0.1:{ports['VOPD_SERVER_HTTP_PORT']}"
    with teacher.start() as running:
        teacher.wait_until_healthy(running, timeout_s=300)
        headers = {"Authorization": f"Bearer {(keys / 'default.key').read_text().strip()}"}
        info = httpx2.get(f"{url}/v1/info", headers=headers).json()
        assert (info["engine"], info["model_id"]) == ("vllm", str(demo_model_dir))
        body = {"contexts": [[504, 3575, 282, 4649, 314]], "sequences": [{"completion_ids": [7042, 30]}]}
        answer = httpx2.post(f"{url}/v1/score", json=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        assert running.terminate() == 0, running.log()
