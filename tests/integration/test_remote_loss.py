"""A loss whose teacher is asked in the middle of the forward is the loss of our own pipeline, and its gradient.

The reference samples nothing anew: it writes down, from plain logits of one unpadded sequence at a time, what our
sampler would have recorded, and goes the trainer's own way from there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fake_local_teacher import FakeLocalTeacher
from tiny_model import NUM_IDS, write_tiny_model
from vopd_client.batch import collate
from vopd_client.config import Objective
from vopd_client.errors import ConfigError, HandshakeError, TeacherUnavailableError
from vopd_client.losses import compute_loss
from vopd_client.remote_loss import LossSettings, RemoteLoss, RemoteLossOutput, SampledCompletion
from vopd_client.rollouts.base import Rollout, RolloutKey
from vopd_client.student import StudentForTraining
from vopd_client.teacher_head import TeacherHead
from vopd_client.types import Candidates, HiddenStates, NoSupport, SequenceToScore

TOLERANCE = 1e-5  # float32, one summed in another order than the other; gradients are of order 1
TOP_K = 20
SUPPORTS = {"opd": "none", "vopd-full": "vocabulary", "full-kl": "vocabulary"}
PADDED_ROWS = 5


@pytest.fixture(scope="module")
def student_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its output layer has rows that no token belongs to."""
    return write_tiny_model(tmp_path_factory.mktemp("student") / "m", seed=1, vocab_padding=PADDED_ROWS)


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("teacher") / "m", seed=2)


def completion(
    prompt_length: int, length: int, *, seed: int, outside: tuple[int, ...] = (), name: str = "row"
) -> SampledCompletion:
    """Random ids. `outside`: positions that are not in the loss."""
    rng = np.random.default_rng(seed)
    in_loss_T = np.ones(length, np.bool_)
    in_loss_T[list(outside)] = False
    return SampledCompletion(rng.integers(0, NUM_IDS, prompt_length), rng.integers(0, NUM_IDS, length), in_loss_T, name)


BATCH = [completion(3, 5, seed=0), completion(6, 1, seed=1), completion(1, 9, seed=2)]


def settings(objective: Objective, temperature: float = 1.0, **others: object) -> LossSettings:
    given = {"top_k": TOP_K, "support_mass": None, "tail": None, "baseline": None, **others}
    return LossSettings.of(objective, temperature=temperature, **given)  # type: ignore[arg-type]


def remote_loss(student_dir: Path, teacher: FakeLocalTeacher, of: LossSettings) -> tuple[RemoteLoss, torch.nn.Module]:
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(student_dir)
    return RemoteLoss.prepare(model, tokenizer, teacher, of, max_new_tokens=16, tell=lambda _: None), model


