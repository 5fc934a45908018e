"""Weights from GPU to GPU through vLLM's own trainer engines, as far as a machine without a GPU can tell.

The NCCL engine of vLLM runs whole but for the communicator: what it sends is checked against what vLLM's worker parses,
and goes over its own packing. The GPU's part is in test_vllm_rollouts_gpu.py.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from vllm.distributed.weight_transfer import nccl_engine
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo
from vllm.entrypoints.rl.online.api_router import router as rl_router
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest, GenerateTokensResponse
from vllm.entrypoints.serve.dev.cache.api_router import router as cache_router
from vllm.entrypoints.serve.dev.rpc.api_router import router as rpc_router

from vopd_client.rollouts.base import RolloutKey
from vopd_client.rollouts.vllm_request import NEVER, DrawSettings, sampling_parameters
from vopd_client.weight_sync import push
from vopd_client.weight_transfer import StudentSource, Transfer, ipc_init_info, nccl_init_info

WEIGHTS = {"model.embed.weight": torch.randn(5, 4), "model.norm.weight": torch.randn(4), "steps": torch.tensor([3])}


class RecordingWorkers:
    """The control of an engine whose workers parse what they get with vLLM's own classes, and keep it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.init: NCCLWeightTransferInitInfo | None = None
        self.updates: list[NCCLWeightTransferUpdateInfo] = []
        self._worker = NCCLWeightTransferEngine.__new__(NCCLWeightTransferEngine)

    def pause(self) -> None:
        self.calls.append("pause")

    def resume(self) -> None:
        self.calls.append("resume")

    def can_read(self, path: str) -> bool:
        raise AssertionError("no files here")

    def reload(self, path: str) -> None:
        raise AssertionError("no files here")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.calls.append("init")
        self.init = self._worker.parse_init_info(json.loads(json.dumps(init_info)))

    def start_weight_update(self) -> None:
        self.calls.append("start")

    def update_weights(self, update_info: Any) -> None:
        self.calls.append("update")
        self.updates.append(self._worker.parse_update_info(json.loads(json.dumps(update_info))))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append("finish")

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset")
        return True

    def set_weight_version(self, version: str) -> None:
        self.calls.append(f"label {version}")


def test_a_push_over_nccl_is_a_whole_round_in_order_and_what_vllms_workers_expect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[tuple[str, torch.Tensor]] = []

    def broadcast(iterator: Any, **_settings: Any) -> None:
        sent.extend((name, tensor.clone()) for name, tensor in iterator)

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda init_info: object())
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", broadcast)
    workers = RecordingWorkers()
    init_info = nccl_engine.NCCLTrainerInitInfo(rank=0, master_address="10.0.0.1", master_port=4711, world_size=3)
    transfer = Transfer(workers, init_info, device=torch.device("cpu"), dtype=torch.bfloat16)
    for version in ("run/0", "run/1"):
        push(workers, lambda: transfer.deliver(WEIGHTS), version)
    one_round = ["start", "update", "finish", "reset"]
    assert workers.calls == [
        *("pause", "label in part: run/0", "init", *one_round, "label run/0", "resume"),
        *("pause", "label in part: run/1", *one_round, "label run/1", "resume"),
    ]
    assert workers.init is not None
    assert (workers.init.master_address, workers.init.master_port) == ("10.0.0.1", 4711)
    assert (workers.init.rank_offset, workers.init.world_size, workers.init.packed) == (1, 3, True)
    for update in workers.updates:
        assert update.names == list(WEIGHTS)
        assert update.dtype_names == ["bfloat16", "bfloat16", "int64"]
        assert update.shapes == [[5, 4], [4], [1]]
    assert [name for name, _ in sent] == [*WEIGHTS, *WEIGHTS]
    for name, tensor in sent:
        assert torch.equal(tensor, WEIGHTS[name].to(tensor.dtype))


def test_a_source_says_beforehand_what_it_then_yields() -> None:
    source = StudentSource(device=torch.device("cpu"), dtype=torch.float16)
    source.weights = WEIGHTS
    for meta, (name, tensor) in zip(source.metadata(), source, strict=True):
        assert (meta.name, meta.dtype, meta.shape) == (name, tensor.dtype, tuple(tensor.shape))


def test_the_rendezvous_is_at_the_address_that_the_server_sees() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        info = nccl_init_info(f"http://127.0.0.1:{server.getsockname()[1]}", num_workers=4)
    assert info.master_address == "127.0.0.1"
    assert info.world_size == 5
    assert 0 < info.master_port < 65536
    assert info.backend == "nccl"


def test_handles_of_a_gpus_memory_are_announced_as_vllms_worker_reads_them() -> None:
    info = ipc_init_info()
    assert (info.backend, info.packed, info.is_sender) == ("ipc", True, True)
    worker = IPCWeightTransferEngine.__new__(IPCWeightTransferEngine)
    assert asdict(worker.parse_init_info({"packed": info.packed})) == {"packed": True}


def test_requests_and_answers_are_those_of_vllms_server() -> None:
    settings = DrawSettings(
        num_shared_ids=10, vocab_size=12, end_ids=frozenset({7}), max_new_tokens=4, temperature=0.5, top_k=3, seed=2**62
    )
    parameters = sampling_parameters(settings, RolloutKey(1, 2, 3), max_tokens=4)
    body = {"token_ids": np.arange(3).tolist(), "sampling_params": parameters, "stream": False}
    request = GenerateRequest.model_validate(json.loads(json.dumps(body)))
    for name, value in parameters.items():
        assert getattr(request.sampling_params, name) == value, name
    assert request.sampling_params.logit_bias == {10: NEVER, 11: NEVER}  # not clamped
    assert request.is_sampling_param_provided("max_tokens")
    choice = set(GenerateTokensResponse.model_fields["choices"].annotation.__args__[0].model_fields)
    assert {"token_ids", "finish_reason", "logprobs", "weight_versions"} <= choice


def test_the_endpoints_are_vllms() -> None:
    paths = {route.path for router in (rl_router, cache_router, rpc_router) for route in router.routes}
    assert {
        *("/pause", "/resume", "/init_weight_transfer_engine", "/start_weight_update", "/update_weights"),
        *("/finish_weight_update", "/update_weight_version", "/reset_prefix_cache", "/collective_rpc"),
    } <= paths
