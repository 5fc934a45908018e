"""The student's training forward against plain logits, and its way in and out of model directories."""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    CohereConfig,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    GraniteConfig,
    LlamaForCausalLM,
    PhiConfig,
    T5Config,
)

from moved_weights import moved
from tiny_model import CHAT_TEMPLATE, write_tiny_model
from vopd_client.errors import ConfigError
from vopd_client.export import save_student
from vopd_client.linear_logprobs import Logits
from vopd_client.model_files import add_lora
from vopd_client.rollouts.base import RolloutKey
from vopd_client.rollouts.transformers import RolloutSampler
from vopd_client.student import (
    StudentForTraining,
    StudentOutputs,
    load_student,
)
from vopd_client.teacher_head import TeacherHead

NUM_SUPPORT_IDS = 7


@dataclass(frozen=True)
class Sequences:
    """Random prompts and completions and what a forward over them takes."""

    prompts: list[list[int]]
    completions: list[list[int]]
    inputs: dict[str, Tensor]


def sequences_of(
    shapes: Sequence[tuple[int, int]], *, vocab_size: int = 259, num_support_ids: int = NUM_SUPPORT_IDS
) -> Sequences:
    """(context tokens, completion tokens) of each sequence -> padded inputs; pads hold id 1, masks tell them."""
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, vocab_size, context).tolist() for context, _ in shapes]
    completions = [generator.integers(0, vocab_size, length).tolist() for _, length in shapes]
    num_inputs = max(context + length for context, length in shapes)
    num_tokens = max(length for _, length in shapes)
    batch = len(shapes)
    inputs = {
        "input_ids_BS": torch.ones(batch, num_inputs, dtype=torch.long),
        "attention_mask_BS": torch.zeros(batch, num_inputs, dtype=torch.long),
        "row_index_BT": torch.zeros(batch, num_tokens, dtype=torch.long),
        "completion_ids_BT": torch.ones(batch, num_tokens, dtype=torch.long),
        "support_ids_BTK": torch.ones(batch, num_tokens, num_support_ids, dtype=torch.long),
        "support_mask_BTK": torch.zeros(batch, num_tokens, num_support_ids, dtype=torch.bool),
        "loss_mask_BT": torch.zeros(batch, num_tokens, dtype=torch.bool),
    }
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids, length = prompt + completion, len(completion)
        inputs["input_ids_BS"][index, : len(ids)] = torch.tensor(ids)
        inputs["attention_mask_BS"][index, : len(ids)] = 1
        inputs["row_index_BT"][index, :length] = len(prompt) - 1 + torch.arange(length)
        inputs["completion_ids_BT"][index, :length] = torch.tensor(completion)
        inputs["loss_mask_BT"][index, :length] = True
        for token in range(length):
            count = token % num_support_ids + 1 if num_support_ids else 0  # ragged, as recorded supports are
            ids_K = torch.from_numpy(generator.choice(vocab_size, count, replace=False))
            inputs["support_ids_BTK"][index, token, :count] = ids_K
            inputs["support_mask_BTK"][index, token, :count] = True
    return Sequences(prompts, completions, inputs)


def plain_outputs(
    model: nn.Module, sequences: Sequences, *, temperature: float = 1.0, num_shared_ids: int = 259
) -> StudentOutputs:
    """The same from whole logits, one unpadded sequence at a time, with the token loop written out."""
    shape = sequences.inputs["support_ids_BTK"].shape
    sampled_BT = torch.zeros(shape[:2])
    support_BTK = torch.zeros(shape)
    pi_squared_BT = torch.zeros(shape[:2])
    for index, (prompt, completion) in enumerate(zip(sequences.prompts, sequences.completions, strict=True)):
        logits_SV = model(input_ids=torch.tensor([prompt + completion])).logits[0]
        for token, token_id in enumerate(completion):
            row_V = logits_SV[len(prompt) + token - 1, :num_shared_ids] / temperature
            logprobs_V = row_V.log_softmax(dim=-1)
            mask_K = sequences.inputs["support_mask_BTK"][index, token]
            sampled_BT[index, token] = logprobs_V[token_id]
            support_BTK[index, token, mask_K] = logprobs_V[sequences.inputs["support_ids_BTK"][index, token][mask_K]]
            pi_squared_BT[index, token] = logprobs_V.detach().exp().square().sum()
    return StudentOutputs(sampled_BT, support_BTK, pi_squared_BT)


