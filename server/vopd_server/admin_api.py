"""The admin listener: what an operator and a scheduler look at, apart from where clients call."""

from __future__ import annotations

import asyncio
import re
from base64 import b64encode
from hashlib import sha256
from importlib import resources
from typing import Protocol

from fastapi import FastAPI
from pydantic import TypeAdapter
from starlette.responses import RedirectResponse, Response

from vopd_server.http_api import add_health
from vopd_server.metrics import Metrics
from vopd_server.status import ServiceStatus

PAGE = "status_page.html"
_STATUS = TypeAdapter(ServiceStatus)


class Watched(Protocol):
    """What there is to look at. `state` is the status's."""

    metrics: Metrics

    @property
    def state(self) -> str: ...

    def status(self) -> ServiceStatus: ...


def make_admin_app(service: Watched) -> FastAPI:
    """/metrics in Prometheus's text format, /status for people, and /healthz and /readyz as clients see them.

    /status.json is the `ServiceStatus` of the moment; the page at /status asks for it each second.
    """
    app = FastAPI(title="vopd teacher, admin", docs_url=None, redoc_url=None, openapi_url=None)
    add_health(app, lambda: service.state)
    page = resources.files("vopd_server").joinpath(PAGE).read_text(encoding="utf-8")
    page_headers = {
        "Content-Security-Policy": content_security_policy(page),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    async def metrics() -> Response:
        # The status is taken in the event loop, whose own it is; the text is made beside it.
        body, content_type = await asyncio.to_thread(service.metrics.exposition, service.status())
        return Response(body, media_type=content_type)

    async def status_json() -> Response:
        return Response(
            _STATUS.dump_json(service.status()), media_type="application/json", headers={"Cache-Control": "no-store"}
        )

    async def status_page() -> Response:
        return Response(page, media_type="text/html", headers=page_headers)

    async def to_status_page() -> Response:
        return RedirectResponse("status")

    app.get("/metrics")(metrics)
    app.get("/status.json")(status_json)
    app.get("/status")(status_page)
    app.get("/")(to_status_page)
    return app


def content_security_policy(page: str) -> str:
    """Lets the page run its own style and script, by their hashes, and ask where it came from. Nothing else."""
    return "; ".join(
        (
            "default-src 'none'",
            f"style-src {_hash_of(page, 'style')}",
            f"script-src {_hash_of(page, 'script')}",
            "connect-src 'self'",
            "img-src data:",  # its icon
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _hash_of(page: str, tag: str) -> str:
    """Of what is between the page's one pair of tags."""
    [text] = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
