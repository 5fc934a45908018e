"""The served model's tokenizer, as the handshake compares it."""

from __future__ import annotations

from typing import Any

from vopd_proto.fingerprint import token_table, tokenizer_fingerprint
from vopd_server.types import TokenizerInfo


def tokenizer_info(tokenizer: Any, generation_config: Any | None) -> TokenizerInfo:
    """Reads a transformers tokenizer.

    The end ids are the tokenizer's own and the generation config's together: chat models often end a turn
    with another token than the one their tokenizer calls the end.
    """
    tokens = tuple(token_table(tokenizer))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return TokenizerInfo(
        tokens=tokens,
        tokenizer_json=backend.to_str() if backend is not None else "",
        chat_template=_default_template(tokenizer.chat_template),
        begin_id=tokenizer.bos_token_id,
        end_ids=_end_ids(tokenizer.eos_token_id, getattr(generation_config, "eos_token_id", None)),
        pad_id=tokenizer.pad_token_id,
        fingerprint=tokenizer_fingerprint(tokens),
    )


def _default_template(templates: str | dict[str, str] | None) -> str:
    """A tokenizer may name several templates (for tools, for retrieval); "default" is the one for chat."""
    return templates.get("default", "") if isinstance(templates, dict) else templates or ""


def _end_ids(*ids: int | list[int] | None) -> tuple[int, ...]:
    """Each once, in the order given: the tokenizer's own end, the main one, stays first."""
    flat = [one for item in ids for one in (item if isinstance(item, list) else [item]) if one is not None]
    return tuple(dict.fromkeys(flat))
