"""What each tenant has had: totals since the start, and rates of late. Time is handed in."""

from __future__ import annotations

from collections import Counter, deque

ANSWERS_WINDOW_S = 30.0
SHARE_WINDOW_S = 60.0


class RecentRate:
    """The sum of what was recorded over the last `window_s` seconds, and per second."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._records: deque[tuple[float, float]] = deque()
        self._sum = 0.0

    def record(self, amount: float, now_s: float) -> None:
        self._records.append((now_s, amount))
        self._sum += amount
        self._forget(now_s)

    def total(self, now_s: float) -> float:
        self._forget(now_s)
        return self._sum if self._records else 0.0

    def per_s(self, now_s: float) -> float:
        """0 when nothing was recorded of late."""
        total = self.total(now_s)
        return total / max(now_s - self._records[0][0], 1.0) if self._records else 0.0

    def _forget(self, now_s: float) -> None:
        while self._records and self._records[0][0] < now_s - self._window_s:
            self._sum -= self._records.popleft()[1]


class Usage:
    """One tenant's. rejections: calls and sequences that ended with an error, by its code."""

    def __init__(self) -> None:
        self.sequences_scored = 0
        self.tokens_scored = 0
        self.rejections: Counter[str] = Counter()
        self._tokens = RecentRate(ANSWERS_WINDOW_S)
        self._sequences = RecentRate(ANSWERS_WINDOW_S)
        self._cost = RecentRate(SHARE_WINDOW_S)

    def answered(self, tokens: int, now_s: float) -> None:
        self.sequences_scored += 1
        self.tokens_scored += tokens
        self._tokens.record(tokens, now_s)
        self._sequences.record(1, now_s)

    def started(self, cost: float, now_s: float) -> None:
        self._cost.record(cost, now_s)

    def tokens_per_s(self, now_s: float) -> float:
        return self._tokens.per_s(now_s)

    def sequences_per_s(self, now_s: float) -> float:
        return self._sequences.per_s(now_s)

    def recent_cost(self, now_s: float) -> float:
        return self._cost.total(now_s)


class UsageBook:
    """By tenant; an entry is made when it is first asked for."""

    def __init__(self) -> None:
        self._of: dict[str, Usage] = {}

    def of(self, tenant_id: str) -> Usage:
        return self._of.setdefault(tenant_id, Usage())