def some_loss(outputs: StudentOutputs) -> Tensor:
    """Weighs every entry differently, so that a swapped row shows in the gradient."""
    sampled_BT, support_BTK = outputs.sampled_logprobs_BT, outputs.support_logprobs_BTK
    return (sampled_BT * torch.arange(1, sampled_BT.numel() + 1).view_as(sampled_BT)).sum() + (
        support_BTK.exp() * torch.arange(support_BTK.numel()).view_as(support_BTK)
    ).sum()


@pytest.fixture
def model(tiny_model_dir: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir)


SHAPES = [(5, 4), (1, 1), (9, 1), (3, 11)]


@pytest.mark.parametrize(("temperature", "num_shared_ids"), [(1.0, 259), (0.6, 259), (1.0, 200)])
def test_outputs_are_the_plain_log_softmax_at_the_rows_that_predict_the_completion(
    model: LlamaForCausalLM, temperature: float, num_shared_ids: int
) -> None:
    sequences = sequences_of(SHAPES, vocab_size=num_shared_ids)
    student = StudentForTraining(model)
    student.temperature, student.num_shared_ids = temperature, num_shared_ids
    outputs = student(**sequences.inputs)
    expected = plain_outputs(model, sequences, temperature=temperature, num_shared_ids=num_shared_ids)
    for actual, plain in zip(outputs[:3], expected[:3], strict=True):
        torch.testing.assert_close(actual, plain, atol=1e-5, rtol=1e-5)
    assert not outputs.sum_pi_squared_BT.requires_grad


def test_a_completion_of_one_token_is_scored_by_the_last_row_of_its_prompt(model: LlamaForCausalLM) -> None:
    sequences = sequences_of([(6, 1)])
    outputs = StudentForTraining(model)(**sequences.inputs)
    logits_SV = model(input_ids=torch.tensor(sequences.prompts)).logits[0]  # the prompt alone
    expected = logits_SV[5].log_softmax(dim=-1)[sequences.completions[0][0]]
    torch.testing.assert_close(outputs.sampled_logprobs_BT[0, 0], expected)
    assert outputs.whole_BT is None
    assert outputs.reverse_kl_sum is None


def test_gradients_are_those_of_the_plain_path(model: LlamaForCausalLM) -> None:
    sequences = sequences_of(SHAPES)
    reference = copy.deepcopy(model)
    some_loss(StudentForTraining(model)(**sequences.inputs)).backward()
    some_loss(plain_outputs(reference, sequences)).backward()
    for (name, parameter), plain in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert parameter.grad is not None, name
        scale = plain.grad.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(parameter.grad, plain.grad, atol=1e-5 * scale, rtol=1e-4)


def test_a_padded_batch_equals_its_sequences_one_by_one(model: LlamaForCausalLM) -> None:
    sequences = sequences_of(SHAPES)
    student = StudentForTraining(model)
    together = student(**sequences.inputs)
    for index, (context, length) in enumerate(SHAPES):
        alone = student(
            **{
                name: value[index : index + 1, : context + length if name.endswith("_BS") else length]
                for name, value in sequences.inputs.items()
            }
        )
        torch.testing.assert_close(
            together.sampled_logprobs_BT[index, :length], alone.sampled_logprobs_BT[0], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            together.support_logprobs_BTK[index, :length], alone.support_logprobs_BTK[0], atol=1e-5, rtol=0
        )
        assert not together.sampled_logprobs_BT[index, length:].any()
        assert not together.support_logprobs_BTK[index, length:].any()


class ProductsWithHead(TorchDispatchMode):
    """Rows of every matrix product whose result has 259 columns, the output layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.num_rows: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) and result.shape[-1] == 259:
            self.num_rows.append(len(result))
        return result


def test_the_output_layer_runs_at_scored_rows_only(model: LlamaForCausalLM) -> None:
    student = StudentForTraining(model)
    with ProductsWithHead() as products:
        student(**sequences_of(SHAPES).inputs)
    assert products.num_rows == [4 + 1 + 1 + 11]


class MatrixCasts(TorchDispatchMode):
    """Conversions of float32 matrices to bf16, by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[torch.Size] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten._to_copy and result.dtype == torch.bfloat16 and result.ndim == 2:
            self.shapes[result.shape] += 1
        return result


