"""From variances at single positions to the table that people choose a support size by. Pure; numpy only.

Axes: N positions. Every figure is a mean over positions, or the ratio of two such means. Positions of one prompt are
not independent, so standard errors treat prompts as the sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from vopd_proto.arrays import IntArray

FloatArray = npt.NDArray[np.float64]
Owner = Literal["student", "teacher"]

OPD = "opd"
# Of each estimator with a support: the one that it becomes when the support is the whole vocabulary; None: exact.
LIMITS: dict[str, str | None] = {
    "vopd renormalise": "vopd-full kl",
    "vopd bucket": "vopd-full kl",
    "vopd optimal": "vopd-full optimal",
    "vopd-rb none": None,
    "vopd-rb renormalise": None,
    "vopd-rb bucket": None,
    "vopd-rb optimal": None,
    "vopd-rb tail": None,
    "vopd-rb best": None,
}
WITHOUT_SUPPORT = ("vopd-full kl", "vopd-full optimal")
ADAPTIVE_ESTIMATORS = ("vopd renormalise", "vopd bucket", "vopd-rb optimal")
COMPARED_ESTIMATORS = ("vopd-rb optimal", "vopd bucket")
TOLERANCE = 0.1  # of the variance at the largest K: what the last sentence calls close


# ---------------------------------------------------------------- what was measured


@dataclass(frozen=True, slots=True)
class SupportRule:
    """Whose `size` most likely ids, and no more of them than reach the student's probability `mass`."""

    owner: Owner
    size: int
    mass: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class SupportValues:
    """What the supports of one rule give at every position.

    bytes_per_token: of request and answer, see `wire_bytes`.
    """

    num_ids_N: IntArray
    left_out_N: FloatArray  # the student's probability outside
    variances_N: Mapping[str, FloatArray]  # by estimator, nats^2
    bytes_per_token: float


@dataclass(frozen=True, slots=True, eq=False)
class Approximation:
    """The teacher told log-probabilities on a support only; outside it one log-ratio stands for all ids."""

    owner: Owner
    size: int
    student_left_out_N: FloatArray
    teacher_left_out_N: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class Measurement:
    """All positions. prompt_N: which prompt each belongs to; approximation: None where both distributions are exact."""

    prompt_N: IntArray
    kl_N: FloatArray  # nats
    signal_N: FloatArray  # squared norm of the exact gradient, nats^2
    variances_N: Mapping[str, FloatArray]  # of the estimators without a support
    supports: Mapping[SupportRule, SupportValues]
    approximation: Approximation | None


# ---------------------------------------------------------------- means


@dataclass(frozen=True, slots=True)
class Estimate:
    """NaN: cannot be told (a ratio to nothing; the standard error of a single prompt)."""

    value: float
    standard_error: float = math.nan

    def to_json(self) -> dict[str, float | None]:
        return {"value": finite(self.value), "standard_error": finite(self.standard_error)}


def ratio_of_means(numerator_N: FloatArray, denominator_N: FloatArray, prompt_N: IntArray) -> Estimate:
    """mean(numerator) / mean(denominator) with the standard error over prompts.

    Linearised: with R the ratio and x, y the sums of numerator and denominator over each of M prompts,
    SE^2 = M / (M - 1) sum (x - R y)^2 / (sum y)^2. Source: Cochran, Sampling Techniques, chapter 6 (ratio estimators).
    """
    prompts, index_N = np.unique(prompt_N, return_inverse=True)
    x = np.bincount(index_N, numerator_N)
    y = np.bincount(index_N, denominator_N)
    if y.sum() == 0:
        return Estimate(math.nan)
    ratio = x.sum() / y.sum()
    if len(prompts) == 1:
        return Estimate(float(ratio))
    squares = np.square(x - ratio * y).sum() * len(prompts) / (len(prompts) - 1)
    return Estimate(float(ratio), float(np.sqrt(squares) / abs(y.sum())))


def mean(values_N: npt.NDArray[np.generic], prompt_N: IntArray) -> Estimate:
    """Over positions."""
    return ratio_of_means(values_N.astype(np.float64), np.ones(len(values_N)), prompt_N)


# ---------------------------------------------------------------- the tables


@dataclass(frozen=True)
class Row:
    """An estimator with one owner's supports; owner None: it has none. Ratios of variance to opd's.

    whole: over the whole vocabulary.
    """

    estimator: str
    owner: Owner | None
    by_size: dict[int, Estimate]
    whole: Estimate | None


@dataclass(frozen=True)
class SupportRow:
    """What supports of one rule hold and cost, and what they do to the objectives that matter."""

    rule: SupportRule
    num_ids: Estimate
    left_out: Estimate
    bytes_per_token: float
    ratios: dict[str, Estimate]


