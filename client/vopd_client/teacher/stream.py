"""Scores over streams that outlive their connections, to as many replicas as there are, whatever they speak."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Sequence

import grpc

from vopd_client.errors import TeacherError, TeacherUnavailableError, VopdError
from vopd_client.teacher.balance import Balancer
from vopd_client.teacher.codec import decode_scores, pack_ids, sequence_message
from vopd_client.teacher.link import StreamLink
from vopd_client.teacher.outbox import Entry, Outbox
from vopd_client.teacher.patience import Patience, Timing
from vopd_client.teacher.replica import Connection
from vopd_client.teacher.replicas import Replicas
from vopd_client.teacher.requests import check_message_size
from vopd_client.teacher.status import Failure
from vopd_client.types import SequenceScores, SequenceToScore
from vopd_proto import SEQUENCE_OVERHEAD_BYTES
from vopd_proto import teacher_pb2 as pb

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
SILENT_AFTER_S = 30.0  # an idle replica is then asked what a silent one owes


class ScoreStream:
    """`submit` sequences from as many tasks as you like; answers return as they finish.

    Each replica has a connection of its own, and is handed a sequence when it has room for it. When a connection
    breaks, everything that is still unanswered there is asked again (of another replica at once, if there is one, or
    after a handshake), and nothing else: no sequence is lost or answered twice.
    """

    def __init__(
        self,
        replicas: Replicas,
        patience: Patience,
        *,
        settings: pb.StreamSettings,
        window: int,
        max_context_tokens: int,
        sequence_ids: itertools.count[int],
        timing: Timing,
    ) -> None:
        self.patience = patience
        self._replicas = replicas
        self._sequence_ids = sequence_ids
        self._balancer = Balancer(
            len(replicas.all),
            window=window,
            is_up=replicas.is_single,
            favourite=timing.rng.randrange(len(replicas.all)),
        )
        self._waiting: deque[Entry] = deque()  # for a replica with room
        self._futures: dict[str, asyncio.Future[SequenceScores]] = {}
        self._links = [
            StreamLink(
                index,
                replica,
                replicas=replicas,
                owner=self,
                patience=patience if replicas.is_single else patience.beside(f"teacher {replica.address.url}"),
                settings=settings,
                outbox=Outbox(window=window, max_context_tokens=max_context_tokens),
                now=timing.now,
            )
            for index, replica in enumerate(replicas.all)
        ]
        self._silent: set[int] = set()  # links that others were asked for
        self._given_up: set[int] = set()  # links whose replica breaks streams
        self._task: asyncio.Task[None] | None = None
        self._error: VopdError | None = None

    @property
    def waiting_reason(self) -> str:
        """As `Patience.waiting_reason`, of the whole stream or of one of the replicas."""
        patiences = [link.patience for link in self._links] + [self.patience]
        return next((reason for patience in patiences if (reason := patience.waiting_reason)), "")

    async def submit(self, sequence: SequenceToScore) -> SequenceScores:
        """The scores of one sequence. Cancelling gives up on its answer.

        Raises: TeacherRequestError, TeacherUnsupportedError, AlignmentError, NonFiniteError for this
            sequence alone; HandshakeError, TeacherPermissionError, TeacherUnavailableError,
            TeacherInternalError for the stream, which then refuses everything.
        """
        if self._error is not None:
            raise type(self._error)(*self._error.args) from self._error
        entry = self._entry(sequence)
        future: asyncio.Future[SequenceScores] = asyncio.get_running_loop().create_future()
        self._futures[entry.sequence_id] = future
        self.patience.clock.begin()
        if self._task is None:
            self._start()
        self._waiting.append(entry)
        self._hand_out()
        try:
            return await future
        finally:
            self.patience.clock.end()
            if self._futures.pop(entry.sequence_id, None) is not None:  # cancelled, not answered
                self._abandon(entry.sequence_id)

    async def close(self) -> None:
        """Ends the stream; what is unanswered raises TeacherUnavailableError."""
        self._fail(TeacherUnavailableError("the teacher client was closed"))
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def __aenter__(self) -> ScoreStream:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.close()

    def _entry(self, sequence: SequenceToScore) -> Entry:
        sequence_id = str(next(self._sequence_ids))
        entry = Entry(
            sequence_id,
            sequence,
            message=sequence_message(sequence, sequence_id=sequence_id),
            context=pack_ids("context_ids", sequence.context_ids),
        )
        limit = self._replicas.max_message_bytes - SEQUENCE_OVERHEAD_BYTES
        check_message_size(entry.message, limit)
        check_message_size(entry.context, limit)
        return entry

    # ------------------------------------------------------------ handing out

    def _hand_out(self) -> None:
        while self._waiting:
            index = self._balancer.choose(self._waiting[0].job)
            if index is None:
                return
            self._give(index, self._waiting.popleft())

    def _give(self, index: int, entry: Entry) -> None:
        self._balancer.begin(index, entry.job)
        self._links[index].add(entry)

    def _abandon(self, sequence_id: str) -> None:
        """Nobody waits for an answer any more, or for a second one."""
        for index in self._balancer.holders(sequence_id):
            if self._links[index].abandon(sequence_id):
                self._balancer.end(index, sequence_id)
        self._waiting = deque(entry for entry in self._waiting if entry.sequence_id != sequence_id)
        self._hand_out()

    # ------------------------------------------------------------ what links report

    def may_take(self, link: StreamLink, is_up: bool) -> None:
        self._silent.discard(link.index)
        if not self._replicas.is_single:
            self._balancer.set_up(link.index, is_up)
        self._hand_out()

    def took(self, link: StreamLink, entry: Entry, connection: Connection) -> None:
        self._balancer.end(link.index, entry.sequence_id)
        future = self._futures.pop(entry.sequence_id, None)
        if future is not None and not future.done():
            try:
                scores = decode_scores(
                    entry.sequence,
                    entry.chunks,
                    vocab_size=connection.info.vocab_size,
                    hidden_size=connection.info.hidden_size,
                )
            except VopdError as error:
                future.set_exception(error)
            else:
                future.set_result(scores)
                link.replica.answered([entry.sequence])
        self._settled(entry)

    def failed(self, link: StreamLink, entry: Entry, failure: Failure) -> None:
        self._balancer.end(link.index, entry.sequence_id)
        future = self._futures.pop(entry.sequence_id, None)
        if future is not None and not future.done():
            future.set_exception(failure.to_error())
        self._settled(entry)

    def gave_back(self, link: StreamLink, entries: Sequence[Entry], *, is_all: bool) -> None:
        if is_all:
            self._balancer.end_all(link.index)
            if not self._replicas.is_single:
                self._balancer.set_up(link.index, False)
        else:
            for entry in entries:
                self._balancer.end(link.index, entry.sequence_id)
        wanted = [
            entry
            for entry in entries
            if entry.sequence_id in self._futures and not self._balancer.holders(entry.sequence_id)
        ]
        link.replica.num_taken_back += len(wanted)
        self._waiting.extendleft(reversed(wanted))
        self._hand_out()

    def _settled(self, entry: Entry) -> None:
        """One is answered: there is room, and a second answer is of no use."""
        others = [self._links[index] for index in self._balancer.holders(entry.sequence_id)]
        self._hand_out()
        for other in others:
            if other.abandon(entry.sequence_id):
                self._balancer.end(other.index, entry.sequence_id)
            if other.index in self._silent and not other.unanswered:
                other.cut(Failure(grpc.StatusCode.UNAVAILABLE, f"answered nothing for {SILENT_AFTER_S:g} s"))

    # ------------------------------------------------------------ several replicas

    def _relieve_the_silent(self) -> None:
        """Has idle replicas score what silent ones owe as well. The first answer counts.

        Not instead: a replica may only be slow, and what is slow everywhere would be passed on for ever.
        """
        silent = [link for link in self._links if link.silent_s >= SILENT_AFTER_S]
        if not any(self._balancer.is_idle(link.index) for link in self._links if link not in silent):
            return
        for link in silent:
            self._silent.add(link.index)
            self._balancer.set_up(link.index, False)
            for entry in link.unanswered:
                if self._balancer.holders(entry.sequence_id) == [link.index]:
                    index = self._balancer.choose(entry.job)
                    if index is not None:
                        link.replica.num_taken_back += 1
                        self._give(index, entry.copy())

    # ------------------------------------------------------------ life

    def _start(self) -> None:
        if not self._replicas.is_single:
            for link in self._links:
                self._balancer.set_up(link.index, link.replica.current is not None)
        self._task = asyncio.create_task(self.patience.run(self._serve))
        self._task.add_done_callback(self._stopped)

    async def _serve(self) -> None:
        """Serves every replica until something ends the stream."""
        tasks = [asyncio.create_task(self._serve_link(link)) for link in self._links]
        if not self._replicas.is_single:
            tasks.append(asyncio.create_task(self._watch()))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve_link(self, link: StreamLink) -> None:
        """Returns when this replica is given up and others are left. Raises: what ends the stream."""
        try:
            await link.serve()
        except VopdError as error:
            self._given_up.add(link.index)
            if len(self._given_up) == len(self._links) or self.patience.clock.expired:
                raise
            logger.warning("teacher replica %s is given up for this stream: %s", link.replica.address.url, error)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self._relieve_the_silent()

    def _stopped(self, task: asyncio.Task[None]) -> None:
        """The serving task never returns: it was cancelled by `close`, or something ended the stream."""
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        if isinstance(error, VopdError):
            self._fail(error)
        else:
            broken = TeacherError(f"the score stream broke: {error!r}")
            broken.__cause__ = error
            self._fail(broken)

    def _fail(self, error: VopdError) -> None:
        self._error = self._error or error
        for future in self._futures.values():
            if not future.done():
                future.set_exception(error)
        self._futures.clear()