def test_a_microbatch_casts_every_weight_once_forward_and_no_other_backward_but_the_output_layers(
    model: LlamaForCausalLM,
) -> None:
    """Autocast keeps its casts for one forward; the chunked head, which keeps nothing large, casts again."""
    student = StudentForTraining(model)
    weights = Counter(module.weight.shape for module in model.modules() if isinstance(module, nn.Linear))
    inputs = sequences_of(SHAPES).inputs
    with MatrixCasts() as forward, torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = student(**inputs)
    with MatrixCasts() as backward:
        some_loss(outputs).backward()
    assert {shape: forward.shapes[shape] for shape in weights} == weights
    assert {shape: backward.shapes[shape] for shape in weights if backward.shapes[shape]} == {
        model.lm_head.weight.shape: 1
    }


def test_padding_needs_no_mask_and_changes_nothing_where_attention_is_torchs(model: LlamaForCausalLM) -> None:
    sequences = sequences_of(SHAPES)
    masked = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation="eager")
    masked.load_state_dict(model.state_dict())
    found: list[Any] = []

    def note(_: nn.Module, __: Any, inputs: dict[str, Any]) -> None:
        found.append(inputs["attention_mask"])

    outputs = []
    for each in (model, masked):
        each.model.register_forward_pre_hook(note, with_kwargs=True)
        found.clear()
        outputs.append(StudentForTraining(each)(**sequences.inputs))
        assert (found[-1] is None) == (each is model)
    for unmasked_values, masked_values in zip(outputs[0][:3], outputs[1][:3], strict=True):
        torch.testing.assert_close(unmasked_values, masked_values, atol=1e-5, rtol=1e-5)


def test_a_row_outside_the_loss_mask_is_zero_and_without_gradient(model: LlamaForCausalLM) -> None:
    sequences = sequences_of([(5, 4), (2, 3)])
    sequences.inputs["loss_mask_BT"][0, 2] = False
    outputs = StudentForTraining(model)(**sequences.inputs)
    assert outputs.sampled_logprobs_BT[0, 2] == 0
    assert outputs.sampled_logprobs_BT[0, 3] != 0
    outputs.sampled_logprobs_BT[0, 2].backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_a_microbatch_without_a_single_scored_row_has_zero_gradients(model: LlamaForCausalLM) -> None:
    sequences = sequences_of([(5, 1)])
    sequences.inputs["loss_mask_BT"][:] = False
    outputs = StudentForTraining(model)(**sequences.inputs)
    some_loss(outputs).backward()
    assert not any(output.any() for output in outputs[:3])
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} would make a distributed reducer wait"
        assert not parameter.grad.any(), name


@pytest.mark.parametrize(("temperature", "num_shared_ids"), [(1.0, 259), (0.6, 200)])
def test_the_whole_vocabulary_is_compared_with_the_teachers_whole_distribution(
    model: LlamaForCausalLM, temperature: float, num_shared_ids: int
) -> None:
    """KL and its gradient against two plain log-softmaxes; the teacher is normalised over all of its ids."""
    sequences = sequences_of(SHAPES, vocab_size=num_shared_ids, num_support_ids=0)
    teacher = copy.deepcopy(model)
    torch.manual_seed(1)
    teacher.lm_head = nn.Linear(teacher.config.hidden_size, 300, bias=True)  # untied, padded, of another size
    reference, student = copy.deepcopy(model), StudentForTraining(model)
    student.temperature, student.num_shared_ids = temperature, num_shared_ids
    head = teacher.lm_head
    student.teacher_head = TeacherHead(head.weight.detach(), head.bias.detach(), Logits(300, temperature))
    hidden_BSH = teacher.model(sequences.inputs["input_ids_BS"]).last_hidden_state.detach()
    rows_BT = sequences.inputs["row_index_BT"]
    hidden_BTH = hidden_BSH[torch.arange(len(rows_BT))[:, None], rows_BT]

    outputs = student(**sequences.inputs, teacher_hidden_BTH=hidden_BTH, want_kl_gradient=True)
    outputs.reverse_kl_sum.backward()

    logits_BSV = reference(sequences.inputs["input_ids_BS"]).logits[..., :num_shared_ids] / temperature
    student_BTV = logits_BSV.log_softmax(-1)[torch.arange(len(rows_BT))[:, None], rows_BT]
    teacher_BTV = (head(hidden_BTH) / temperature).log_softmax(-1)[..., :num_shared_ids].detach()
    plain_BT = (student_BTV.exp() * (student_BTV - teacher_BTV)).sum(-1) * sequences.inputs["loss_mask_BT"]
    plain_BT.sum().backward()
    torch.testing.assert_close(outputs.whole_BT.reverse_kl, plain_BT.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs.reverse_kl_sum, plain_BT.sum(), atol=1e-3, rtol=1e-4)
    sampled_BT = plain_outputs(reference, sequences, temperature=temperature, num_shared_ids=num_shared_ids)
    torch.testing.assert_close(outputs.sampled_logprobs_BT, sampled_BT.sampled_logprobs_BT, atol=1e-4, rtol=1e-4)
    assert outputs.num_ids == num_shared_ids
    for (name, parameter), plain in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, plain.grad, atol=1e-3, rtol=1e-3, msg=name)


