"""What the transformers engine loads, says of itself, gives away and refuses."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from scoring_checks import (
    V,
    request,
    serving,
)
from tiny_model import CHAT_TEMPLATE, tiny_tokenizer, write_tiny_model
from vopd_server.engines.loading import LoadedModel, directory_revision, load_model
from vopd_server.engines.scoring_model import scoring_model
from vopd_server.engines.transformers import TransformersEngine
from vopd_server.errors import ConfigError
from vopd_server.types import HeadFile


async def test_loading_leaves_the_event_loop_free(tiny_model_dir: Path) -> None:
    num_ticks = 0

    async def tick() -> None:
        nonlocal num_ticks
        while True:
            num_ticks += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    async with serving(tiny_model_dir):
        ticking.cancel()
        assert num_ticks > 2


async def test_info_says_what_is_served(tiny_model_dir: Path) -> None:
    async with serving(tiny_model_dir, dtype="bfloat16", max_context_length=100_000, deterministic=True) as engine:
        pass
    info = engine.info  # which a closed engine still knows
    assert info.model_id == str(tiny_model_dir)
    assert info.model_revision == directory_revision(tiny_model_dir)
    assert (info.engine, info.engine_version) == ("transformers", transformers.__version__)
    assert (info.dtype, info.vocab_size, info.hidden_size) == ("bfloat16", V, 32)
    assert info.max_context_length == 32_768  # the model's own
    assert info.supports == {"sampled", "teacher_top_k", "candidates"}
    assert info.any_temperature
    assert info.deterministic


async def test_the_head_is_there_from_start_to_close_where_it_is_allowed(tiny_model_dir: Path) -> None:
    async with serving(tiny_model_dir, allow_full_vocab=True) as engine:
        info = engine.info
        assert info.supports == {"sampled", "teacher_top_k", "candidates", "hidden_states"}
        assert info.head is not None
        data = info.head.path.read_bytes()
        assert info.head.num_bytes == len(data) > V * 32 * 4
        assert info.head.sha256 == hashlib.sha256(data).hexdigest()
    assert not info.head.path.parent.exists()
    async with serving(tiny_model_dir, allow_full_vocab=True) as again:
        assert again.info.head is not None
        assert again.info.head.sha256 == info.head.sha256
        assert again.info.head.path != info.head.path
    async with serving(tiny_model_dir) as closed:
        assert closed.info.head is None
        assert closed.info.supports == {"sampled", "teacher_top_k", "candidates"}


@pytest.fixture
def head_directories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], list[Path]]:
    """Those that are there now, of the heads written in this test."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return lambda: list(place.glob("vopd-head-*"))


async def test_a_start_that_fails_leaves_no_head_behind(
    tiny_model_dir: Path, head_directories: Callable[[], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_arguments: Any, **_settings: Any) -> HeadFile:
        assert len(head_directories()) == 1
        raise ConfigError("no room")

    monkeypatch.setattr("vopd_server.engines.transformers.write_head_file", write)
    engine = TransformersEngine(model=str(tiny_model_dir), device="cpu", allow_full_vocab=True)
    with pytest.raises(ConfigError, match="no room"):
        await engine.start()
    assert head_directories() == []
    await engine.close()


async def test_a_start_that_is_cancelled_leaves_no_head_behind_once_closed(
    tiny_model_dir: Path, head_directories: Callable[[], list[Path]]
) -> None:
    engine = TransformersEngine(model=str(tiny_model_dir), device="cpu", allow_full_vocab=True)
    starting = asyncio.create_task(engine.start())
    while not head_directories():  # noqa: ASYNC110  # written by the engine's thread
        await asyncio.sleep(0.001)
    starting.cancel()
    await asyncio.wait((starting,))
    await engine.close()
    assert head_directories() == []


async def test_a_head_that_cannot_be_given_away_keeps_the_teacher_from_starting(
    tiny_model_dir: Path, head_directories: Callable[[], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class CompressedLinear(torch.nn.Linear):
        """Computes as a linear layer does and is none."""

    def load_compressed(*arguments: Any, **settings: Any) -> LoadedModel:
        loaded = load_model(*arguments, **settings)
        loaded.model.lm_head.__class__ = CompressedLinear
        return loaded

    monkeypatch.setattr("vopd_server.engines.transformers.load_model", load_compressed)
    async with serving(tiny_model_dir) as engine:
        await engine.score(request(np.arange(3), np.arange(4)))
    with pytest.raises(ConfigError, match=r"the output head cannot be given away: it is a .*CompressedLinear"):
        await TransformersEngine(model=str(tiny_model_dir), device="cpu", allow_full_vocab=True).start()
    assert head_directories() == []


async def test_the_tokenizer_is_described_with_every_end_id(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 3]}))
    async with serving(directory) as engine:
        tokenizer = engine.tokenizer
    assert tokenizer.end_ids == (257, 258, 3)  # the tokenizer's own, the main one, first
    assert (tokenizer.begin_id, tokenizer.pad_id) == (256, 257)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.tokens[256:] == (b"<|start|>", b"<|end|>", b"<|other_end|>")
    rebuilt = Tokenizer.from_str(tokenizer.tokenizer_json)
    assert rebuilt.encode("hello").ids == tiny_tokenizer().encode("hello")


def test_a_directory_revision_follows_the_weights_and_not_the_place(tmp_path: Path) -> None:
    first = write_tiny_model(tmp_path / "first", seed=0)
    copied = Path(shutil.copytree(first, tmp_path / "copied"))
    retrained = write_tiny_model(tmp_path / "retrained", seed=1)
    assert directory_revision(first) == directory_revision(copied)
    assert directory_revision(first) != directory_revision(retrained)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "no/such-model"}, "cannot load the model 'no/such-model'"),
        ({"device": "abacus"}, "'abacus' is not a device"),
        ({"device": "meta:99"}, "'meta:99' is not on this machine"),
    ],
)
async def test_what_cannot_be_loaded_is_a_config_error(
    tiny_model_dir: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        await TransformersEngine(**{"model": str(tiny_model_dir), **settings}).start()


async def test_damaged_weights_are_a_config_error(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path)
    weights = directory / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(ConfigError, match="cannot load the model"):
        await TransformersEngine(model=str(directory), device="cpu").start()


class LlamaWithSecondThoughts(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """An architecture that does to its logits what no engine could know."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * torch.linspace(0.5, 1.5, outputs.logits.shape[-1])
        return outputs


class LlamaThatLooksAhead(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """Not causal: padding behind a sequence would change its scores."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.register_forward_hook(self._mix_positions)

    @staticmethod
    def _mix_positions(_module: Any, _inputs: Any, outputs: Any) -> Any:
        outputs.last_hidden_state = outputs.last_hidden_state + outputs.last_hidden_state.mean(1, keepdim=True)
        return outputs


@pytest.mark.parametrize(
    ("architecture", "through"),
    [(LlamaWithSecondThoughts, "its output head"), (LlamaThatLooksAhead, "a padded batch")],
)
def test_a_model_that_cannot_be_reproduced_is_refused_by_name(
    tiny_model_dir: Path, architecture: Any, through: str
) -> None:
    model = architecture.from_pretrained(tiny_model_dir).eval()
    loaded = LoadedModel(model, tiny_tokenizer(), torch.device("cpu"), "revision", 512)
    with pytest.raises(ConfigError, match=rf"{architecture.__name__} .* through {through}.* nats"):
        scoring_model(loaded)


def test_the_package_of_engines_imports_without_torch() -> None:
    script = "import sys, vopd_server.engines, vopd_server.engines.base; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
