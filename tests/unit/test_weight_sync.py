"""The order of an update, the ways that weights go, and what happens when they do not arrive. Without vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tiny_model import write_tiny_model
from vopd_client.errors import ConfigError, RolloutEngineError, RolloutEngineUnavailableError
from vopd_client.preparation import check_objective
from vopd_client.processes import LARGEST_OF, add_up
from vopd_client.rollout_engine import checkpoint_weights, shape_of
from vopd_client.rollouts.vllm_facts import WORKER_EXTENSION
from vopd_client.rollouts.vllm_server import ServerEngine
from vopd_client.student import load_student
from vopd_client.train_config import TrainConfig
from vopd_client.weight_sync import (
    WeightSync,
    check_can_read,
    choose_way,
    push,
    weights_directory,
    write_weights,
)


class RecordingControl:
    """Notes every call, in order."""

    def __init__(self, *, empties_its_cache: bool = True) -> None:
        self.calls: list[str] = []
        self._empties_its_cache = empties_its_cache

    def pause(self) -> None:
        self.calls.append("pause")

    def resume(self) -> None:
        self.calls.append("resume")

    def can_read(self, path: str) -> bool:
        return Path(path).is_file()

    def reload(self, path: str) -> None:
        self.calls.append(f"reload {path}")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.calls.append("init")

    def start_weight_update(self) -> None:
        self.calls.append("start")

    def update_weights(self, update_info: Any) -> None:
        self.calls.append("update")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append("finish")

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset")
        return self._empties_its_cache

    def set_weight_version(self, version: str) -> None:
        self.calls.append(f"label {version}")


def test_weights_arrive_while_nothing_runs_and_before_anything_is_labelled_with_them() -> None:
    control = RecordingControl()

    def deliver() -> None:
        control.start_weight_update()
        control.update_weights({})
        control.finish_weight_update()

    push(control, deliver, "run/3")
    assert control.calls == [
        *("pause", "label in part: run/3", "start", "update", "finish", "reset", "label run/3", "resume")
    ]


def test_an_update_that_fails_leaves_the_label_that_says_so_and_takes_requests_again() -> None:
    control = RecordingControl()

    def fail() -> None:
        raise RolloutEngineError("no")

    with pytest.raises(RolloutEngineError, match="no"):
        push(control, fail, "run/3")
    assert control.calls == ["pause", "label in part: run/3", "resume"]
    control = RecordingControl(empties_its_cache=False)
    with pytest.raises(RolloutEngineError, match="did not empty its prefix cache"):
        push(control, lambda: None, "run/3")
    assert control.calls == ["pause", "label in part: run/3", "reset", "resume"]


def sync_of(control: RecordingControl | None, events: list[str], **changes: Any) -> WeightSync:
    def gather() -> Mapping[str, Tensor]:
        events.append("gather")
        return {"w": torch.ones(1)}

    settings: dict[str, Any] = {
        "control": control,
        "gather": gather,
        "deliver": lambda weights: events.append(f"deliver {list(weights)}"),
        "write": lambda weights: events.append("write"),
        "clear": lambda: events.append("clear"),
        "is_main_process": True,
        "run_label": "run",
    }
    return WeightSync(**{**settings, **changes})


def test_weights_are_pushed_once_for_each_number_of_updates() -> None:
    control, events = RecordingControl(), list[str]()
    sync = sync_of(control, events)
    assert sync.refresh(0) == "run/0"
    assert events == ["gather", "write", "deliver ['w']", "clear"]
    assert sync.refresh(0) == "run/0"
    assert events.count("gather") == 1
    assert sync.refresh(1) == "run/1"
    assert [call for call in control.calls if call.startswith("label run")] == ["label run/0", "label run/1"]


def test_a_process_beside_a_server_takes_part_in_the_gathering_alone() -> None:
    events: list[str] = []
    assert sync_of(None, events, is_main_process=False).refresh(4) == "run/4"
    assert events == ["gather"]


def test_after_a_push_that_failed_the_next_one_is_made() -> None:
    events: list[str] = []

    def fail_once(_weights: Mapping[str, Tensor]) -> None:
        events.append("deliver")
        if events.count("deliver") == 1:
            raise ValueError("shapes differ")

    sync = sync_of(RecordingControl(), events, deliver=fail_once)
    with pytest.raises(RolloutEngineError, match="do not reach the rollout engine: shapes differ"):
        sync.refresh(0)
    assert sync.version == ""
    assert events[-1] == "clear"
    assert sync.refresh(0) == "run/0"


@pytest.mark.parametrize(
    ("asked", "transfer", "on_server", "on_gpu", "way"),
    [
        ("auto", "", True, True, "disk"),
        ("auto", "nccl", True, True, "nccl"),
        ("auto", "nccl", True, False, "disk"),
        ("auto", "ipc", False, True, "ipc"),
        ("auto", "ipc", True, True, "disk"),
        ("disk", "nccl", True, True, "disk"),
        ("nccl", "nccl", True, True, "nccl"),
        ("ipc", "ipc", False, True, "ipc"),
    ],
)
def test_the_way_is_what_the_engine_can(asked: Any, transfer: str, on_server: bool, on_gpu: bool, way: str) -> None:
    assert choose_way(asked, transfer=transfer, on_server=on_server, trainer_on_gpu=on_gpu) == way


@pytest.mark.parametrize(
    ("asked", "transfer", "on_server", "on_gpu", "message"),
    [
        ("ipc", "ipc", True, True, "ipc is for an engine in the trainer: a server has disk and nccl"),
        ("nccl", "nccl", False, True, "nccl is for a server: a trainer with its own engine has disk and ipc"),
        ("nccl", "nccl", True, False, "moves weights between GPUs, and the student is on none"),
        ("nccl", "", True, True, r'--weight-transfer-config \'{"backend": "nccl"}\' \(it has none\)'),
    ],
)
def test_a_way_that_there_is_not_is_refused(
    asked: Any, transfer: str, on_server: bool, on_gpu: bool, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_way(asked, transfer=transfer, on_server=on_server, trainer_on_gpu=on_gpu)


def test_files_appear_complete_in_the_engines_type_and_replace_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vopd_client.weight_sync.SHARD_BYTES", 3000)
    tensors = {f"layer.{index}": torch.randn(20, 20) for index in range(7)} | {"count": torch.tensor([3])}
    directory = tmp_path / "weights"
    for scale in (1.0, 2.0):
        scaled = {name: tensor * scale if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        write_weights(directory, iter(scaled.items()), dtype=torch.bfloat16)
        files = sorted(directory.iterdir())
        assert len(files) == 3  # 800 bytes each, three to a file
        read = {name: tensor for file in files for name, tensor in load_file(file).items()}
        assert read.keys() == scaled.keys()
        assert all(torch.equal(read[name], scaled[name].to(torch.bfloat16)) for name in scaled if name != "count")
        assert read["count"].dtype == torch.int64

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield "layer.0", torch.ones(20, 20)
        raise OSError(28, "No space left on device")

    with pytest.raises(RolloutEngineError, match=r"cannot write the weights for the rollout engine to .*No space left"):
        write_weights(directory, broken(), dtype=torch.float32)
    assert sorted(directory.iterdir()) == files
    assert list(tmp_path.iterdir()) == [directory]


def test_weights_wait_in_memory_where_that_is_shared_and_has_room(tmp_path: Path) -> None:
    run, memory = tmp_path / "runs" / "mine", tmp_path / "memory"
    assert weights_directory(run, num_bytes=10, same_machine=True, memory=memory).parent == run
    memory.mkdir()
    in_memory = weights_directory(run, num_bytes=10, same_machine=True, memory=memory)
    assert in_memory.parent == memory
    assert weights_directory(run, num_bytes=10, same_machine=False, memory=memory).parent == run
    assert weights_directory(run, num_bytes=10**18, same_machine=True, memory=memory).parent == run
    assert weights_directory(tmp_path / "mine", num_bytes=10, same_machine=True, memory=memory) != in_memory


def test_an_engine_that_does_not_see_the_trainers_files_is_found_out_before_the_run(tmp_path: Path) -> None:
    control = RecordingControl()
    check_can_read(control, tmp_path / "new" / "weights")
    assert list((tmp_path / "new").iterdir()) == []
    control.can_read = lambda path: False  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"does not see .*; give both a directory that they share as output_dir"):
        check_can_read(control, tmp_path / "weights")


@pytest.mark.parametrize("tied", [True, False])
def test_the_engine_gets_each_weight_once_by_its_checkpoints_name(tmp_path: Path, tied: bool) -> None:
    directory = write_tiny_model(tmp_path / "model", tie_word_embeddings=tied)
    student = load_student(directory, device="cpu")
    weights = checkpoint_weights(student.module.causal_lm, student.module.causal_lm.state_dict())
    assert weights.keys() == load_file(directory / "model.safetensors").keys()
    assert ("lm_head.weight" in weights) is not tied
    assert shape_of(student).architecture == "LlamaForCausalLM"


# --- a server that is not one, or not started for this


def server_of(handler: Any, *, timeout_s: float = 5.0, told: list[str] | None = None) -> ServerEngine:
    told = [] if told is None else told
    return ServerEngine(
        "http://rollouts:8000",
        max_in_flight=2,
        timeout_s=timeout_s,
        tell=told.append,
        transport=httpx2.MockTransport(handler),
    )


def paths(*names: str) -> httpx2.Response:
    return httpx2.Response(200, json={"paths": {name: {} for name in names}})


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["/v1/models"], "VLLM_SERVER_DEV_MODE=1 in its environment and --enable-scale-out"),
        (["/v1/models", "/inference/v1/generate"], "VLLM_SERVER_DEV_MODE=1 in its environment"),
        (["/collective_rpc", "/update_weight_version"], "--enable-scale-out"),
    ],
)
def test_a_server_without_the_endpoints_is_told_by_its_missing_flags(names: list[str], missing: str) -> None:
    with pytest.raises(ConfigError, match=f"http://rollouts:8000 must be started with {missing}$"):
        server_of(lambda request: paths(*names))


def test_a_server_without_the_workers_extension_is_told_so() -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/openapi.json":
            return paths("/collective_rpc", "/update_weight_version", "/inference/v1/generate")
        return httpx2.Response(500, json={"error": {"message": "no attribute 'vopd_facts'"}})

    with pytest.raises(ConfigError, match=f"--worker-extension-cls {WORKER_EXTENSION}.*vopd_facts"):
        server_of(handler)


def test_a_server_that_does_not_answer_is_waited_for_and_then_given_up() -> None:
    told: list[str] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("connection refused")

    with pytest.raises(
        RolloutEngineUnavailableError, match=r"gave no answer for .* s: ConnectError connection refused"
    ):
        server_of(handler, timeout_s=0.2, told=told)
    assert told == ["waiting for the rollout server at http://rollouts:8000: ConnectError connection refused"]


def test_a_server_that_comes_back_in_time_is_asked_again() -> None:
    asked: list[str] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        asked.append(request.url.path)
        if len(asked) == 1:
            return httpx2.Response(503)
        return paths("/v1/models")

    with pytest.raises(ConfigError, match="must be started with"):
        server_of(handler)
    assert asked == ["/openapi.json", "/openapi.json"]


# --- settings


def config_of(**settings: Any) -> TrainConfig:
    return TrainConfig(student="s", prompts="p", teacher_url=["grpc://a:1"], **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollouts_url": "http://a:1"}, "rollouts_url is about vLLM: it needs rollouts vllm"),
        ({"rollouts_engine_args": '{"enforce_eager": true}'}, "rollouts_engine_args is about vLLM"),
        ({"weight_sync": "nccl"}, "weight_sync is about vLLM"),
        ({"rollouts": "vllm", "rollouts_url": "a:1"}, "rollouts_url is http://host:port, and not 'a:1'"),
        ({"rollouts": "vllm", "rollouts_url": "http://a:1/v1"}, "rollouts_url is http://host:port"),
        ({"rollouts": "vllm", "deterministic": True}, "deterministic does not go with rollouts vllm"),
        (
            {"rollouts": "vllm", "rollouts_url": "http://a:1", "rollouts_engine_args": {"seed": 1}},
            "a server has its own flags",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(**settings)


def test_sampled_terms_of_another_engines_rollouts_are_weighed_unless_told_otherwise() -> None:
    assert check_objective(config_of()).importance_cap is None
    assert check_objective(config_of(rollouts="vllm")).importance_cap == 2
    assert check_objective(config_of(rollouts="vllm", importance_cap=5)).importance_cap == 5
    assert check_objective(config_of(rollouts="vllm", objective="topk-kl")).importance_cap is None


def test_of_a_largest_value_the_largest_of_all_processes_is_taken() -> None:
    name = f"{LARGEST_OF}x"
    assert add_up([{name: 0.5, "n": 1}, {name: 2.0, "n": 1}, {"n": 1}]) == {name: 2.0, "n": 3}
