"""The student: a causal LM whose forward returns log-probabilities at the completion's rows only.

Axes: B sequences, S input tokens (right-padded), T completion tokens, K support size, N scored completion tokens,
H hidden size, V vocabulary (the ids that both sides have).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vopd_client.errors import ConfigError
from vopd_client.gradient_checkpointing import layers_to_checkpoint
from vopd_client.linear_logprobs import Logits, linear_logprobs
from vopd_client.model_files import (
    add_lora,
    end_token_ids,
    load_causal_lm,
    load_tokenizer,
    lora_layers,
    max_input_length,
    stored_dtype,
    without_peft_wrapper,
)
from vopd_client.output_head import check_output_head, hidden_states, logit_transform, output_head
from vopd_client.teacher_head import TeacherHead
from vopd_client.whole_vocabulary import RewardMoments, whole_vocabulary


class StudentOutputs(NamedTuple):
    """Row t belongs to completion token t; everything is 0 outside the loss mask, and float32.

    With the teacher's hidden states there are whole_BT and reverse_kl_sum, KL(pi || q) added up over the loss mask;
    the support is then empty. Otherwise both are None.
    """

    sampled_logprobs_BT: Tensor  # gradient
    support_logprobs_BTK: Tensor  # gradient; 0 at pad columns
    sum_pi_squared_BT: Tensor  # no gradient
    whole_BT: RewardMoments | None = None  # no gradient
    reverse_kl_sum: Tensor | None = None  # gradient, where it was wanted
    num_ids: int = 0  # that whole_BT sums over


class StudentForTraining(nn.Module):
    """Wraps a causal LM, plain or with LoRA, as `model`.

    The output layer runs inside this forward, so that the hooks of DDP and FSDP see its weight being used. The
    trainer sets `temperature` and, after the handshake, `num_shared_ids` (until then: all ids of the output layer),
    `dropped_ids`, end tokens that pi is to be conditioned against (until then: none), and, for what needs the whole
    vocabulary, `teacher_head` and the `reward_floor` (see `whole_vocabulary`).

    gradient_checkpointing: forwards that gradients go back through keep the inputs of layers only.

    Raises: ConfigError when the logits of this architecture cannot be computed from its hidden states, or it does not
        support gradient checkpointing.
    """

    def __init__(self, model: nn.Module, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.model = model
        self.eval()
        check_output_head(self.causal_lm)
        # A tuple: modules in an attribute of their own would be in the state dict twice.
        self._checkpointed = tuple(layers_to_checkpoint(self.causal_lm)) if gradient_checkpointing else ()
        self.temperature = 1.0
        self.num_shared_ids = self.vocab_size
        self.dropped_ids: tuple[int, ...] = ()
        self.teacher_head: TeacherHead | None = None
        self.reward_floor: float | None = None
        self.train()

    @property
    def causal_lm(self) -> Any:
        """The transformers model; LoRA layers, where there are any, sit inside it."""
        return without_peft_wrapper(self.model)

    @property
    def vocab_size(self) -> int:
        """Ids that the output layer scores, padding of the embedding included."""
        return int(output_head(self.causal_lm).out_features)

    @property
    def logits(self) -> Logits:
        """What becomes of the output layer's product before the softmax."""
        transform = logit_transform(self.causal_lm)
        return Logits(self.num_shared_ids, self.temperature, transform.scale, transform.softcap, self.dropped_ids)

    def train(self, mode: bool = True) -> StudentForTraining:
        """Training mode turns on LoRA's dropout and nothing else.

        The model's own dropout stays off: pi in the training forward is to be the pi that sampled.
        """
        super().train(False)
        self.training = mode
        for layer in lora_layers(self.causal_lm).values():
            layer.lora_dropout.train(mode)
        return self

    def forward(
        self,
        input_ids_BS: Tensor,
        attention_mask_BS: Tensor,
        row_index_BT: Tensor,
        completion_ids_BT: Tensor,
        support_ids_BTK: Tensor,
        support_mask_BTK: Tensor,
        loss_mask_BT: Tensor,
        teacher_hidden_BTH: Tensor | None = None,
        *,
        want_kl_gradient: bool = False,
    ) -> StudentOutputs:
        """Log-probabilities at the run's temperature, over the first `num_shared_ids` ids, natural log.

        The arguments are the fields of `Batch`. Logits are computed at the N rows inside loss_mask_BT only:
        neither prompts nor padding cost any. want_kl_gradient: reverse_kl_sum is to be differentiable.
        """
        return self.outputs_at(
            hidden_states(
                self.causal_lm,
                input_ids_BS,
                attention_mask_BS,
                self._checkpointed if torch.is_grad_enabled() else (),
            ),
            row_index_BT,
            completion_ids_BT,
            support_ids_BTK,
            support_mask_BTK,
            loss_mask_BT,
            teacher_hidden_BTH,
            want_kl_gradient=want_kl_gradient,
        )

    def outputs_at(
        self,
        hidden_BSH: Tensor,
        row_index_BT: Tensor,
        completion_ids_BT: Tensor,
        support_ids_BTK: Tensor,
        support_mask_BTK: Tensor,
        loss_mask_BT: Tensor,
        teacher_hidden_BTH: Tensor | None = None,
        *,
        want_kl_gradient: bool = False,
    ) -> StudentOutputs:
        """What `forward` returns, from the last hidden states of the input: to be called inside a forward."""
        scored = sequence_N, token_N = loss_mask_BT.nonzero(as_tuple=True)
        hidden_NH = hidden_BSH[sequence_N, row_index_BT[scored]]
        head = output_head(self.causal_lm)

        def padded(values: Tensor) -> Tensor:
            """[N, ...] -> [B, T, ...], 0 outside the mask."""
            empty = values.new_zeros((*loss_mask_BT.shape, *values.shape[1:]))
            return empty.index_put((sequence_N, token_N), values)

        if teacher_hidden_BTH is not None:
            assert self.teacher_head is not None, "hidden states without the head that they belong to"
            whole = whole_vocabulary(
                hidden_NH,
                head.weight,
                head.bias,
                completion_ids_BT[scored],
                self.logits,
                teacher_hidden_BTH[scored],
                self.teacher_head,
                want_kl_gradient=want_kl_gradient,
                reward_floor=self.reward_floor,
            )
            return StudentOutputs(
                sampled_logprobs_BT=padded(whole.sampled_N),
                support_logprobs_BTK=whole.sampled_N.new_zeros((*loss_mask_BT.shape, 0)),
                sum_pi_squared_BT=padded(whole.moments.sum_pi_squared),
                whole_BT=RewardMoments(*map(padded, whole.moments)),
                reverse_kl_sum=whole.reverse_kl_sum,
                num_ids=self.num_shared_ids - len(self.dropped_ids),
            )
        logprobs = linear_logprobs(
            hidden_NH,
            head.weight,
            head.bias,
            completion_ids_BT[scored],
            support_ids_BTK[scored],
            support_mask_BTK[scored],
            self.logits,
        )
        return StudentOutputs(
            sampled_logprobs_BT=padded(logprobs.sampled_N),
            support_logprobs_BTK=padded(logprobs.support_NK),
            sum_pi_squared_BT=padded(logprobs.sum_pi_squared_N),
        )


