"""What the soak's tallies, samples and looks come to. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from soak_plan import Tally
from soak_process import ProcessSample

ALWAYS_BUSY = 0.95  # of the looks
# Of a share, beside a turn more or less than others have had: who came last by chance.
SHARE_TOLERANCE = 0.1
TURN_TOKENS = 450  # the largest of a busy tenant: a context and the completions that come along


def total(tallies: Iterable[Tally]) -> Tally:
    """All jobs as one; of extremes the extreme."""
    everything = Tally()
    for tally in tallies:
        for name, value in vars(tally).items():
            match name, value:
                case "latencies_s", dict():
                    for kind, seconds in value.items():
                        everything.latencies_s.setdefault(kind, []).extend(seconds)
                case (("largest_mean_nats" | "largest_nats"), _):
                    setattr(everything, name, max(getattr(everything, name), value))
                case "least_ids_shared", _:
                    everything.least_ids_shared = min(everything.least_ids_shared, value)
                case _, Counter():
                    getattr(everything, name).update(value)
                case _:
                    setattr(everything, name, getattr(everything, name) + value)
    return everything


def latencies(by_name: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    return {
        name: {
            "sequences": len(found),
            "p50_s": round(float(np.quantile(found, 0.5)), 3),
            "p95_s": round(float(np.quantile(found, 0.95)), 3),
        }
        for name, found in sorted(by_name.items())
        if len(found)
    }


def window_of(samples: Sequence[ProcessSample], seconds: float) -> tuple[list[ProcessSample], list[ProcessSample]]:
    """The minute after the first one, and the last one; of a soak of less than four a quarter each."""
    length_s = min(60.0, seconds / 4)
    early = [sample for sample in samples if length_s <= sample.at_s < 2 * length_s]
    late = [sample for sample in samples if seconds - length_s <= sample.at_s <= seconds]
    return early, late


def slope_a_minute(samples: Sequence[ProcessSample], name: str, *, from_s: float, to_s: float) -> float:
    """Least squares between warm-up and end; 0 for fewer than two samples."""
    between = [sample for sample in samples if from_s <= sample.at_s <= to_s]
    if len(between) < 2:
        return 0.0
    at_min = np.array([sample.at_s / 60 for sample in between])
    return float(np.polyfit(at_min, [getattr(sample, name) for sample in between], 1)[0])


def growth_figures(samples: Sequence[ProcessSample], seconds: float) -> dict[str, dict[str, float]]:
    """Of memory, descriptors and threads: median early and late, and the slope in between."""
    early, late = window_of(samples, seconds)
    figures = {}
    for name in ("memory_mib", "descriptors", "threads"):
        first, last = (float(np.median([getattr(one, name) for one in part])) for part in (early, late))
        slope = slope_a_minute(samples, name, from_s=min(60.0, seconds / 4), to_s=seconds)
        figures[name] = {"after_warm_up": first, "at_the_end": last, "slope_a_minute": round(slope, 3)}
    return figures


@dataclass(frozen=True)
class Look:
    """At /status.json: of every tenant its share of the last minute, and whether it had something queued."""

    at_s: float
    share: Mapping[str, float]
    is_queued: Mapping[str, bool]


def busy_shares(looks: Sequence[Look], weights: Mapping[str, float]) -> dict[str, float]:
    """What those that were always busy got of what they got together, over what their weights say."""
    if not looks:
        return {}
    busy = [name for name in weights if np.mean([look.is_queued[name] for look in looks]) >= ALWAYS_BUSY]
    had = {name: float(np.mean([look.share[name] for look in looks])) for name in busy}
    all_had, all_weight = sum(had.values()), sum(weights[name] for name in busy)
    return {name: (had[name] / all_had) / (weights[name] / all_weight) for name in busy} if all_had else {}


def share_bars(shares: Mapping[str, float], weights: Mapping[str, float], tokens: float) -> dict[str, float]:
    """How far a tenant's share may be off, in parts of it. tokens: what all of them got together.

    Fair queueing keeps two busy tenants within a turn of each of one another, over their weights (Goyal, Vin and Cheng
    1996, theorem 1). What little was had is therefore off by much.
    """
    all_weight = sum(weights[name] for name in shares)
    return {name: SHARE_TOLERANCE + 2 * TURN_TOKENS / max(1.0, tokens * weights[name] / all_weight) for name in shares}


def rounded(value: float, digits: int = 4) -> float | None:
    """For JSON, which has no infinity."""
    return round(value, digits) if math.isfinite(value) else None
