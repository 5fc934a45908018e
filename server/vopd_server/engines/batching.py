"""Which queued requests run together: pure functions on lengths, no model and no queue.

A *pass* is what the engine runs before it looks at its queue again. Without sharing it is one padded
forward of whole sequences. With sharing every distinct context runs once, or not at all where it has been kept,
and the completions follow on its cache in one or more *waves*, each a padded forward of its own.

Every plan holds the oldest request of the queue, so a request waits for at most as many passes as there
are requests before it: long or odd ones cannot starve. What joins the oldest is chosen by length.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

# Rows that run together differ in length by at most the shorter one's length, so a row is at most half
# padding; below this many tokens a forward of its own costs more than the padding it saves.
PADDING_SLACK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """What planning needs to know of a request."""

    context_key: bytes  # equal for equal contexts, and for no others
    context_length: int  # C >= 1
    completion_length: int  # T >= 1

    @property
    def completion_fed(self) -> int:
        """Completion tokens that the model reads: the last one is scored but predicts nothing asked for."""
        return self.completion_length - 1

    @property
    def tokens_fed(self) -> int:
        return self.context_length + self.completion_fed


@dataclass(frozen=True, slots=True)
class PassPlan:
    """One pass: indices into the planned queue, a tuple a wave. Without sharing there is one wave."""

    shares_contexts: bool
    waves: tuple[tuple[int, ...], ...]

    @property
    def members(self) -> tuple[int, ...]:
        return tuple(index for wave in self.waves for index in wave)


@dataclass(frozen=True, slots=True)
class _Block:
    """Requests that run together, as a rectangle of tokens."""

    members: tuple[int, ...]
    context_width: int
    completion_width: int

    @property
    def width(self) -> int:
        return self.context_width + self.completion_width

    @property
    def padded_tokens(self) -> int:
        return len(self.members) * self.width

    def joined(self, other: _Block) -> _Block:
        return _Block(
            self.members + other.members,
            max(self.context_width, other.context_width),
            max(self.completion_width, other.completion_width),
        )


def plan_next_pass(
    shapes: Sequence[Shape],
    *,
    max_tokens: int,
    can_share: bool = True,
    kept: Set[bytes] = frozenset(),
    one_by_one: bool = False,
) -> PassPlan:
    """The next pass over a queue, oldest request first.

    max_tokens: padded tokens that one forward may hold, cached contexts included (each row has its own
        copy of its context's cache). Only a request that alone exceeds it may exceed it, alone.
    can_share: whether the model's cache can be computed once and expanded over a group.
    kept: keys of contexts that have been read before: also a single completion goes on from there.
    one_by_one: forwards of one row each, so that shapes depend on the request alone.

    All queued requests with the context of a shared pass's member are part of that pass.
    """
    assert shapes, "nothing is queued"
    groups = _groups_by_context(shapes)
    oldest_group = groups[shapes[0].context_key]
    if one_by_one:
        return PassPlan(can_share, tuple((index,) for index in oldest_group))

    def shares(key: bytes) -> bool:
        return can_share and (len(groups[key]) > 1 or key in kept)

    if shares(shapes[0].context_key):
        blocks = [_group_block(members, shapes) for key, members in groups.items() if shares(key)]
        picked = _joined_with_neighbours(blocks, max_tokens)
        return PassPlan(True, _waves(picked.members, shapes, picked.context_width, max_tokens))
    singles = [
        _Block((index,), shape.tokens_fed, 0) for index, shape in enumerate(shapes) if not shares(shape.context_key)
    ]
    return PassPlan(False, (tuple(sorted(_joined_with_neighbours(singles, max_tokens).members)),))


def _groups_by_context(shapes: Sequence[Shape]) -> dict[bytes, list[int]]:
    """Indices by context, groups in the order of their oldest member."""
    groups: dict[bytes, list[int]] = {}
    for index, shape in enumerate(shapes):
        groups.setdefault(shape.context_key, []).append(index)
    return groups


def _group_block(members: Sequence[int], shapes: Sequence[Shape]) -> _Block:
    completion_width = max(shapes[index].completion_fed for index in members)
    return _Block(tuple(members), shapes[members[0]].context_length, completion_width)


def _is_alike(shortest: int, longest: int) -> bool:
    return longest - shortest <= max(shortest, PADDING_SLACK_TOKENS)


def _joined_with_neighbours(blocks: Sequence[_Block], max_tokens: int) -> _Block:
    """`blocks[0]` joined with its neighbours in width, nearest first, while the token budget holds them."""
    oldest = joined = blocks[0]
    by_width = sorted(blocks, key=lambda block: block.width)
    low = high = by_width.index(oldest)
    while True:
        neighbours = [
            index
            for index in (low - 1, high + 1)
            if 0 <= index < len(by_width)
            and joined.joined(by_width[index]).padded_tokens <= max_tokens
            and _is_alike(by_width[min(low, index)].width, by_width[max(high, index)].width)
        ]
        if not neighbours:
            return joined
        nearest = min(neighbours, key=lambda index: abs(by_width[index].width - oldest.width))
        joined = joined.joined(by_width[nearest])
        low, high = min(low, nearest), max(high, nearest)


def _waves(
    members: Sequence[int], shapes: Sequence[Shape], context_width: int, max_tokens: int
) -> tuple[tuple[int, ...], ...]:
    """`members` cut into forwards of like length that keep the budget; the oldest member's wave is first."""
    waves: list[list[int]] = []
    for index in sorted(members, key=lambda index: (-shapes[index].completion_fed, index)):
        if waves:
            longest = shapes[waves[-1][0]].completion_fed
            fits = (len(waves[-1]) + 1) * (context_width + longest) <= max_tokens
            if fits and _is_alike(shapes[index].completion_fed, longest):
                waves[-1].append(index)
                continue
        waves.append([index])
    return tuple(sorted((tuple(sorted(wave)) for wave in waves), key=min))
