"""What `bench/overlap.py` runs and what it makes of it: cases, settings, medians and ratios. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from vopd_client.train_config import TrainConfig

ROOT = Path(__file__).parent.parent
PROMPTS = ROOT / "examples" / "demo" / "train.jsonl"
PEOPLE_CALL_IT = {0: "on-policy", 1: "max-staleness-1"}

# The first step loads what is used for the first time, and with max_staleness 1 samples twice; the second may still
# wait for the first one's answers. The last one samples nothing. None of them is like the others.
UNCOUNTED_FIRST, UNCOUNTED_LAST = 2, 1
BAR = 1.1

Row = Mapping[str, Any]


@dataclass(frozen=True, order=True)
class Case:
    """One way to train: how old rollouts may be, and how far away the teacher is."""

    max_staleness: int
    latency_s: float

    @property
    def name(self) -> str:
        return f"{PEOPLE_CALL_IT[self.max_staleness]}-latency-{self.latency_s:g}s"


@dataclass(frozen=True)
class Ratio:
    """Seconds of a step over what they should be, and how large that may get."""

    what: str
    value: float
    bar: float = BAR

    @property
    def holds(self) -> bool:
        return self.value <= self.bar

    def to_row(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}


def cases(latency_s: float) -> list[Case]:
    """In the order in which a round takes them."""
    return [Case(staleness, latency) for latency in (0.0, latency_s) for staleness in (0, 1)]


def train_config(case: Case, *, model: str, teacher_url: str, output_dir: Path, counted_steps: int) -> TrainConfig:
    """The demo's settings with longer steps: more rollouts, and nothing but training.

    At the demo's learning rate completions get shorter from step to step; here steps are to stay like one another.
    """
    return TrainConfig(
        student=model,
        teacher_url=[teacher_url],
        prompts=str(PROMPTS),
        output_dir=output_dir,
        name=case.name,
        max_staleness=case.max_staleness,
        prompts_per_step=8,
        rollouts_per_prompt=3,
        max_new_tokens=12,
        steps=UNCOUNTED_FIRST + counted_steps + UNCOUNTED_LAST,
        learning_rate=1e-6,
        checkpoint_every=0,
    )


def counted(rows: Sequence[Row]) -> list[Row]:
    """The steps of one run that are like one another."""
    return list(rows[UNCOUNTED_FIRST:-UNCOUNTED_LAST])


def summarise(case: Case, rows: Sequence[Row]) -> dict[str, Any]:
    """Medians over the counted steps of all rounds, in seconds a step."""
    times = {name: median(row[name] for row in rows) for name in ("step_s", "rollout_s", "update_s", "teacher_wait_s")}
    spread_s = sorted(row["step_s"] for row in rows)
    truncated = [row.get("importance_truncated_fraction", 0.0) for row in rows]
    return {
        **asdict(case),
        "steps": len(rows),
        **times,
        "step_s_min": spread_s[0],
        "step_s_max": spread_s[-1],
        "tokens_per_s": median(row["tokens_per_s"] for row in rows),
        "staleness": mean(row["staleness"] for row in rows),
        "importance_truncated_fraction": mean(truncated),
        "teacher_bytes_per_token": mean(row["teacher_bytes_per_token"] for row in rows),
    }


def ratios(rows: Sequence[Row], latency_s: float) -> list[Ratio]:
    """The two bars: sampled ahead the latency is hidden, on-policy it is paid once a step."""
    step_s = {Case(row["max_staleness"], row["latency_s"]): row["step_s"] for row in rows}
    far, near = (step_s[Case(1, latency)] for latency in (latency_s, 0.0))
    far_on_policy, near_on_policy = (step_s[Case(0, latency)] for latency in (latency_s, 0.0))
    return [
        Ratio(f"max_staleness 1: a step at {latency_s:g} s / at 0 s", far / near),
        Ratio(
            f"on-policy: a step at {latency_s:g} s / (at 0 s + {latency_s:g} s)",
            far_on_policy / (near_on_policy + latency_s),
        ),
    ]
