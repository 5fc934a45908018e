"""provenance.json: what a run was made of, as far as its settings do not say it. Read without torch.

The handshake tells what a teacher is, and only the process that trains knows which versions it trained with.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vopd_client.errors import RunDirectoryError
from vopd_client.prompt_source import ListedPrompts
from vopd_client.run_directory import write_atomically

if TYPE_CHECKING:
    from vopd_client.preparation import Run

PACKAGES = ("vopd", "torch", "transformers", "accelerate", "peft")

Provenance = Mapping[str, Any]


def provenance_of(run: Run) -> dict[str, Any]:
    """Of a run that can start. num_prompts: null for a stream, whose length nobody knows."""
    return {
        "student_revision": run.student.revision,
        "teachers": [
            {
                "name": plan.name,
                "model_id": plan.teacher.info.model_id,
                "model_revision": plan.teacher.info.model_revision,
                "dtype": plan.teacher.info.dtype,
                "engine": f"{plan.teacher.info.engine} {plan.teacher.info.engine_version}",
                "support": plan.request.support,
            }
            for _, plan in sorted(run.plans.items())
        ],
        "num_prompts": len(run.prompts.prompts) if isinstance(run.prompts, ListedPrompts) else None,
        "num_held_out_prompts": len(run.eval_prompts),
        "num_processes": run.accelerator.num_processes,
        "versions": {"Python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
    }


def write_provenance(path: Path, provenance: Provenance) -> None:
    """Raises: RunDirectoryError."""
    try:
        write_atomically(path, json.dumps(provenance, indent=2) + "\n")
    except OSError as error:
        raise RunDirectoryError(f"cannot write {path}: {error.strerror or error}") from error


def read_provenance(path: Path) -> Provenance:
    """Empty where there is none, as in runs of older versions. Raises: RunDirectoryError for a damaged one."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunDirectoryError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise RunDirectoryError(f"{path} is damaged: it does not hold names and values")
    return value
