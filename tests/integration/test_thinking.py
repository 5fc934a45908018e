"""`thinking` in whole commands: both sides are asked alike, in training and in evaluation."""

from __future__ import annotations

import io
import json
from concurrent.futures import Future
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from fake_local_teacher import FakeLocalTeacher
from tiny_model import CHAT_TEMPLATE, write_tiny_model
from training_runs import Runs
from vopd_client.command_config import EvalConfig
from vopd_client.errors import ConfigError
from vopd_client.eval_command import run_eval
from vopd_client.types import SequenceScores, SequenceToScore

pytestmark = pytest.mark.usefixtures("fresh_process_state", "no_report")

STUDENTS = CHAT_TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}"
TEACHERS = (
    "{% if not thinking is defined %}{% set thinking = true %}{% endif %}" + CHAT_TEMPLATE
) + "{{ '' if thinking else '<no>' }}"


class Asked(FakeLocalTeacher):
    """Remembers the contexts that it was asked about."""

    def __init__(self, directory: Path, chat_template: str) -> None:
        super().__init__(directory, chat_template=chat_template)
        self.contexts: set[str] = set()

    def submit(self, sequence: SequenceToScore) -> Future[SequenceScores]:
        self.contexts.add(self._tokenizer.decode(sequence.context_ids))
        return super().submit(sequence)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose chat template can close the thoughts before the reply."""
    directory = write_tiny_model(tmp_path_factory.mktemp("thinking") / "student", seed=1)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = STUDENTS
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def chats(tmp_path: Path) -> str:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}], "answer": "Hi"}) + "\n")
    return str(path)


def test_student_and_teacher_see_the_same_beginning_of_the_reply(runs: Runs, student: Path, chats: str) -> None:
    for thinking, ending in (("auto", "assistant\n"), ("yes", "assistant\n"), ("no", "assistant\n<no>")):
        teacher = Asked(runs.models / "teacher", TEACHERS)
        settings = {"student": str(student), "prompts": chats, "eval_prompts": chats, "eval_teacher": "no"}
        assert runs.train(teacher, name=thinking, steps=1, thinking=thinking, **settings) == 0
        assert teacher.contexts == {f"<|start|>user\nHi<|end|><|start|>{ending}"}


def test_a_template_without_the_switch_is_refused_on_either_side(runs: Runs, student: Path, chats: str) -> None:
    with pytest.raises(ConfigError, match="the student's chat template reads none of enable_thinking, thinking"):
        runs.train(Asked(runs.models / "teacher", TEACHERS), prompts=chats, thinking="no")
    with pytest.raises(ConfigError, match="the teacher's chat template reads none of enable_thinking, thinking"):
        runs.train(prompts=chats, student=str(student), thinking="no", name="other")
    with pytest.raises(ConfigError, match="thinking no has no effect: no row has messages"):
        runs.train(thinking="no", student="nowhere", name="plain")  # before the student is looked for


def test_the_evaluation_command_thinks_or_not(student: Path, chats: str) -> None:
    def completion(thinking: str) -> str:
        console = Console(file=io.StringIO(), width=200)
        config = EvalConfig(model=str(student), prompts=chats, thinking=thinking, max_new_tokens=8, device="cpu")
        evaluation = run_eval(config, console)
        return str(evaluation.samples[0].completion)  # type: ignore[union-attr]

    assert completion("auto") == completion("yes") != completion("no")  # the prompts differ, and so do the replies
