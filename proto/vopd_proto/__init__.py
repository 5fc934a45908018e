"""The wire contract, shared by teacher and client: generated stubs, array packing, tokenizer fingerprint."""

# Both sides set gRPC's message limits to this (gRPC's own default is 4 MiB): a 16k-token
# completion with 100 dense candidates a position is about 6.5 MB of ids and as much again back.
MAX_MESSAGE_BYTES = 64 * 2**20

MAX_NAME_LENGTH = 256  # characters of a request id or a sequence id
# Of one sequence, or of its answer, beside its arrays, at most: names, field tags, lengths and times. Who plans a
# request and who checks it must count alike.
SEQUENCE_OVERHEAD_BYTES = 4 * MAX_NAME_LENGTH + 256
