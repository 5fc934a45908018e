"""What a model card says, of whom it says it, and what it keeps to itself."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from vopd_client.checkpoint import TrainerState
from vopd_client.ending import summarise
from vopd_client.model_card import Exported, license_of, model_name, prompts_name, render_card
from vopd_client.train_config import TrainConfig

STATE = TrainerState(
    step=20, train_seconds=3720.0, teacher_wait_seconds=61.0, teacher_bytes=10_000, num_valid_tokens=100
)


def teacher(model_id: str, *, name: str = "", **facts: str) -> dict[str, str]:
    return {
        "name": name, "model_id": model_id, "model_revision": "r1", "dtype": "bfloat16", "engine": "vllm 0.32",
        "support": "student", **facts,
    }  # fmt: skip


def card(
    *teachers: dict[str, str],
    student: str = "Org/Small-1B",
    export: Any = "merged",
    chats: bool = True,
    base_card: str = "",
    evaluations: list[dict[str, Any]] | None = None,
    provenance: dict[str, Any] | None = None,
    state: TrainerState | None = None,
    **settings: Any,
) -> tuple[dict[str, Any], str]:
    """The metadata and the rest."""
    config = TrainConfig(
        **{"student": student, "prompts": "Org/math:train", "teacher_url": ["grpc://x:1"], "steps": 20} | settings
    )
    known = {
        "student_revision": "5f3a",
        "teachers": list(teachers) or [teacher("Org/Big-70B")],
        "num_prompts": 500,
        "num_held_out_prompts": 50,
        "versions": {"Python": "3.11.7", "vopd": "0.1.0"},
    }
    text = render_card(
        config,
        known | (provenance or {}),
        summarise(evaluations or [], state or STATE),
        Exported(export, "bfloat16", chats=chats),
        base_card=base_card,
    )
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def row_of(body: str, label: str) -> str:
    [found] = [line for line in body.splitlines() if line.startswith(f"| {label} |")]
    return found.removeprefix(f"| {label} | ").removesuffix(" |")


@pytest.mark.parametrize(
    ("export", "settings", "relation", "library", "tags"),
    [
        ("merged", {}, "finetune", "transformers", ["vopd", "on-policy-distillation", "distillation"]),
        ("merged", {"lora_rank": 8}, "finetune", "transformers", ["vopd", "on-policy-distillation", "distillation"]),
        ("adapter", {"lora_rank": 8}, "adapter", "peft", ["vopd", "on-policy-distillation", "distillation", "lora"]),
    ],
)
def test_the_hub_is_told_the_base_and_what_became_of_it(
    export: str, settings: dict[str, Any], relation: str, library: str, tags: list[str]
) -> None:
    metadata, _ = card(export=export, **settings)
    assert metadata == {
        "base_model": "Org/Small-1B",
        "base_model_relation": relation,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": tags,
    }


@pytest.mark.parametrize(
    ("base_card", "expected"),
    [
        ("---\nlicense: apache-2.0\nlanguage: en\n---\n# Base", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: https://example.org/l\n---\n",
            {"license": "other", "license_name": "own", "license_link": "https://example.org/l"},
        ),
        ("---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("", {}),
        ("# Base\n\nLicense: MIT\n", {}),
        ("---\nlanguage: en\n---\n", {}),
        ("---\nlicense: [mit, apache-2.0]\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
    ],
)
def test_the_license_is_the_one_that_the_bases_card_states_or_none(base_card: str, expected: dict[str, str]) -> None:
    assert license_of(base_card) == expected
    metadata, _ = card(base_card=base_card)
    assert {key: value for key, value in metadata.items() if key.startswith("license")} == expected
    assert "language" not in metadata


def test_who_was_distilled_from_whom_how_and_with_what() -> None:
    _, body = card(lora_rank=16, lora_alpha=32.0, objective="vopd", top_k=50, seed=7, learning_rate=2e-5)
    assert "`Org/Small-1B` (revision `5f3a`)" in body
    assert "Teacher: `Org/Big-70B` (revision `r1`), in `bfloat16`." in body
    assert row_of(body, "objective") == "`vopd`"
    assert row_of(body, "support") == "the student's 50 most likely tokens of each position"
    assert row_of(body, "weights trained") == "LoRA, rank 16, alpha 32, dropout 0"
    assert row_of(body, "steps") == "20"
    assert row_of(body, "prompts") == "`Org/math:train`, 500 of them"
    assert row_of(body, "completion tokens trained on") == "100"
    assert row_of(body, "learning rate") == "2e-05, cosine"
    assert row_of(body, "training time").startswith("1 h 02 min, 1 min 01 s of it")
    assert row_of(body, "traffic with the teacher") == "100 bytes a completion token, both ways"
    assert row_of(body, "software") == "Python 3.11.7, vopd 0.1.0"


def test_a_teacher_in_the_same_process_has_no_traffic() -> None:
    _, body = card(state=replace(STATE, teacher_bytes=0))
    assert row_of(body, "traffic with the teacher") == "none: in the same process"


def test_every_one_of_several_teachers_is_named() -> None:
    _, body = card(
        teacher("Org/Coder", name="code", support="teacher"),
        teacher("Org/Prover", name="math"),
        teacher_url=[],
        teacher={"code": ["grpc://x:1"], "math": ["grpc://y:1"]},
    )
    assert "- `code`: `Org/Coder` (revision `r1`), in `bfloat16`" in body
    assert "- `math`: `Org/Prover` (revision `r1`), in `bfloat16`" in body
    assert "the teacher's 100 most likely tokens" in row_of(body, "support")
    assert "the student's 100 most likely tokens" in row_of(body, "support")
    assert "x:1" not in body


def evaluation(step: int, who: str = "student", **measured: Any) -> dict[str, Any]:
    return {"step": step, "who": who, **measured}


def test_numbers_are_the_evaluations_and_what_was_not_measured_says_so() -> None:
    evaluations = [
        evaluation(0, exact_match=0.25, exact_match_by_kind={"a": 0.5, "b|c": 0.0}, kl_nats=1.5),
        evaluation(10, exact_match=0.9, kl_nats=0.4),
        evaluation(20, exact_match=0.5, exact_match_by_kind={"a": 0.5, "b|c": 0.5}, kl_nats=None),
    ]
    _, body = card(evaluations=evaluations, eval_prompts="held.jsonl")
    assert "On 50 held-out prompts of `held.jsonl`:" in body
    assert row_of(body, "exact match") == "25.0% | 50.0% | not measured"
    assert row_of(body, r"exact match: b\|c") == "0.0% | 50.0% | not measured"
    assert row_of(body, "KL to the teacher, nats a token") == "1.5000 | not measured | "


def test_sampled_evaluations_stand_with_their_intervals() -> None:
    sampled = {"exact_match": None, "samples_per_prompt": 4, "kl_nats": 0.5}
    evaluations = [
        evaluation(0, **sampled, avg_at_n={"mean": 0.25, "low": 0.2, "high": 0.3}),
        evaluation(20, **sampled, avg_at_n={"mean": 0.5, "low": 0.4, "high": 0.6}, maj_at_n=None),
    ]
    _, body = card(evaluations=evaluations, eval_prompts="held.jsonl")
    before, after, own = row_of(body, "avg@4").split(" | ")
    assert before.startswith("25")
    assert after.startswith("50")
    assert own == "not measured"
    assert row_of(body, "maj@4") == "not measured | not measured | not measured"


def test_without_evaluations_there_is_no_table() -> None:
    _, body = card()
    assert "Not measured: the run had no evaluation." in body
    assert "%" not in body.split("## Training")[0]


def test_a_stream_has_no_number_of_prompts() -> None:
    _, body = card(provenance={"num_prompts": None}, stream_prompts=True)
    assert row_of(body, "prompts") == "`Org/math:train`, read as a stream"


@pytest.mark.parametrize(
    ("given", "shown", "is_local"),
    [
        ("Org/Small-1B", "Org/Small-1B", False),
        ("gpt2", "gpt2", False),
        ("/home/someone/models/small/", "small", True),
        ("../models/small", "small", True),
        ("~/models/small", "small", True),
        (".cache/small", "small", True),
        ("C:\\models\\small", "small", True),
        ("a/b/c", "c", True),
    ],
)
def test_of_a_path_the_last_part_is_shown(given: str, shown: str, is_local: bool) -> None:
    assert model_name(given) == (shown, is_local)


def test_a_directory_that_is_there_is_local_whatever_it_looks_like(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_name("runs/model") == ("model", True)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("/home/someone/data.jsonl", "data.jsonl"),
        ("sub/data.parquet", "data.parquet"),
        ("/home/someone/set:train", "set:train"),
        ("Org/math:train", "Org/math:train"),
    ],
)
def test_of_a_file_of_prompts_its_name_is_shown(given: str, shown: str) -> None:
    assert prompts_name(given) == shown


def test_nothing_of_this_machine_is_in_a_card() -> None:
    _, body = card(
        teacher("/srv/secret/big"),
        student="/home/someone/small",
        prompts="/home/someone/private/data.jsonl",
        eval_prompts="/home/someone/private/held.jsonl",
        export="adapter",
        lora_rank=4,
        evaluations=[evaluation(0, exact_match=0.0)],
        provenance={"student_revision": None},
    )
    assert "A LoRA adapter for `small` (a local directory)" in body
    assert "Teacher: `big` (a local directory, revision `r1`)" in body
    assert 'from_pretrained("small", dtype="auto")  # where you keep it' in body
    for private in ("/home", "someone", "/srv", "secret", "private", "x:1"):
        assert private not in body


def test_a_teachers_name_cannot_write_the_card() -> None:
    metadata, body = card(teacher("evil`\n---\nlicense: mit\n---\n# <script>", model_revision="a`b"))
    assert "license" not in metadata
    line = next(line for line in body.splitlines() if line.startswith("Teacher"))
    assert line.count("`") == 6
    assert not any(line.startswith("# <script>") for line in body.splitlines())


@pytest.mark.parametrize(("rank", "said"), [(2, 8), (16, 16), (17, 32), (300, 320)])
def test_the_snippet_for_vllm_names_a_rank_that_it_takes(rank: int, said: int) -> None:
    _, body = card(export="adapter", lora_rank=rank)
    assert f'LLM("Org/Small-1B", enable_lora=True, max_lora_rank={said})' in body


@pytest.mark.parametrize("export", ["merged", "adapter"])
@pytest.mark.parametrize("chats", [True, False])
def test_both_snippets_are_programs(export: str, chats: bool) -> None:
    _, body = card(export=export, chats=chats, lora_rank=4)
    snippets = [part.split("```")[0] for part in body.split("```python\n")[1:]]
    assert len(snippets) == 2
    for snippet in snippets:
        compile(snippet, "card", "exec")
        assert ("messages" in snippet or "llm.chat" in snippet) is chats


def test_a_card_needs_no_torch() -> None:
    program = "import sys, vopd_client.model_card; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
