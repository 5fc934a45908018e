"""What a stream owes and is owed: a state machine without tasks, clocks or channels."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from functools import cached_property

from vopd_client.errors import AlignmentError, TeacherInternalError
from vopd_client.teacher.balance import Job
from vopd_client.types import SequenceToScore
from vopd_proto import teacher_pb2 as pb

MAX_IDLE_CONTEXTS = 8


class ContextTable:
    """Which contexts the server holds for this stream: those in use, and the last few that were.

    max_tokens: of all of them together, as long as more than one is held; 0: any number.
    """

    def __init__(self, *, max_tokens: int = 0, max_idle: int = MAX_IDLE_CONTEXTS) -> None:
        self._max_tokens = max_tokens
        self._max_idle = max_idle
        self._next_index = 0
        self._indices: dict[bytes, int] = {}
        self._num_tokens: dict[bytes, int] = {}
        self._num_users: dict[bytes, int] = {}
        self._idle: OrderedDict[bytes, None] = OrderedDict()  # least recently used first

    def has_room_for(self, key: bytes, num_tokens: int) -> bool:
        """Whether the context is held, or fits once the idle ones have made room."""
        in_use = sum(self._num_tokens[used] for used in self._num_users)
        return key in self._num_users or not in_use or not self._max_tokens or in_use + num_tokens <= self._max_tokens

    def use(self, key: bytes, num_tokens: int) -> tuple[int, bool]:
        """The context's index, and whether it must be sent first."""
        is_new = key not in self._indices
        if is_new:
            self._indices[key] = self._next_index
            self._num_tokens[key] = num_tokens
            self._next_index += 1
        self._idle.pop(key, None)
        self._num_users[key] = self._num_users.get(key, 0) + 1
        return self._indices[key], is_new

    def done(self, key: bytes) -> None:
        """One user less."""
        self._num_users[key] -= 1
        if not self._num_users[key]:
            del self._num_users[key]
            self._idle[key] = None

    def release_surplus(self) -> list[int]:
        """Forgets the contexts that have been idle longest, beyond what may be kept; their indices."""
        released = []
        while len(self._idle) > self._max_idle or (self._idle and self._is_over_max_tokens()):
            key, _ = self._idle.popitem(last=False)
            del self._num_tokens[key]
            released.append(self._indices.pop(key))
        return released

    def _is_over_max_tokens(self) -> bool:
        return 0 < self._max_tokens < sum(self._num_tokens.values())


@dataclass(eq=False)
class Entry:
    """One submitted sequence until it is answered."""

    sequence_id: str
    sequence: SequenceToScore
    message: pb.Sequence
    context: pb.UIntArray
    abandoned: bool = False  # nobody waits any more, but the server still works on it
    chunks: list[pb.SequenceScores] = field(default_factory=list)
    num_rows: int = 0

    @property
    def num_context_tokens(self) -> int:
        return len(self.sequence.context_ids)

    @cached_property
    def context_key(self) -> bytes:
        return hashlib.sha256(self.context.SerializeToString()).digest()

    @property
    def job(self) -> Job:
        return Job(self.sequence_id, self.context_key, self.num_context_tokens, len(self.sequence.completion_ids))

    def copy(self) -> Entry:
        """The same question for another replica, with an answer of its own to come."""
        message = pb.Sequence()
        message.CopyFrom(self.message)
        return Entry(self.sequence_id, self.sequence, message, self.context)


