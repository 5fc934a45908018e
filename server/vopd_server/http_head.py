"""GET /v1/head: the file of the output head, gigabytes of it, sent as it is read."""

from __future__ import annotations

from dataclasses import replace

from starlette.requests import Request

from vopd_server.calls import head_pieces
from vopd_server.http_call import Answer, whole_answer
from vopd_server.types import HeadFile

OCTET_STREAM = "application/octet-stream"


def head_answer(request: Request, head: HeadFile) -> Answer:
    """The file, or that the client has it."""
    if is_held(request, head):
        return replace(whole_answer(b"", OCTET_STREAM), headers={"ETag": etag(head)}, status=304)
    return Answer(head_pieces(head), head.num_bytes, {"Content-Type": OCTET_STREAM, "ETag": etag(head)})


def etag(head: HeadFile) -> str:
    return f'"{head.sha256}"'


def is_held(request: Request, head: HeadFile) -> bool:
    """Whether If-None-Match says that the client has this very file."""
    told = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    return "*" in told or etag(head) in told
