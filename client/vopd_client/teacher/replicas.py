"""The replicas of one teacher: who is there, that they agree, and a connection to one of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from vopd_client.errors import HandshakeError, TeacherUnavailableError, VopdError
from vopd_client.handshake import check_same_teacher
from vopd_client.teacher.agreement import GoldenScores, ask_golden, check_agreement
from vopd_client.teacher.channel import Address
from vopd_client.teacher.patience import Patience, Timing
from vopd_client.teacher.replica import Connection, Replica
from vopd_client.teacher.retry import retry_delay_s
from vopd_client.teacher.status import Failure
from vopd_client.teacher.transport import CallFailed, Traffic, Transport
from vopd_client.types import TeacherInfo

logger = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 10.0  # for the others, once the first replica is there


class Replicas:
    """Gives out connections to any replica, or to one of them.

    The first handshake pins the teacher. A later one that shows another tokenizer, vocabulary or model revision is
    refused: scores of other weights would be mixed into the same run. Of several replicas each new connection must
    also score as the first one did.

    One replica is connected to when somebody asks for it. Several are kept connected in the background, so that one
    that was away is used again when it is back; while others are left, one that is refused is only left out.
    """

    def __init__(
        self,
        addresses: tuple[Address, ...],
        *,
        open_transport: Callable[[Address, Traffic], Transport],
        expected_fingerprint: str | None,
        expected_revision: str | None,
        timing: Timing,
    ) -> None:
        self.all = tuple(Replica(address, open_transport=open_transport, check=self._check) for address in addresses)
        self.pinned: TeacherInfo | None = None
        self._expected_fingerprint = expected_fingerprint
        self._expected_revision = expected_revision
        self._timing = timing
        self._golden: GoldenScores | None = None
        self._next_to_dial = 0
        self._dialling = asyncio.Lock()
        self._keepers: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()  # replaced whenever it is set
        self._closed = False

    @property
    def is_single(self) -> bool:
        return len(self.all) == 1

    @property
    def max_message_bytes(self) -> int:
        """What all of them take."""
        return min(replica.max_message_bytes for replica in self.all)

    @property
    def missing(self) -> str:
        """Which of several replicas are not there, and why; empty when all are."""
        if not self._keepers:
            return ""
        missing = [f"{replica.address.url}: {replica.problem}" for replica in self.all if replica.current is None]
        return f"{len(missing)} of {len(self.all)} teacher replicas missing: {'; '.join(missing)}" if missing else ""

    async def connect(self, patience: Patience) -> TeacherInfo:
        """Reaches the first replica that answers, waiting for one if need be, and those others that are there.

        Raises: HandshakeError, TeacherPermissionError, TeacherUnavailableError.
        """
        async with self.connection(patience) as connection:
            info = connection.info
        if not self.is_single and not self._keepers:
            await self._join_others()
            self._keepers = [asyncio.create_task(self._keep(replica)) for replica in self.all]
        return info

    @asynccontextmanager
    async def connection(self, patience: Patience, replica: Replica | None = None) -> AsyncIterator[Connection]:
        """A connection to this replica, or to the one with the fewest users; it stays open while it is in use.

        Raises: HandshakeError, TeacherPermissionError, TeacherUnavailableError; of several replicas only when none
            is left that would not raise.
        """
        connection = await self._get(self.all if replica is None else (replica,), patience)
        connection.num_users += 1
        try:
            yield connection
        finally:
            connection.num_users -= 1
            if connection.ended.is_set() and not connection.num_users:
                connection.replica.close_unused(connection)

    def retire(self, connection: Connection, reason: Failure | VopdError) -> None:
        """Says why a connection is of no more use: the next user gets another one, perhaps to another replica."""
        if connection.replica.current is connection:
            connection.replica.retire(connection, reason)
            self._next_to_dial = (self.all.index(connection.replica) + 1) % len(self.all)
            self._tell_missing(connection.replica, "")
            self._notify()

    async def close(self) -> None:
        """Ends every connection; who waits for one gets none."""
        self._closed = True
        self._notify()
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for replica in self.all:
            await replica.close()

    # ------------------------------------------------------------ waiting for a connection

    async def _get(self, wanted: tuple[Replica, ...], patience: Patience) -> Connection:
        while True:
            if self._closed:
                raise TeacherUnavailableError("the teacher client was closed")
            if (ready := self._least_used(wanted)) is not None:
                return ready
            if self._keepers:
                self._raise_if_all_are_refused()
                await self._changed.wait()
            else:
                async with self._dialling:  # one at a time; the others find what it has reached
                    if self._least_used(wanted) is None:
                        await self._dial(patience)

    def _least_used(self, replicas: tuple[Replica, ...]) -> Connection | None:
        """Of those that are connected."""
        connected = [replica.current for replica in replicas if replica.current is not None]
        rng = self._timing.rng  # so that clients that do not know of each other do not all begin with the same one
        return min(connected, key=lambda each: (each.num_users, each.replica.num_sequences, rng.random()), default=None)

    async def _dial(self, patience: Patience) -> None:
        """One attempt, at the replica whose turn it is."""
        replica = self.all[self._next_to_dial]
        try:
            await replica.open()
        except CallFailed as error:
            self._next_to_dial = (self._next_to_dial + 1) % len(self.all)
            await patience.back_off(error.failure, error, num_replicas=len(self.all))

    def _raise_if_all_are_refused(self) -> None:
        refusals = [replica.refusal for replica in self.all if replica.refusal is not None]
        if len(refusals) == len(self.all):
            raise type(refusals[0])(*refusals[0].args) from refusals[0]

    # ------------------------------------------------------------ several replicas

    async def _join_others(self) -> None:
        """Connects to those that are there. Raises: HandshakeError and the like for one that may not be used."""
        attempts = [asyncio.create_task(replica.open()) for replica in self.all]
        try:
            await asyncio.wait(attempts, timeout=JOIN_TIMEOUT_S)
            for replica, attempt in zip(self.all, attempts, strict=True):
                error = attempt.exception() if attempt.done() else None
                if error is not None and not isinstance(error, CallFailed):
                    raise error
                self._tell_missing(replica, "")
        finally:
            for attempt in attempts:
                attempt.cancel()
            await asyncio.gather(*attempts, return_exceptions=True)

    async def _keep(self, replica: Replica) -> None:
        """Connects whenever there is no connection, at growing intervals as long as no answer comes."""
        while True:
            told = replica.problem
            try:
                connection = await replica.open()
                if told:
                    logger.warning("teacher replica %s is there", replica.address.url)
                self._notify()
                await connection.ended.wait()
            except (CallFailed, VopdError):
                self._tell_missing(replica, told)
                self._notify()
            attempt, server_delay_s = max(0, replica.num_failures - 1), replica.retry_delay_s
            await self._timing.sleep(retry_delay_s(attempt, self._timing.rng, server_delay_s=server_delay_s))

    def _tell_missing(self, replica: Replica, told: str) -> None:
        if replica.current is None and replica.problem != told:
            logger.warning("teacher replica %s is missing: %s", replica.address.url, replica.problem)

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    # ------------------------------------------------------------ handshakes

    async def _check(self, transport: Transport, info: TeacherInfo, url: str) -> None:
        """Pins the first teacher; the others must be the same."""
        if self.pinned is not None:
            check_same_teacher(self.pinned, info, where=url)
            if self._golden is not None:
                check_agreement(self._golden, await ask_golden(transport, info, url=url), info)
            return
        for name, expected, actual in (
            ("tokenizer fingerprint", self._expected_fingerprint, info.fingerprint),
            ("model revision", self._expected_revision, info.model_revision),
        ):
            if expected is not None and expected != actual:
                raise HandshakeError(f"{url}: {name} {actual!r} instead of {expected!r}")
        if not self.is_single:
            self._golden = await ask_golden(transport, info, url=url)
        self.pinned = info
