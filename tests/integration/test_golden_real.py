"""The golden probe on the real transformers engine: starts of one model agree, other weights are found."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_model import write_tiny_model
from vopd_server.engines.loading import _BLOCK_BYTES, _block_offsets, directory_revision
from vopd_server.engines.transformers import TransformersEngine
from vopd_server.errors import ConfigError
from vopd_server.golden import GoldenResult, run_golden_probe


async def probed_start(model: Path, record_file: Path, **settings: Any) -> GoldenResult:
    engine = TransformersEngine(model=str(model), device="cpu", **settings)
    try:
        await engine.start()
        return await run_golden_probe(engine, record_file=record_file)
    finally:
        await engine.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_two_starts_of_one_model_agree(dtype: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    record_file = tmp_path / "golden.json"
    first = await probed_start(tiny_model_dir, record_file, dtype=dtype)
    assert first.description.endswith(f"recorded in {record_file} for later starts")
    second = await probed_start(tiny_model_dir, record_file, dtype=dtype)
    told = re.search(r"agree within (\S+) nats; within (\S+) nats of the start of \d{4}-\d\d-\d\d$", second.description)
    assert told is not None
    largest_nats = 1e-4 if dtype == "float32" else 0.5
    assert max(map(float, told.groups())) < largest_nats


async def test_a_deterministic_start_keeps_its_promise_of_the_same_bits(tiny_model_dir: Path, tmp_path: Path) -> None:
    result = await probed_start(tiny_model_dir, tmp_path / "golden.json", dtype="bfloat16", deterministic=True)
    assert "agree within 0 nats" in result.description


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_other_weights_under_the_same_revision_are_refused(dtype: str, tmp_path: Path) -> None:
    """A directory's revision reads blocks of its weights; what lies between them is changed here."""
    model = write_tiny_model(tmp_path / "model", vocab_padding=30_000)  # 4 MB: no longer read whole
    record_file = tmp_path / "golden.json"
    await probed_start(model, record_file, dtype=dtype)
    revision = directory_revision(model)
    halve_weights_between_blocks(model / "model.safetensors")
    assert directory_revision(model) == revision
    with pytest.raises(ConfigError, match=rf"revision {revision}\) in {dtype} .* other weights under the same rev"):
        await probed_start(model, record_file, dtype=dtype)


def halve_weights_between_blocks(path: Path) -> None:
    """In float32, at every place that `directory_revision` does not read."""
    size_bytes = path.stat().st_size
    starts = [offset + _BLOCK_BYTES for offset in _block_offsets(size_bytes)]
    ends = [*list(_block_offsets(size_bytes))[1:], size_bytes]
    data = bytearray(path.read_bytes())
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    num_changed = 0
    for start, end in zip(starts, ends, strict=True):
        first = max(start, header_bytes)
        first += -(first - header_bytes) % 4
        count = (end - first) // 4
        if count > 0:
            torch.frombuffer(data, dtype=torch.float32, offset=first, count=count).mul_(0.5)
            num_changed += count
    assert num_changed > size_bytes // 16  # a quarter of them
    path.write_bytes(data)