def gradients(output: RemoteLossOutput, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    output.loss.loss_sum.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def recorded(index: int, item: SampledCompletion, model: torch.nn.Module, of: LossSettings) -> Rollout:
    """From the whole distribution of one unpadded sequence: sorted, and cut where it reaches the mass."""
    ids = torch.from_numpy(np.concatenate([item.prompt_ids, item.completion_ids]))
    with torch.no_grad():
        logits_TV = model(ids[None]).logits[0, len(item.prompt_ids) - 1 : -1, :NUM_IDS].float()
    logprobs_TV = (logits_TV / of.temperature).log_softmax(-1)
    values_TV, order_TV = logprobs_TV.sort(dim=-1, descending=True)
    supports = []
    for values_V, order_V in zip(values_TV.exp(), order_TV, strict=True):
        enough = int((values_V.cumsum(0) < of.support_mass).sum()) + 1 if of.support_mass < 1 else TOP_K
        supports.append(order_V[: min(enough, TOP_K)].numpy())
    return Rollout(
        key=RolloutKey(0, index, 0),
        prompt_ids=item.prompt_ids,
        completion_ids=item.completion_ids,
        behaviour_logprobs_T=np.zeros(len(item.completion_ids), np.float32),
        support_ids=np.concatenate(supports),
        support_counts_T=np.array([len(support) for support in supports]),
        support_mass_T=np.ones(len(supports), np.float32),
        ended=False,
    )


def pipeline_loss(
    student_dir: Path, teacher: FakeLocalTeacher, of: LossSettings
) -> tuple[float, dict[str, torch.Tensor]]:
    """Recorded rollouts, scores, `collate`, the student's own forward: what our trainer does in a microbatch."""
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    student = StudentForTraining(model)
    student.num_shared_ids, student.temperature = NUM_IDS, of.temperature
    rollouts = [recorded(index, item, model, of) for index, item in enumerate(BATCH)]
    owner = SUPPORTS.get(of.objective, "student")
    if owner == "vocabulary":
        student.teacher_head = TeacherHead.load(
            teacher.head_file(), temperature=of.temperature, device=torch.device("cpu"), vocab_size=NUM_IDS
        )
    asked = [
        SequenceToScore(
            rollout.prompt_ids,
            rollout.completion_ids,
            {"none": NoSupport(), "vocabulary": HiddenStates()}.get(
                owner, Candidates(rollout.support_ids, rollout.support_counts_T)
            ),
        )
        for rollout in rollouts
    ]
    scores = [teacher.submit(sequence).result() for sequence in asked]
    batch = collate(rollouts, scores, prompt_names=["row"] * 3, pad_id=0, num_shared_ids=NUM_IDS, support=owner)  # type: ignore[arg-type]
    outputs = student(**batch.student_inputs, want_kl_gradient=of.objective == "full-kl")
    loss = compute_loss(of.objective, outputs, batch, tail=of.tail, baseline=of.baseline)
    loss.loss_sum.backward()
    return loss.loss_sum.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("objective", ["vopd-rb", "vopd", "opd", "topk-kl", "vopd-full", "full-kl"])
def test_loss_and_gradient_are_those_of_our_own_pipeline(
    student_dir: Path, teacher_dir: Path, objective: Objective
) -> None:
    teacher = FakeLocalTeacher(teacher_dir)
    expected_loss, expected = pipeline_loss(student_dir, teacher, settings(objective))
    loss, model = remote_loss(student_dir, teacher, settings(objective))
    output = loss(BATCH)
    assert output.num_valid_tokens == 15
    assert output.loss.loss_sum.item() == pytest.approx(expected_loss, abs=TOLERANCE)
    actual = gradients(output, model)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=TOLERANCE, rtol=TOLERANCE, msg=name)
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 0.1  # else nothing was compared


def test_a_support_stops_at_its_mass_and_never_depends_on_the_sampled_token(
    student_dir: Path, teacher_dir: Path
) -> None:
    """The same states with another last token: the same support at every position."""
    asked: list[SequenceToScore] = []

    class Listening(FakeLocalTeacher):
        def submit(self, sequence: SequenceToScore):  # type: ignore[no-untyped-def]
            asked.append(sequence)
            return super().submit(sequence)

    of = settings("vopd-rb", support_mass=0.6)
    loss, model = remote_loss(student_dir, Listening(teacher_dir), of)
    first = completion(4, 6, seed=3)
    for last_id in (7, 91):
        loss([SampledCompletion(first.prompt_ids, np.append(first.completion_ids[:-1], last_id), first.in_loss_T, "r")])
    one, other = (sequence.support for sequence in asked)
    assert isinstance(one, Candidates)
    assert isinstance(other, Candidates)
    assert one.ids.tolist() == other.ids.tolist()
    expected = recorded(0, first, model, of)
    assert one.ids.tolist() == expected.support_ids.tolist()
    assert one.counts_T.tolist() == expected.support_counts_T.tolist()
    assert one.counts_T.min() < TOP_K  # the mass did cut


