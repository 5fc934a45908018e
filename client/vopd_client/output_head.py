"""The last step of a causal LM, from hidden states to logits, taken out of the model so that it can run in chunks.

Axes: B sequences, S tokens, N rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vopd_client.cpu_attention import attending_on_cpu, configs_to_switch
from vopd_client.errors import ConfigError
from vopd_client.gradient_checkpointing import checkpointing
from vopd_client.linear_logprobs import Logits, full_logprobs

# fp32 against fp32 over the same weights: what remains is the order of additions.
PROBE_TOLERANCE_NATS = 1e-3


@dataclass(frozen=True)
class LogitTransform:
    """What some architectures do to hidden @ weight + bias: times `scale`, then softcap * tanh(. / softcap)."""

    scale: float = 1.0
    softcap: float | None = None


def logit_transform(model: PreTrainedModel) -> LogitTransform:
    """Reads the transform off the configuration; `check_output_head` finds what it does not know of."""
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)  # Falcon-H1
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return LogitTransform(scale, None if softcap is None else float(softcap))


def output_head(model: PreTrainedModel) -> nn.Linear:
    """The linear layer that makes the logits.

    Raises: ConfigError where there is none, or where it carries adapters: the head's weight is used outside its
        own forward, which would leave them out without a word.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        found = "no output layer" if head is None else f"an output layer of type {type(head).__name__}"
        raise ConfigError(
            f"{type(model).__name__} has {found}; the student's must be a plain linear layer "
            "(adapters on the output layer are not supported)"
        )
    return head


def hidden_states(
    model: PreTrainedModel,
    input_ids_BS: Tensor,
    attention_mask_BS: Tensor,
    checkpointed_layers: Sequence[nn.Module] = (),
) -> Tensor:
    """Final hidden states [B, S, H] of right-padded input, without logits and without a cache.

    checkpointed_layers: those that keep their inputs only, see `gradient_checkpointing`.

    What is computed at padding is never to be read. A causal model does not look ahead to it, so torch's attention
    goes without the mask: it then skips the half above the diagonal, and needs no copy of shared keys for each head.
    """
    mask_BS = None if model.config._attn_implementation == "sdpa" else attention_mask_BS
    attending = partial(attending_on_cpu, configs_to_switch(model))
    with attending(), checkpointing(checkpointed_layers, attending):
        output = model.base_model(input_ids=input_ids_BS, attention_mask=mask_BS, use_cache=False)
    hidden_BSH: Tensor = output.last_hidden_state
    return hidden_BSH


@torch.no_grad()
def check_output_head(model: PreTrainedModel) -> None:
    """Compares hidden states through the head with the model's own logits on a short probe.

    Raises: ConfigError naming the architecture when they differ, or when a later token changes an earlier row
        (not a causal LM).
    """
    head = output_head(model)
    architecture = type(model).__name__
    transform = logit_transform(model)
    generator = torch.Generator().manual_seed(0)
    probe_BS = torch.randint(head.out_features, (1, 8), generator=generator).to(head.weight.device)
    whole_mask_BS = torch.ones_like(probe_BS)

    own_SV = model(input_ids=probe_BS, attention_mask=whole_mask_BS, use_cache=False).logits[0].float()
    own_SV = own_SV.log_softmax(dim=-1)
    ours_SV = full_logprobs(
        hidden_states(model, probe_BS, whole_mask_BS)[0],
        head.weight,
        head.bias,
        Logits(head.out_features, scale=transform.scale, softcap=transform.softcap),
    )
    _require_equal(
        ours_SV,
        own_SV,
        f"{architecture} computes its logits in a way that this trainer does not know: hidden states through "
        "the output layer give other log-probabilities",
    )
    prefix_BS = probe_BS[:, :5]
    prefix_SV = model(input_ids=prefix_BS, attention_mask=torch.ones_like(prefix_BS), use_cache=False).logits[0]
    _require_equal(
        prefix_SV.float().log_softmax(dim=-1),
        own_SV[:5],
        f"{architecture} is not a causal language model: later tokens change the log-probabilities of earlier ones",
    )


def _require_equal(actual_SV: Tensor, expected_SV: Tensor, message: str) -> None:
    difference_nats = (actual_SV - expected_SV).abs().max().item()
    if not difference_nats <= PROBE_TOLERANCE_NATS:  # NaN is a difference, too
        raise ConfigError(f"{message} (by up to {difference_nats:.3g} nats)")