class Outbox:
    """Sequences waiting to be sent and sequences sent, at most `window` of the latter.

    After `connection_lost` every unanswered sequence waits again, in its old order and with what had
    arrived of its answer thrown away: each is sent once on every connection and answered once.
    """

    def __init__(self, *, window: int, max_context_tokens: int = 0) -> None:
        """max_context_tokens: of the contexts that the server is to hold at a time; 0: any number."""
        self._window = window
        self._max_context_tokens = max_context_tokens
        self._waiting: deque[Entry] = deque()
        self._in_flight: dict[str, Entry] = {}
        self._contexts = ContextTable(max_tokens=self._max_context_tokens)
        self._closing_connection = False

    @property
    def is_drained(self) -> bool:
        """The connection takes no more sequences and owes no more answers."""
        return self._closing_connection and not self._in_flight

    def add(self, entry: Entry) -> None:
        self._waiting.append(entry)

    def abandon(self, sequence_id: str) -> bool:
        """Nobody waits for it any more. The wire has no way to say so: if sent, it keeps its place in the window.

        Returns: whether it had not been sent, and is gone.
        """
        if (sent := self._in_flight.get(sequence_id)) is not None:
            sent.abandoned = True
            return False
        waiting = next(entry for entry in self._waiting if entry.sequence_id == sequence_id)
        self._waiting.remove(waiting)
        return True

    @property
    def owes_answers(self) -> bool:
        """Somebody waits for something that it has."""
        return bool(self._waiting) or any(not entry.abandoned for entry in self._in_flight.values())

    @property
    def unanswered(self) -> list[Entry]:
        """In the order of their sending, without those that are abandoned."""
        return [entry for entry in (*self._in_flight.values(), *self._waiting) if not entry.abandoned]

    def take_waiting(self) -> list[Entry]:
        """Gives back what is not sent."""
        taken = list(self._waiting)
        self._waiting.clear()
        return taken

    def next_messages(self) -> list[pb.ScoreStreamRequest]:
        """What to send next: released contexts, then one sequence with its context if that is new."""
        messages = []
        if self._may_send():
            entry = self._waiting.popleft()
            self._in_flight[entry.sequence_id] = entry
            index, is_new = self._contexts.use(entry.context_key, entry.num_context_tokens)
            if is_new:
                context = pb.StreamContext(context_index=index, ids=entry.context)
                messages.append(pb.ScoreStreamRequest(context=context))
            entry.message.context_index = index
            messages.append(pb.ScoreStreamRequest(sequence=entry.message))
        # In front, so that the server is never asked to hold more than it should.
        released = [pb.ReleaseContext(context_index=index) for index in self._contexts.release_surplus()]
        return [pb.ScoreStreamRequest(release_context=release) for release in released] + messages

    def _may_send(self) -> bool:
        if self._closing_connection or not self._waiting or len(self._in_flight) >= self._window:
            return False
        first = self._waiting[0]
        return self._contexts.has_room_for(first.context_key, first.num_context_tokens)

    def receive(self, chunk: pb.ScoreChunk) -> Entry | None:
        """Takes a row chunk in; the entry once its answer is complete (also when it was abandoned).

        Raises: TeacherInternalError for an answer to something not asked, or answered before;
            AlignmentError for chunks out of row order.
        """
        entry = self._expecting(chunk.scores.sequence_id)
        if chunk.first_row != entry.num_rows:
            raise AlignmentError(
                f"a chunk of sequence {entry.sequence_id} starts at row {chunk.first_row}, not at {entry.num_rows}"
            )
        entry.num_rows += chunk.scores.num_rows
        entry.chunks.append(chunk.scores)
        if not chunk.is_last:
            return None
        return self._finish(entry)

    def failed(self, sequence_id: str) -> Entry:
        """The entry that the server answered with an error of its own."""
        return self._finish(self._expecting(sequence_id))

    def send_again(self, entry: Entry) -> None:
        """Puts a refused sequence back at the front."""
        entry.chunks.clear()
        entry.num_rows = 0
        if not entry.abandoned:
            self._waiting.appendleft(entry)

    def stop_sending(self) -> None:
        """The replica is going away: nothing more is sent on this connection."""
        self._closing_connection = True

    def connection_lost(self) -> None:
        for entry in reversed(self._in_flight.values()):
            self.send_again(entry)
        self._in_flight.clear()
        self._contexts = ContextTable(max_tokens=self._max_context_tokens)
        self._closing_connection = False

    def _expecting(self, sequence_id: str) -> Entry:
        entry = self._in_flight.get(sequence_id)
        if entry is None:
            raise TeacherInternalError(
                f"the teacher answered sequence {sequence_id!r}, which is not waiting for an answer"
            )
        return entry

    def _finish(self, entry: Entry) -> Entry:
        del self._in_flight[entry.sequence_id]
        self._contexts.done(entry.context_key)
        return entry
