"""A loss from plain logits: the same as through our own student, and refused where it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from vopd_client import losses
from vopd_client.batch import collate
from vopd_client.errors import AlignmentError, ConfigError, DataError, NonFiniteError
from vopd_client.render import sequence_of_text
from vopd_client.rollouts.base import Rollout, RolloutKey
from vopd_client.student import StudentForTraining
from vopd_client.types import (
    Candidates,
    HiddenStates,
    NoSupport,
    SequenceScores,
    SequenceToScore,
    Support,
    TeacherTopK,
)

CONTEXTS = ([65, 66, 67], [70, 71, 72, 73, 74])
COMPLETIONS = ([1, 2, 3, 4], [9, 8])
NUM_IDS = 250  # of the 259 that the model scores
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir)


def asked_and_answered(kind: type[Support]) -> tuple[list[SequenceToScore], list[SequenceScores]]:
    """Two completions of unlike length, each position with a support of 1 to 5 ids and made-up scores."""
    rng = np.random.default_rng(0)
    sequences, scores = [], []
    for context, completion in zip(CONTEXTS, COMPLETIONS, strict=True):
        counts_T = (
            rng.integers(1, 6, len(completion)) if kind in (Candidates, TeacherTopK) else np.zeros(len(completion), int)
        )
        ids = np.concatenate([rng.choice(NUM_IDS, count, replace=False) for count in counts_T])
        support = {Candidates: Candidates(ids, counts_T), TeacherTopK: TeacherTopK(5)}.get(kind, NoSupport())
        sequences.append(SequenceToScore(np.array(context), np.array(completion), support))
        sampled_T, on_support = (
            np.log(rng.uniform(0.001, 0.1, size)).astype(np.float32) for size in (len(completion), len(ids))
        )
        scores.append(SequenceScores(sampled_T, ids.astype(np.int64), on_support, counts_T))
    return sequences, scores


def plain_logits(model: Any) -> Tensor:
    """[B, T, V] as a loop of somebody else's has them: row t predicts completion token t, NaN beyond a completion."""
    logits_BTV = torch.full((2, 4, 259), torch.nan)
    for row, (context, completion) in enumerate(zip(CONTEXTS, COMPLETIONS, strict=True)):
        ids = torch.tensor([[*context, *completion]])
        logits_BTV[row, : len(completion)] = model(ids).logits[0, len(context) - 1 : -1]
    return logits_BTV


def loss_through_our_student(
    model: Any, objective: Any, sequences: list[SequenceToScore], scores: list[SequenceScores], owner: Any
) -> losses.LossOutput:
    """The trainer's way: rollouts, collate, the chunked head."""
    student = StudentForTraining(model)
    student.num_shared_ids, student.temperature = NUM_IDS, TEMPERATURE
    rollouts = []
    for index, sequence in enumerate(sequences):
        recorded = sequence.support if isinstance(sequence.support, Candidates) else None
        zeros_T = np.zeros(len(sequence.completion_ids))
        rollouts.append(
            Rollout(
                key=RolloutKey(1, index, 0),
                prompt_ids=sequence.context_ids,
                completion_ids=sequence.completion_ids,
                behaviour_logprobs_T=zeros_T.astype(np.float32),
                support_ids=recorded.ids if recorded else np.empty(0, np.int64),
                support_counts_T=recorded.counts_T if recorded else zeros_T.astype(np.int64),
                support_mass_T=zeros_T.astype(np.float32),
                ended=True,
            )
        )
    batch = collate(rollouts, scores, prompt_names=["a", "b"], pad_id=0, num_shared_ids=NUM_IDS, support=owner)
    return losses.compute_loss(objective, student(**batch.student_inputs), batch)


def gradient_of(loss: losses.LossOutput, model: Any) -> Tensor:
    model.zero_grad()
    loss.loss_sum.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(
    ("objective", "kind", "owner"),
    [
        ("opd", NoSupport, "none"),
        ("vopd", Candidates, "student"),
        ("vopd-rb", Candidates, "student"),
        ("vopd-rb", TeacherTopK, "teacher"),
        ("topk-kl", TeacherTopK, "teacher"),
    ],
)
def test_the_loss_is_the_trainers_to_the_last_gradient(model: Any, objective: Any, kind: Any, owner: Any) -> None:
    sequences, scores = asked_and_answered(kind)
    loss = losses.loss_from_logits(
        objective, plain_logits(model), sequences, scores, temperature=TEMPERATURE, num_shared_ids=NUM_IDS
    )
    gradient = gradient_of(loss, model)
    expected = loss_through_our_student(model, objective, sequences, scores, owner)

    torch.testing.assert_close(loss.loss_sum, expected.loss_sum, rtol=1e-5, atol=1e-5)
    assert loss.sums.keys() == expected.sums.keys()
    for name, value in expected.sums.items():
        torch.testing.assert_close(loss.sums[name], value, rtol=1e-4, atol=1e-5)
    expected_gradient = gradient_of(expected, model)
    assert expected_gradient.norm() > 0.01
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5)