@dataclass(frozen=True)
class LoadedStudent:
    """A student, ready to be trained or evaluated.

    end_ids: the generation config's end tokens and the tokenizer's; may be empty.
    pad_id: the tokenizer's, else an end token, else 0; only ever used where it is masked.
    max_length: tokens of prompt and completion together, at most.
    vocab_size: ids that the output layer scores.
    stored_dtype: of the files that it came from; the module's own weights are float32.
    revision: the hub's commit of those files; None for a directory.
    """

    module: StudentForTraining
    tokenizer: Any
    end_ids: frozenset[int]
    pad_id: int
    max_length: int
    vocab_size: int
    stored_dtype: torch.dtype = torch.float32
    revision: str | None = None


def load_student(
    path: str | Path,
    *,
    lora_rank: int = 0,
    lora_alpha: float = 128.0,
    lora_dropout: float = 0.0,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
) -> LoadedStudent:
    """Loads a model directory or hub id with float32 master weights, in training mode.

    With `lora_rank` > 0 only LoRA adapters are trainable; they start from torch's global random generator, so
    seed it first. `device` None means the best there is.

    Raises: ConfigError, which names the path, when it does not exist, is damaged, is not a causal LM, has no
        tokenizer, or computes logits in a way that is not known here; and for an architecture without gradient
        checkpointing, where that is wanted.
    """
    where = _best_device() if device is None else _usable_device(device)
    model = load_causal_lm(path, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    end_ids = end_token_ids(model, tokenizer)
    max_length = max_input_length(model)
    revision = getattr(model.config, "_commit_hash", None)
    if lora_rank > 0:
        model = add_lora(model, rank=lora_rank, alpha=lora_alpha, dropout=lora_dropout)
    module = StudentForTraining(model.to(where), gradient_checkpointing=gradient_checkpointing)
    pad_id = tokenizer.pad_token_id
    return LoadedStudent(
        module=module,
        tokenizer=tokenizer,
        end_ids=end_ids,
        pad_id=pad_id if pad_id is not None else min(end_ids, default=0),
        max_length=max_length,
        vocab_size=module.vocab_size,
        stored_dtype=stored_dtype(path, trust_remote_code=trust_remote_code),
        revision=revision,
    )


def _usable_device(name: str | torch.device) -> torch.device:
    """Found out before the model is loaded. Raises: ConfigError."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name}: {str(error).splitlines()[0]}") from error


def _best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
