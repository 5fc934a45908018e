"""One run with two different teachers: every row is scored by the one that it names, and by nobody else.

`math` is a tiny model like the others. `code` differs from it in whatever a teacher may differ in: weights, width,
padded vocabulary, end token and chat template.
"""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from fake_local_teacher import FakeLocalTeacher
from served_model import ServedModel
from tiny_model import CHAT_TEMPLATE, write_tiny_model
from training_runs import NUM_PROMPTS, Runs, same_bits
from vopd_client.errors import CheckpointError, ConfigError, DataError, HandshakeError, TeacherUnavailableError
from vopd_client.run_directory import read_rows
from vopd_client.teachers import connect_teacher
from vopd_client.train_config import TrainConfig
from vopd_client.training_run import run_training
from vopd_server.types import ScoreRequest

pytestmark = pytest.mark.usefixtures("fresh_process_state", "no_report")

ADDRESSES = {"math": ["grpc://math:1"], "code": ["grpc://code:1"]}
CODE_CHAT_TEMPLATE = CHAT_TEMPLATE.replace("<|start|>", "##")


@pytest.fixture(scope="module")
def school(models: Path) -> Path:
    """The directory of the models, with `code` and rows that name their teacher beside them."""
    code = write_tiny_model(
        models / "code", seed=5, hidden_size=48, vocab_padding=5, end_token="<|other_end|>", max_length=300
    )
    tokenizer = AutoTokenizer.from_pretrained(code)
    tokenizer.chat_template = CODE_CHAT_TEMPLATE
    tokenizer.save_pretrained(code)
    rows = [
        {
            "messages": [{"role": "user", "content": f"say {i}"}],
            "answer": str(i),
            "kind": "low" if i < NUM_PROMPTS // 2 else "high",
            "teacher": "code" if i % 3 == 0 else "math",
        }
        for i in range(NUM_PROMPTS)
    ]
    (models / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return models


@pytest.fixture(scope="module")
def served(school: Path) -> Iterator[dict[str, ServedModel]]:
    with ServedModel(school / "teacher") as math, ServedModel(school / "code") as code:
        yield {"math": math, "code": code}


def train(
    runs: Runs,
    teachers: Mapping[str, FakeLocalTeacher] | None,
    addresses: Mapping[str, Any] = ADDRESSES,
    **settings: Any,
) -> int:
    """A run with two teachers, given or at their addresses."""
    text = io.StringIO()

    def connect(config: TrainConfig, device: str | None) -> Any:
        if teachers is None:
            return connect_teacher(config, device)
        (url,) = config.teacher_url
        return teachers[url.removeprefix("grpc://").removesuffix(":1")]

    settings = {"prompts": str(runs.models / "rows.jsonl"), "teacher": addresses, "teacher_url": [], **settings}
    try:
        return run_training(runs.config(**settings), console=Console(file=text, width=300), connect=connect)
    finally:
        runs.told = text.getvalue()


def local(runs: Runs, **of_code: Any) -> dict[str, FakeLocalTeacher]:
    return {
        "math": FakeLocalTeacher(runs.models / "teacher"),
        "code": FakeLocalTeacher(runs.models / "code", **of_code),
    }


def addresses_of(served: Mapping[str, ServedModel]) -> dict[str, list[str]]:
    for teacher in served.values():
        teacher.requests.clear()
    return {name: [teacher.url] for name, teacher in served.items()}


# ---------------------------------------------------------------- over real sockets


def test_a_row_goes_to_its_own_teacher_as_that_one_reads_it_and_nowhere_else(
    runs: Runs, school: Path, served: dict[str, ServedModel]
) -> None:
    addresses = addresses_of(served)
    eval_prompts = str(school / "rows.jsonl")
    assert train(runs, None, addresses, steps=2, prompts_per_step=3, eval_prompts=eval_prompts, eval_kl="support") == 0
    tokenizer = AutoTokenizer.from_pretrained(school / "code")
    seen = {
        name: {tokenizer.decode(request.context_ids.tolist()) for request in teacher.requests}
        for name, teacher in served.items()
    }
    # Greedy decoding by scoring asks about longer and longer contexts: those that begin with a row's are that row's.
    begun = {
        name: {f"{start}user\nsay {i}<|end|>{start}assistant\n" for i in numbers}
        for name, start, numbers in (("math", "<|start|>", (1, 2, 4, 5)), ("code", "##", (0, 3)))
    }
    assert begun["math"] <= seen["math"]
    assert begun["code"] <= seen["code"]
    assert all(text.startswith(tuple(begun[name])) for name, texts in seen.items() for text in texts)

    rows = runs.metrics()
    assert all(
        row["teacher/math/num_valid_tokens"] + row["teacher/code/num_valid_tokens"] == row["num_valid_tokens"]
        for row in rows
    )
    first, teachers_own, last = read_rows(runs.directory().evals_file)
    assert set(first["kl_by_teacher"]) == set(last["exact_match_by_teacher"]) == {"math", "code"}
    assert teachers_own["who"] == "teacher"
    assert (teachers_own["num_prompts"], set(teachers_own["exact_match_by_teacher"])) == (6, {"math", "code"})
    lowest, highest = sorted(first["kl_by_teacher"].values())
    assert lowest < first["kl_nats"] < highest
    assert "connecting to teacher code: " + served["code"].url in runs.told
    assert "teacher math: " in runs.told
    assert "; 4 prompts, 4 held out" in runs.told
    assert "teacher code: end tokens: student ends with <|end|>" in runs.told
    assert "    teacher code " in runs.told  # a row of the table at the end
    assert f"(code {rows[0]['teacher/code/kl_nats']:.4f}, math {rows[0]['teacher/math/kl_nats']:.4f})" in runs.told


@pytest.mark.parametrize("objective", ["opd", "full-kl"])
def test_losses_are_what_each_rows_own_teacher_makes_of_it_and_add_up(
    runs: Runs, school: Path, served: dict[str, ServedModel], objective: str
) -> None:
    addresses = addresses_of(served)
    head_cache = str(runs.output_dir.parent / "heads")
    settings = {"objective": objective, "prompts_per_step": NUM_PROMPTS, "steps": 1, "head_cache": head_cache}
    assert train(runs, None, addresses, **settings) == 0
    (row,) = read_rows(runs.directory().metrics_file)
    parts = {}
    for name, model in (("math", "teacher"), ("code", "code")):
        parts[name] = {key.split("/")[2]: value for key, value in row.items() if key.startswith(f"teacher/{name}/")}
        plain = [plain_logprobs(school, model, request, swap_ends=name == "code") for request in served[name].requests]
        if objective == "opd":
            kl_T = np.concatenate([pi_T - q_T for pi_T, q_T in map(of_sampled_tokens, plain)])
            loss_T = np.concatenate([(pi_T - q_T) * pi_T for pi_T, q_T in map(of_sampled_tokens, plain)])
        else:
            kl_T = loss_T = np.concatenate([(np.exp(pi_TV) * (pi_TV - q_TV)).sum(-1) for pi_TV, q_TV, _ in plain])
        assert parts[name]["num_valid_tokens"] == len(kl_T)
        assert parts[name]["kl_nats"] == pytest.approx(kl_T.mean(), abs=1e-4)
        assert parts[name]["loss"] == pytest.approx(loss_T.mean(), abs=1e-3)
    assert abs(parts["math"]["kl_nats"] - parts["code"]["kl_nats"]) > 0.1  # the two can be told apart

    def mean_over_teachers(metric: str) -> float:
        tokens = sum(part["num_valid_tokens"] for part in parts.values())
        return float(sum(part[metric] * part["num_valid_tokens"] for part in parts.values()) / tokens)

    for metric in ("loss", "kl_nats", "reward_nats", "support_size_mean", "variance"):
        assert mean_over_teachers(metric) == pytest.approx(row[metric], rel=1e-6, abs=1e-9)
    assert sum(part["wait_s"] for part in parts.values()) == pytest.approx(row["teacher_wait_s"])
    num_bytes = sum(part["bytes"] for part in parts.values())
    assert num_bytes == pytest.approx(row["teacher_bytes_per_token"] * row["num_valid_tokens"])
    assert min(part["bytes"] for part in parts.values()) > 0


Plain = tuple[np.ndarray, np.ndarray, np.ndarray]


def of_sampled_tokens(plain: Plain) -> tuple[np.ndarray, np.ndarray]:
    """[T] log pi and log q of what was sampled."""
    pi_TV, q_TV, completion_ids = plain
    rows = np.arange(len(completion_ids))
    return pi_TV[rows, completion_ids], q_TV[rows, completion_ids]


@torch.no_grad()
def plain_logprobs(school: Path, model: str, request: ScoreRequest, *, swap_ends: bool) -> Plain:
    """[T, V] log pi and log q where a teacher was asked, and the tokens, in the student's labels: a forward of each.

    swap_ends: the teacher ends otherwise; its two end tokens change places in what it says and in what it is asked.
    """
    tokenizer = AutoTokenizer.from_pretrained(school / "student")
    ends = tokenizer.convert_tokens_to_ids(["<|end|>", "<|other_end|>"])
    order_V = np.arange(len(tokenizer))
    if swap_ends:
        order_V[ends] = order_V[ends[::-1]]
    # The student reads the same text in its own chat template.
    text = tokenizer.decode(request.context_ids.tolist()).replace("##", "<|start|>")
    prompt_ids = np.array(tokenizer(text, add_special_tokens=False).input_ids)
    completion_ids = order_V[request.completion_ids]

    def logprobs_TV(directory: Path, context_ids: np.ndarray, completion_ids: np.ndarray) -> np.ndarray:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        ids_S = torch.from_numpy(np.concatenate([context_ids, completion_ids]))
        return np.asarray(model(ids_S[None]).logits[0, len(context_ids) - 1 : -1].log_softmax(-1))

    pi_TV = logprobs_TV(school / "student", prompt_ids, completion_ids)
    q_TV = logprobs_TV(school / model, request.context_ids, request.completion_ids)
    return pi_TV, q_TV[:, order_V], completion_ids


# ---------------------------------------------------------------- refused, by name


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (['{"prompt": "a", "teacher": "math"}', '{"prompt": "b"}'], DataError, r"some\.jsonl:2: no teacher is named"),
        (
            ['{"prompt": "a", "teacher": "maths"}'],
            DataError,
            r"some\.jsonl:1: no teacher 'maths'; there are code, math",
        ),
        (['{"prompt": "a", "teacher": "math"}'], ConfigError, "no row names teacher code"),
    ],
)
def test_rows_and_teachers_that_do_not_find_each_other_are_reported_before_anyone_is_asked(
    runs: Runs, tmp_path: Path, rows: list[str], error: type[Exception], message: str
) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(rows) + "\n")
    with pytest.raises(error, match=message):
        train(runs, {}, prompts=str(path))
    assert "connecting" not in runs.told
    assert not runs.directory().path.exists()


