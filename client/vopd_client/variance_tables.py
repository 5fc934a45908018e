"""A variance report for a terminal."""

from __future__ import annotations

import math

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vopd_client.variance_report import (
    ADAPTIVE_ESTIMATORS,
    Estimate,
    Owner,
    SupportRow,
    VarianceReport,
    label,
)

OWNERS: dict[Owner, str] = {"student": "the student's top-K", "teacher": "the teacher's top-K"}
FILE_WIDTH = 110  # columns where nobody has a terminal


def default_console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=FILE_WIDTH)


def show_report(report: VarianceReport, console: Console) -> None:
    """Two tables, what they were taken from, and the conclusion."""

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    if report.approximation is not None:
        tell(describe_approximation(report))
    tell(
        f"{report.num_positions} positions of {report.num_prompts} prompts; mean KL {_figures(report.kl)} nats; "
        f"|gradient|² {_figures(report.signal)} nats², variance of opd {_figures(report.opd_variance)} nats²: "
        f"the noise of one sampled token is {_figures(report.noise_to_signal)} times the signal"
    )
    console.print(ratio_table(report))
    console.print(support_table(report))
    tell(
        "0.123(45): standard error 0.045, over prompts. vopd (renormalise) with the student's top-K is the paper's; no "
        "run can know the b of vopd-rb (best). Bytes a token: request and answer of each completion's measured "
        "positions, packed as they travel (ids at the width of the largest, log-probabilities as score_float_type), "
        "without the contexts."
    )
    tell(report.conclusion)


def describe_approximation(report: VarianceReport) -> str:
    """What is not exact, and by how much at most."""
    facts = report.approximation
    assert facts is not None
    student, teacher = (facts[f"{who}_left_out_mass"]["value"] for who in ("student", "teacher"))
    return (
        f"approximate: this teacher gives no hidden states, so its distribution is known on {OWNERS[facts['support']]} "
        f"with K' = {facts['size']} only, and one log-ratio stands for all ids outside. On average they hold "
        f"{student:.2g} of the student's probability and {teacher:.2g} of the teacher's."
    )


def ratio_table(report: VarianceReport) -> Table:
    """Ratios to opd's variance; a section an owner."""
    table = _table("Variance of the gradient at a position, as a ratio to opd's")
    table.add_column("estimator", no_wrap=True)
    for size in report.sizes:
        table.add_column(f"K = {size}", justify="right", no_wrap=True)
    table.add_column("all ids", justify="right", no_wrap=True)
    section: Owner | None = None
    for row in report.rows:
        if row.owner != section:
            table.add_section()
            if row.owner is not None:
                table.add_row(f"{OWNERS[row.owner]}:", style="italic")
            section = row.owner
        by_size = [digits(row.by_size[size]) if size in row.by_size else "" for size in report.sizes]
        table.add_row(label(row.estimator), *by_size, "" if row.whole is None else digits(row.whole))
    return table


def support_table(report: VarianceReport) -> Table:
    """What supports cost: of K ids, and adaptive ones of the student."""
    table = _table("What a support costs, and the ratios that it gives")
    table.add_column("support", no_wrap=True)
    for heading in ("ids", "left\nout", "bytes\na token"):
        table.add_column(heading, justify="right", no_wrap=True)
    for estimator in ADAPTIVE_ESTIMATORS:
        table.add_column(label(estimator).replace(" ", "\n"), justify="right", no_wrap=True)
    for row in report.fixed:
        table.add_row(f"{row.rule.owner}'s top {row.rule.size}", *_support_cells(row))
    table.add_section()
    table.add_row(f"the top {report.sizes[-1]} cut", style="italic")
    for row in report.adaptive:
        table.add_row(f"to mass {row.rule.mass:g}", *_support_cells(row))
    return table


def digits(estimate: Estimate) -> str:
    """`0.123(45)`: the standard error, where it is known, in units of the last digit; what is exact, without any."""
    value, error = estimate.value, estimate.standard_error
    if math.isnan(value):
        return "–"
    if error == 0 and value in (0.0, 1.0):
        return f"{value:g}"
    if 0 < value < 1e-6:
        return f"{value:.0e}"
    decimals = 3 if value == 0 else max(3, 1 - math.floor(math.log10(value)))
    return f"{value:.{decimals}f}" + ("" if math.isnan(error) else f"({round(error * 10**decimals)})")


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold"
    )


def _support_cells(row: SupportRow) -> list[str]:
    ratios = [digits(row.ratios[name]) for name in ADAPTIVE_ESTIMATORS]
    return [f"{row.num_ids.value:.1f}", f"{100 * row.left_out.value:.2g}%", f"{row.bytes_per_token:.0f}", *ratios]


def _figures(estimate: Estimate) -> str:
    error = "" if math.isnan(estimate.standard_error) else f" ± {estimate.standard_error:.2g}"
    return f"{estimate.value:.3g}{error}"