@dataclass(frozen=True)
class VarianceReport:
    """All that is printed, drawn and written."""

    sizes: tuple[int, ...]
    num_positions: int
    num_prompts: int
    kl: Estimate  # nats
    signal: Estimate  # nats^2
    opd_variance: Estimate  # nats^2
    noise_to_signal: Estimate  # of opd, one sampled token
    rows: tuple[Row, ...]
    fixed: tuple[SupportRow, ...]  # supports of exactly K ids
    adaptive: tuple[SupportRow, ...]  # of the student, at most the largest K ids
    approximation: dict[str, Any] | None

    def row(self, estimator: str, owner: Owner | None) -> Row:
        return next(row for row in self.rows if (row.estimator, row.owner) == (estimator, owner))

    @property
    def sufficient_sizes(self) -> dict[str, int]:
        """The smallest K that serves, by estimator, with the student's supports."""
        return {name: smallest_sufficient(self.row(name, "student").by_size) for name in COMPARED_ESTIMATORS}

    @property
    def conclusion(self) -> str:
        """One sentence."""
        if self.opd_variance.value == 0:
            return "Student and teacher agree at every position: there is no variance to reduce."
        sizes = " and ".join(f"{size} for {label(name)}" for name, size in self.sufficient_sizes.items())
        return (
            f"With the student's top-K, the smallest K whose variance is within {TOLERANCE:.0%} of that at "
            f"K = {self.sizes[-1]} is {sizes}."
        )

    def to_json(self) -> dict[str, Any]:
        """Numbers that cannot be told are null."""
        return {
            "num_positions": self.num_positions,
            "num_prompts": self.num_prompts,
            "exact": self.approximation is None,
            "approximation": self.approximation,
            "kl_nats": self.kl.to_json(),
            "squared_gradient_norm": self.signal.to_json(),
            "opd_variance": self.opd_variance.to_json(),
            "opd_variance_to_squared_gradient_norm": self.noise_to_signal.to_json(),
            "ratios_to_opd": [
                {
                    "estimator": row.estimator,
                    "support": row.owner,
                    "by_size": {str(size): estimate.to_json() for size, estimate in row.by_size.items()},
                    "whole_vocabulary": None if row.whole is None else row.whole.to_json(),
                }
                for row in self.rows
            ],
            "supports": [_support_json(row) for row in self.fixed],
            "adaptive_supports": [_support_json(row) for row in self.adaptive],
            "smallest_sufficient_size": self.sufficient_sizes,
            "conclusion": self.conclusion,
        }


def make_report(measured: Measurement, *, sizes: Sequence[int], masses: Sequence[float]) -> VarianceReport:
    """Args: sizes, masses: what of `measured.supports` the two tables are made of; sizes ascend."""
    prompt_N, opd_N = measured.prompt_N, measured.variances_N[OPD]

    def ratio(variance_N: FloatArray) -> Estimate:
        return ratio_of_means(variance_N, opd_N, prompt_N)

    def row(estimator: str, owner: Owner) -> Row:
        limit = LIMITS[estimator]
        return Row(
            estimator,
            owner,
            {size: ratio(measured.supports[SupportRule(owner, size)].variances_N[estimator]) for size in sizes},
            Estimate(0.0, 0.0) if limit is None else ratio(measured.variances_N[limit]),
        )

    def support_row(rule: SupportRule) -> SupportRow:
        values = measured.supports[rule]
        return SupportRow(
            rule,
            mean(values.num_ids_N, prompt_N),
            mean(values.left_out_N, prompt_N),
            values.bytes_per_token,
            {name: ratio(values.variances_N[name]) for name in ADAPTIVE_ESTIMATORS},
        )

    owners: tuple[Owner, ...] = ("student", "teacher")
    one = ratio(opd_N)
    return VarianceReport(
        sizes=tuple(sizes),
        num_positions=len(prompt_N),
        num_prompts=len(np.unique(prompt_N)),
        kl=mean(measured.kl_N, prompt_N),
        signal=mean(measured.signal_N, prompt_N),
        opd_variance=mean(opd_N, prompt_N),
        noise_to_signal=ratio_of_means(opd_N, measured.signal_N, prompt_N),
        rows=(
            Row(OPD, None, dict.fromkeys(sizes, one), one),
            *(row(estimator, owner) for owner in owners for estimator in LIMITS),
            *(Row(name, None, {}, ratio(measured.variances_N[name])) for name in WITHOUT_SUPPORT),
            Row("full-kl", None, {}, Estimate(0.0, 0.0)),
        ),
        fixed=tuple(support_row(SupportRule(owner, size)) for owner in owners for size in sizes),
        adaptive=tuple(support_row(SupportRule("student", sizes[-1], mass)) for mass in masses),
        approximation=_approximation(measured),
    )


def smallest_sufficient(by_size: Mapping[int, Estimate], tolerance: float = TOLERANCE) -> int:
    """The smallest K whose variance, and that of every larger K, is at most 1 + tolerance times the largest K's."""
    limit = (1 + tolerance) * by_size[max(by_size)].value
    smallest = max(by_size)
    for size in sorted(by_size, reverse=True):
        if not by_size[size].value <= limit:
            break
        smallest = size
    return smallest


def label(estimator: str) -> str:
    """`vopd-rb (optimal)`."""
    name, _, detail = estimator.partition(" ")
    return f"{name} ({detail})" if detail else name


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _approximation(measured: Measurement) -> dict[str, Any] | None:
    if (approximation := measured.approximation) is None:
        return None
    return {
        "support": approximation.owner,
        "size": approximation.size,
        "student_left_out_mass": mean(approximation.student_left_out_N, measured.prompt_N).to_json(),
        "teacher_left_out_mass": mean(approximation.teacher_left_out_N, measured.prompt_N).to_json(),
    }


def _support_json(row: SupportRow) -> dict[str, Any]:
    return {
        "support": row.rule.owner,
        "size": row.rule.size,
        "mass": row.rule.mass,
        "mean_size": row.num_ids.to_json(),
        "left_out_mass": row.left_out.to_json(),
        "bytes_per_token": row.bytes_per_token,
        "ratios_to_opd": {name: estimate.to_json() for name, estimate in row.ratios.items()},
    }