def test_no_support_at_all_leaves_the_sampled_logprobs(model: LlamaForCausalLM) -> None:
    sequences = sequences_of(SHAPES, num_support_ids=0)
    outputs = StudentForTraining(model)(**sequences.inputs)
    assert outputs.support_logprobs_BTK.shape == (4, 11, 0)
    torch.testing.assert_close(
        outputs.sampled_logprobs_BT, plain_outputs(model, sequences).sampled_logprobs_BT, atol=1e-5, rtol=0
    )


def test_a_tied_output_layer_gets_the_gradient_of_both_its_uses(model: LlamaForCausalLM) -> None:
    sequences = sequences_of([(3, 2)])
    some_loss(StudentForTraining(model)(**sequences.inputs)).backward()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    gradient_V = model.lm_head.weight.grad.abs().sum(dim=-1)
    assert (gradient_V > 0).all()  # ids that are no input have a gradient through the output layer alone


def small(config_type: type, **settings: Any) -> Any:
    return config_type(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        **settings,
    )


ARCHITECTURES = {
    "bias in the output layer": small(PhiConfig),
    "logit scale": small(CohereConfig, pad_token_id=0),
    "logit divisor": small(GraniteConfig, logits_scaling=3.0, pad_token_id=0),
    "softcap": small(Gemma2Config, head_dim=8, final_logit_softcapping=2.0),
    "no rotary positions": GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_equal_their_own_logits(name: str) -> None:
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(ARCHITECTURES[name]).eval()
    if other.get_output_embeddings().bias is not None:
        nn.init.normal_(other.get_output_embeddings().bias)
    sequences = sequences_of(SHAPES)
    actual, expected = StudentForTraining(other)(**sequences.inputs), plain_outputs(other, sequences)
    torch.testing.assert_close(actual.sampled_logprobs_BT, expected.sampled_logprobs_BT, atol=1e-4, rtol=1e-4)


class HalvedLogits(LlamaForCausalLM):
    """An architecture that does something to its logits that nobody has heard of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 2
        return output


def test_an_unknown_step_after_the_output_layer_is_refused_by_name(model: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError, match=r"HalvedLogits computes its logits in a way .* nats"):
        StudentForTraining(HalvedLogits(model.config))


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=0.3,
    )
    bert = BertLMHeadModel(config).eval()
    # Without the transform of its head, which another error would be about.
    bert.cls.predictions.transform = nn.Identity()
    with pytest.raises(ConfigError, match="BertLMHeadModel is not a causal language model"):
        StudentForTraining(bert)


@pytest.mark.parametrize("device", ["gpu", "cuda:7"])
def test_a_device_that_is_not_there_is_refused_by_name(tiny_model_dir, device):
    with pytest.raises(ConfigError, match=f"device {device}: "):
        load_student(tiny_model_dir, device=device)


def test_lora_trains_its_adapters_alone(tiny_model_dir: Path) -> None:
    student = load_student(tiny_model_dir, lora_rank=4, lora_alpha=8.0, device="cpu").module
    trainable = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert not any("lm_head" in name or "embed" in name for name in trainable)
    some_loss(student(**sequences_of(SHAPES).inputs)).backward()
    for name, parameter in student.named_parameters():
        assert (parameter.grad is not None) == (name in trainable), name
        if "lora_B" in name:  # lora_A starts without a gradient, as B is zero
            assert parameter.grad.any(), name


def test_lora_is_put_on_all_seven_projections(tiny_model_dir: Path) -> None:
    student = load_student(tiny_model_dir, lora_rank=4, device="cpu").module
    adapted = {name.rpartition(".")[2] for name, layer in student.named_modules() if isinstance(layer, LoraLayer)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_lora_falls_back_to_all_linear_layers_but_the_output_layer() -> None:
    gpt2 = AutoModelForCausalLM.from_config(ARCHITECTURES["no rotary positions"])
    student = StudentForTraining(add_lora(gpt2, rank=2, alpha=4.0, dropout=0.0))
    adapted = {name for name, layer in student.named_modules() if isinstance(layer, LoraLayer)}
    assert len(adapted) == 2 * 4
    assert not any("lm_head" in name for name in adapted)


def test_an_adapter_on_the_output_layer_is_refused(model: LlamaForCausalLM) -> None:
    model.config.tie_word_embeddings = False
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ConfigError, match="adapters on the output layer are not supported"):
        StudentForTraining(adapted)


def test_training_mode_turns_on_the_dropout_of_lora_and_no_other(tiny_model_dir: Path) -> None:
    torch.manual_seed(0)
    config = copy.deepcopy(ARCHITECTURES["no rotary positions"])
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.5
    inputs = sequences_of(SHAPES).inputs
    full = StudentForTraining(AutoModelForCausalLM.from_config(config)).train()
    assert full.training
    assert torch.equal(full(**inputs).sampled_logprobs_BT, full(**inputs).sampled_logprobs_BT)

    lora = load_student(tiny_model_dir, lora_rank=4, lora_dropout=0.5, device="cpu").module
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    assert not torch.equal(lora(**inputs).sampled_logprobs_BT, lora(**inputs).sampled_logprobs_BT)
    lora.eval()
    assert torch.equal(lora(**inputs).sampled_logprobs_BT, lora(**inputs).sampled_logprobs_BT)


def test_a_loaded_student_knows_its_facts(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model", vocab_padding=41, max_length=512)
    GenerationConfig(eos_token_id=[258, 3]).save_pretrained(directory)
    loaded = load_student(directory, device="cpu")
    assert loaded.end_ids == {257, 258, 3}  # the tokenizer's is 257
    assert loaded.pad_id == 257
    assert loaded.max_length == 512
    assert loaded.vocab_size == loaded.module.num_shared_ids == 300
    assert loaded.module.training
    assert {parameter.dtype for parameter in loaded.module.parameters()} == {torch.float32}


def test_a_bf16_checkpoint_gets_fp32_master_weights(tmp_path: Path, model: LlamaForCausalLM) -> None:
    directory = write_tiny_model(tmp_path / "model")
    model.to(torch.bfloat16).save_pretrained(directory)
    student = load_student(directory, device="cpu").module
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


def test_the_pad_id_falls_back_to_an_end_token(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = None
    tokenizer.eos_token = "<|other_end|>"
    tokenizer.save_pretrained(directory)
    loaded = load_student(directory, device="cpu")
    assert loaded.end_ids == {257, 258}
    assert loaded.pad_id == 257


def without(directory: Path, target: Path, pattern: str) -> Path:
    shutil.copytree(directory, target)
    removed = list(target.glob(pattern))
    assert removed
    for file in removed:
        file.unlink()
    return target


def test_what_cannot_be_loaded_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    cases: dict[Path, str] = {tmp_path / "absent": "no model directory"}

    cases[without(tiny_model_dir, tmp_path / "no_tokenizer", "tokenizer*")] = "cannot load a tokenizer from"
    cases[without(tiny_model_dir, tmp_path / "no_weights", "*.safetensors")] = "cannot load a causal"

    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_model_dir, damaged)
    (damaged / "model.safetensors").write_bytes(b"no tensors")
    cases[damaged] = "cannot load a causal"

    encoder_decoder = tmp_path / "t5"
    T5Config(vocab_size=259, d_model=16, num_layers=1).save_pretrained(encoder_decoder)
    cases[encoder_decoder] = "cannot load a causal"

    no_head = tmp_path / "bert"
    BertModel(
        BertConfig(vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(no_head)
    cases[no_head] = "weights are missing"

    for path, message in cases.items():
        with pytest.raises(ConfigError) as caught:
            load_student(path, device="cpu")
        assert message in str(caught.value)
        assert str(path) in str(caught.value)


def test_a_mistyped_path_given_as_text_is_not_looked_for_on_a_hub(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model directory"):
        load_student(f"{tmp_path}/absent", device="cpu")


def test_an_adapter_directory_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    loaded = load_student(tiny_model_dir, lora_rank=2, device="cpu")
    loaded.module.model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="holds an adapter"):
        load_student(tmp_path / "adapter", device="cpu")


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_saved_student_loads_with_plain_transformers(tiny_model_dir: Path, tmp_path: Path, lora_rank: int) -> None:
    loaded = moved(load_student(tiny_model_dir, lora_rank=lora_rank, lora_alpha=8.0, device="cpu"))
    before = {name: value.clone() for name, value in loaded.module.state_dict().items()}
    save_student(loaded.module, loaded.tokenizer, tmp_path / "saved")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    sequences = sequences_of(SHAPES)
    expected = plain_outputs(model, sequences)
    loaded.module.eval()
    actual = loaded.module(**sequences.inputs)
    torch.testing.assert_close(actual.sampled_logprobs_BT, expected.sampled_logprobs_BT, atol=1e-4, rtol=1e-4)
    original = plain_outputs(AutoModelForCausalLM.from_pretrained(tiny_model_dir), sequences)
    assert not torch.allclose(expected.sampled_logprobs_BT, original.sampled_logprobs_BT, atol=0.1)

    assert model.generation_config.eos_token_id == 257
    assert model.generation_config.pad_token_id == 257
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    assert not list((tmp_path / "saved").glob("adapter*"))

    after = loaded.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_merged_lora_of_transposed_layers_is_right(tmp_path: Path) -> None:
    # GPT-2 keeps its weights as [in, out].
    torch.manual_seed(0)
    gpt2 = AutoModelForCausalLM.from_config(ARCHITECTURES["no rotary positions"])
    student = StudentForTraining(add_lora(gpt2, rank=2, alpha=4.0, dropout=0.0))
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    save_student(student, _NoTokenizer(), tmp_path / "saved")
    sequences = sequences_of(SHAPES)
    expected = plain_outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), sequences)
    torch.testing.assert_close(
        student(**sequences.inputs).sampled_logprobs_BT, expected.sampled_logprobs_BT, atol=1e-4, rtol=1e-4
    )


class _NoTokenizer:
    def save_pretrained(self, directory: Path) -> None:
        pass


def test_a_generation_config_that_transformers_would_not_save_can_be_saved(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_model_dir, directory)
    facts = json.loads((directory / "generation_config.json").read_text())
    (directory / "generation_config.json").write_text(json.dumps(facts | {"temperature": 0.6, "top_p": 0.9}))
    loaded = load_student(directory, device="cpu")
    save_student(loaded.module, loaded.tokenizer, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved == facts | {"temperature": 0.6, "top_p": 0.9}  # vLLM samples with them; transformers is greedy
    assert GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == 257
    assert load_student(tmp_path / "saved", device="cpu").end_ids == loaded.end_ids


def test_the_training_forward_of_the_real_model_repeats_what_sampling_recorded(demo_model_dir: Path) -> None:
    loaded = load_student(demo_model_dir, device="cpu")
    message = {"role": "user", "content": "What is the capital of France?"}
    encoded = loaded.tokenizer.apply_chat_template([message], add_generation_prompt=True)
    prompt_ids = np.array(encoded["input_ids"], np.int64)
    sampler = RolloutSampler(
        loaded.module.model,
        num_shared_ids=loaded.vocab_size,
        end_ids=loaded.end_ids,
        pad_id=loaded.pad_id,
        max_new_tokens=8,
        temperature=1.0,
        top_k=20,
        support_mass=0.99,
        seed=0,
        batch_size=4,
        mixed_precision="bf16",
    )
    mismatches_nats = []
    for rollout in sampler.sample([(RolloutKey(0, 0, index), prompt_ids) for index in range(4)]):
        num_tokens, first = len(rollout.completion_ids), len(prompt_ids) - 1
        ids_BS = torch.from_numpy(np.concatenate([prompt_ids, rollout.completion_ids]))[None]
        empty_BTK = torch.zeros(1, num_tokens, 0, dtype=torch.long)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = loaded.module(
                ids_BS,
                torch.ones_like(ids_BS),
                first + torch.arange(num_tokens)[None],
                torch.from_numpy(rollout.completion_ids)[None],
                empty_BTK,
                empty_BTK.bool(),
                torch.ones(1, num_tokens, dtype=torch.bool),
            )
        mismatches_nats.append(np.abs(outputs.sampled_logprobs_BT[0].numpy() - rollout.behaviour_logprobs_T))
    # bf16 has 8 bits: two orders of additions differ by 0.026 nats here.
    assert np.concatenate(mismatches_nats).mean() < 0.06
