"""Which of vLLM's own engine arguments an operator may set, and which are this server's. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from vopd_server.errors import ConfigError

# Why an argument cannot be passed through.
RESERVED = {
    "model": "use the setting model",
    "revision": "use the setting revision",
    "dtype": "use the setting dtype",
    "trust_remote_code": "use the setting trust_remote_code",
    "max_model_len": "use the setting max_context_length",
    "max_logprobs": "use the setting max_top_k",
    "tokenizer": "the teacher's tokenizer is its model's",
    "tokenizer_revision": "the teacher's tokenizer is its model's",
    "skip_tokenizer_init": "the teacher's tokenizer is its model's",
    "logprobs_mode": "scores are log-probabilities of the raw logits",
    "disable_log_stats": "the statistics tell which answers a preemption has spoiled",
    "scheduler_cls": "this server's keeps cache hits within contexts",
    "kv_sharing_fast_prefill": "it makes the log-probabilities of prompt tokens wrong",
    "enable_lora": "no request names an adapter, and one on the output head would make its scores wrong",
    "max_num_queued_reqs": "admission is this server's: use the setting queue_tokens",
    "max_num_queued_tokens": "admission is this server's: use the setting queue_tokens",
    "enable_log_requests": "prompts are not logged",
}


def check_engine_args(engine_args: Mapping[str, Any], known: Collection[str]) -> None:
    """known: the names of vLLM's AsyncEngineArgs. Raises: ConfigError naming the argument and the nearest known one."""
    for name in engine_args:
        if name in RESERVED:
            raise ConfigError(f"engine_args.{name} cannot be set: {RESERVED[name]}")
        if name not in known:
            nearest = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ConfigError(f"engine_args.{name} is not an argument of vLLM's AsyncEngineArgs{hint}")
