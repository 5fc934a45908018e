"""Tasks of reasoning-gym as prompts: the same rows everywhere, scored by the task itself, and never run as code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
from reasoning_gym.utils import SYSTEM_PROMPTS
from reasoning_gym.utils import extract_answer as its_extract_answer

from tiny_model import tiny_tokenizer
from vopd_client.cli import main
from vopd_client.errors import DataError
from vopd_client.extraction import tagged_answer
from vopd_client.judging import is_right, reward
from vopd_client.prompt_rows import PromptRow, RowFormat
from vopd_client.prompts import Prompt, load_prompts, open_stream, render_prompts
from vopd_client.reasoning_gym_prompts import ANY_ANSWER, parse_task_spec
from vopd_client.reasoning_gym_rows import check_parameters, make, runs_answers, task_seed
from vopd_client.reasoning_gym_scores import TaskItem, is_harmless
from vopd_client.sampled_evaluation import judge_samples

TASKS = ["chain_sum", "word_ladder", "graph_color", "countdown"]
SPEC = f"reasoning-gym:{'+'.join(TASKS)}?size=3&seed=1&chain_sum.max_terms=3&chain_sum.min_terms=3"


@pytest.fixture(scope="module")
def rows() -> list[PromptRow]:
    return load_prompts(SPEC)


def prompt_of(row: PromptRow) -> Prompt:
    """As the trainer has it, whatever the tokenizer."""
    plain = PromptRow(**vars(row) | {"prompt": "2+2?", "messages": None})
    (prompt,) = render_prompts(
        [plain], tokenizer=tiny_tokenizer(), teacher_chat_template="", max_prompt_tokens=99, max_new_tokens=9,
        student_max_length=999, teacher_max_length=999,
    )  # fmt: skip
    return prompt


def test_tasks_take_turns_and_every_row_has_what_its_task_made(rows: list[PromptRow]) -> None:
    assert [row.kind for row in rows] == TASKS * 3
    assert [row.index for row in rows] == list(range(12))
    assert rows[4].source == "reasoning-gym:chain_sum:2"
    assert {row.verifier for row in rows} == {"reasoning-gym"}
    system, user = rows[0].messages or ()
    assert system == {"role": "system", "content": SYSTEM_PROMPTS["default"].strip()}
    made = reasoning_gym.create_dataset("chain_sum", size=3, seed=task_seed("chain_sum", 1), min_terms=3, max_terms=3)
    assert [row.answer for row in rows[::4]] == [item["answer"] for item in made]
    assert user["content"] == made[0]["question"]


def test_the_same_specification_gives_the_same_rows_though_a_generator_iterates_over_sets(
    rows: list[PromptRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "7")  # word_ladder's rows depend on it, and it must not reach them
    assert load_prompts(SPEC) == rows


def test_rows_of_one_seed_are_not_those_of_the_next() -> None:
    made = [make({"tasks": [["chain_sum", {"size": 40, "seed": seed}]], "system_prompt": "none"}) for seed in (1, 2)]
    first, second = ({entry["question"] for entry in it.tasks[0].entries} for it in made)
    # Four of about 10^8 questions of long sums could meet by chance; in reasoning-gym 39 of 40 are shared.
    assert len(first & second) < 5


def test_plain_text_has_the_system_prompt_before_the_question_and_the_suffix_behind(rows: list[PromptRow]) -> None:
    spec = "reasoning-gym:chain_sum?size=1&seed=1&min_terms=3&max_terms=3&chat=false&system_prompt=direct&teacher=math"
    plain = load_prompts(spec, row_format=RowFormat(prompt_column="ignored", prompt_suffix="\nGo."))
    question = (rows[0].messages or ())[-1]["content"]
    assert plain[0].prompt == f"{SYSTEM_PROMPTS['direct']}\n\n{question}\nGo."
    assert plain[0].teacher == "math"
    with pytest.raises(DataError, match="prompt_suffix goes after plain text"):
        RowFormat(prompt_suffix="\nGo.").suffixed({"messages": rows[0].messages}, "row 1")


# ---------------------------------------------------------------- scores


def test_a_task_scores_right_wrong_and_partly_right_answers(rows: list[PromptRow]) -> None:
    prompt = prompt_of(rows[0])
    answer = prompt.answer or ""
    right = f"Let me see.\n<answer>{answer}</answer>"
    assert reward(prompt, right) == reward(prompt, f"so\n {answer}") == 1.0
    assert reward(prompt, f"<answer>{answer}.0</answer>") == 1.0  # the task knows that these are equal
    partly = f"<answer>it is {answer}</answer>"
    assert reward(prompt, partly) == pytest.approx(len(answer) / len(f"it is {answer}"))
    assert reward(prompt, "<answer>nothing</answer>") == reward(prompt, "") == 0.0
    assert is_right(prompt, right)
    assert not is_right(prompt, partly)


def test_only_a_full_score_counts_in_avg_pass_and_maj(rows: list[PromptRow]) -> None:
    prompt = prompt_of(rows[0])
    right, partly = f"<answer>{prompt.answer}</answer>", f"<answer>is {prompt.answer}</answer>"
    judged = judge_samples(prompt, [partly, right, partly, "<answer></answer>"])
    assert judged.correct == (False, True, False, False)
    assert judged.answers == (f"is {prompt.answer}", prompt.answer, f"is {prompt.answer}", None)
    assert (judged.majority, judged.is_majority_right) == (0, False)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer> 7 </answer>", "7"),
        ("<answer>1</answer> no, <answer>\n2\n</answer>.", "2"),
        ("<think><answer>1</answer></think> <answer>2", "1"),
        ("a\nb\n\n 9 \n", "9"),
        ("<think>5</think>\nsix", "six"),
        ("  ", None),
    ],
)
def test_the_answer_is_in_the_last_tags_or_the_last_line(text: str, answer: str | None) -> None:
    assert tagged_answer(text) == answer
    if (theirs := its_extract_answer(text)) is not None:
        assert tagged_answer(text) == theirs


def test_a_task_that_gives_no_example_accepts_any_right_answer(rows: list[PromptRow]) -> None:
    row = rows[TASKS.index("graph_color")]
    assert row.answer == ANY_ANSWER
    assert row.task_item is not None
    assert row.task_item.score("not a colouring") < 1


# ---------------------------------------------------------------- answers are text, not code


def test_scorers_that_run_answers_are_known_and_get_arithmetic_alone(rows: list[PromptRow], tmp_path: Path) -> None:
    classes = {name: entry[0] for name, entry in reasoning_gym.factory.DATASETS.items()}
    assert runs_answers(classes["countdown"])  # sympy's parser, which calls eval
    assert runs_answers(classes["spiral_matrix"])
    assert not runs_answers(classes["chain_sum"])
    assert not runs_answers(classes["number_sorting"])  # evaluates its own answer, not the completion's
    row = rows[TASKS.index("countdown")]
    item = row.task_item
    assert item is not None
    assert item.runs_answers
    assert item.score(row.answer) == 1.0
    attack = tmp_path / "attack"
    assert item.score(f"__import__('pathlib').Path({str(attack)!r}).touch()") == 0.0
    # What would happen otherwise, so that the line above proves something:
    TaskItem(item.task, item.parameters, item.entry).score(f"__import__('pathlib').Path({str(attack)!r}).touch()")
    assert attack.exists()


@pytest.mark.parametrize("answer", ["1 + 2*(3-4)/5", "[[1, 2], [3, 4]]", "0x1f", ""])
def test_arithmetic_is_harmless(answer: str) -> None:
    assert is_harmless(answer)


@pytest.mark.parametrize("answer", ["9**9**9", "9* *9", "exit()", "x", "1e999", "1" * 20, "+" * 600])
def test_anything_else_is_not(answer: str) -> None:
    assert not is_harmless(answer)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("task", "parameters", "message"),
    [
        ("chainsum", {}, "unknown task 'chainsum'; did you mean 'chain_sum'"),
        ("composite", {}, "unknown task 'composite'"),
        ("chain_sum", {"max_term": 3}, "unknown parameter of chain_sum 'max_term'; did you mean 'max_terms'"),
        ("chain_sum", {"max_terms": "x"}, "chain_sum: max_terms is like 6, not 'x'"),
        ("chain_sum", {"max_terms": 1, "min_terms": 3}, "AssertionError: max_terms must be >= min_terms"),
    ],
)
def test_what_reasoning_gym_does_not_have_is_refused_with_what_is_near(
    task: str, parameters: dict[str, Any], message: str
) -> None:
    made = make({"tasks": [[task, {"size": 1, "seed": 1} | parameters]], "system_prompt": "none"})
    assert message in made.problem


def test_a_problem_and_a_task_that_would_run_code_are_errors_of_the_specification() -> None:
    made = make({"tasks": [["lcm", {"size": 1, "seed": 1}]], "system_prompt": "dflt"})
    assert "unknown system_prompt 'dflt'; did you mean 'default'?" in made.problem
    with pytest.raises(DataError, match="by running the answer as Python code"):
        load_prompts("reasoning-gym:simple_integration?size=1")
    with pytest.raises(DataError, match="lcm\\?nubmers=3: unknown parameter of lcm 'nubmers'"):
        load_prompts("reasoning-gym:lcm?nubmers=3")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "write reasoning-gym:task"),
        ("lcm+lcm", "each of them once"),
        ("lcm?size", "'size' is no parameter: write name=value, joined by &"),
        ("lcm?gcd.size=3", "gcd.size: there is no task 'gcd' in it; there are lcm"),
        ("lcm?size=0", "size of lcm is a whole number from 1, not 0"),
        ("lcm?seed=-1", "seed of lcm is a whole number from 0, not -1"),
        ("lcm?chat=maybe", "chat is true or false, not 'maybe'"),
    ],
)
def test_a_specification_that_cannot_be_read_says_why(spec: str, message: str) -> None:
    with pytest.raises(DataError) as raised:
        parse_task_spec(f"reasoning-gym:{spec}")
    assert message in str(raised.value)


def test_parameters_have_the_types_of_their_defaults() -> None:
    defaults = {"n": 3, "p": 0.5, "flag": True, "names": ("a",), "word": "x", "when": Path()}
    given = {"n": 4, "p": 1, "flag": False, "names": ["b", "c"], "word": "y"}
    assert check_parameters("t", given, defaults) == given | {"names": ("b", "c")}
    for name, value in (("n", True), ("n", 1.5), ("p", "x"), ("flag", 1), ("names", "b"), ("word", 1)):
        with pytest.raises(ValueError, match=f"t: {name} is like"):
            check_parameters("t", {name: value}, defaults)
    with pytest.raises(ValueError, match="when cannot be set here"):
        check_parameters("t", {"when": "now"}, defaults)


def test_rows_are_not_streamed_and_files_have_no_such_verifier(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="leave out stream_prompts"):
        open_stream(SPEC)
    (tmp_path / "data.jsonl").write_text('{"prompt": "x", "answer": "7", "verifier": "reasoning-gym"}\n')
    assert main(["eval", "--model", "m", "--prompts", str(tmp_path / "data.jsonl")]) == 2
    assert "verifier reasoning-gym is for rows that a task made" in capsys.readouterr().err


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"reasoning-gym is not installed: pip install 'vopd\[tasks\]'"):
        load_prompts(SPEC)
