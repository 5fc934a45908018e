"""A student's KL to its teachers on held-out prompts, with the run's own sampler and scoring.

Axes: B sequences, T completion tokens, K support size. Natural log, nats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vopd_client.baselines import SupportLogprobs, bucket_reverse_kl
from vopd_client.batch import Batch
from vopd_client.prompts import Prompt
from vopd_client.rollouts.base import RolloutKey
from vopd_client.rollouts.decoding import MixedPrecision
from vopd_client.rollouts.transformers import RolloutSampler
from vopd_client.scoring import Request, SentRollout, send
from vopd_client.student import StudentForTraining, StudentOutputs
from vopd_client.teaching_plan import TeachingPlan, plan_teachers_microbatches
from vopd_client.types import SequenceScores


def wait_for_answer(sent: SentRollout) -> SequenceScores:
    """The answer as it came. Raises: what the teacher's future raises."""
    assert sent.answer is not None, "all of an evaluation's rollouts are scored"
    return sent.answer.result()


@dataclass(frozen=True)
class KlMeasurement:
    """How the KL is measured.

    One completion a prompt is sampled, and at each of its tokens KL(pi || q) is taken in closed form: exactly, with a
    teacher that gives hidden states, else from the support and a bucket for the rest. The states are the student's
    own, so the mean is an estimate of what on-policy distillation minimises; the bucket makes every state's value a
    lower bound of its KL over the whole vocabulary, close where the support holds nearly all of the student's mass.

    plans: of the teachers that can be asked, by name, with a support or hidden states; the prompts of others are left
        out.
    sampler: with a seed of its own. Every evaluation draws with the same random numbers.
    make_batch: (what was asked, rollouts of one teacher's prompts, its answers) -> padded tensors.
    receive: waits for the answer to one rollout; a caller's own can look up from waiting now and then.
    """

    plans: Mapping[str, TeachingPlan]
    sampler: RolloutSampler
    make_batch: Callable[[Request, Sequence[SentRollout], Sequence[SequenceScores]], Batch]
    microbatch_tokens: int
    receive: Callable[[SentRollout], SequenceScores] = wait_for_answer


def sample_and_send(kl: KlMeasurement, prompts: Sequence[Prompt]) -> list[SentRollout]:
    """One completion a prompt, in the prompts' order; each is on its way to its teacher once it is finished."""
    sent: dict[int, SentRollout] = {}
    requests = [
        (RolloutKey(0, position, 0), prompt.student_ids)
        for position, prompt in enumerate(prompts)
        if prompt.teacher in kl.plans
    ]
    for rollout in kl.sampler.sample(requests):
        position = rollout.key.prompt_index
        plan = kl.plans[prompts[position].teacher]
        sent[position] = send(rollout, prompts[position], request=plan.evaluation_request, teacher=plan.teacher)
    return [sent[position] for position in sorted(sent)]


@torch.no_grad()
def kl_of_tokens(
    kl: KlMeasurement, student: StudentForTraining, sent: Sequence[SentRollout], mixed_precision: MixedPrecision
) -> list[tuple[Prompt, float]]:
    """The KL at every scored token of every completion, in nats; waits for a teacher where it must.

    Raises: what `kl.receive` raises.
    """
    device = next(student.parameters()).device
    kl_by_token: list[tuple[Prompt, float]] = []
    for indices in plan_teachers_microbatches(sent, kl.microbatch_tokens):
        items = [sent[index] for index in indices]
        plan = kl.plans[items[0].prompt.teacher]
        plan.fit(student)
        batch = kl.make_batch(plan.evaluation_request, items, [kl.receive(item) for item in items]).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed_precision == "bf16"):
            kl_BT = kl_of_batch(student, batch)
        for item, kl_T, mask_T in zip(items, kl_BT, batch.loss_mask_BT, strict=True):
            kl_by_token += [(item.prompt, value) for value in kl_T[mask_T].tolist()]
    return kl_by_token


def kl_of_batch(student: StudentForTraining, batch: Batch) -> Tensor:
    """KL(pi || q) at each row, [B, T], 0 outside the loss mask.

    Over the whole vocabulary where the batch has the teacher's hidden states, else from the support and one bucket.
    """
    outputs: StudentOutputs = student(**batch.student_inputs)
    if outputs.whole_BT is not None:
        return outputs.whole_BT.reverse_kl
    return bucket_reverse_kl(
        SupportLogprobs(outputs.support_logprobs_BTK, batch.teacher_support_logprobs_BTK, batch.support_mask_BTK)
    )
