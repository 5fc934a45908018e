"""`vopd-client variance` on tiny models, against a plain computation from whole logits that shares no code with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM

from fake_local_teacher import FakeLocalTeacher
from tiny_model import tiny_tokenizer, write_tiny_model
from vopd_client.command_config import VarianceConfig
from vopd_client.errors import ConfigError, HandshakeError
from vopd_client.types import Candidates, HiddenStates, SequenceToScore, TeacherTopK
from vopd_client.variance_command import run_variance
from vopd_client.variance_measure import Block, blocks_of_batch
from vopd_client.variance_report import LIMITS, Owner, VarianceReport

NUM_IDS = 259
SIZES = [1, 4, 32]
ALL_IDS = {"max_support_size": NUM_IDS}
NO_STATES = {"head_sha256": "", "supports": frozenset({"sampled", "teacher_top_k", "candidates"})}
NO_CANDIDATES = {"head_sha256": "", "supports": frozenset({"sampled", "teacher_top_k"})}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    write_tiny_model(directory / "student", seed=1)
    write_tiny_model(directory / "teacher", seed=0, vocab_padding=5)
    write_tiny_model(directory / "other-end", seed=0, end_token="<|other_end|>")
    rows = [{"prompt": f"say {i}:", "teacher_prompt": f"please say {i}:"} for i in range(5)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


class RecordingTeacher(FakeLocalTeacher):
    """Keeps what it was asked, in the teacher's labels."""

    def __init__(self, directory: Path, **info: object) -> None:
        super().__init__(directory, **info)
        self.asked: list[SequenceToScore] = []

    def submit(self, sequence: SequenceToScore) -> Any:
        self.asked.append(sequence)
        return super().submit(sequence)


def settings(models: Path, **changes: Any) -> VarianceConfig:
    defaults: dict[str, Any] = {
        "student": str(models / "student"),
        "teacher_url": ["grpc://nowhere:1"],
        "prompts": str(models / "prompts.jsonl"),
        "max_new_tokens": 6,
        "support_sizes": SIZES,
        "support_masses": [1.0, 0.7],
        "device": "cpu",
    }
    return VarianceConfig(**defaults | changes)


def run(config: VarianceConfig, teacher: FakeLocalTeacher) -> tuple[VarianceReport, str]:
    screen = StringIO()
    report = run_variance(config, console=Console(file=screen, width=110), connect=lambda settings, device: teacher)
    assert teacher.closed
    return report, screen.getvalue()


def numbers(report: VarianceReport) -> list[float]:
    """All of the first table, of the second, and what is said before."""
    ratios = [row.by_size[size].value for row in report.rows if row.by_size for size in report.sizes]
    whole = [row.whole.value for row in report.rows if row.whole is not None]
    supports = [
        value
        for row in (*report.fixed, *report.adaptive)
        for value in (
            row.num_ids.value,
            row.left_out.value,
            row.bytes_per_token,
            *(r.value for r in row.ratios.values()),
        )
    ]
    return [*ratios, *whole, *supports, report.kl.value, report.signal.value, report.opd_variance.value]


# ---------------------------------------------------------------- the plain computation


