"""Two training processes do what one does: plain data parallelism and FSDP2, over gloo, and over nccl where there are
two GPUs (`pytest tests/integration/test_several_processes.py` on that machine).

Tolerances: two processes add the same gradients up in another order. In float32 that moves a gradient by about 1e-6 of
its size; over four steps of AdamW at a learning rate of 1e-3, whose step does not grow with the gradient, weights of
size 0.3 move apart by less than 1e-6, and what is computed from them by less than 1e-4 of itself. A gradient that is
not exchanged, or weighed by the wrong number of tokens, moves them by 1e-3 in the first step.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fake_local_teacher import FakeLocalTeacher
from process_runs import Job, Outcome, run_in_processes, without_reports
from tiny_model import write_tiny_model
from training_runs import Runs, largest_difference
from vopd_client.errors import ConfigError, TeacherUnavailableError

# Two processes take all their runs before the first test: the time of many tests.
pytestmark = pytest.mark.timeout(600)

STEPS = 4
PROMPTS, ROLLOUTS = 3, 6  # of a step: the first process has two prompts and the second one
SHARED = {
    "steps": STEPS,
    "prompts_per_step": PROMPTS,
    "microbatch_tokens": 40,  # several microbatches a step, and not as many in each process
    "deterministic": True,
}
FSDP = {"sharding": "fsdp"}
CASES = {
    "tied": {},
    "untied": {"student": "untied"},
    "lora": {"lora_rank": 4},
    "adapter": {"lora_rank": 4, "export": "adapter"},
    "ahead": {"max_staleness": 1, "eval_prompts": "eval.jsonl", "eval_every": 2},
    "full-kl": {"objective": "full-kl"},
    "vopd-full": {"objective": "vopd-full"},
    "checkpointed": {"gradient_checkpointing": True},
    "bf16": {"mixed_precision": "bf16"},
    "masked": {"cut_completions": "mask", "max_new_tokens": 24},  # some processes have nothing to learn in a step
}
REPLICATED = ("tied", "untied", "lora", "ahead", "masked")
METRICS = ("kl_nats", "loss", "grad_norm", "num_valid_tokens", "adam_moment_variance")


@dataclass
class Place:
    """Runs of one and of two processes on one kind of device."""

    runs: Runs
    device: str
    outcomes: list[dict[str, Outcome]] = field(default_factory=list)  # by rank and name
    asked: dict[str, list[tuple[list[int], list[int]]]] = field(default_factory=dict)  # in runs of one process, by name

    def settings(self, case: str, **more: object) -> dict[str, object]:
        settings = SHARED | CASES.get(case, {}) | more
        for name in ("student", "eval_prompts"):
            if name in settings:
                settings[name] = str(self.runs.models / str(settings[name]))
        return settings

    def jobs(self) -> list[Job]:
        return [
            *(Job(self.settings(case, name=f"ddp-{case}")) for case in REPLICATED),
            *(Job(self.settings(case, name=f"fsdp-{case}", **FSDP)) for case in CASES),
            # its second request of step 3, in the middle of a step
            Job(self.settings("tied", name="ddp-gone"), gone_at=(1, 6)),
            Job(self.settings("tied", name="fsdp-gone", **FSDP), gone_at=(1, 6)),
            Job(self.settings("ahead", name="ddp-ahead-gone"), gone_at=(1, 6)),
            Job(self.settings("ahead", name="fsdp-ahead-gone", **FSDP), gone_at=(1, 6)),
            Job(self.settings("tied", name="fsdp-nan", **FSDP), nan_at=(1, 3)),
            Job(self.settings("tied", name="one-then-fsdp", resume=True, **FSDP)),
            Job(self.settings("lora", name="one-then-fsdp-lora", resume=True, **FSDP)),
            Job(self.settings("tied", name="too-many", prompts_per_step=1, **FSDP)),
        ]

    def launch(self) -> None:
        """Takes all runs of several processes."""
        for name, case in (("one-then-fsdp", "tied"), ("one-then-fsdp-lora", "lora")):
            teacher = FakeLocalTeacher(self.runs.models / "teacher", on_submit=gone_from(2 * ROLLOUTS + 2))
            assert self.runs.train(teacher, **self.settings(case, name=name, device=self.device)) == 3
        by_rank = run_in_processes(self.runs.models, self.runs.output_dir, self.jobs(), device=self.device)
        self.outcomes = [{outcome.name: outcome for outcome in outcomes} for outcomes in by_rank]

    def alone(self, case: str, **more: object) -> str:
        """The name of the same run in one process."""
        name = f"one-{'-'.join([case, *map(str, more.values())])}"
        if not self.runs.directory(name).summary_file.exists():
            settings = self.settings(case, name=name, device=self.device, **more)
            AcceleratorState._reset_state()  # which would keep another precision
            assert self.runs.train(self.teacher_of(name), **settings) == 0, self.runs.told
            AcceleratorState._reset_state()
        return name

    def teacher_of(self, name: str) -> FakeLocalTeacher:
        asked = self.asked.setdefault(name, [])

        class Teacher(FakeLocalTeacher):
            def submit(self, sequence):  # type: ignore[no-untyped-def]
                asked.append((sequence.context_ids.tolist(), sequence.completion_ids.tolist()))
                return super().submit(sequence)

        return Teacher(self.runs.models / "teacher")

    def assert_same_run(self, name: str, other: str, *, relative: float = 1e-4) -> None:
        rows, other_rows = self.runs.metrics(name), self.runs.metrics(other)
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        for row, other_row in zip(rows, other_rows, strict=True):
            for metric in METRICS:
                expected = other_row[metric]  # None: no token was scored
                assert row[metric] == (expected and pytest.approx(expected, rel=relative, abs=1e-5)), metric
        assert largest_difference(self.weights(name), self.weights(other)) < 1e-5

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        model = self.runs.directory(name).model
        adapter = model / "adapter_model.safetensors"
        return load_file(adapter if adapter.exists() else model / "model.safetensors")


def gone_from(first: int):  # type: ignore[no-untyped-def]
    """A teacher that answers no request from this one on."""

    def leave(number: int) -> None:
        if number >= first:
            raise TeacherUnavailableError("gone for 600 s")

    return leave


def devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.device_count() >= 2 else [])]


@pytest.fixture(scope="module", params=devices())
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp(f"processes-{request.param}")
    models = directory / "models"
    models.mkdir()
    write_tiny_model(models / "teacher", seed=0)
    write_tiny_model(models / "student", seed=1)
    write_tiny_model(models / "untied", seed=2, tie_word_embeddings=False)
    rows = [{"prompt": f"say {index}:", "answer": str(index)} for index in range(6)]
    (models / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (models / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    with without_reports():
        place = Place(Runs(models, directory / "runs"), request.param)
        place.launch()
        yield place


@pytest.mark.parametrize("case", REPLICATED)
def test_data_parallel_processes_take_the_steps_of_one(place: Place, case: str) -> None:
    assert [outcomes[f"ddp-{case}"].exit_code for outcomes in place.outcomes] == [0, 0]
    place.assert_same_run(f"ddp-{case}", place.alone(case))


@pytest.mark.parametrize("case", CASES)
def test_sharded_processes_take_the_steps_of_one(place: Place, case: str) -> None:
    assert [outcomes[f"fsdp-{case}"].exit_code for outcomes in place.outcomes] == [0, 0], place.outcomes
    place.assert_same_run(f"fsdp-{case}", place.alone(case))


@pytest.mark.parametrize("case", ["tied", "untied"])
def test_shards_are_a_half_of_every_weight_and_moment(place: Place, case: str) -> None:
    whole = {outcomes[f"ddp-{case}"].own_numbers for outcomes in place.outcomes}
    parts = [outcomes[f"fsdp-{case}"].own_numbers for outcomes in place.outcomes]
    assert whole == {sum(parts)}
    assert parts == pytest.approx([sum(parts) / 2] * 2, rel=0.02)  # 259 rows of the embedding make no two halves


@pytest.mark.parametrize("run", ["ddp-tied", "fsdp-tied", "fsdp-lora"])
def test_each_process_asks_about_its_own_rollouts_which_are_those_of_one_process(place: Place, run: str) -> None:
    whole = place.asked[place.alone(run.partition("-")[2])]
    parts = [outcomes[run].asked for outcomes in place.outcomes]
    assert [len(part) for part in parts] == [STEPS * ROLLOUTS * 2 // 3, STEPS * ROLLOUTS // 3]
    first_step = [*parts[0][: ROLLOUTS * 2 // 3], *parts[1][: ROLLOUTS // 3]]
    assert count(first_step) == count(whole[:ROLLOUTS])


def count(asked: list[tuple[list[int], list[int]]]) -> Counter[tuple[tuple[int, ...], tuple[int, ...]]]:
    return Counter((tuple(context), tuple(completion)) for context, completion in asked)


def test_only_the_first_process_tells_anything(place: Place) -> None:
    main, other = place.outcomes
    assert all(outcome.told for outcome in main.values() if outcome.exit_code is not None)
    assert not any(outcome.told for outcome in other.values())
    assert [row["step"] for row in place.runs.metrics("ddp-tied")] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("run", ["ddp-gone", "fsdp-gone", "ddp-ahead-gone", "fsdp-ahead-gone"])
def test_all_processes_save_and_stop_when_the_teacher_of_one_is_gone_and_one_process_goes_on(
    place: Place, run: str
) -> None:
    assert [outcomes[run].exit_code for outcomes in place.outcomes] == [3, 3], place.outcomes
    assert "stopped after step 2" in place.outcomes[0][run].told
    assert place.runs.checkpoints(run) == ["step-000002"]
    in_flight = (place.runs.directory(run).checkpoints / "step-000002").glob("rollouts-*")
    case, ranks = ("ahead", (0, 1)) if "ahead" in run else ("tied", ())
    assert sorted(path.name for path in in_flight) == [f"rollouts-000003-{rank:05d}.safetensors" for rank in ranks]
    assert place.runs.train(**place.settings(case, name=run, device=place.device, resume=True)) == 0
    assert "going on after step 2" in place.runs.told
    assert "holds no rollouts" not in place.runs.told
    place.assert_same_run(run, place.alone(case))


@pytest.mark.parametrize(("run", "case"), [("one-then-fsdp", "tied"), ("one-then-fsdp-lora", "lora")])
def test_sharded_processes_go_on_with_what_one_process_began(place: Place, run: str, case: str) -> None:
    assert [outcomes[run].exit_code for outcomes in place.outcomes] == [0, 0], place.outcomes
    assert "going on after step 2" in place.outcomes[0][run].told
    place.assert_same_run(run, place.alone(case))


def test_a_loss_that_is_not_finite_in_one_process_stops_all_before_the_update(place: Place) -> None:
    for outcomes in place.outcomes:
        assert outcomes["fsdp-nan"].error.startswith("NonFiniteError: step 3 stopped before the weights were updated")
    assert [row["step"] for row in place.runs.metrics("fsdp-nan")] == [1, 2]
    assert place.runs.checkpoints("fsdp-nan") == ["step-000002"]


def test_a_step_needs_a_prompt_for_every_process(place: Place) -> None:
    for outcomes in place.outcomes:
        assert "2 processes share prompts_per_step 1" in outcomes["too-many"].error


def test_the_model_of_a_sharded_run_loads_with_plain_transformers(place: Place) -> None:
    for run, tied in (("fsdp-lora", True), ("fsdp-untied", False)):
        directory = place.runs.directory(run).model
        model, loading = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
        assert not loading["missing_keys"]
        assert not loading["unexpected_keys"]
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_a_checkpoint_of_shards_has_the_files_and_names_of_any_other(place: Place) -> None:
    sharded, whole = (
        place.runs.directory(name).checkpoints / f"step-{STEPS:06d}" for name in ("fsdp-tied", place.alone("tied"))
    )
    weights, whole_weights = (load_file(path / "model.safetensors") for path in (sharded, whole))
    assert largest_difference(weights, whole_weights) < 1e-5
    moments, whole_moments = (
        torch.load(path / "optimizer.bin", weights_only=True)["state"] for path in (sharded, whole)
    )
    assert moments.keys() == whole_moments.keys()
    for index, moment in moments.items():
        assert torch.allclose(moment["exp_avg"], whole_moments[index]["exp_avg"], rtol=1e-3, atol=1e-6)
        assert float(moment["step"]) == float(whole_moments[index]["step"]) == STEPS


def test_one_process_has_nobody_to_share_a_model_with(place: Place) -> None:
    with pytest.raises(ConfigError, match="sharding fsdp shares the model among processes, and there is one"):
        place.runs.train(**place.settings("tied", name="alone-sharded", device=place.device, **FSDP))