def test_a_row_that_names_a_teacher_is_not_sent_to_one_without_a_name(runs: Runs, school: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: no teacher 'code'; the run's only teacher has no name"):
        runs.train(prompts=str(school / "rows.jsonl"))


@pytest.mark.parametrize(
    ("of_code", "error", "message"),
    [
        ({"fingerprint": "another"}, HandshakeError, "^teacher code: student and teacher have different tokenizers"),
        ({"max_context_length": 12}, DataError, r"^teacher code: .*rows\.jsonl:1: teacher's context .* maximum 12"),
        ({"supports": frozenset({"sampled"})}, HandshakeError, "^teacher code: .*needs a support"),
    ],
)
def test_every_teacher_is_checked_before_the_run_starts_and_the_one_that_does_not_fit_is_named(
    runs: Runs, school: Path, of_code: dict[str, Any], error: type[Exception], message: str
) -> None:
    teachers = local(runs, **of_code)
    with pytest.raises(error, match=message):
        train(runs, teachers)
    assert [teacher.calls for teacher in teachers.values()] == [0, 0]
    assert all(teacher.closed for teacher in teachers.values())


def test_what_is_asked_is_each_teachers_own(runs: Runs, school: Path) -> None:
    """`code` cannot gather the student's ids, and its end is dropped from the loss; neither is so for `math`."""
    teachers = local(runs, supports=frozenset({"sampled", "teacher_top_k"}))
    settings = {"end_token": "drop", "max_new_tokens": 64, "rollouts_per_prompt": 4, "prompts_per_step": NUM_PROMPTS}
    assert train(runs, teachers, steps=1, **settings) == 0
    assert "teacher code: support: this teacher cannot score the student's own top-k" in runs.told
    assert "teacher math: support" not in runs.told
    (row,) = runs.metrics()
    num_dropped = row["completion_tokens_mean"] * 4 * NUM_PROMPTS - row["num_valid_tokens"]
    num_ended = row["ended_fraction"] * 4 * NUM_PROMPTS
    assert 0 < num_dropped < num_ended  # those of code's rows alone
    assert row["teacher/code/support_size_mean"] == pytest.approx(16, abs=1)
    assert row["teacher/math/support_size_mean"] == 16


# ---------------------------------------------------------------- going on


def interrupt_at(call: int) -> Callable[[int], None]:
    return lambda number: os.kill(os.getpid(), signal.SIGINT) if number == call else None


def fail_at(call: int, error: Exception) -> Callable[[int], None]:
    def fail(number: int) -> None:
        if number == call:
            raise error

    return fail


def without_traffic(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A request that is sent again, or fails, has other bytes."""
    return [
        {key: value for key, value in row.items() if key.rsplit("/")[-1] not in ("bytes", "teacher_bytes_per_token")}
        for row in rows
    ]


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_run_that_ends_early_goes_on_to_the_bits_of_the_undisturbed_one(
    runs: Runs, school: Path, max_staleness: int
) -> None:
    settings = {"max_staleness": max_staleness, "deterministic": True, "steps": 5, "prompts_per_step": 3}
    assert train(runs, local(runs), name="undisturbed", **settings) == 0
    gone = TeacherUnavailableError("no progress for 600 s")
    assert train(runs, local(runs, on_submit=fail_at(5, gone)), **settings) == 3
    assert "the teacher is gone: teacher code: no progress for 600 s" in runs.told
    assert train(runs, local(runs, on_submit=interrupt_at(5)), resume=True, **settings) == 130
    assert train(runs, local(runs), resume=True, **settings) == 0
    assert "going on after step" in runs.told
    assert without_traffic(runs.metrics()) == without_traffic(runs.metrics("undisturbed"))
    assert same_bits(runs.weights(), runs.weights("undisturbed"))


def test_a_resumed_run_insists_on_the_teacher_behind_every_name(runs: Runs, school: Path) -> None:
    settings = {"steps": 2, "deterministic": True, "schedule": "constant"}
    assert train(runs, local(runs), **settings) == 0
    settings |= {"steps": 3, "resume": True}
    with pytest.raises(CheckpointError, match="teacher_model_revision: code=1, math=1 -> code=2, math=1"):
        train(runs, local(runs, model_revision="2"), **settings)
    in_another_order = dict(reversed(ADDRESSES.items()))
    assert train(runs, local(runs), in_another_order, **settings) == 0
