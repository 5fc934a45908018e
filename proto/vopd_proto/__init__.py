"""The wire contract, shared by teacher and client: generated stubs, array packing, tokenizer fingerprint."""

# Both sides set gRPC's message limits to this (gRPC's own default is 4 MiB): a 16k-token
# completion with 100 dense candidates a position is about 6.5 MB of ids and as much again back.
MAX_MESSAGE_BYTES = 64 * 2**20
