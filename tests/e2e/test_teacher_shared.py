"""Three trainings that share one teacher process, which is killed, and one whose log has no room left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from teacher_process import ANNOUNCED
from tenants import write_key
from vopd_server.tenancy import TenantLimits
from wire_client import Question, connect
from workplace import ONE_THREAD, STEPS, Workplace, assert_same_run

pytestmark = pytest.mark.e2e

TENANTS = ("alice", "bob", "carol")


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def test_three_trainings_outlive_the_teacher_that_they_share(place: Workplace) -> None:
    """Killed amid all three and started again on its port: each ends with the bits of an undisturbed run."""
    keys_file = place.directory / "keys.json"
    key_flags = {}
    for tenant_id in TENANTS:
        key_path = place.directory / f"{tenant_id}.key"
        key_path.write_text(write_key(keys_file, tenant_id, TenantLimits()))
        key_flags[tenant_id] = ("--api-key-file", str(key_path))
    with ExitStack() as stack:
        first = stack.enter_context(place.teacher("--keys-file", str(keys_file)))
        place.complete("undisturbed", first.url, *key_flags["alice"], afresh=True)
        trainers = {
            tenant_id: stack.enter_context(place.trainer(tenant_id, first.url, *key_flags[tenant_id]))
            for tenant_id in TENANTS
        }
        for tenant_id, trainer in trainers.items():
            trainer.wait_until(lambda tenant_id=tenant_id: place.num_steps(tenant_id) >= 2)
        first.kill()
        done = {tenant_id: place.num_steps(tenant_id) for tenant_id in TENANTS}
        assert max(done.values()) < STEPS, f"over before the teacher was killed: {done}"
        stack.enter_context(place.teacher("--keys-file", str(keys_file), port=first.port))
        for trainer in trainers.values():
            assert trainer.wait() == 0, trainer.log()
    for tenant_id in TENANTS:
        assert_same_run(place, tenant_id, "undisturbed")


def test_a_teacher_whose_log_has_no_room_left_scores_and_drains(place: Workplace) -> None:
    said = place.directory / "said.txt"
    command = [sys.executable, "-m", "vopd_server.main", "serve", "--model", str(place.teacher_dir)]
    ports = ["--port", "0", "--http-port", "0", "--admin-port", "0"]
    env = {**os.environ, **ONE_THREAD}
    with Path("/dev/full").open("w") as full, said.open("w") as out:
        teacher = subprocess.Popen([*command, *ports], stdout=out, stderr=full, env=env)
    try:
        asyncio.run(asyncio.wait_for(score_once(teacher, said), 120))
        teacher.send_signal(signal.SIGTERM)
        assert teacher.wait(60) == 0
    finally:
        teacher.kill()
        teacher.wait()


async def score_once(teacher: subprocess.Popen[bytes], said: Path) -> None:
    while not (announced := ANNOUNCED.search(await asyncio.to_thread(said.read_text))):
        assert teacher.poll() is None, f"ended with {teacher.returncode}"
        await asyncio.sleep(0.05)
    async with connect(announced["grpc"], announced["http"]) as client:
        [answer] = await client.score([[1, 2, 3]], [Question([4, 5])])
        assert len(answer.sampled_T) == 2