def logprobs_of(directory: Path, context_ids: np.ndarray, completion_ids: np.ndarray) -> Tensor:
    """[T, V] float64; row t predicts completion token t."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        logits_SV = model(torch.tensor(np.concatenate([context_ids, completion_ids]))[None]).logits[0]
    return logits_SV[len(context_ids) - 1 : -1].double().log_softmax(-1)


def plain_variance(pi_V: Tensor, reward_V: Tensor, inside_V: Tensor, baseline: float) -> float:
    """g(y) of every y as a row: exact over S, sampled outside it."""
    score_YV = torch.eye(len(pi_V), dtype=torch.float64) - pi_V
    exact_V = ((pi_V * (reward_V - baseline))[:, None] * score_YV)[inside_V].sum(0)
    sampled_YV = torch.where(inside_V, 0.0, reward_V - baseline)[:, None] * score_YV
    gradient_YV = exact_V + sampled_YV
    mean_V = (pi_V[:, None] * gradient_YV).sum(0)
    return float((pi_V * (gradient_YV - mean_V).square().sum(-1)).sum())


def plain_variances(student_V: Tensor, teacher_V: Tensor, ids: list[int]) -> dict[str, float]:
    """By the formulas of docs/method.md, word for word."""
    pi_V, q_V, reward_V = student_V.exp(), teacher_V.exp(), teacher_V - student_V
    inside_V = torch.zeros(len(pi_V), dtype=torch.bool)
    inside_V[ids] = True
    weight_V = 1 - 2 * pi_V + pi_V.square().sum()
    tail = float(((1 - q_V[inside_V].sum()) / (1 - pi_V[inside_V].sum())).log())
    own_pi, own_q = pi_V[inside_V] / pi_V[inside_V].sum(), q_V[inside_V] / q_V[inside_V].sum()
    bucketed_V = torch.where(inside_V, reward_V, tail)
    baselines = {
        "none": 0.0,
        "renormalise": -float((own_pi * (own_pi / own_q).log()).sum()),
        "bucket": float((pi_V * bucketed_V).sum()),
        "optimal": float((pi_V * weight_V * bucketed_V).sum() / (pi_V * weight_V).sum()),
        "tail": tail,
    }
    nothing_V = torch.zeros_like(inside_V)
    expected = {
        f"vopd {name}": plain_variance(pi_V, reward_V, nothing_V, b)
        for name, b in baselines.items()
        if name in ("renormalise", "bucket", "optimal")
    }
    return expected | {f"vopd-rb {name}": plain_variance(pi_V, reward_V, inside_V, b) for name, b in baselines.items()}


def expected_ratios(models: Path, teacher_name: str, asked: list[SequenceToScore], owner: Owner, size: int):
    """Of every estimator to opd over all positions of what the teacher was asked, and the mean KL."""
    swap = list(range(NUM_IDS))
    if teacher_name == "other-end":  # the student's labels: its end token is the teacher's
        end, other_end = tiny_tokenizer().convert_tokens_to_ids(["<|end|>", "<|other_end|>"])
        swap[end], swap[other_end] = other_end, end
    sums: dict[str, float] = {}
    kl, num_positions = 0.0, 0
    num_please = len(tiny_tokenizer().encode("please "))  # which only the teacher sees
    for sequence in asked:
        student_context = sequence.context_ids[num_please:]
        completion = np.array(swap)[sequence.completion_ids]
        student_TV = logprobs_of(models / "student", student_context, completion)
        teacher_TV = logprobs_of(models / teacher_name, sequence.context_ids, sequence.completion_ids)[:, swap]
        for student_V, teacher_V in zip(student_TV, teacher_TV, strict=True):
            ids = (student_V if owner == "student" else teacher_V).topk(size).indices.tolist()
            nothing_V = torch.zeros(NUM_IDS, dtype=torch.bool)
            opd = plain_variance(student_V.exp(), teacher_V - student_V, nothing_V, 0.0)
            for name, value in {"opd": opd, **plain_variances(student_V, teacher_V, ids)}.items():
                sums[name] = sums.get(name, 0.0) + value
            kl += float((student_V.exp() * (student_V - teacher_V)).sum())
            num_positions += 1
    return {name: value / sums["opd"] for name, value in sums.items()}, kl / num_positions


@pytest.mark.parametrize("teacher_name", ["teacher", "other-end"])
@pytest.mark.parametrize(("owner", "size"), [("student", 4), ("teacher", 4), ("student", 1)])
def test_the_table_is_what_whole_logits_say(models: Path, teacher_name: str, owner: Owner, size: int):
    teacher = RecordingTeacher(models / teacher_name)
    report, text = run(settings(models, max_prompts=3), teacher)
    expected, kl = expected_ratios(models, teacher_name, teacher.asked, owner, size)
    actual = {name: report.row(name, owner).by_size[size].value for name in LIMITS if name != "vopd-rb best"}
    assert actual == pytest.approx({name: expected[name] for name in actual}, rel=1e-4)
    assert report.kl.value == pytest.approx(kl, rel=1e-4)
    assert report.num_prompts == 3
    assert report.num_positions == sum(len(sequence.completion_ids) for sequence in teacher.asked)
    assert "approximate" not in text


# ---------------------------------------------------------------- what is measured where


def test_the_cap_on_positions_spares_the_teacher_what_is_not_measured(models: Path):
    everything, few = RecordingTeacher(models / "teacher"), RecordingTeacher(models / "teacher")
    run(settings(models), everything)
    report, text = run(settings(models, max_positions=2), few)
    assert report.num_positions == 2
    assert len(few.asked) <= 2 < len(everything.asked) == 5
    assert f"measuring 2 positions of {len(few.asked)} completions" in text
    assert all(isinstance(sequence.support, HiddenStates) for sequence in few.asked)


@pytest.mark.parametrize("changes", [{"microbatch_tokens": 1}, {"rollout_batch_size": 1}, {"mixed_precision": "bf16"}])
def test_how_the_work_is_cut_changes_nothing(models: Path, changes: dict[str, Any]):
    """bf16 is other numbers; that they are near shows that the student is asked in the same way."""
    config = settings(models, rollouts_per_prompt=2)
    plain, _ = run(config, FakeLocalTeacher(models / "teacher"))
    cut, _ = run(config.model_copy(update=changes), FakeLocalTeacher(models / "teacher"))
    if "mixed_precision" in changes:
        assert numbers(cut) != pytest.approx(numbers(plain), rel=1e-4)
        assert cut.kl.value == pytest.approx(plain.kl.value, rel=0.3)
    else:
        assert numbers(cut) == pytest.approx(numbers(plain), rel=1e-4)


def test_no_block_holds_more_positions_than_it_may_and_none_is_lost(models: Path, monkeypatch: pytest.MonkeyPatch):
    whole, _ = run(settings(models), FakeLocalTeacher(models / "teacher"))
    sizes: list[int] = []

    def small_blocks(*arguments: Any) -> Iterator[Block]:
        for block in blocks_of_batch(*arguments, block_elements=3 * NUM_IDS):
            sizes.append(len(block.student_nV))
            yield block

    monkeypatch.setattr("vopd_client.variance_command.blocks_of_batch", small_blocks)
    cut, _ = run(settings(models), FakeLocalTeacher(models / "teacher"))
    assert max(sizes) == 3
    assert sum(sizes) == whole.num_positions
    assert numbers(cut) == pytest.approx(numbers(whole), rel=1e-6)


def test_a_dropped_end_is_measured_nowhere(models: Path):
    """So hot that the student's tokens are almost all alike, and some of 1,600 are its end."""
    config = settings(models, rollouts_per_prompt=8, max_new_tokens=40, max_positions=10_000, temperature=8.0)
    kept, _ = run(config.model_copy(update={"end_token": "keep"}), FakeLocalTeacher(models / "other-end"))
    teacher = RecordingTeacher(models / "other-end")
    dropped, text = run(config.model_copy(update={"end_token": "drop"}), teacher)
    assert "end_token is drop" in text
    assert dropped.num_positions < kept.num_positions
    assert np.isfinite(numbers(dropped)).all()


