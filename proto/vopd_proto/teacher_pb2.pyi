from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FloatType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FLOAT_TYPE_UNSPECIFIED: _ClassVar[FloatType]
    FLOAT32: _ClassVar[FloatType]
    FLOAT16: _ClassVar[FloatType]
    BFLOAT16: _ClassVar[FloatType]
FLOAT_TYPE_UNSPECIFIED: FloatType
FLOAT32: FloatType
FLOAT16: FloatType
BFLOAT16: FloatType

class FloatArray(_message.Message):
    __slots__ = ("type", "data")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    type: FloatType
    data: bytes
    def __init__(self, type: _Optional[_Union[FloatType, str]] = ..., data: _Optional[bytes] = ...) -> None: ...

class UIntArray(_message.Message):
    __slots__ = ("bytes_per_item", "data")
    BYTES_PER_ITEM_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    bytes_per_item: int
    data: bytes
    def __init__(self, bytes_per_item: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class TeacherTopK(_message.Message):
    __slots__ = ("k",)
    K_FIELD_NUMBER: _ClassVar[int]
    k: int
    def __init__(self, k: _Optional[int] = ...) -> None: ...

class Candidates(_message.Message):
    __slots__ = ("ids", "counts")
    IDS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    ids: UIntArray
    counts: UIntArray
    def __init__(self, ids: _Optional[_Union[UIntArray, _Mapping]] = ..., counts: _Optional[_Union[UIntArray, _Mapping]] = ...) -> None: ...

class HiddenStates(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Sequence(_message.Message):
    __slots__ = ("sequence_id", "context_length", "completion_length", "num_candidates", "context_index", "completion_ids", "teacher_top_k", "candidates", "hidden_states")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_LENGTH_FIELD_NUMBER: _ClassVar[int]
    NUM_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_IDS_FIELD_NUMBER: _ClassVar[int]
    TEACHER_TOP_K_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    context_length: int
    completion_length: int
    num_candidates: int
    context_index: int
    completion_ids: UIntArray
    teacher_top_k: TeacherTopK
    candidates: Candidates
    hidden_states: HiddenStates
    def __init__(self, sequence_id: _Optional[str] = ..., context_length: _Optional[int] = ..., completion_length: _Optional[int] = ..., num_candidates: _Optional[int] = ..., context_index: _Optional[int] = ..., completion_ids: _Optional[_Union[UIntArray, _Mapping]] = ..., teacher_top_k: _Optional[_Union[TeacherTopK, _Mapping]] = ..., candidates: _Optional[_Union[Candidates, _Mapping]] = ..., hidden_states: _Optional[_Union[HiddenStates, _Mapping]] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("request_id", "temperature", "float_type", "contexts", "sequences")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    FLOAT_TYPE_FIELD_NUMBER: _ClassVar[int]
    CONTEXTS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    temperature: float
    float_type: FloatType
    contexts: _containers.RepeatedCompositeFieldContainer[UIntArray]
    sequences: _containers.RepeatedCompositeFieldContainer[Sequence]
    def __init__(self, request_id: _Optional[str] = ..., temperature: _Optional[float] = ..., float_type: _Optional[_Union[FloatType, str]] = ..., contexts: _Optional[_Iterable[_Union[UIntArray, _Mapping]]] = ..., sequences: _Optional[_Iterable[_Union[Sequence, _Mapping]]] = ...) -> None: ...

class SequenceScores(_message.Message):
    __slots__ = ("sequence_id", "num_rows", "sampled_logprobs", "support_logprobs", "support_ids", "k", "hidden_states", "queue_time_s", "engine_time_s")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SUPPORT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SUPPORT_IDS_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_TIME_S_FIELD_NUMBER: _ClassVar[int]
    ENGINE_TIME_S_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    num_rows: int
    sampled_logprobs: FloatArray
    support_logprobs: FloatArray
    support_ids: UIntArray
    k: int
    hidden_states: FloatArray
    queue_time_s: float
    engine_time_s: float
    def __init__(self, sequence_id: _Optional[str] = ..., num_rows: _Optional[int] = ..., sampled_logprobs: _Optional[_Union[FloatArray, _Mapping]] = ..., support_logprobs: _Optional[_Union[FloatArray, _Mapping]] = ..., support_ids: _Optional[_Union[UIntArray, _Mapping]] = ..., k: _Optional[int] = ..., hidden_states: _Optional[_Union[FloatArray, _Mapping]] = ..., queue_time_s: _Optional[float] = ..., engine_time_s: _Optional[float] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("request_id", "model_revision", "scores")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_REVISION_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model_revision: str
    scores: _containers.RepeatedCompositeFieldContainer[SequenceScores]
    def __init__(self, request_id: _Optional[str] = ..., model_revision: _Optional[str] = ..., scores: _Optional[_Iterable[_Union[SequenceScores, _Mapping]]] = ...) -> None: ...

class StreamSettings(_message.Message):
    __slots__ = ("request_id", "temperature", "float_type")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    FLOAT_TYPE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    temperature: float
    float_type: FloatType
    def __init__(self, request_id: _Optional[str] = ..., temperature: _Optional[float] = ..., float_type: _Optional[_Union[FloatType, str]] = ...) -> None: ...

class StreamContext(_message.Message):
    __slots__ = ("context_index", "ids")
    CONTEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    context_index: int
    ids: UIntArray
    def __init__(self, context_index: _Optional[int] = ..., ids: _Optional[_Union[UIntArray, _Mapping]] = ...) -> None: ...

class ReleaseContext(_message.Message):
    __slots__ = ("context_index",)
    CONTEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    context_index: int
    def __init__(self, context_index: _Optional[int] = ...) -> None: ...

class ScoreStreamRequest(_message.Message):
    __slots__ = ("settings", "context", "sequence", "release_context")
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    RELEASE_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    settings: StreamSettings
    context: StreamContext
    sequence: Sequence
    release_context: ReleaseContext
    def __init__(self, settings: _Optional[_Union[StreamSettings, _Mapping]] = ..., context: _Optional[_Union[StreamContext, _Mapping]] = ..., sequence: _Optional[_Union[Sequence, _Mapping]] = ..., release_context: _Optional[_Union[ReleaseContext, _Mapping]] = ...) -> None: ...

class ScoreChunk(_message.Message):
    __slots__ = ("scores", "first_row", "is_last")
    SCORES_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    IS_LAST_FIELD_NUMBER: _ClassVar[int]
    scores: SequenceScores
    first_row: int
    is_last: bool
    def __init__(self, scores: _Optional[_Union[SequenceScores, _Mapping]] = ..., first_row: _Optional[int] = ..., is_last: bool = ...) -> None: ...

class ScoreFailure(_message.Message):
    __slots__ = ("sequence_id", "code", "message", "field", "retry_delay_s")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    RETRY_DELAY_S_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    code: int
    message: str
    field: str
    retry_delay_s: float
    def __init__(self, sequence_id: _Optional[str] = ..., code: _Optional[int] = ..., message: _Optional[str] = ..., field: _Optional[str] = ..., retry_delay_s: _Optional[float] = ...) -> None: ...

class StreamOpened(_message.Message):
    __slots__ = ("request_id", "model_revision")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_REVISION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model_revision: str
    def __init__(self, request_id: _Optional[str] = ..., model_revision: _Optional[str] = ...) -> None: ...

class StreamWaiting(_message.Message):
    __slots__ = ("reason", "message")
    class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNKNOWN: _ClassVar[StreamWaiting.Reason]
        QUEUE_BOUND: _ClassVar[StreamWaiting.Reason]
        TURN: _ClassVar[StreamWaiting.Reason]
        TOKENS_IN_FLIGHT: _ClassVar[StreamWaiting.Reason]
        TOKENS_PER_MINUTE: _ClassVar[StreamWaiting.Reason]
        ENGINE: _ClassVar[StreamWaiting.Reason]
    UNKNOWN: StreamWaiting.Reason
    QUEUE_BOUND: StreamWaiting.Reason
    TURN: StreamWaiting.Reason
    TOKENS_IN_FLIGHT: StreamWaiting.Reason
    TOKENS_PER_MINUTE: StreamWaiting.Reason
    ENGINE: StreamWaiting.Reason
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    reason: StreamWaiting.Reason
    message: str
    def __init__(self, reason: _Optional[_Union[StreamWaiting.Reason, str]] = ..., message: _Optional[str] = ...) -> None: ...

class ScoreStreamResponse(_message.Message):
    __slots__ = ("opened", "chunk", "failure", "waiting")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    opened: StreamOpened
    chunk: ScoreChunk
    failure: ScoreFailure
    waiting: StreamWaiting
    def __init__(self, opened: _Optional[_Union[StreamOpened, _Mapping]] = ..., chunk: _Optional[_Union[ScoreChunk, _Mapping]] = ..., failure: _Optional[_Union[ScoreFailure, _Mapping]] = ..., waiting: _Optional[_Union[StreamWaiting, _Mapping]] = ...) -> None: ...

class GetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_sequences_per_request", "max_tokens_per_request", "max_support_size", "max_message_bytes")
    MAX_SEQUENCES_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MAX_SUPPORT_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_sequences_per_request: int
    max_tokens_per_request: int
    max_support_size: int
    max_message_bytes: int
    def __init__(self, max_sequences_per_request: _Optional[int] = ..., max_tokens_per_request: _Optional[int] = ..., max_support_size: _Optional[int] = ..., max_message_bytes: _Optional[int] = ...) -> None: ...

class TokenizerInfo(_message.Message):
    __slots__ = ("fingerprint", "num_ids", "begin_id", "end_ids", "pad_id")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_IDS_FIELD_NUMBER: _ClassVar[int]
    BEGIN_ID_FIELD_NUMBER: _ClassVar[int]
    END_IDS_FIELD_NUMBER: _ClassVar[int]
    PAD_ID_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    num_ids: int
    begin_id: int
    end_ids: _containers.RepeatedScalarFieldContainer[int]
    pad_id: int
    def __init__(self, fingerprint: _Optional[str] = ..., num_ids: _Optional[int] = ..., begin_id: _Optional[int] = ..., end_ids: _Optional[_Iterable[int]] = ..., pad_id: _Optional[int] = ...) -> None: ...

class Supports(_message.Message):
    __slots__ = ("sampled", "teacher_top_k", "candidates", "hidden_states")
    SAMPLED_FIELD_NUMBER: _ClassVar[int]
    TEACHER_TOP_K_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    sampled: bool
    teacher_top_k: bool
    candidates: bool
    hidden_states: bool
    def __init__(self, sampled: bool = ..., teacher_top_k: bool = ..., candidates: bool = ..., hidden_states: bool = ...) -> None: ...

class GetInfoResponse(_message.Message):
    __slots__ = ("model_id", "model_revision", "tokenizer", "chat_template", "vocab_size", "max_context_length", "dtype", "engine", "engine_version", "supports", "any_temperature", "deterministic", "limits", "server_version", "hidden_size", "head_sha256")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_REVISION_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SUPPORTS_FIELD_NUMBER: _ClassVar[int]
    ANY_TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    HEAD_SHA256_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    model_revision: str
    tokenizer: TokenizerInfo
    chat_template: str
    vocab_size: int
    max_context_length: int
    dtype: str
    engine: str
    engine_version: str
    supports: Supports
    any_temperature: bool
    deterministic: bool
    limits: Limits
    server_version: str
    hidden_size: int
    head_sha256: str
    def __init__(self, model_id: _Optional[str] = ..., model_revision: _Optional[str] = ..., tokenizer: _Optional[_Union[TokenizerInfo, _Mapping]] = ..., chat_template: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_context_length: _Optional[int] = ..., dtype: _Optional[str] = ..., engine: _Optional[str] = ..., engine_version: _Optional[str] = ..., supports: _Optional[_Union[Supports, _Mapping]] = ..., any_temperature: bool = ..., deterministic: bool = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., server_version: _Optional[str] = ..., hidden_size: _Optional[int] = ..., head_sha256: _Optional[str] = ...) -> None: ...

class GetTokenizerRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetTokenizerResponse(_message.Message):
    __slots__ = ("tokens", "tokenizer_json")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_JSON_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[bytes]
    tokenizer_json: str
    def __init__(self, tokens: _Optional[_Iterable[bytes]] = ..., tokenizer_json: _Optional[str] = ...) -> None: ...

class GetHeadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetHeadResponse(_message.Message):
    __slots__ = ("data", "num_bytes")
    DATA_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    num_bytes: int
    def __init__(self, data: _Optional[bytes] = ..., num_bytes: _Optional[int] = ...) -> None: ...
