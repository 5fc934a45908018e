"""The client of a vopd teacher: ask it for scores (`vopd_client.teacher`, no torch), or train a student with them.

Where things are, in the order in which a training step needs them:

    the command     cli, config, errors, types
    the teacher     teacher/ (over the wire), local_teacher and local_engine (in this process), handshake,
                    show and scored_text (for people)
    prompts         prompts, prompt_rows, render, verify
    the student     student, model_files, output_head, linear_logprobs, gradient_checkpointing
    rollouts        rollouts/, environment and added_turns (trajectories of several turns)
    scores          scoring, alignment, batch
    the objective   losses, loss_inputs, logits_inputs, baselines, variance
    the loop        trainer, schedule, optimization, step_metrics, processes, interruption
    around it       preparation and teaching (before the first step), periodic_evaluation, ending (after the last)
    others' loops   remote_loss, trl
    evaluation      evaluation, held_out_kl, teacher_greedy, eval_command
    on disk         run_directory, checkpoint, tracking
    the result      export, model_card, provenance, export_command
    the report      report, run_data, plots

What a program of its own needs is named here, and imported when it is first used: `from vopd_client import
TeacherClient` brings no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vopd_client import errors, losses, types
    from vopd_client.batch import Batch, collate, plan_microbatches
    from vopd_client.export import save_student
    from vopd_client.handshake import num_shared_ids
    from vopd_client.render import sequence_of_text
    from vopd_client.rollouts.base import Rollout, RolloutKey
    from vopd_client.rollouts.transformers import RolloutSampler
    from vopd_client.student import LoadedStudent, StudentForTraining, load_student
    from vopd_client.teacher import RemoteTeacher, ScoreStream, TeacherClient
    from vopd_client.teaching import compare_tokenizers
    from vopd_client.types import (
        Candidates,
        HiddenStates,
        NoSupport,
        SequenceScores,
        SequenceToScore,
        Support,
        Teacher,
        TeacherInfo,
        TeacherTopK,
    )

__all__ = [
    "Batch",
    "Candidates",
    "HiddenStates",
    "LoadedStudent",
    "NoSupport",
    "RemoteTeacher",
    "Rollout",
    "RolloutKey",
    "RolloutSampler",
    "ScoreStream",
    "SequenceScores",
    "SequenceToScore",
    "StudentForTraining",
    "Support",
    "Teacher",
    "TeacherClient",
    "TeacherInfo",
    "TeacherTopK",
    "collate",
    "compare_tokenizers",
    "errors",
    "load_student",
    "losses",
    "num_shared_ids",
    "plan_microbatches",
    "save_student",
    "sequence_of_text",
    "types",
]

# Where each name is at home; the imports above tell type checkers the same.
_NAMES = {
    "": ("errors", "losses", "types"),
    ".batch": ("Batch", "collate", "plan_microbatches"),
    ".export": ("save_student",),
    ".handshake": ("num_shared_ids",),
    ".render": ("sequence_of_text",),
    ".rollouts.base": ("Rollout", "RolloutKey"),
    ".rollouts.transformers": ("RolloutSampler",),
    ".student": ("LoadedStudent", "StudentForTraining", "load_student"),
    ".teacher": ("RemoteTeacher", "ScoreStream", "TeacherClient"),
    ".teaching": ("compare_tokenizers",),
    ".types": (
        "Candidates",
        "HiddenStates",
        "NoSupport",
        "SequenceScores",
        "SequenceToScore",
        "Support",
        "Teacher",
        "TeacherInfo",
        "TeacherTopK",
    ),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}

if not TYPE_CHECKING:  # to a type checker a module's __getattr__ is every name there could be

    def __getattr__(name: str) -> object:
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            value = getattr(import_module(__name__ + home), name) if home else import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith(__name__):
                raise
            raise ModuleNotFoundError(
                f"vopd_client.{name} needs the package {error.name}: pip install 'vopd[train]'", name=error.name
            ) from error
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
