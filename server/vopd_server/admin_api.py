"""The admin listener: what an operator and a scheduler look at, apart from where clients call."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI
from starlette.responses import Response

from vopd_server.http_api import add_health
from vopd_server.service import TeacherService


def make_admin_app(service: TeacherService) -> FastAPI:
    """/metrics in Prometheus's text format, and /healthz and /readyz as clients see them."""
    app = FastAPI(title="vopd teacher, admin", docs_url=None, redoc_url=None, openapi_url=None)
    add_health(app, service)

    async def metrics() -> Response:
        body, content_type = await asyncio.to_thread(service.metrics.exposition)
        return Response(body, media_type=content_type)

    app.get("/metrics")(metrics)
    return app
