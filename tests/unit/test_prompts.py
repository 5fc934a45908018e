"""Prompt files are read, bad rows are named by file and line, and both sides' contexts are what the models saw
in training: rendered by the right template, without tokens that nobody asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tiny_model import tiny_tokenizer
from vopd_client.errors import DataError
from vopd_client.prompts import Prompt, PromptRow, RowFormat, load_prompts, render_prompts

USER = {"role": "user", "content": "Hi"}


def write_rows(path: Path, *rows: object) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), "utf-8")
    return str(path)


# ---------------------------------------------------------------- reading


def test_rows_of_a_jsonl_file_know_their_line(tmp_path: Path) -> None:
    spec = write_rows(
        tmp_path / "data.jsonl",
        {"prompt": "2+2=", "answer": "4", "kind": "sum"},
        "",
        {"messages": [USER], "teacher_prompt": "Hint: hello.", "answer": "o$", "verifier": "regex"},
    )
    first, second = load_prompts(spec, default_verifier="contains")
    assert (first.index, first.source, first.prompt) == (0, f"{spec}:1", "2+2=")
    assert (first.answer, first.verifier, first.kind) == ("4", "contains", "sum")
    assert (second.index, second.source, second.messages) == (1, f"{spec}:3", (USER,))
    assert (second.teacher_prompt, second.verifier) == ("Hint: hello.", "regex")


def test_a_row_without_an_answer_needs_no_verifier(tmp_path: Path) -> None:
    (row,) = load_prompts(write_rows(tmp_path / "data.jsonl", {"prompt": "a"}), default_verifier="math")
    assert row.answer is None
    assert row.verifier is None


def test_a_parquet_file_reads_like_the_same_jsonl_file(tmp_path: Path) -> None:
    values: list[dict[str, Any]] = [
        {"messages": [{"role": "system", "content": "Be kind."}, USER], "prompt": None, "answer": "b"},
        {"messages": None, "prompt": "plain", "answer": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "data.parquet")
    from_jsonl = load_prompts(write_rows(tmp_path / "data.jsonl", *values))
    from_parquet = load_prompts(str(tmp_path / "data.parquet"))
    assert [row.source for row in from_parquet] == [f"{tmp_path}/data.parquet:{n}" for n in (1, 2)]
    assert [contents(row) for row in from_parquet] == [contents(row) for row in from_jsonl]


def test_a_data_set_is_read_by_name_and_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    splits = {
        name: datasets.Dataset.from_list([{"prompt": f"{name} 1", "id": 1}, {"prompt": f"{name} 2", "id": 2}])
        for name in ("train", "test")
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    for name, split in splits.items():
        split.to_parquet(tmp_path / "files" / f"{name}.parquet")
    for directory in ("saved", "files"):
        spec = f"{tmp_path}/{directory}"
        caplog.clear()
        with caplog.at_level("INFO", logger="vopd_client.prompts"):
            assert [row.prompt for row in load_prompts(f"{spec}:test")] == ["test 1", "test 2"]
        assert "columns left out: id" in caplog.text
        assert [row.source for row in load_prompts(spec)] == [f"{spec}:1", f"{spec}:2"]
        assert load_prompts(spec)[0].prompt == "train 1"  # the split called train, where none is named
        with pytest.raises(DataError, match=r"no split 'dev'.*train"):
            load_prompts(f"{spec}:dev")


def test_a_data_set_without_our_columns_says_what_it_has(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([{"question": "q", "solution": "s"}]).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="column prompt or messages; this one has question, solution"):
        load_prompts(str(tmp_path / "saved"))


def test_a_name_that_is_nothing_says_what_was_tried(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file, and not a data set that can be loaded"):
        load_prompts(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        load_prompts(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(DataError, match=r"data\.csv: prompts are read from \.jsonl"):
        load_prompts("data.csv")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"bad\.parquet: not a readable Parquet file"):
        load_prompts(str(tmp_path / "bad.parquet"))
    with pytest.raises(DataError, match=r"empty\.jsonl: holds no rows"):
        load_prompts(write_rows(tmp_path / "empty.jsonl", ""))


def test_a_configuration_of_a_data_set_is_named_between_name_and_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    directory = tmp_path / "files"
    directory.mkdir()
    for name in ("en", "cn"):
        datasets.Dataset.from_list([{"prompt": f"in {name}"}]).to_parquet(directory / f"{name}.parquet")
    (directory / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files: en.parquet\n- config_name: cn\n  data_files: cn.parquet\n---\n"
    )
    (row,) = load_prompts(f"{directory}:en:train")
    assert (row.prompt, row.source) == ("in en", f"{directory}:en:train:1")
    with pytest.raises(DataError, match=r"files: no such file, and not a data set .*(?i:config).*en"):
        load_prompts(f"{directory}:train")
    with pytest.raises(DataError, match="a data set is name, name:split or name:configuration:split"):
        load_prompts(f"{directory}:en:train:7")
    datasets.Dataset.from_list([{"prompt": "a"}]).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="no configuration 'en': a saved data set has none"):
        load_prompts(f"{tmp_path}/saved:en:train")


# ---------------------------------------------------------------- rows of others

THEIRS = RowFormat(prompt_column="problem", answer_column="solution", prompt_suffix="\n\nThink.")


def test_named_columns_are_read_and_all_others_left_out(tmp_path: Path) -> None:
    values = [{"problem": "1+1?", "solution": "2", "answer": ["not text"], "kind": 7, "id": 1}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "data.parquet")
    import datasets

    datasets.Dataset.from_list(values).save_to_disk(tmp_path / "saved")
    for spec in (write_rows(tmp_path / "data.jsonl", *values), f"{tmp_path}/data.parquet", f"{tmp_path}/saved"):
        (row,) = load_prompts(spec, default_verifier="math", row_format=THEIRS)
        assert contents(row) == ("1+1?\n\nThink.", None, "2", "math", None)


def test_a_column_that_is_not_named_has_our_name_and_an_answer_may_be_missing(tmp_path: Path) -> None:
    spec = write_rows(tmp_path / "data.jsonl", {"problem": "a", "answer": "1", "x": 0}, {"problem": "b"})
    rows = load_prompts(spec, row_format=RowFormat(prompt_column="problem"))
    assert [(row.prompt, row.answer) for row in rows] == [("a", "1"), ("b", None)]
    spec = write_rows(tmp_path / "data.jsonl", {"prompt": "a", "solution": "1", "x": 0})
    (row,) = load_prompts(spec, row_format=RowFormat(answer_column="solution"))
    assert (row.prompt, row.answer) == ("a", "1")


@pytest.mark.parametrize(("answer", "text"), [(70, "70"), (27.0, "27"), (0.5, "0.5"), ("70", "70"), (-3, "-3")])
def test_a_named_column_may_hold_numbers_as_answers(tmp_path: Path, answer: object, text: str) -> None:
    spec = write_rows(tmp_path / "data.jsonl", {"problem": "a", "solution": answer})
    assert load_prompts(spec, row_format=THEIRS)[0].answer == text


def test_a_named_column_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    import datasets

    value = {"question": "q", "solution": "1"}
    problem = r"no column 'problem' \(prompt_column\); there are question, solution"
    with pytest.raises(DataError, match=rf"data\.jsonl:1: {problem}"):
        load_prompts(write_rows(tmp_path / "data.jsonl", value), row_format=THEIRS)
    datasets.Dataset.from_list([value]).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=rf"saved: {problem}"):
        load_prompts(f"{tmp_path}/saved", row_format=THEIRS)
    with pytest.raises(DataError, match=r"no column 'solution' \(answer_column\); there are problem"):
        load_prompts(write_rows(tmp_path / "data.jsonl", {"problem": "a"}), row_format=THEIRS)
    with pytest.raises(DataError, match=r"this one has question, solution\. prompt_column names another one"):
        load_prompts(f"{tmp_path}/saved", row_format=RowFormat(answer_column="solution"))


def test_a_suffix_ends_every_plain_prompt_on_both_sides_but_not_a_teacher_s_own(tmp_path: Path) -> None:
    spec = write_rows(tmp_path / "data.jsonl", {"prompt": "a"}, {"prompt": "b", "teacher_prompt": "c"})
    rows = load_prompts(spec, row_format=RowFormat(prompt_suffix=" End."))
    assert [(row.prompt, row.teacher_prompt) for row in rows] == [("a End.", None), ("b End.", "c")]
    spec = write_rows(tmp_path / "data.jsonl", {"messages": [USER]})
    with pytest.raises(DataError, match=r"data\.jsonl:1: prompt_suffix goes after plain text"):
        load_prompts(spec, row_format=RowFormat(prompt_suffix=" End."))


# ---------------------------------------------------------------- malformed rows


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{'prompt': 'a'}", "not JSON at column 2: Expecting property name"),
        ('["a"]', "a row is an object with the key prompt or messages, not a list"),
        ({}, "neither prompt nor messages"),
        ({"prompt": None, "kind": "x"}, "neither prompt nor messages"),
        ({"prompt": "a", "messages": [USER]}, "either prompt or messages, not both"),
        ({"prompt": "a", "teacher_prompt": "b", "teacher_messages": [USER]}, "either teacher_prompt or"),
        ({"prompt": "a", "anwser": "b"}, "unknown key 'anwser'; did you mean 'answer'?"),
        ({"prompt": "a", "xyzzy": "b"}, "unknown key 'xyzzy'"),
        ({"prompt": 7}, "prompt must be text, not a number"),
        ({"prompt": "a", "answer": 42}, "answer must be text, not a number"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": "a", "answer": ""}, "answer is empty"),
        ({"prompt": "a", "answer": "b", "verifier": "exakt"}, "unknown verifier 'exakt'; did you mean 'exact'?"),
        ({"prompt": "a", "verifier": "exact"}, "a verifier without an answer"),
        ({"prompt": "a", "answer": "(", "verifier": "regex"}, "answer: not a regular expression"),
        ({"messages": "Hi"}, "messages must be a list of messages, not text"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["Hi"]}, r"messages[0] must be an object with role and content, not text"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "unknown role 'usr'; did you mean 'user'?"),
        ({"messages": [{"content": "a"}]}, "messages[0]: no role"),
        ({"messages": [{"role": "user"}]}, "messages[0]: content must be text, not null"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0]: content must be text, not a list"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages[0]: content is empty"),
        ({"messages": [{"role": "user", "contents": "a"}]}, "unknown key 'contents'; did you mean 'content'?"),
        ({"messages": [USER, {"role": "assistant", "content": "a"}]}, "messages ends with the assistant"),
        ({"prompt": "a", "teacher_messages": [{"role": "x", "content": "a"}]}, "teacher_messages[0]: unknown"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path: Path, row: object, problem: str) -> None:
    spec = write_rows(tmp_path / "data.jsonl", {"prompt": "fine"}, "", row)
    with pytest.raises(DataError) as caught:
        load_prompts(spec)
    assert str(caught.value).startswith(f"{spec}:3: ")
    assert problem in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_the_run_s_default_verifier_checks_the_answers_too(tmp_path: Path) -> None:
    spec = write_rows(tmp_path / "data.jsonl", {"prompt": "a", "answer": "("})
    assert load_prompts(spec)[0].verifier == "exact"
    with pytest.raises(DataError, match=r"data\.jsonl:1: answer: not a regular expression"):
        load_prompts(spec, default_verifier="regex")


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"data\.jsonl:2: not UTF-8 at byte 13 of the line"):
        load_prompts(str(path))


def test_the_first_five_bad_rows_are_reported_at_once(tmp_path: Path) -> None:
    spec = write_rows(tmp_path / "data.jsonl", *[{"promt": n} if n % 2 else {"prompt": "a"} for n in range(20)])
    with pytest.raises(DataError) as caught:
        load_prompts(spec)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:5]] == [f"{spec}:{number}" for number in (2, 4, 6, 8, 10)]
    assert lines[5:] == ["(looked no further after 5 bad rows)"]


def test_reading_prompts_does_not_import_torch() -> None:
    script = "import sys, vopd_client.prompts; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# ---------------------------------------------------------------- rendering

TEACHER_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[reply]{% endif %}"
)


def render(tmp_path: Path, *rows: dict[str, Any], tokenizer: Any = None, **overrides: Any) -> list[Prompt]:
    settings: dict[str, Any] = {
        "teacher_chat_template": TEACHER_TEMPLATE,
        "max_prompt_tokens": 100,
        "max_new_tokens": 10,
        "student_max_length": 200,
        "teacher_max_length": 400,
    }
    return render_prompts(
        load_prompts(write_rows(tmp_path / "data.jsonl", *rows)),
        tokenizer=tokenizer or tiny_tokenizer(),
        **(settings | overrides),
    )


def test_a_chat_goes_through_each_side_s_own_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    (prompt,) = render(tmp_path, {"messages": [{"role": "system", "content": "Be kind."}, USER]})
    assert tokenizer.decode(prompt.student_ids) == (
        "<|start|>system\nBe kind.<|end|><|start|>user\nHi<|end|><|start|>assistant\n"
    )
    assert tokenizer.decode(prompt.teacher_ids) == "<|start|>[system] Be kind.<|end|>[user] Hi<|end|>[reply]"
    assert prompt.student_ids.dtype == np.int64
    assert prompt.text == "Hi"


def test_the_teacher_s_own_begin_and_end_tokens_fill_its_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    (prompt,) = render(
        tmp_path,
        {"messages": [USER]},
        teacher_begin_id=tokenizer.convert_tokens_to_ids("<|end|>"),
        teacher_end_id=tokenizer.convert_tokens_to_ids("<|other_end|>"),
    )
    assert tokenizer.decode(prompt.teacher_ids) == "<|end|>[user] Hi<|other_end|>[reply]"
    assert tokenizer.decode(prompt.student_ids) == "<|start|>user\nHi<|end|><|start|>assistant\n"


def test_the_teacher_may_see_another_context(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    few_shot = [USER, {"role": "assistant", "content": "Hello"}, USER]
    same, plain, chat = render(
        tmp_path,
        {"prompt": "Hi"},
        {"messages": [USER], "teacher_prompt": "Say hello: "},
        {"prompt": "Hi", "teacher_messages": few_shot},
    )
    assert tokenizer.decode(same.teacher_ids) == tokenizer.decode(same.student_ids) == "Hi"
    assert tokenizer.decode(plain.teacher_ids) == "Say hello: "
    assert tokenizer.decode(chat.teacher_ids).endswith("[assistant] Hello<|end|>[user] Hi<|end|>[reply]")


def test_a_begin_token_is_added_to_plain_text_and_not_doubled_in_a_chat(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", tokenizer.bos_token_id)]
    )
    plain, chat = render(tmp_path, {"prompt": "Hi"}, {"messages": [USER]}, tokenizer=tokenizer)
    assert tokenizer.decode(plain.student_ids) == "<|start|>Hi"
    assert tokenizer.decode(chat.student_ids) == "<|start|>user\nHi<|end|><|start|>assistant\n"
    assert tokenizer.decode(chat.teacher_ids) == "<|start|>[user] Hi<|end|>[reply]"


def test_a_missing_chat_template_says_whose(tmp_path: Path) -> None:
    without = tiny_tokenizer()
    without.chat_template = None
    with pytest.raises(DataError, match=r"data\.jsonl:1: messages need .* the student's tokenizer has none"):
        render(tmp_path, {"messages": [USER]}, tokenizer=without)
    with pytest.raises(DataError, match=r"data\.jsonl:1: teacher_messages need .* the teacher has none"):
        render(tmp_path, {"prompt": "a", "teacher_messages": [USER]}, teacher_chat_template="")
    (prompt,) = render(tmp_path, {"prompt": "a"}, tokenizer=without, teacher_chat_template="")
    assert len(prompt.student_ids) == 1


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% for message in messages %}", "Unexpected end of template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ 'a' * 5000000 }}", "renders 5000000 characters, more than 4000000"),
        ("{#" + "x" * 200_000 + "#}", "has 200004 characters, more than 200000"),
        ("{% if 1 %}{% endif %}", "the teacher would see no tokens"),
    ],
)
def test_a_teacher_s_template_is_untrusted(tmp_path: Path, template: str, problem: str) -> None:
    with pytest.raises(DataError, match=rf"data\.jsonl:1: .*{problem}"):
        render(tmp_path, {"messages": [USER]}, teacher_chat_template=template)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"max_prompt_tokens": 11}, "prompt 12 tokens > max_prompt_tokens 11"),
        (
            {"student_max_length": 21},
            "student's context 12 + completion 10 tokens > the student's maximum 21",
        ),
        (
            {"teacher_max_length": 29},
            "teacher's context 20 + completion 10 tokens > the teacher's maximum 29",
        ),
    ],
)
def test_lengths_are_checked_with_room_for_the_longest_completion(
    tmp_path: Path, overrides: dict[str, int], problem: str
) -> None:
    row = {"prompt": "a" * 12, "teacher_prompt": "b" * 20}
    (limit,) = overrides
    render(tmp_path, row, **{limit: overrides[limit] + 1})  # the limit itself is allowed
    with pytest.raises(DataError) as caught:
        render(tmp_path, {"prompt": "a"}, row, **overrides)
    assert str(caught.value) == f"{tmp_path}/data.jsonl:2: {problem}"


def contents(row: PromptRow) -> tuple[object, ...]:
    return (row.prompt, row.messages, row.answer, row.verifier, row.kind)
