"""What a run leaves for others: merged models and adapters that plain libraries load, their cards, and the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fake_local_teacher import FakeLocalTeacher
from moved_weights import moved
from tiny_model import CHAT_TEMPLATE, NUM_IDS, write_tiny_model
from training_runs import Runs, same_bits
from vopd_client.cli import main
from vopd_client.errors import ConfigError, TeacherUnavailableError
from vopd_client.export import ExportKind, dtype_to_export, save_student
from vopd_client.rollouts.base import RolloutKey
from vopd_client.rollouts.transformers import RolloutSampler
from vopd_client.run_directory import RunDirectory
from vopd_client.student import load_student

FORMS: list[tuple[ExportKind, int]] = [("merged", 0), ("merged", 4), ("adapter", 4)]
IDS_BS = torch.arange(1, 40)[None]


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS_BS).logits.float()


def load_export(directory: Path, export: ExportKind, base: Path) -> Any:
    if export == "merged":
        return AutoModelForCausalLM.from_pretrained(directory)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory)


def keys_of(directory: Path) -> list[str]:
    return [name for file in sorted(directory.glob("model*.safetensors")) for name in load_file(file)]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("export", "lora_rank"), FORMS)
def test_an_export_has_the_trainers_logits(tmp_path: Path, export: ExportKind, lora_rank: int, tied: bool) -> None:
    base = write_tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    loaded = moved(load_student(base, lora_rank=lora_rank, lora_alpha=8.0, device="cpu"))
    loaded.module.eval()
    expected = logits_of(loaded.module.model)
    assert (expected - logits_of(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.1
    save_student(loaded.module, loaded.tokenizer, tmp_path / "saved", export=export)

    model = load_export(tmp_path / "saved", export, base)
    torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    assert torch.equal(logits_of(loaded.module.model), expected)  # nothing was merged in place
    if export == "merged":
        assert ("lm_head.weight" in keys_of(tmp_path / "saved")) is not tied
        config = json.loads((tmp_path / "saved" / "config.json").read_text())
        assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "float32")
    else:
        files = {path.name for path in (tmp_path / "saved").iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= files
        assert not {"README.md", "model.safetensors"} & files  # a card of PEFT's own says nothing
        adapter = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == str(base)


@pytest.mark.parametrize(("export", "lora_rank"), FORMS)
def test_bf16_files_hold_the_float32_weights_rounded_once(
    tiny_model_dir: Path, tmp_path: Path, export: ExportKind, lora_rank: int
) -> None:
    loaded = moved(load_student(tiny_model_dir, lora_rank=lora_rank, lora_alpha=8.0, device="cpu"))
    for name, dtype in (("exact", torch.float32), ("rounded", torch.bfloat16)):
        save_student(loaded.module, loaded.tokenizer, tmp_path / name, export=export, dtype=dtype)
    file = "model.safetensors" if export == "merged" else "adapter_model.safetensors"
    exact, rounded = (load_file(tmp_path / name / file) for name in ("exact", "rounded"))
    assert same_bits({name: value.bfloat16() for name, value in exact.items()}, rounded)
    assert {value.dtype for value in rounded.values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in loaded.module.parameters()} == {torch.float32}
    if export == "merged":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "rounded", dtype="auto")
        assert model.dtype == torch.bfloat16
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert loaded.module.causal_lm.config.dtype != torch.bfloat16  # the run's own is untouched


def test_a_large_model_is_written_in_shards(tiny_model_dir: Path, tmp_path: Path) -> None:
    loaded = moved(load_student(tiny_model_dir, device="cpu"))
    save_student(loaded.module, loaded.tokenizer, tmp_path / "saved", max_shard_size="40KB")
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert sorted(index["weight_map"]) == sorted(keys_of(tmp_path / "saved"))
    expected = logits_of(loaded.module.model)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05},
        {"temperature": 0.6, "top_p": 0.9, "min_p": 0.05},
        {"eos_token_id": [257, 258, 3], "max_new_tokens": 77},
    ],
    ids=["sampled", "sampling without do_sample", "several end tokens"],
)
def test_the_generation_config_stays_the_bases(tiny_model_dir: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """vLLM samples with its options whatever do_sample is, so that none of them may go."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    facts = json.loads((base / "generation_config.json").read_text()) | options
    (base / "generation_config.json").write_text(json.dumps(facts))
    loaded = load_student(base, device="cpu")
    save_student(loaded.module, loaded.tokenizer, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text()) == facts
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert {name: getattr(saved, name) for name in options} == options
    assert load_student(tmp_path / "saved", device="cpu").end_ids == loaded.end_ids


