"""The capacity model against what `make bench-scaling` has measured: seconds, bytes and memory of every point. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from capacity_engine import Costs, Work, fitted, held_bytes, one_rate, wire_bytes_of, work_of
from capacity_figures import model_of_config
from capacity_model import TeacherModel
from scaling_points import Point


@dataclass(frozen=True)
class Compared:
    """One point of a curve. Ratios are predicted over measured.

    one_rate: from the base point's rate alone. fitted: from a cost for each kind of work, of `calibrates` points.
    wire: bytes a token, both ways together. memory: the peak, of an idle teacher's own and what the model adds.
    """

    curve: str
    value: int
    measured_tokens_per_s: float
    one_rate_tokens_per_s: float
    fitted_tokens_per_s: float
    wire_ratio: float
    memory_ratio: float
    calibrates: bool

    @property
    def one_rate_ratio(self) -> float:
        return self.one_rate_tokens_per_s / self.measured_tokens_per_s

    @property
    def fitted_ratio(self) -> float:
        return self.fitted_tokens_per_s / self.measured_tokens_per_s


@dataclass(frozen=True)
class Check:
    """A whole file of points. Costs are this machine's, in seconds."""

    one_rate: Costs
    fitted: Costs
    points: tuple[Compared, ...]

    @property
    def effective_flops_s(self) -> float:
        """At the base point, everything else included."""
        return 1 / self.one_rate.matrix_flop_s

    def worst(self, ratios: Sequence[float]) -> float:
        """The largest factor between predicted and measured, in either direction."""
        return float(np.exp(np.abs(np.log(ratios)).max()))

    def typical(self, ratios: Sequence[float]) -> float:
        """The median factor."""
        return float(np.exp(np.median(np.abs(np.log(ratios)))))

    def summary(self) -> dict[str, float]:
        """Factors between predicted and measured; those of fitted costs without the points that gave them."""
        checked = [point for point in self.points if not point.calibrates]
        columns = {
            "one_rate": [point.one_rate_ratio for point in self.points],
            "fitted": [point.fitted_ratio for point in checked],
            "wire": [point.wire_ratio for point in self.points],
            "memory": [point.memory_ratio for point in self.points],
        }
        found = {"effective_flops_s": self.effective_flops_s}
        for name, ratios in columns.items():
            found |= {f"{name}_typical_factor": self.typical(ratios), f"{name}_worst_factor": self.worst(ratios)}
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "summary": self.summary(),
            "one_rate": asdict(self.one_rate),
            "fitted": asdict(self.fitted),
            "rows": [
                asdict(point) | {"one_rate_ratio": point.one_rate_ratio, "fitted_ratio": point.fitted_ratio}
                for point in self.points
            ],
        }


def check(content: Mapping[str, Any]) -> Check:
    """Of the content of scaling.json.

    Raises: KeyError for a file that lacks a field; ValueError for one without the points that calibrate.
    """
    model = model_of_config(content["model_config"])
    base = Point(**content["base"])
    seconds = {Point(**row["point"]): 1 / rate_of_sequences(row) for row in content["rows"]}
    works = {point: work_of(model.shape, point) for point in seconds}
    if base not in seconds:
        raise ValueError(f"the base point {base} was not measured")
    simple = one_rate(works[base], seconds[base])
    calibrating = calibration_points(base, list(seconds))
    costs = fitted([works[point] for point in calibrating], [seconds[point] for point in calibrating])
    engine = content["engine"]
    compared = [_compared(row, model, works, simple, costs, calibrating, engine) for row in content["rows"]]
    return Check(simple, costs, tuple(compared))


def rate_of_sequences(row: Mapping[str, Any]) -> float:
    """Sequences a second."""
    return float(row["scored_tokens_per_s"]) / int(row["point"]["completion"])


def calibration_points(base: Point, points: Sequence[Point]) -> list[Point]:
    """One for each kind of work: the base, the longest context, the largest k, the teacher's top k, one at a time.

    Raises: ValueError where a kind of work does not vary.
    """

    def alike(point: Point, name: str) -> bool:
        return all(value == asdict(base)[other] for other, value in asdict(point).items() if other != name)

    def extreme(name: str, sign: int) -> Point:
        return max(
            (point for point in points if alike(point, name)), key=lambda point: sign * int(getattr(point, name))
        )

    searching = replace(base, support="teacher_top_k")
    found = [base, extreme("context", 1), extreme("k", 1), searching, extreme("concurrency", -1)]
    if len(set(found)) < len(found) or searching not in points:
        raise ValueError("a curve is missing, or begins or ends at the base point: there is nothing to calibrate with")
    return found


def _compared(
    row: Mapping[str, Any],
    model: TeacherModel,
    works: Mapping[Point, Work],
    simple: Costs,
    costs: Costs,
    calibrating: Sequence[Point],
    engine: Mapping[str, int],
) -> Compared:
    point = Point(**row["point"])
    sent, received = wire_bytes_of(point)
    held = held_bytes(
        model, point, max_batch_tokens=engine["max_batch_tokens"], chunk_elements=engine["chunk_elements"]
    )
    return Compared(
        curve=row["curve"],
        value=row["value"],
        measured_tokens_per_s=row["scored_tokens_per_s"],
        one_rate_tokens_per_s=point.completion / simple.seconds(works[point]),
        fitted_tokens_per_s=point.completion / costs.seconds(works[point]),
        wire_ratio=(sent + received) / (row["bytes_sent_per_token"] + row["bytes_received_per_token"]),
        memory_ratio=(row["idle_bytes"] + held) / row["peak_bytes"],
        calibrates=point in calibrating,
    )
