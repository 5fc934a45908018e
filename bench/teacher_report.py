"""What the figures of `make bench-teacher` come to: ratios within repetitions, and bars. Pure but for the printing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from teacher_agreement import Agreement
from teacher_measure import Figures, medians
from teacher_plan import Row
from teacher_servers import Contestant
from teacher_workload import Sharing

# The bars: tokens a second over those of stock vLLM, parts of the engine's time, bytes a token both ways.
LEAST_SHARED, LEAST_VLLM, LEAST_ALONE = 10.0, 3.0, 4.0
MOST_OVERHEAD = 0.05
MOST_DENSE_BYTES, MOST_ADAPTIVE_BYTES = 700.0, 100.0

SHARINGS: tuple[Sharing, ...] = ("shared", "alone")
OUR_ENGINES: tuple[Contestant, ...] = ("vllm", "transformers")

Found = Mapping[Row, Sequence[Figures]]  # of every repetition
Labels = Mapping[Row, str]


@dataclass(frozen=True)
class Bar:
    what: str
    found: str
    bar: str
    holds: bool


def row_of(found: Found, contestant: Contestant, sharing: Sharing, support: str | None = None) -> Row | None:
    """The first such row that is not adaptive."""
    for row in found:
        is_it = (row.contestant, row.sharing) == (contestant, sharing) and not row.is_adaptive
        if is_it and support in (None, row.support):
            return row
    return None


def better_engine(found: Found, sharing: Sharing) -> Row | None:
    """Ours with the higher median rate, dense supports."""
    ours = [row for name in OUR_ENGINES if (row := row_of(found, name, sharing)) is not None]
    return max(ours, key=lambda row: medians(found[row]).scored_tokens_per_s, default=None)


def _better_name(found: Found, sharing: Sharing) -> str:
    row = better_engine(found, sharing)
    return row.contestant if row is not None else ""


def paired(found: Found, above: Row | None, below: Row | None, figure: str) -> float | None:
    """The median of the ratios within a repetition; None when one of them was not measured."""
    if above is None or below is None:
        return None
    pairs = zip(found[above], found[below], strict=True)
    ratios: list[float] = [getattr(one, figure) / getattr(other, figure) for one, other in pairs]
    return statistics.median(ratios)


def ratios_of(found: Found) -> dict[str, float]:
    """By name; what `--only` left out is left out."""
    shared, alone = better_engine(found, "shared"), better_engine(found, "alone")
    stock_shared, stock_alone = (row_of(found, "stock", sharing) for sharing in SHARINGS)
    null = row_of(found, "null", "shared", str(shared.support)) if shared else None
    rate = "scored_tokens_per_s"
    ratios = {
        "better_over_stock_shared": paired(found, shared, stock_shared, rate),
        "vllm_over_stock_shared": paired(found, row_of(found, "vllm", "shared"), stock_shared, rate),
        "transformers_over_stock_shared": paired(found, row_of(found, "transformers", "shared"), stock_shared, rate),
        "better_over_stock_alone": paired(found, alone, stock_alone, rate),
        "vllm_over_stock_alone": paired(found, row_of(found, "vllm", "alone"), stock_alone, rate),
        "transformers_over_stock_alone": paired(found, row_of(found, "transformers", "alone"), stock_alone, rate),
        "null_over_better_seconds": paired(found, null, shared, "seconds"),
    }
    return {name: ratio for name, ratio in ratios.items() if ratio is not None}


def bars_of(found: Found, ratios: Mapping[str, float], support_sizes: Mapping[Row, float], labels: Labels) -> list[Bar]:
    """What could be judged of what was measured."""
    shared, alone = (_better_name(found, sharing) for sharing in SHARINGS)
    bars = []
    for name, what, least in (
        ("better_over_stock_shared", f"the better engine ({shared}) over stock, shared contexts", LEAST_SHARED),
        ("vllm_over_stock_shared", "our vllm over stock, shared contexts", LEAST_VLLM),
        ("better_over_stock_alone", f"the better engine ({alone}) over stock, own contexts", LEAST_ALONE),
    ):
        if name in ratios:
            bars.append(Bar(what, f"{ratios[name]:.2f} times", f">= {least:g} times", ratios[name] >= least))
    if "null_over_better_seconds" in ratios:
        overhead = ratios["null_over_better_seconds"]
        what = f"null over the better engine's ({shared}) time"
        bars.append(Bar(what, f"{overhead:.2%}", f"<= {MOST_OVERHEAD:.0%}", overhead <= MOST_OVERHEAD))
    for row, figures in found.items():
        if row.contestant in OUR_ENGINES and row.sharing == "shared":
            most = MOST_ADAPTIVE_BYTES if row.is_adaptive else MOST_DENSE_BYTES
            num_bytes = medians(figures).bytes_per_token
            said = f"{num_bytes:.0f} bytes ({support_sizes[row]:.1f} ids a position)"
            bars.append(Bar(f"{row.contestant}, {labels[row]}", said, f"<= {most:g} bytes", num_bytes <= most))
    return bars


def print_table(console: Console, found: Found, support_sizes: Mapping[Row, float], labels: Labels, title: str) -> None:
    columns = (
        "tokens/s",
        "p50 s",
        "p95 s",
        "server\nCPU s",
        "client\nCPU s",
        "bytes\nout",
        "bytes\nback",
        "MiB",
        "ids",
    )
    table = Table(title=title)
    table.add_column("")
    table.add_column("context, support", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    last = None
    for row, repetitions in found.items():
        figures = medians(repetitions)
        table.add_row(
            row.contestant if row.contestant != last else "",
            labels[row],
            f"{figures.scored_tokens_per_s:,.0f}",
            f"{figures.latency_p50_s:.3g}",
            f"{figures.latency_p95_s:.3g}",
            f"{figures.server_cpu_s:.3g}",
            f"{figures.client_cpu_s:.3g}",
            f"{figures.bytes_sent_per_token:,.0f}",
            f"{figures.bytes_received_per_token:,.0f}",
            f"{figures.peak_memory_mib:,.0f}",
            f"{support_sizes[row]:.1f}",
        )
        last = row.contestant
    console.print(table)


def print_judgement(console: Console, bars: Sequence[Bar], agreements: Sequence[Agreement]) -> None:
    table = Table("bar", "found", "asked for", "")
    for bar in bars:
        table.add_row(escape(bar.what), bar.found, bar.bar, "held" if bar.holds else "[bold red]missed")
    console.print(table)
    for found in agreements:
        console.print(
            f"{found.who}: {found.sampled_mean_nats:.3f} nats apart on sampled tokens (largest "
            f"{found.sampled_largest_nats:.2f}), {found.support_mean_nats:.3f} on supports "
            f"({found.common:.0f} common ids a position)"
        )