@pytest.mark.parametrize("says_it", ["config", "weights"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_auto_is_the_dtype_of_the_students_own_files(
    tiny_model_dir: Path, tmp_path: Path, dtype: torch.dtype, says_it: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    # In two files, of which one has to be read where the config says nothing.
    shard = "40KB" if says_it == "weights" else "5GB"
    AutoModelForCausalLM.from_pretrained(base).to(dtype).save_pretrained(base, max_shard_size=shard)
    if says_it == "weights":
        (base / "model.safetensors").unlink()
        config = json.loads((base / "config.json").read_text())
        del config["dtype"]
        (base / "config.json").write_text(json.dumps(config))
    loaded = load_student(base, device="cpu")
    assert dtype_to_export("auto", loaded) == dtype
    assert dtype_to_export("float32", loaded) == torch.float32
    assert dtype_to_export("bfloat16", loaded) == torch.bfloat16
    assert {parameter.dtype for parameter in loaded.module.parameters()} == {torch.float32}


def test_there_is_no_adapter_without_lora(tiny_model_dir: Path, tmp_path: Path) -> None:
    loaded = load_student(tiny_model_dir, device="cpu")
    with pytest.raises(ConfigError, match="export adapter needs a student with LoRA"):
        save_student(loaded.module, loaded.tokenizer, tmp_path / "saved", export="adapter")
    with pytest.raises(ValueError, match="export adapter needs adapters: give a lora_rank above 0"):
        Runs(tmp_path, tmp_path).config(export="adapter")


# ---------------------------------------------------------------- whole runs and the command

pytestmark = pytest.mark.usefixtures("fresh_process_state", "no_report")
LORA = {"lora_rank": 2, "export": "adapter"}


@pytest.fixture
def teacher(models: Path) -> FakeLocalTeacher:
    return FakeLocalTeacher(models / "teacher", model_revision="abc123")


def metadata(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    parsed: dict[str, Any] = yaml.safe_load(front)
    return parsed


def test_a_run_leaves_a_card_with_its_own_numbers(runs: Runs, teacher: FakeLocalTeacher) -> None:
    prompts = str(runs.models / "prompts.jsonl")
    assert runs.train(teacher, eval_prompts=prompts, eval_max_new_tokens=4, steps=2) == 0
    directory = runs.directory()
    card = (directory.model / "README.md").read_text()
    summary = json.loads(directory.summary_file.read_text())
    assert metadata(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["vopd", "on-policy-distillation", "distillation"],
    }
    assert "`student` (a local directory)" in card
    assert "Teacher: `fake` (revision `abc123`), in `float32`." in card
    assert "On 6 held-out prompts of `prompts.jsonl`:" in card
    before, after, own = (f"{summary[f'exact_match_{who}']:.1%}" for who in ("before", "after", "teacher"))
    assert f"| exact match | {before} | {after} | {own} |" in card
    before, after = (f"{summary[f'kl_nats_{when}']:.4f}" for when in ("before", "after"))
    assert f"| KL to the teacher, nats a token | {before} | {after} |  |" in card
    odd = summary["kl_nats_after_by_kind"]["odd"]
    assert f"nats a token: odd | {summary['kl_nats_before_by_kind']['odd']:.4f} | {odd:.4f} |" in card
    assert f"| completion tokens trained on | {summary['num_valid_tokens']:,} |" in card
    assert f"| {summary['teacher_bytes_per_token']:,.0f} bytes a completion token, both ways |" in card
    assert "| prompts | `prompts.jsonl`, 6 of them |" in card
    assert f"torch {torch.__version__}, " in card
    assert "2605.07865" in card
    assert str(runs.models) not in card  # nobody else's business
    assert str(runs.models.name) not in card


def test_a_card_of_a_run_without_evaluations_says_so(runs: Runs, teacher: FakeLocalTeacher) -> None:
    assert runs.train(teacher, steps=1, **LORA) == 0
    card = (runs.directory().model / "README.md").read_text()
    assert "Not measured: the run had no evaluation." in card
    assert "| before | after |" not in card
    assert "exact match" not in card
    assert metadata(card)["library_name"] == "peft"
    assert "LoRA, rank 2, alpha 128, dropout 0" in card
    assert "PeftModel.from_pretrained(base" in card
    assert "max_lora_rank=8" in card


@pytest.mark.parametrize("settings", [{}, LORA], ids=["merged", "adapter"])
def test_the_snippet_in_the_card_runs_with_its_paths_filled_in(
    runs: Runs, teacher: FakeLocalTeacher, capsys: pytest.CaptureFixture[str], settings: dict[str, Any]
) -> None:
    assert runs.train(teacher, steps=1, **settings) == 0
    model = runs.directory().model
    snippet = (model / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(snippet.replace('"PATH"', repr(str(model))).replace('"student"', repr(str(runs.models / "student"))), {})
    assert capsys.readouterr().out


def export(*arguments: object) -> int:
    return main(["export", *map(str, arguments)])


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}, LORA], ids=["full", "merged", "adapter"])
def test_the_command_writes_what_the_run_left_at_the_same_step(
    runs: Runs, teacher: FakeLocalTeacher, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = {"eval_prompts": str(runs.models / "prompts.jsonl"), "eval_max_new_tokens": 2}
    assert runs.train(teacher, steps=2, **evaluation, **settings) == 0
    left = runs.directory().model
    assert export(runs.directory().path) == 0
    written = runs.directory().path / f"{settings.get('export', 'merged')}-step-000002"
    assert capsys.readouterr().out.strip() == str(written)
    names = sorted(path.name for path in left.iterdir())
    assert sorted(path.name for path in written.iterdir()) == names
    for name in names:
        if name == "adapter_config.json":  # PEFT writes a set in any order
            one, other = (json.loads((where / name).read_text()) for where in (left, written))
            assert one | {"target_modules": sorted(one["target_modules"])} == other | {
                "target_modules": sorted(other["target_modules"])
            }
        else:
            assert (written / name).read_bytes() == (left / name).read_bytes(), name


def test_an_interrupted_runs_student_is_exported_from_any_checkpoint(
    runs: Runs, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone_after_three_steps(number: int) -> None:
        if number > 12:
            raise TeacherUnavailableError("gone")

    gone = FakeLocalTeacher(models / "teacher", on_submit=gone_after_three_steps)
    assert runs.train(gone, steps=6, lora_rank=2) == 3
    run = runs.directory().path
    assert runs.checkpoints() == ["step-000002", "step-000003"]
    target = tmp_path / "out" / "second"
    flags = ["--checkpoint", "step-000002", "--export", "adapter", "--export-dtype", "bfloat16", "--export-dir", target]
    assert export(run, *flags) == 0
    adapter = load_file(target / "adapter_model.safetensors")
    assert {value.dtype for value in adapter.values()} == {torch.bfloat16}
    stored = load_file(runs.directory().checkpoints / "step-000002" / "model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B{}.weight"
    assert torch.equal(adapter[name.format("")], stored["model." + name.format(".default")].bfloat16())
    card = (target / "README.md").read_text()
    assert "| steps | 2 of 6 that were planned |" in card
    assert "exported as bfloat16" in card
    assert not (run / "model").exists()

    assert export(run) == 0
    merged = run / "merged-step-000003"
    assert "| steps | 3 of 6 that were planned |" in (merged / "README.md").read_text()
    assert "lm_head.weight" not in keys_of(merged)
    with safe_open(merged / "model.safetensors", framework="pt") as weights:
        assert weights.get_tensor("model.norm.weight").dtype == torch.float32

    assert export(run) == 2
    assert "merged-step-000003 already exists: give another --export-dir" in capsys.readouterr().err


def test_what_cannot_be_exported_is_explained(
    runs: Runs, teacher: FakeLocalTeacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def complaint(*arguments: object) -> str:
        assert export(*arguments) == 2
        return capsys.readouterr().err

    assert "holds no run: there is no config.yaml in it" in complaint(tmp_path)
    assert runs.train(teacher, steps=1) == 0
    run = runs.directory().path
    assert "no checkpoint step-000007 in" in (told := complaint(run, "--checkpoint", "step-000007"))
    assert "there are: step-000001" in told
    assert "give a lora_rank above 0" in complaint(run, "--export", "adapter")
    occupied = tmp_path / "occupied"
    occupied.write_text("")
    assert f"{occupied} already exists" in complaint(run, "--export-dir", occupied)

    weights = run / "checkpoints" / "step-000001" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert "step-000001: model.safetensors has" in complaint(run, "--checkpoint", "step-000001")
    shutil.rmtree(run / "checkpoints")
    assert "the run has not saved one yet" in complaint(run)


def test_a_student_that_is_another_by_now_is_refused(
    runs: Runs, teacher: FakeLocalTeacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = tmp_path / "student"
    shutil.copytree(runs.models / "student", student)
    assert runs.train(teacher, steps=1, student=str(student)) == 0
    shutil.rmtree(student)
    write_tiny_model(student, num_layers=1)
    assert export(runs.directory().path) == 2
    assert "step-000001 does not fit the student of its run: " in capsys.readouterr().err


def test_a_run_of_a_version_without_provenance_still_exports(runs: Runs, teacher: FakeLocalTeacher) -> None:
    assert runs.train(teacher, steps=1) == 0
    run = RunDirectory(runs.directory().path)
    run.provenance_file.unlink()
    assert export(run.path) == 0
    card = (run.path / "merged-step-000001" / "README.md").read_text()
    assert "Teacher: not recorded." in card
    assert "| software | not recorded |" in card


def test_an_exported_model_is_a_student_again(runs: Runs, teacher: FakeLocalTeacher) -> None:
    assert runs.train(teacher, steps=1, export_dtype="bfloat16") == 0
    again = load_student(runs.directory().model, device="cpu")
    sampler = RolloutSampler(
        again.module.model,
        num_shared_ids=NUM_IDS,
        end_ids=again.end_ids,
        pad_id=again.pad_id,
        max_new_tokens=4,
        temperature=1.0,
        top_k=4,
        support_mass=1.0,
        seed=0,
        batch_size=1,
    )
    assert len(list(sampler.sample([(RolloutKey(0, 0, 0), np.arange(1, 5))]))) == 1
    assert again.stored_dtype == torch.bfloat16