# ---------------------------------------------------------------- a teacher without hidden states


def test_with_all_ids_as_candidates_the_completed_teacher_is_the_exact_one(models: Path):
    exact, _ = run(settings(models), FakeLocalTeacher(models / "teacher"))
    teacher = RecordingTeacher(models / "teacher", **NO_STATES, **ALL_IDS)
    completed, text = run(settings(models), teacher)
    assert all(isinstance(sequence.support, Candidates) for sequence in teacher.asked)
    assert numbers(completed) == pytest.approx(numbers(exact), rel=2e-3)
    assert " ".join(text.split()).endswith(completed.conclusion)
    assert completed.approximation is not None
    assert completed.approximation["student_left_out_mass"]["value"] < 1e-6


@pytest.mark.parametrize(
    ("offers", "support", "owner"), [(NO_STATES, Candidates, "student"), (NO_CANDIDATES, TeacherTopK, "teacher")]
)
def test_with_fewer_ids_it_says_how_many_and_what_they_leave_out(models: Path, offers, support, owner):
    teacher = RecordingTeacher(models / "teacher", **offers, max_support_size=40)
    report, text = run(settings(models), teacher)
    assert all(isinstance(sequence.support, support) for sequence in teacher.asked)
    said = " ".join(text.split())
    assert f"approximate: this teacher gives no hidden states, so its distribution is known on the {owner}'s" in said
    assert "K' = 40" in said
    facts = report.to_json()["approximation"]
    assert (facts["support"], facts["size"]) == (owner, 40)
    assert 0.01 < facts["student_left_out_mass"]["value"] < 0.9
    assert 0.01 < facts["teacher_left_out_mass"]["value"] < 0.9
    exact, _ = run(settings(models), FakeLocalTeacher(models / "teacher"))
    assert report.kl.value < exact.kl.value  # a bucket hides the spread within it


@pytest.mark.parametrize(
    ("info", "changes", "error", "complaint"),
    [
        (NO_STATES | {"max_support_size": 20}, {}, ConfigError, "K = 32 > K' = 20"),
        ({}, {"support_sizes": [1, 300]}, ConfigError, "K = 300 > 259"),
        ({"any_temperature": False}, {"temperature": 0.5}, HandshakeError, "temperature 0.5"),
        ({"max_context_length": 10}, {}, Exception, "maximum 10"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_sampled(models: Path, info, changes, error, complaint):
    teacher = RecordingTeacher(models / "teacher", **info)
    with pytest.raises(error, match=complaint):
        run(settings(models, **changes), teacher)
    assert teacher.asked == []
    assert teacher.closed


# ---------------------------------------------------------------- files


def test_json_and_picture_are_written_where_they_are_wanted(models: Path, tmp_path: Path):
    config = settings(models, json_file=tmp_path / "v.json", plot_file=tmp_path / "v.png")
    report, _ = run(config, FakeLocalTeacher(models / "teacher"))
    written = json.loads((tmp_path / "v.json").read_text())
    assert written["settings"]["student"] == str(models / "student")
    assert written["teacher"]["model_id"] == "fake"
    assert {name: written[name] for name in report.to_json()} == json.loads(json.dumps(report.to_json()))
    assert (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG")


def test_a_directory_that_is_not_there_is_said_so_before_the_teacher_is_asked(models: Path, tmp_path: Path):
    config = settings(models, json_file=tmp_path / "missing" / "v.json")
    with pytest.raises(ConfigError, match="missing is not a directory"):
        run_variance(config, connect=lambda settings, device: pytest.fail("it was connected to"))
