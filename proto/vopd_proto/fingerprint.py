"""The identity of a tokenizer: a hash over its id -> token table.

Two models can be distilled into one another when equal ids mean equal text. Embedding sizes
do not tell that (models of one family pad them differently), and neither do names or files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any


def tokenizer_fingerprint(tokens: Sequence[bytes]) -> str:
    """sha256 over the table, each entry preceded by its length in bytes; an id without a token is empty."""
    digest = hashlib.sha256()
    for token in tokens:
        digest.update(len(token).to_bytes(4, "little"))
        digest.update(token)
    return digest.hexdigest()


def token_table(tokenizer: Any) -> list[bytes]:
    """The id -> token table of a transformers tokenizer, [num_ids] UTF-8 (lone surrogates kept as they are)."""
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    table = [b""] * size
    for token, index in tokenizer.get_vocab().items():
        table[index] = token.encode("utf-8", "surrogatepass")
    return table
