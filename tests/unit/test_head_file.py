"""The file of the output head: what is in it, that its bytes are the weights' alone, and whose is refused."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional

from vopd_server.engines.head import OutputHead
from vopd_server.engines.head_file import head_directory, write_head_file
from vopd_server.errors import ConfigError
from vopd_server.types import HeadFile

V, H = 37, 8


def linear(*, bias: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(H, V, bias=bias, dtype=dtype)


def written(module: torch.nn.Module, directory: Path, *, dtype: str = "float32", **transform: Any) -> HeadFile:
    return write_head_file(OutputHead(module, V, H, **transform), directory, model_dtype=dtype)


def read(head: HeadFile) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(head.path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118  # no dict


# ---------------------------------------------------------------- what is in it


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_holds_the_weights_in_their_own_dtype(bias: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    module = linear(bias=bias, dtype=dtype)
    tensors, metadata = read(written(module, tmp_path, dtype=str(dtype).removeprefix("torch.")))
    assert set(tensors) == ({"weight", "bias"} if bias else {"weight"})
    for name, tensor in tensors.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, getattr(module, name))
    assert metadata == {"logit_scale": "1.0"}


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        ({"scale": 1 / 3}, {"logit_scale": "0.3333333333333333"}),
        ({"softcap": 30}, {"logit_scale": "1.0", "softcap": "30.0"}),
        ({"scale": 0.0625, "softcap": 2.5}, {"logit_scale": "0.0625", "softcap": "2.5"}),
    ],
)
def test_its_metadata_say_what_becomes_of_the_product(
    transform: dict[str, float], expected: dict[str, str], tmp_path: Path
) -> None:
    module = linear(bias=True)
    tensors, metadata = read(written(module, tmp_path, **transform))
    assert metadata == expected
    hidden_NH = torch.randn(5, H) * 4
    logits_NV = functional.linear(hidden_NH, tensors["weight"], tensors["bias"]) * float(metadata["logit_scale"])
    if softcap := metadata.get("softcap"):
        logits_NV = float(softcap) * torch.tanh(logits_NV / float(softcap))
    with torch.no_grad():
        torch.testing.assert_close(logits_NV, OutputHead(module, V, H, **transform).logits(hidden_NH))


def test_a_head_that_is_the_embedding_too_is_written_and_stays_tied(tmp_path: Path) -> None:
    module, embedding = linear(), torch.nn.Embedding(V, H)
    module.weight = embedding.weight
    tensors, _ = read(written(module, tmp_path))
    assert torch.equal(tensors["weight"], embedding.weight)
    assert module.weight is embedding.weight
    assert module.weight.requires_grad


def test_a_weight_that_does_not_lie_in_order_is_written_in_order(tmp_path: Path) -> None:
    module = linear()
    module.weight = torch.nn.Parameter(torch.randn(H, V).T)
    assert not module.weight.is_contiguous()
    tensors, _ = read(written(module, tmp_path))
    assert torch.equal(tensors["weight"], module.weight)


# ---------------------------------------------------------------- its bytes


def test_its_size_and_checksum_are_the_files(tmp_path: Path) -> None:
    head = written(linear(bias=True), tmp_path)
    data = head.path.read_bytes()
    assert (head.num_bytes, head.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert head.path.parent == tmp_path


def test_the_same_weights_make_the_same_bytes_and_others_do_not(tmp_path: Path) -> None:
    """safetensors puts metadata in a random order: with two of them, 20 files would agree once in 500,000 times."""
    transform = {"scale": 0.5, "softcap": 30.0}
    heads = [written(linear(bias=True), tmp_path, **transform) for _ in range(20)]
    assert len({head.sha256 for head in heads}) == 1
    assert read(heads[-1])[1] == {"logit_scale": "0.5", "softcap": "30.0"}
    others = [
        written(linear(bias=True, seed=1), tmp_path, **transform),
        written(linear(bias=False), tmp_path, **transform),
        written(linear(bias=True), tmp_path, scale=0.25, softcap=30.0),
    ]
    assert len({head.sha256 for head in [heads[0], *others]}) == 4


def test_it_is_the_same_in_another_process(tmp_path: Path) -> None:
    script = (
        "import sys, torch\nfrom pathlib import Path\n"
        "from vopd_server.engines.head import OutputHead\n"
        "from vopd_server.engines.head_file import write_head_file\n"
        "module = torch.nn.Linear(8, 37)\n"
        "with torch.no_grad():\n"
        "    module.weight.copy_(torch.arange(296.0).reshape(37, 8)); module.bias.copy_(torch.arange(37.0))\n"
        "head = OutputHead(module, 37, 8, 0.1, 7.0)\n"
        "print(write_head_file(head, Path(sys.argv[1]), model_dtype='float32').sha256)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    told = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert told[0] == told[1]
    assert len(told[0].strip()) == 64


def test_its_directory_is_for_this_user_alone() -> None:
    with head_directory() as directory:
        assert Path(directory).stat().st_mode & 0o777 == 0o700


# ---------------------------------------------------------------- whose is refused


class QuantisedLinear(torch.nn.Linear):
    """As bitsandbytes and others do it: a linear module whose weight is something else."""


class ShardedTensor(torch.Tensor):
    """As DTensor: a part of the weight under the name of the whole."""


def with_weight(weight: torch.Tensor) -> torch.nn.Linear:
    module = linear()
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return module


def with_hook() -> torch.nn.Linear:
    module = linear()
    module.register_forward_hook(lambda _module, _inputs, output: output * 2)
    return module


def with_forward_of_its_own() -> torch.nn.Linear:
    module = linear()
    module.forward = lambda hidden: hidden @ module.weight.T * 2  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (QuantisedLinear(H, V), r"it is a \S*QuantisedLinear, not a torch\.nn\.Linear"),
        (with_weight(torch.zeros(V, H, dtype=torch.int8)), "its weight is int8; float32, bfloat16, float16 can be"),
        (with_weight(torch.zeros(V, H).to(torch.float8_e4m3fn)), "its weight is float8_e4m3fn; float32,"),
        (with_weight(torch.zeros(V, H, dtype=torch.float64)), "its weight is float64; float32,"),
        (with_weight(torch.zeros(V, H, device="meta")), r"its weight is not in memory \(device meta\)"),
        (
            with_weight(torch.zeros(V, H).as_subclass(ShardedTensor)),
            "its weight is a ShardedTensor, not a plain tensor",
        ),
        (with_weight(torch.zeros(V, H, dtype=torch.bfloat16)), "its weight is bfloat16 in a model that is float32"),
        (with_hook(), "hooks, or a forward of its own, have a part in its product"),
        (with_forward_of_its_own(), "hooks, or a forward of its own, have a part in its product"),
    ],
)
def test_a_head_that_is_more_than_plain_weights_is_refused_with_the_reason(
    module: torch.nn.Module, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"allow_full_vocab: the output head cannot be given away: {reason}"):
        written(module, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_a_config_error_with_the_size(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"the output head, {V * H * 4} bytes, cannot be written to .*nowhere"):
        written(linear(), tmp_path / "nowhere")


def test_a_place_for_it_that_is_not_there_is_a_config_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="no directory for the file of the output head"):
        head_directory()