def test_tokens_that_are_not_the_students_own_are_read_and_not_learned_from(
    student_dir: Path, teacher_dir: Path
) -> None:
    teacher = FakeLocalTeacher(teacher_dir)
    whole, _ = remote_loss(student_dir, teacher, settings("vopd-rb"))
    [kept, first, last] = [
        completion(3, 6, seed=0, outside=outside) for outside in ((2, 3), (0, 1, 2, 3), (2, 3, 4, 5))
    ]
    output = whole([kept])
    parts = [whole([part]) for part in (first, last)]
    assert output.num_valid_tokens == 4
    assert output.loss.loss_sum.item() == pytest.approx(sum(part.loss.loss_sum.item() for part in parts), abs=TOLERANCE)
    assert float(output.entropy_sum) == pytest.approx(sum(float(part.entropy_sum) for part in parts), abs=TOLERANCE)


def test_another_temperature_divides_both_sides(student_dir: Path, teacher_dir: Path) -> None:
    """The teacher scores at the temperature that it was connected with; here the student's side is looked at."""
    cold, _ = remote_loss(student_dir, FakeLocalTeacher(teacher_dir), settings("opd", temperature=1.0))
    warm, _ = remote_loss(student_dir, FakeLocalTeacher(teacher_dir), settings("opd", temperature=2.0))
    assert float(warm(BATCH).entropy_sum) > float(cold(BATCH).entropy_sum)
    with pytest.raises(HandshakeError, match=r"temperature 2: this teacher scores at temperature 1 only"):
        remote_loss(student_dir, FakeLocalTeacher(teacher_dir, any_temperature=False), settings("opd", temperature=2.0))


def test_a_failed_call_is_an_error_and_never_a_number(student_dir: Path, teacher_dir: Path) -> None:
    def fail_the_second(number: int) -> None:
        if number == 2:
            raise TeacherUnavailableError("no progress of the teacher for 2 s")

    loss, model = remote_loss(student_dir, FakeLocalTeacher(teacher_dir, on_submit=fail_the_second), settings("opd"))
    with pytest.raises(TeacherUnavailableError, match="no progress"):
        loss(BATCH)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_another_tokenizer_is_refused_with_the_first_differing_token(student_dir: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", extra_tokens=("<|tool|>",))
    with pytest.raises(HandshakeError, match=r"different tokenizers: 259 and 260 entries, 1 of them different"):
        remote_loss(student_dir, FakeLocalTeacher(other), settings("opd"))


def test_a_teacher_that_cannot_gather_gives_its_own_top_k(student_dir: Path, teacher_dir: Path) -> None:
    told: list[str] = []
    teacher = FakeLocalTeacher(teacher_dir, supports=frozenset({"sampled", "teacher_top_k"}))
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(student_dir)
    loss = RemoteLoss.prepare(model, tokenizer, teacher, settings("vopd-rb"), max_new_tokens=16, tell=told.append)
    output = loss(BATCH)
    assert told == ["support: this teacher cannot score the student's own top-k; its own top-k is the support instead"]
    assert float(output.loss.sums["support_size"]) == TOP_K * output.num_valid_tokens


@pytest.mark.parametrize(
    ("objective", "given", "message"),
    [
        ("opd-rb", {}, "objective 'opd-rb': there are opd, vopd"),
        ("vopd", {"top_k": 0}, "top_k 0: a support holds at least 1 id"),
        ("vopd", {"support_mass": 1.5}, r"support_mass 1.5 is not in \(0, 1\]"),
        (
            "vopd",
            {"tail": "cut"},
            "tail 'cut': there are bucket, renormalise|tail 'cut': there are renormalise, bucket",
        ),
        ("topk-kl", {"baseline": "kl"}, "baseline"),
    ],
)
def test_settings_that_there_are_not_are_refused(objective: Objective, given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(objective, **given)


def test_defaults_are_those_of_the_objective() -> None:
    ours, theirs = settings("vopd-rb"), settings("vopd")
    assert (ours.support_mass, ours.tail) == (0.9999, "bucket")
    assert (theirs.support_mass, theirs.tail) == (1.0, "renormalise")
    assert settings("vopd", tail="bucket").tail == "bucket"
