"""Every setting of the teacher, with its unit and default; the one source of flags, file keys and environment."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_settings import NoDecode

from vopd_proto import MAX_MESSAGE_BYTES, SEQUENCE_OVERHEAD_BYTES
from vopd_server.answer_codec import CHUNK_BYTES
from vopd_server.demand import MIN_TENANT_BYTES

EngineName = Literal["auto", "transformers", "vllm"]


def _parsed_object(value: object) -> object:
    """A flag and a variable hold JSON, a file holds the mapping itself."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"not a JSON object: {error}") from error


EngineArgs = Annotated[dict[str, Any], NoDecode, BeforeValidator(_parsed_object)]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]


class ServerConfig(BaseModel):
    """One teacher process. Unknown keys are errors; settings that do not go together are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # --- what is served
    model: str = Field(description="Teacher model: a directory or a hub id.")
    revision: str | None = Field(None, description="Revision of a hub model; default: its main branch.")
    engine: EngineName = Field(
        "auto", description="What runs the model; auto: vllm where it is installed and can do what is asked for."
    )
    engine_args: EngineArgs = Field(
        default_factory=dict,
        description='vLLM\'s own engine arguments, passed through: {"tensor_parallel_size": 4}.',
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of the weights and of the matrix products; auto: the checkpoint's own."
    )
    device: str | None = Field(None, description="Device of the model: cpu, cuda, cuda:1, mps; default: the best.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model files.")
    deterministic: bool = Field(
        False, description="The same request gives the same bits, whatever else is served beside it (slower)."
    )
    allow_full_vocab: bool = Field(
        False,
        description="Give the model's output head, a matrix of its weights, to whoever may score, and final hidden "
        "states with it. vopd-full, full-kl, exact KL in evaluations and `vopd-client variance` need them. Engine "
        "transformers only, which auto then is.",
    )

    # --- where
    host: str = Field(
        "127.0.0.1",
        description="Address to listen on; one that is not loopback needs API keys with TLS or --plaintext, or --open.",
    )
    port: int = Field(50051, ge=0, le=65535, description="TCP port of gRPC; 0: any free one.")
    http_port: int | None = Field(8080, ge=0, le=65535, description="TCP port of HTTP; 0: any free one; None: no HTTP.")
    admin_host: str = Field(
        "127.0.0.1",
        description="Address of the admin listener: metrics and health; one that is not loopback needs --admin-open.",
    )
    admin_port: int | None = Field(
        9090, ge=0, le=65535, description="TCP port of the admin listener; 0: any free one; None: no admin listener."
    )
    admin_open: bool = Field(False, description="Show metrics and health to everyone who can reach the admin port.")
    keys_file: Path | None = Field(
        None,
        description="File with the tenants and the hashes of their API keys, which `vopd-server keys` writes; it is "
        "read again when it changes. None: no keys, and one tenant.",
    )
    create_keys_file: bool = Field(
        False,
        description="When keys_file is missing, create it with a key for the tenant `default`, written to default.key "
        "beside it.",
    )
    open: bool = Field(False, description="Serve everyone who can reach the ports, without API keys.")
    plaintext: bool = Field(
        False, description="Take API keys over unencrypted connections from other machines: the network is trusted."
    )
    tls_cert_file: Path | None = Field(
        None, description="PEM file with the certificate chain of gRPC and HTTP; with it they speak TLS only."
    )
    tls_key_file: Path | None = Field(None, description="PEM file with the certificate's private key.")

    # --- how much
    max_context_length: int | None = Field(
        None, ge=2, description="Context + completion tokens of one sequence, at most; default: the model's own."
    )
    max_batch_tokens: int = Field(
        16_384, ge=1, description="Padded tokens in one forward pass, at most; a longer sequence runs alone."
    )
    context_cache_tokens: int | None = Field(
        None,
        ge=0,
        description="Tokens of contexts whose keys and values the transformers engine keeps, for completions that "
        "arrive after the first of their group; 0: none. Default: a quarter of max-batch-tokens.",
    )
    max_sequences_per_request: int = Field(256, ge=1, description="Sequences in one Score request, at most.")
    max_tokens_per_request: int = Field(
        131_072, ge=2, description="Context + completion tokens over all sequences of one request, at most."
    )
    max_top_k: int = Field(1024, ge=1, description="Ids in the support of one position, at most.")
    max_message_bytes: int = Field(
        MAX_MESSAGE_BYTES, ge=1, description="Bytes of one message or HTTP body in either direction, at most."
    )
    queue_tokens: int = Field(
        524_288,
        ge=2,
        description="Tokens that one tenant may have admitted and not yet answered, where its key has no bound of its "
        "own; over it requests are refused and streams held back.",
    )
    queue_bytes: int = Field(
        4 * 2**30,
        ge=MIN_TENANT_BYTES,
        description="Memory for requests and answers, of all tenants together: each has an equal share of it.",
    )
    engine_window_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens in the engine at a time; the rest waits where fairness decides. Default: one forward's "
        "worth, with vLLM one step's and no more than its KV cache holds.",
    )
    calls_per_tenant: int = Field(256, ge=1, description="Calls of one tenant at a time, at most; a stream is one.")

    # --- for how long
    drain_timeout_s: float = Field(
        30.0, ge=0, description="Seconds after SIGTERM in which requests in flight may finish."
    )
    answer_timeout_s: float = Field(
        300.0, gt=0, description="Seconds that a client may leave an answer of its stream unread before it is ended."
    )
    watchdog_interval_s: float = Field(
        30.0,
        gt=0,
        description="Seconds in which the engine answers nothing, after which the watchdog has it score its probe.",
    )
    engine_hang_timeout_s: float = Field(
        300.0,
        gt=0,
        description="Seconds without any answer of the engine, nor to the watchdog's probe, after which it counts as "
        "hung and the process ends. Longer than the longest forward takes.",
    )

    # --- what is written
    golden_file: Path | None = Field(
        None,
        description="File that keeps the scores of a fixed sequence: a start whose scores differ from those of an "
        "earlier one of the same model is refused. None: compared within one start only.",
    )
    log_level: LogLevel = Field("info", description="Least severe messages that are logged (to standard error).")
    log_format: LogFormat = Field("text", description="One line of text, or one JSON object, a message.")

    @model_validator(mode="after")
    def _admitted_requests_fit(self) -> ServerConfig:
        if self.max_tokens_per_request > self.queue_tokens:
            raise ValueError(
                f"max_tokens_per_request {self.max_tokens_per_request} > queue_tokens {self.queue_tokens}: "
                "a request within its limit could never be admitted"
            )
        if self.max_context_length is not None and self.max_context_length > self.max_tokens_per_request:
            raise ValueError(
                f"max_context_length {self.max_context_length} > max_tokens_per_request "
                f"{self.max_tokens_per_request}: a sequence within its limit could never be sent"
            )
        needed = least_message_bytes(self.max_tokens_per_request, self.max_sequences_per_request, self.max_top_k)
        if self.max_message_bytes < needed:
            raise ValueError(
                f"max_message_bytes {self.max_message_bytes} < {needed}, which max_tokens_per_request "
                f"{self.max_tokens_per_request}, max_sequences_per_request {self.max_sequences_per_request} "
                f"and max_top_k {self.max_top_k} need"
            )
        return self

    @model_validator(mode="after")
    def _keys_or_everyone(self) -> ServerConfig:
        if self.keys_file is not None and self.open:
            raise ValueError("open serves everyone, keys_file those who have a key: leave one of them out")
        if self.keys_file is None and self.create_keys_file:
            raise ValueError("create_keys_file needs a keys_file, which names the file to create")
        return self

    @model_validator(mode="after")
    def _strangers_only_when_told(self) -> ServerConfig:
        encrypted = self.tls_cert_file is not None
        if not is_loopback(self.host):
            if self.keys_file is None and not self.open:
                raise ValueError(
                    f"host {self.host} can be reached from other machines, and no API keys are asked for: add "
                    "--keys-file (`vopd-server keys create` makes one), or --open to serve everyone who can reach it, "
                    "or listen on 127.0.0.1"
                )
            if self.keys_file is not None and not (encrypted or self.plaintext):
                raise ValueError(
                    f"host {self.host} can be reached from other machines, and their API keys would travel "
                    "unencrypted: add --tls-cert-file and --tls-key-file, or --plaintext if the network in between is "
                    "trusted, or listen on 127.0.0.1"
                )
        if not (is_loopback(self.admin_host) or self.admin_open or self.open):
            raise ValueError(
                f"admin_host {self.admin_host} can be reached from other machines, and the admin port asks for no "
                "key: add --admin-open to show metrics and health to everyone who can reach it, or listen on 127.0.0.1"
            )
        return self

    @model_validator(mode="after")
    def _each_listener_has_its_own_port(self) -> ServerConfig:
        """Two on one port would be found when the second is bound, but not said which."""
        named = {"port": self.port, "http_port": self.http_port, "admin_port": self.admin_port}
        names_of_port: dict[int, str] = {}
        for name, port in named.items():
            if port and port in names_of_port:
                raise ValueError(f"{names_of_port[port]} and {name} are both {port}")
            if port:
                names_of_port[port] = name
        return self

    @model_validator(mode="after")
    def _certificate_and_key_go_together(self) -> ServerConfig:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file go together")
        return self

    @model_validator(mode="after")
    def _engine_can_do_it(self) -> ServerConfig:
        reasons = reasons_against_vllm(self)
        if self.engine == "vllm" and reasons:
            raise ValueError(f"engine vllm {reasons[0]}")
        if self.engine == "transformers" and self.engine_args:
            raise ValueError("engine_args are vLLM's: engine transformers has none")
        if self.engine_args and reasons:
            raise ValueError(f"engine_args are vLLM's, which {reasons[0]}")
        return self


def reasons_against_vllm(config: ServerConfig) -> list[str]:
    """What vLLM cannot do of what is asked for; empty when it can be chosen."""
    return [
        reason
        for reason, applies in (
            ("cannot be deterministic", config.deterministic),
            (f"chooses its devices itself: leave device {config.device} out", config.device is not None),
            ("does not give hidden states away, as allow_full_vocab asks: transformers does", config.allow_full_vocab),
        )
        if applies
    ]


def least_message_bytes(max_tokens: int, max_sequences: int, max_top_k: int) -> int:
    """Bytes that a request without a support, its answer, and any one chunk of an answer stay below."""
    request_or_answer = 4 * max_tokens + SEQUENCE_OVERHEAD_BYTES * (max_sequences + 1)
    chunk_of_one_row = max(CHUNK_BYTES, 8 * (max_top_k + 1)) + SEQUENCE_OVERHEAD_BYTES
    return max(request_or_answer, chunk_of_one_row)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host` (a name other than localhost may be anything: no)."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
