"""The other protocols on the HTTP listener: the same tenants, queue, limits, deadlines, metrics, logs and errors."""

from __future__ import annotations

import asyncio
import time

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from vopd_server.calls import Call
from vopd_server.compat import sglang, vllm_generate
from vopd_server.compat.models import model_info, model_list
from vopd_server.compat.openapi import COMPLETIONS, GENERATE, HEALTH, MODEL_INFO, MODELS, SGLANG_GENERATE
from vopd_server.compat.scoring import Read, Served, TokenTexts, scored_answer
from vopd_server.compat.vllm_completions import read_completions
from vopd_server.errors import MediaTypeError
from vopd_server.http_call import Answer, CallResponse, whole_answer
from vopd_server.http_request import JSON, MAX_JSON_BYTES, media_type_of, read_body, while_connected
from vopd_server.service import TeacherService
from vopd_server.tenancy import Tenant


def add_compat(app: FastAPI, service: TeacherService, *, body_timeout_s: float) -> None:
    """body_timeout_s: as for `make_http_app`."""
    api = CompatApi(service, body_timeout_s=body_timeout_s)
    app.get("/health", **HEALTH)(api.health)
    app.get("/health_generate", **HEALTH)(api.health)
    app.get("/v1/models", **MODELS)(api.models)
    app.get("/get_model_info", **MODEL_INFO)(api.model_info)
    app.post("/v1/completions", **COMPLETIONS)(api.completions)
    app.post("/inference/v1/generate", **GENERATE)(api.generate)
    app.post("/generate", **SGLANG_GENERATE)(api.sglang_generate)


class CompatApi:
    """The requests of other protocols, by their paths."""

    def __init__(self, service: TeacherService, *, body_timeout_s: float) -> None:
        self._service = service
        self._body_timeout_s = body_timeout_s
        self._texts: TokenTexts | None = None
        self._created = int(time.time())

    async def health(self) -> Response:
        """200 when requests are answered: trainers poll it until then. Needs no key."""
        state = self._service.state
        return Response(f"{state}\n", 200 if state == "ready" else 503, media_type="text/plain")

    async def models(self, _request: Request) -> Response:
        async def answer(_request: Request, call: Call) -> Answer:
            longest = self._service.limits_for(call.tenant).max_context_length
            return _json(model_list(self._service.info, max_context_length=longest, created=self._created))

        return CallResponse(self._service, "Models", answer, unread_timeout_s=self._body_timeout_s)

    async def model_info(self, _request: Request) -> Response:
        async def answer(_request: Request, _call: Call) -> Answer:
            return _json(model_info(self._service.info))

        return CallResponse(self._service, "ModelInfo", answer, unread_timeout_s=self._body_timeout_s)

    async def completions(self, _request: Request) -> Response:
        return self._scoring("Completions", read_completions)

    async def generate(self, _request: Request) -> Response:
        return self._scoring("Generate", vllm_generate.read_generate)

    async def sglang_generate(self, _request: Request) -> Response:
        return self._scoring("SglangGenerate", sglang.read_generate)

    def _scoring(self, method: str, read: Read) -> CallResponse:
        async def answer(request: Request, call: Call) -> Answer:
            if (media_type := media_type_of(request)) != JSON:
                raise MediaTypeError("Content-Type", f"{media_type or 'none'!r}; send {JSON}")
            max_bytes = min(self._service.limits.max_message_bytes, MAX_JSON_BYTES)
            body = await read_body(request, max_bytes, timeout_s=self._body_timeout_s)
            self._service.metrics.bytes_moved(call.tenant.id, "http", "received", len(body))
            return await while_connected(request, self._scored(call, read, body))

        return CallResponse(self._service, method, answer, unread_timeout_s=self._body_timeout_s)

    async def _scored(self, call: Call, read: Read, body: bytes) -> Answer:
        asked, write = await asyncio.to_thread(read, body, self._served_to(call.tenant))
        return whole_answer(await scored_answer(self._service, call, asked, write), JSON)

    def _served_to(self, tenant: Tenant) -> Served:
        info = self._service.info
        if self._texts is None:
            self._texts = TokenTexts(self._service.tokenizer.tokens)
        return Served(
            model_id=info.model_id,
            model_revision=info.model_revision,
            vocab_size=info.vocab_size,
            max_top_k=min(self._service.limits_for(tenant).max_top_k, info.vocab_size),
            texts=self._texts,
        )


def _json(answer: BaseModel) -> Answer:
    return whole_answer(answer.model_dump_json().encode(), JSON)
