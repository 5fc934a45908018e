"""Weights from GPU to GPU through vLLM's own weight transfer. Imported where vLLM is, and only when it is asked for.

vLLM's trainer engines drive the round: start_weight_update, update_weights beside the broadcast or with the handles of
this GPU's memory, finish_weight_update. What is ours is the source of the tensors and the way to the workers.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from vopd_client.weight_sync import WeightControl, in_dtype

# Of the staging buffers on this GPU; vLLM's own default is four times as much, twice.
BUFFER_BYTES = 256 << 20


class StudentSource(WeightSource):  # type: ignore[misc]  # vLLM has no types here
    """The tensors of one push, each brought to the GPU and to the engine's type when its turn comes."""

    def __init__(self, *, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self.weights: Mapping[str, Tensor] = {}

    def metadata(self) -> list[Any]:
        return [
            ParamMeta(name, self._dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
            for name, tensor in self.weights.items()
        ]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.weights.items():
            yield name, in_dtype(tensor.to(self._device), self._dtype).contiguous()


class Transfer:
    """Delivers weights to one engine, whose rendezvous is made with the first of them.

    Args: init_info: of `nccl_init_info` or `ipc_init_info`. dtype: what the engine computes in.
    """

    def __init__(self, control: WeightControl, init_info: Any, *, device: torch.device, dtype: torch.dtype) -> None:
        self._control = control
        self._init_info = init_info
        self._source = StudentSource(device=device, dtype=dtype)
        self._engine: Any = None

    def deliver(self, weights: Mapping[str, Tensor]) -> None:
        self._source.weights = weights
        try:
            if self._engine is None:
                self._engine = WeightTransferTrainerFactory.trainer_init(
                    self._init_info, client=self._control, source=self._source
                )
            self._engine.send_weights()
        finally:
            self._source.weights = {}

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None


def ipc_init_info() -> Any:
    return IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=BUFFER_BYTES)


def nccl_init_info(server_url: str, *, num_workers: int) -> Any:
    """The trainer is rank 0 of the group, at the address from which it reaches the server."""
    address, port = own_address(server_url)
    return NCCLTrainerInitInfo(
        rank=0,
        master_address=address,
        master_port=port,
        world_size=1 + num_workers,
        packed=True,
        packed_buffer_size_bytes=BUFFER_BYTES,
    )


def own_address(server_url: str) -> tuple[str, int]:
    """This machine's address as the server sees it, and a port that is free now."""
    parts = urlsplit(server_url)
    with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=30) as connection:
        address: str = connection.getsockname()[0]
    with socket.socket() as probe:
        probe.bind((address, 0))
        return address, int(probe.getsockname()[1])
