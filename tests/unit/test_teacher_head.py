"""The output head as it arrives in a file: what it makes of hidden states, and what is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from vopd_client.errors import HandshakeError
from vopd_client.linear_logprobs import Logits
from vopd_client.teacher_head import TeacherHead

NUM_IDS, HIDDEN = 11, 4


def head_file(tmp_path, *, tensors=None, metadata=None):
    generator = torch.Generator().manual_seed(0)
    weight_VH = torch.randn(NUM_IDS, HIDDEN, generator=generator)
    path = tmp_path / "head.safetensors"
    save_file({"weight": weight_VH} if tensors is None else tensors, path, metadata=metadata or {"logit_scale": "1.0"})
    return path, weight_VH


def load(path, *, temperature=1.0, vocab_size=NUM_IDS):
    return TeacherHead.load(path, temperature=temperature, device=torch.device("cpu"), vocab_size=vocab_size)


def test_bias_scale_soft_cap_and_temperature_make_the_distribution(tmp_path):
    weight_VH, bias_V = torch.randn(NUM_IDS, HIDDEN), torch.randn(NUM_IDS)
    path, _ = head_file(
        tmp_path, tensors={"weight": weight_VH, "bias": bias_V}, metadata={"logit_scale": "0.25", "softcap": "3.0"}
    )
    hidden_NH = torch.randn(7, HIDDEN)
    logits_NV = 3.0 * torch.tanh(0.25 * (hidden_NH @ weight_VH.T + bias_V) / 3.0)
    expected_NV = (logits_NV / 0.7).log_softmax(-1)
    head = load(path, temperature=0.7)
    torch.testing.assert_close(head.logprobs(hidden_NH, num_ids=NUM_IDS), expected_NV)
    # A student with fewer ids: the teacher stays normalised over its own vocabulary.
    torch.testing.assert_close(head.logprobs(hidden_NH, num_ids=5), expected_NV[:, :5])


def test_a_bfloat16_head_multiplies_in_bfloat16_as_the_teacher_does(tmp_path):
    weight_VH = torch.randn(NUM_IDS, HIDDEN).bfloat16()
    path, _ = head_file(tmp_path, tensors={"weight": weight_VH})
    hidden_NH = torch.randn(3, HIDDEN).bfloat16().float()
    logprobs_NV = load(path).logprobs(hidden_NH, num_ids=NUM_IDS)
    assert logprobs_NV.dtype == torch.float32
    rounded_NV = torch.nn.functional.linear(hidden_NH.bfloat16(), weight_VH).float()
    assert torch.equal(logprobs_NV, rounded_NV - rounded_NV.logsumexp(-1, keepdim=True))


def test_exchanged_ids_are_those_of_a_student_that_ends_with_another_token(tmp_path):
    bias_V = torch.arange(float(NUM_IDS))
    path, _ = head_file(tmp_path, tensors={"weight": torch.randn(NUM_IDS, HIDDEN), "bias": bias_V})
    hidden_NH = torch.randn(2, HIDDEN)
    head = load(path)
    plain_NV = head.logprobs(hidden_NH, num_ids=NUM_IDS)
    exchanged_NV = head.with_exchanged_ids((3, 8)).logprobs(hidden_NH, num_ids=NUM_IDS)
    order = [0, 1, 2, 8, 4, 5, 6, 7, 3, 9, 10]
    torch.testing.assert_close(exchanged_NV, plain_NV[:, order])
    assert head.with_exchanged_ids(None) is head


@pytest.mark.parametrize(
    ("tensors", "metadata", "vocab_size", "message"),
    [
        ({"other": torch.zeros(2)}, None, NUM_IDS, "not the output head of a teacher"),
        (None, {"softcap": "3.0"}, NUM_IDS, "not the output head of a teacher: KeyError\\('logit_scale'\\)"),
        (None, {"logit_scale": "much"}, NUM_IDS, "could not convert string to float"),
        (None, None, 12, r"head is \[11, 4\]; it announced 12 ids"),
        ({"weight": torch.zeros(11, 4), "bias": torch.zeros(10)}, None, NUM_IDS, r"bias .* is \[10\], for 11 ids"),
    ],
)
def test_a_file_that_is_not_this_teachers_head_is_refused_with_the_facts(
    tmp_path, tensors, metadata, vocab_size, message
):
    path, _ = head_file(tmp_path, tensors=tensors, metadata=metadata)
    with pytest.raises(HandshakeError, match=message):
        load(path, vocab_size=vocab_size)


def test_a_damaged_file_is_refused_by_name(tmp_path):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(HandshakeError, match=r"damaged\.safetensors is not the output head"):
        load(path)


def test_a_head_has_as_many_ids_as_its_softmax():
    with pytest.raises(ValueError, match="num_ids 12 > 11 rows"):
        TeacherHead(torch.zeros(11, 4), None, Logits(12)).logprobs(torch.zeros(1, 4), num_ids=11)
