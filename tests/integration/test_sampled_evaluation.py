"""Sampled evaluation on a tiny model: draws are those of a plain forward, judged samples give the right numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from vopd_client.cli import main
from vopd_client.errors import NonFiniteError
from vopd_client.prompts import Prompt
from vopd_client.rollouts.base import RolloutKey
from vopd_client.rollouts.samples import sample_completions
from vopd_client.rollouts.sampling import row_uniforms
from vopd_client.sampled_evaluation import JudgedPrompt, judge_samples, summarise_samples
from vopd_client.student import LoadedStudent, load_student
from vopd_proto.arrays import IntArray

TEXTS = ["one", "two", "three and more", "one"]  # two prompts that are equal, of different rows


@pytest.fixture(scope="module")
def student(tiny_model_dir: Path) -> LoadedStudent:
    return load_student(tiny_model_dir, device="cpu")


def sample(
    student: LoadedStudent, texts: Sequence[str] = TEXTS, *, samples_per_prompt: int = 3, **overrides: Any
) -> dict[tuple[int, int], IntArray]:
    """(row, sample) -> token ids."""
    settings: dict[str, Any] = {
        "seed": 7, "temperature": 0.6, "top_k": 0, "top_p": 1.0, "end_ids": student.end_ids, "pad_id": student.pad_id,
        "max_new_tokens": 12, "num_shared_ids": student.vocab_size, "batch_size": 5,
    }  # fmt: skip
    requests = [
        (RolloutKey(0, row, index), np.array(student.tokenizer(text).input_ids))
        for row, text in enumerate(texts)
        for index in range(samples_per_prompt)
    ]
    completions = sample_completions(student.module.model, requests, **(settings | overrides))
    return {(key.prompt_index, key.rollout_index): ids for (key, _), ids in zip(requests, completions, strict=True)}


def as_lists(samples: dict[tuple[int, int], IntArray]) -> dict[tuple[int, int], list[int]]:
    return {key: ids.tolist() for key, ids in samples.items()}


# ---------------------------------------------------------------- drawing


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (20, 0.95), (3, 1.0), (0, 0.5)])
def test_every_token_is_the_draw_of_its_own_number_from_a_plain_forward_cut_by_transformers(
    student: LoadedStudent, tiny_model_dir: Path, top_k: int, top_p: float
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    warpers = LogitsProcessorList()
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    num_compared = 0
    for (row, index), completion_ids in sample(student, top_k=top_k, top_p=top_p).items():
        prompt_ids = student.tokenizer(TEXTS[row]).input_ids
        ids = torch.tensor([[*prompt_ids, *completion_ids.tolist()]])
        with torch.no_grad():
            logits_TV = model(ids).logits[0, len(prompt_ids) - 1 : -1].float() / 0.6
        cumulative_TV = warpers(None, logits_TV).double().softmax(-1).cumsum(-1)
        uniforms_T = torch.from_numpy(row_uniforms(7, RolloutKey(0, row, index), len(completion_ids)))
        expected_T = torch.searchsorted(cumulative_TV, uniforms_T[:, None], right=True).squeeze(1)
        clear_T = (cumulative_TV - uniforms_T[:, None]).abs().amin(-1) > 1e-5  # not at an edge of two ids
        assert completion_ids[clear_T.numpy()].tolist() == expected_T[clear_T].tolist()
        num_compared += int(clear_T.sum())
    assert num_compared > 50


def test_samples_are_a_function_of_seed_row_and_sample_alone(student: LoadedStudent) -> None:
    samples = as_lists(sample(student))
    assert as_lists(sample(student)) == samples
    assert as_lists(sample(student, batch_size=1)) == samples
    more = as_lists(sample(student, samples_per_prompt=5))
    assert {key: more[key] for key in samples} == samples
    fewer_rows = as_lists(sample(student, TEXTS[:2]))
    assert fewer_rows == {key: ids for key, ids in samples.items() if key[0] < 2}
    longer = as_lists(sample(student, max_new_tokens=20))
    assert {key: ids[:12] for key, ids in longer.items()} == samples
    assert len({tuple(ids) for ids in samples.values()}) == len(samples)  # equal prompts, too, are drawn apart
    assert all(ids != samples[key] for key, ids in as_lists(sample(student, seed=8)).items())


def test_a_sample_ends_with_its_end_token_or_at_the_limit(student: LoadedStudent) -> None:
    unended = sample(student, max_new_tokens=12)
    end_ids = frozenset({int(unended[0, 0][4])})
    ended = sample(student, end_ids=end_ids)
    assert any(len(ids) < 12 for ids in ended.values())
    for key, ids in ended.items():
        assert unended[key][: len(ids)].tolist() == ids.tolist()
        assert (int(ids[-1]) in end_ids) or len(ids) == 12
        assert not end_ids & set(ids[:-1].tolist())


def test_logits_that_are_not_finite_name_the_draw(student: LoadedStudent) -> None:
    head = student.module.model.get_output_embeddings()
    kept = head.weight.detach().clone()
    try:
        with torch.no_grad():
            head.weight[5] = torch.nan
        with pytest.raises(NonFiniteError, match=r"completion token 0 of RolloutKey\(step=0, prompt_index=0"):
            sample(student, ["x"], top_p=0.9)
    finally:
        with torch.no_grad():
            head.weight.copy_(kept)


# ---------------------------------------------------------------- judging


def prompt_of(answer: str, verifier: Any, kind: str | None = None) -> Prompt:
    ids = np.array([1])
    return Prompt(
        index=0, source="data.jsonl:1", student_ids=ids, teacher_ids=ids, answer=answer, verifier=verifier, kind=kind,
        text="2/4?",
    )  # fmt: skip


def judge(answer: str, verifier: Any, *texts: str, kind: str | None = None) -> JudgedPrompt:
    return judge_samples(prompt_of(answer, verifier, kind), texts)


def test_a_majority_of_maths_is_one_of_equal_values_however_they_are_written() -> None:
    texts = [r"\boxed{3}", r"\boxed{0.5}", r"\boxed{\frac{1}{2}}", r"\boxed{3}", r"\boxed{2/4}"]
    judged = judge("1/2", "boxed-math", *texts)
    assert judged.correct == (False, True, True, False, True)
    assert judged.majority == 1  # three halves, in three spellings, against two threes
    assert judged.answers[1] is not None


def test_of_equally_common_answers_the_first_speaks() -> None:
    assert judge("C", "choice", "Answer: B", "Answer: C", "I pass", r"\boxed{C}", "Answer: (B)").majority == 0
    assert judge("C", "choice", "I pass", "Answer: C", "Answer: B").majority == 1
    nobody = judge("C", "choice", "I pass", "me too")
    assert (nobody.majority, nobody.answers, nobody.correct) == (None, (None, None), (False, False))


def test_scores_are_means_over_prompts_by_kind_and_over_all() -> None:
    judged = [
        judge("C", "choice", "Answer: C", "Answer: C", "Answer: B", "Answer: A", kind="easy"),
        judge("C", "choice", "Answer: B", "Answer: B", "Answer: C", "Answer: A", kind="hard"),
        judge("C", "choice", "Answer: A", "Answer: B", "I pass", "I pass", kind="hard"),
    ]
    evaluation = summarise_samples(judged, num_cut=2, sample_count=2)
    scores = evaluation.scores
    assert scores.num_prompts == 3
    assert scores.avg_at_n.mean == pytest.approx((2 / 4 + 1 / 4 + 0) / 3)
    assert scores.pass_at_n.mean == pytest.approx(2 / 3)
    assert scores.maj_at_n.mean == pytest.approx(1 / 3)
    assert list(evaluation.scores_by_kind) == ["easy", "hard"]
    assert evaluation.scores_by_kind["hard"].avg_at_n.mean == pytest.approx(1 / 8)
    assert evaluation.scores_by_kind["hard"].pass_at_n.mean == 0.5
    assert evaluation.scores_by_kind["hard"].maj_at_n.mean == 0
    row = json.loads(json.dumps(evaluation.to_row()))
    assert row["pass_at_n"]["mean"] == pytest.approx(2 / 3)
    assert (row["num_completions"], row["num_cut"]) == (12, 2)
    assert [prompt.get("first_completion") for prompt in row["per_prompt"]] == ["Answer: C", "Answer: B", None]
    assert row["per_prompt"][2]["answers"] == ["A", "B", None, None]


# ---------------------------------------------------------------- the command


def run_command(tiny_model_dir: Path, directory: Path, rows: Sequence[dict[str, Any]], *flags: str) -> dict[str, Any]:
    (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["--model", str(tiny_model_dir), "--prompts", str(directory / "data.jsonl"), "--device", "cpu"]
    settings += ["--max-new-tokens", "6", "--json-file", str(directory / "result.json")]
    assert main(["eval", *settings, *flags]) == 0
    result: dict[str, Any] = json.loads((directory / "result.json").read_text())
    return result


SAMPLED = ["--samples-per-prompt", "4", "--temperature", "0.6", "--top-p", "0.95", "--sampling-top-k", "20"]


def test_the_eval_command_samples_and_reports_the_three_measures(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": "one", "answer": "(?s).", "verifier": "regex", "kind": "always"},
        {"prompt": "two"},  # no answer: not asked, and the rows after it keep their draws
        {"prompt": "three", "answer": "7", "verifier": "boxed-math", "kind": "never"},
    ]
    result = run_command(tiny_model_dir, tmp_path, rows, *SAMPLED)
    printed = capsys.readouterr().out
    assert "avg@4" in printed
    assert "pass@4" in printed
    assert "maj@4" in printed
    assert "100.0% (100–100)" in printed
    assert "temperature 0.6, top_p 0.95, top_k 20, seed 42" in printed
    assert result["num_prompts"] == 2
    assert result["avg_at_n"]["mean"] == result["pass_at_n"]["mean"] == result["maj_at_n"]["mean"] == 0.5
    assert result["by_kind"]["always"]["maj_at_n"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert result["by_kind"]["never"]["pass_at_n"]["mean"] == 0.0
    assert (result["samples_per_prompt"], result["sampling_top_k"], result["seed"]) == (4, 20, 42)
    assert [prompt["source"].rpartition(":")[2] for prompt in result["per_prompt"]] == ["1", "3"]
    with_answer = [rows[0], rows[1] | {"answer": "x"}, rows[2]]
    again = run_command(tiny_model_dir, tmp_path, with_answer, *SAMPLED)
    assert again["per_prompt"][2] == result["per_prompt"][1]


def test_the_same_seed_gives_the_same_result_and_another_one_another(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [{"prompt": text, "answer": "x"} for text in ("one", "two", "three")]
    result = run_command(tiny_model_dir, tmp_path, rows, *SAMPLED)
    assert run_command(tiny_model_dir, tmp_path, rows, *SAMPLED) == result
    other = run_command(tiny_model_dir, tmp_path, rows, *SAMPLED, "--seed", "43")
    assert other["per_prompt"] != result["per_prompt"]


def test_the_eval_command_reads_rows_of_others(tiny_model_dir: Path, tmp_path: Path) -> None:
    columns = ["--prompt-column", "problem", "--answer-column", "solution", "--prompt-suffix", " In short."]
    rows = [{"problem": "1+1?", "solution": 2, "level": 1}]
    result = run_command(tiny_model_dir, tmp_path, rows, *columns, "--verifier", "math", *SAMPLED)
    (prompt,) = result["per_prompt"]
    assert (prompt["prompt"], prompt["answer"]) == ("1+1? In short.", "2")


@pytest.mark.parametrize(("flag", "value"), [("--temperature", "0.6"), ("--top-p", "0.95"), ("--sampling-top-k", "20")])
def test_how_to_sample_is_refused_where_nothing_is_sampled(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "--model", "m", "--prompts", "p.jsonl", flag, value]) == 2
    printed = capsys.readouterr().err
    assert f"{flag.removeprefix('--').replace('-', '_')} {value} has no effect" in printed
    assert "give samples_per_prompt 2 or more" in printed
