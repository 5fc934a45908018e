"""What the trainer itself computes of a completion that another engine sampled."""

from __future__ import annotations

import numpy as np
import torch

from vopd_client.linear_logprobs import HeadInDtype
from vopd_client.output_head import hidden_states, output_head
from vopd_client.rollouts.base import Rollout
from vopd_client.rollouts.recall import recall
from vopd_client.student import LoadedStudent


def recalled(student: LoadedStudent, rollout: Rollout, *, top_k: int, support_mass: float) -> Rollout:
    """The rollout that the trainer's own sampler would have recorded."""
    module = student.module
    ids_1S = torch.from_numpy(np.concatenate([rollout.prompt_ids, rollout.completion_ids]))[None]
    with torch.no_grad():
        hidden_1SH = hidden_states(module.causal_lm, ids_1S, torch.ones_like(ids_1S))
    first = len(rollout.prompt_ids) - 1
    head = output_head(module.causal_lm)
    return recall(
        rollout.key,
        rollout.prompt_ids,
        rollout.completion_ids,
        hidden_1SH[0, first : first + len(rollout.completion_ids)],
        HeadInDtype(head.weight, head.bias),
        module.logits,
        top_k=top_k,
        support_mass=support_mass,
    ).rollout