def test_logits_of_16_bits_are_compared_in_32() -> None:
    sequences, scores = asked_and_answered(Candidates)
    logits_BTV = torch.randn(2, 4, NUM_IDS, dtype=torch.bfloat16, requires_grad=True)
    loss = losses.loss_from_logits("vopd-rb", logits_BTV, sequences, scores)
    upcast = losses.loss_from_logits("vopd-rb", logits_BTV.detach().float().requires_grad_(), sequences, scores)
    assert loss.loss_sum.dtype == torch.float32
    assert loss.loss_sum == upcast.loss_sum


@pytest.mark.parametrize("shape", [(2, 5, 259), (2, 3, 259), (1, 4, 259), (4, 259)])
def test_logits_that_are_not_one_row_a_token_are_refused(shape: tuple[int, ...]) -> None:
    sequences, scores = asked_and_answered(Candidates)
    with pytest.raises(AlignmentError, match=r"for 2 completions of up to 4 tokens: row t must predict"):
        losses.loss_from_logits("vopd", torch.zeros(shape), sequences, scores)


def test_a_missing_answer_is_refused() -> None:
    sequences, scores = asked_and_answered(Candidates)
    with pytest.raises(AlignmentError, match="1 scores"):
        losses.loss_from_logits("vopd", torch.zeros(2, 4, 259), sequences, scores[:1])


def test_logits_that_are_not_finite_name_the_sequence_and_the_token(model: Any) -> None:
    sequences, scores = asked_and_answered(Candidates)
    logits_BTV = plain_logits(model).detach()
    logits_BTV[1, 1, 7] = torch.nan
    with pytest.raises(NonFiniteError, match=r"completion token 1 \(id 8\) of sequence 1 is nan"):
        losses.loss_from_logits("vopd", logits_BTV, sequences, scores)


def test_an_objective_that_needs_a_support_is_not_given_none() -> None:
    sequences, scores = asked_and_answered(NoSupport)
    with pytest.raises(ConfigError, match=r"objective vopd-rb needs a support: score with TeacherTopK\(k\)"):
        losses.loss_from_logits("vopd-rb", torch.zeros(2, 4, 259), sequences, scores)


def test_a_misspelt_objective_is_told_what_there_is() -> None:
    sequences, scores = asked_and_answered(Candidates)
    misspelt: Any = "vopd_rb"
    with pytest.raises(ConfigError, match="objective 'vopd_rb': there are opd, vopd, vopd-rb, "):
        losses.loss_from_logits(misspelt, torch.zeros(2, 4, 259), sequences, scores)


def test_supports_of_several_kinds_are_refused() -> None:
    sequences, scores = asked_and_answered(Candidates)
    others, other_scores = asked_and_answered(TeacherTopK)
    with pytest.raises(ConfigError, match="several kinds of support: Candidates, TeacherTopK"):
        losses.loss_from_logits("vopd", torch.zeros(2, 4, 259), [sequences[0], others[1]], [scores[0], other_scores[1]])


def test_hidden_states_are_refused_with_what_takes_them() -> None:
    sequences, scores = asked_and_answered(NoSupport)
    asked = [SequenceToScore(s.context_ids, s.completion_ids, HiddenStates()) for s in sequences]
    with pytest.raises(ConfigError, match="hidden states are compared by StudentForTraining"):
        losses.loss_from_logits("vopd-full", torch.zeros(2, 4, 259), asked, scores)


# ---------------------------------------------------------------- texts


def test_two_texts_are_tokenised_apart_and_an_end_token_counts_where_it_is_written(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    sequence = sequence_of_text(tokenizer, "ab", "cd<|end|>", TeacherTopK(3))
    assert tokenizer.convert_ids_to_tokens(sequence.context_ids) == ["a", "b"]
    assert tokenizer.convert_ids_to_tokens(sequence.completion_ids) == ["c", "d", "<|end|>"]
    assert sequence.completion_ids.dtype == np.int64
    assert sequence.support == TeacherTopK(3)
    assert sequence_of_text(tokenizer, "a", "b").support == NoSupport()


@pytest.mark.parametrize(("context", "completion", "empty"), [("", "b", "context"), ("a", "", "completion")])
def test_a_text_that_makes_no_tokens_is_refused(
    tiny_model_dir: Path, context: str, completion: str, empty: str
) -> None:
    with pytest.raises(DataError, match=f"the {empty} makes no tokens"):
        sequence_of_text(AutoTokenizer.from_pretrained(tiny_model_dir), context, completion)
