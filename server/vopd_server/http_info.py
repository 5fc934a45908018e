"""What this teacher is, as JSON: GetInfoResponse and GetTokenizerResponse with numbers and names."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from vopd_proto import teacher_pb2 as pb


class TokenizerBody(BaseModel):
    """fingerprint: sha256 over the table of /v1/tokenizer. num_ids: its entries."""

    fingerprint: str
    num_ids: int
    begin_id: int | None
    end_ids: list[int]
    pad_id: int | None


class LimitsBody(BaseModel):
    """What one request may ask for."""

    max_sequences_per_request: int
    max_tokens_per_request: int
    max_support_size: int
    max_message_bytes: int


class InfoAnswer(BaseModel):
    """The handshake; the fields are those of GetInfoResponse in teacher.proto.

    head_sha256: of the file at /v1/head; empty where the model's output head is not given away.
    """

    model_id: str
    model_revision: str
    tokenizer: TokenizerBody
    chat_template: str
    vocab_size: int
    hidden_size: int
    max_context_length: int
    dtype: str
    engine: str
    engine_version: str
    supports: list[Literal["sampled", "teacher_top_k", "candidates", "hidden_states"]]
    any_temperature: bool
    deterministic: bool
    limits: LimitsBody
    server_version: str
    head_sha256: str


class TokenizerAnswer(BaseModel):
    """tokens: entry i is id i. tokenizer_json: for the `tokenizers` library; empty when there is none."""

    tokens: list[str]
    tokenizer_json: str


def info_answer(info: pb.GetInfoResponse) -> InfoAnswer:
    tokenizer = info.tokenizer
    return InfoAnswer.model_validate(
        {
            **{
                name: getattr(info, name)
                for name in InfoAnswer.model_fields
                if name not in ("tokenizer", "supports", "limits")
            },
            "tokenizer": TokenizerBody(
                fingerprint=tokenizer.fingerprint,
                num_ids=tokenizer.num_ids,
                begin_id=tokenizer.begin_id if tokenizer.HasField("begin_id") else None,
                end_ids=list(tokenizer.end_ids),
                pad_id=tokenizer.pad_id if tokenizer.HasField("pad_id") else None,
            ),
            "supports": [descriptor.name for descriptor, offered in info.supports.ListFields() if offered],
            "limits": LimitsBody(**{name: getattr(info.limits, name) for name in LimitsBody.model_fields}),
        }
    )


def tokenizer_answer(table: pb.GetTokenizerResponse) -> TokenizerAnswer:
    """A token that is no whole text has the replacement character in it; protobuf has its bytes."""
    return TokenizerAnswer(
        tokens=[token.decode("utf-8", "replace") for token in table.tokens], tokenizer_json=table.tokenizer_json
    )
