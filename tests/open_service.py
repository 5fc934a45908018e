"""A service without keys or transports around an engine, and what is asked of its admission."""

from __future__ import annotations

from vopd_server.admission import Admission
from vopd_server.engines.base import Engine
from vopd_server.key_ring import OpenDoor
from vopd_server.scheduler import Demand, FairScheduler, Ticket
from vopd_server.service import TeacherService
from vopd_server.tenancy import OPEN_TENANT
from vopd_server.validation import Limits

QUEUE_BYTES = 2**30


def open_service(engine: Engine, limits: Limits, *, queue_tokens: int = 100) -> TeacherService:
    """Not yet started."""
    scheduler = FairScheduler(window_tokens=0, queue_tokens=queue_tokens, queue_bytes=QUEUE_BYTES)
    return TeacherService(engine, limits, Admission(scheduler), door=OpenDoor())


def reserved_tokens(service: TeacherService) -> int:
    """Tokens admitted and not yet answered, of all tenants."""
    return sum(queue.reserved_tokens for queue in service.admission.scheduler.queues.values())


def num_held(service: TeacherService) -> int:
    """Sequences of streams held back because their tenant is at its bound."""
    return sum(len(queue.held) for queue in service.admission.scheduler.queues.values())


def take(service: TeacherService, tokens: int) -> Ticket:
    """Admits `tokens` of the open tenant, for a test to give back."""
    [ticket] = service.admission.admit_now(OPEN_TENANT, [Demand(tokens, 0)])
    return ticket
