"""Fills the tables of docs/performance.md from bench/results/*.json, so that no figure is typed by hand.

    python bench/performance_tables.py

A section stands between `<!-- figures: NAME -->` and `<!-- end of figures -->`. One whose results are not there is left
as it is and named. `--check` changes nothing and exits with 1 when a table is not that of its results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

GIGA, MEBIBYTE = 1e9, 2**20
SECTION = re.compile(r"<!-- figures: (?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- end of figures -->", re.DOTALL)

EXAMPLE_COLUMNS = (
    "",
    "GFLOP a scored token",
    "scored tokens/s",
    "seconds a step of all students",
    "weights a GPU, GB",
    "KV room of a replica, tokens",
    "bytes a token, out / back",
    "Mbit/s, out / back",
    "bound by",
)

Content = Mapping[str, Any]


def filled(text: str, bodies: Mapping[str, str]) -> str:
    """`text` with the sections of these names replaced.

    Raises: ValueError for a name that `text` has no section of.
    """
    if missing := sorted(set(bodies) - set(section_names(text))):
        raise ValueError(f"no section for the figures of {', '.join(missing)}")

    def replaced(found: re.Match[str]) -> str:
        name = found["name"]
        return f"<!-- figures: {name} -->\n{bodies.get(name, found['body'])}<!-- end of figures -->"

    return SECTION.sub(replaced, text)


def section_names(text: str) -> list[str]:
    return [found["name"] for found in SECTION.finditer(text)]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Of Markdown; the first column is text, the others are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def told(value: object) -> str:
    """Three digits of a number, all of them where they stand before the point."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# ---------------------------------------------------------------- sections


def rows_and_bars(content: Content) -> str:
    """Every field of `rows` that is one number or text; then the bars, where there is a list of them or of ratios."""
    rows = [
        {key: value for key, value in row.items() if isinstance(value, str | int | float)} for row in content["rows"]
    ]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    header = [column.replace("_per_", " / ").replace("_", " ") for column in columns]
    made = table(header, [[told(row[column]) if column in row else "" for column in columns] for row in rows])
    bars = next((part for name in ("bars", "ratios") if isinstance(part := content.get(name), list)), [])
    lines = [
        [bar["what"], told(bar.get("found", bar.get("value"))), told(bar["bar"]), "yes" if bar["holds"] else "**no**"]
        for bar in bars
    ]
    if lines:
        made += "\n" + table(("bar", "found", "asked for", "holds"), lines)
    return made


def teacher(content: Content) -> str:
    """The contestants and the bars, then the engine in one process beside its floor."""
    made = rows_and_bars(content)
    if "floor" not in content:
        return made
    lines = []
    for row in content["floor"]["rows"]:
        shares = list(row["profile"]["shares"].items())[:6]
        lines.append(
            [
                f"{row['contexts']} contexts",
                told(row["scored_tokens_per_s"]),
                told(row["floor_tokens_per_s"]),
                told(row["over_floor"]),
                ", ".join(f"{name} {share:.0%}" for name, share in shares),
            ]
        )
    header = ("transformers engine, in one process", "tokens/s", "floor", "times the floor", "where the time goes")
    return made + "\n" + table(header, lines)


def scaling(content: Content) -> str:
    """A row a curve, its points side by side."""
    lines = []
    for rows in by_curve(content["rows"]):
        num_bytes = [row["bytes_sent_per_token"] + row["bytes_received_per_token"] for row in rows]
        lines.append(
            [
                rows[0]["curve"],
                joined(row["value"] for row in rows),
                joined(round(row["scored_tokens_per_s"]) for row in rows),
                joined(round(row["seconds_per_sequence"], 3) for row in rows),
                joined(map(round, num_bytes)),
                joined(round(row["peak_bytes"] / MEBIBYTE) for row in rows),
            ]
        )
    header = ("", "values", "scored tokens/s", "seconds a sequence", "bytes a token, both ways", "peak MiB")
    settings = content["settings"]
    return table(header, lines) + f"\n{content['teacher']}; medians of {settings['passes']} passes.\n"


def largest(content: Content) -> str:
    lines = []
    for row in content["largest"]:
        found = row["found"]
        largest_tokens = f"{found['tokens']:,}" if found else f"fewer than {row['probes'][0]['tokens']:,}"
        peak = f"{found['peak_bytes'] / MEBIBYTE:,.0f}" if found else ""
        ended = "" if row["limited_by"] == "memory" else f"at least; the search ended by {row['limited_by']}"
        lines.append([str(row["group"]), f"{row['budget_bytes'] / MEBIBYTE:,.0f}", largest_tokens, peak, ended])
    return table(("completions a context", "budget, MiB", "tokens of each", "peak, MiB", ""), lines)


def check(content: Content) -> str:
    """Predicted over measured, a row a curve; then the factors over all."""
    found = content["check"]
    lines = []
    for rows in by_curve(found["rows"]):
        ratios = [
            joined(f"{row[name]:.2f}" for row in rows)
            for name in ("one_rate_ratio", "fitted_ratio", "wire_ratio", "memory_ratio")
        ]
        lines.append([rows[0]["curve"], joined(row["value"] for row in rows), *ratios])
    summary = found["summary"]
    factors = "; ".join(
        f"{what}: typically within a factor of {summary[f'{name}_typical_factor']:.2f}, "
        f"at worst {summary[f'{name}_worst_factor']:.2f}"
        for name, what in (
            ("one_rate", "tokens/s from one rate"),
            ("fitted", "from five costs, over the points that did not give them"),
            ("wire", "bytes"),
            ("memory", "memory"),
        )
    )
    rate = f"The one rate: {summary['effective_flops_s'] / GIGA:,.0f} GFLOP/s at the base point"
    header = ("", "values", "tokens/s, one rate", "tokens/s, five costs", "bytes", "memory")
    return table(header, lines) + f"\n{rate}. {factors[0].upper()}{factors[1:]}.\n"


def examples(content: Content) -> str:
    lines = []
    for row in content["examples"]:
        found = row["predicted"]
        memory, wire = found["memory"], found["wire"]
        lines.append(
            [
                row["name"],
                f"{sum(found['flops'].values()) / GIGA:.1f}",
                f"{found['scored_tokens_per_s']:,.0f}",
                f"{found['step_s']:,.0f}",
                f"{memory['weights'] / GIGA:.1f}",
                f"{memory['kv_room_tokens']:,}",
                f"{wire['sent']:.0f} / {wire['received']:.0f}",
                f"{found['sent_mbit_s']:.0f} / {found['received_mbit_s']:.0f}",
                found["bound"],
            ]
        )
    return table(EXAMPLE_COLUMNS, lines)


def wire(content: Content) -> str:
    """Floats of every support; ids and compression of two of them."""
    rows = content["rows"]
    floats = [
        [
            row["support"],
            told(row["ids_a_token"]),
            row["way"],
            told(row["bytes_a_token"]),
            told(row["support_mean_nats"]),
            told(row["support_max_nats"]),
            told(row["support_value_max_nats"]),
        ]
        for row in rows
        if row["what"] == "floats"
    ]
    header = ("support", "ids", "floats", "bytes", "error, mean", "largest", "largest of the value")
    made = table(header, floats) + "\n"
    ids = [
        [row["support"], told(row["vocabulary"]), row["way"], told(row["bytes_a_token"]), mbit(row)]
        for row in rows
        if row["what"] == "ids" and row["way"] != "gaps, narrowest whole bytes"
    ]
    made += table(("support", "vocabulary", "ids", "bytes", "saves time below"), ids) + "\n"
    zlib = [
        [row["support"], row["array"], told(row["level"]), f"{row['ratio']:.2f}", mbit(row)]
        for row in rows
        if row["what"] == "zlib" and row["support"] == "dense"
    ]
    return made + table(("support", "zlib of", "level", "size", "saves time below"), zlib)


def mbit(row: Content) -> str:
    """The link on which a smaller message outweighs the time that it takes to make."""
    found = row["saves_time_below_mbit_per_s"]
    return "" if found is None else f"{found:.0f} Mbit/s"


# Section: the file of its results, and how they are told.
SECTIONS: Mapping[str, tuple[str, Callable[[Content], str]]] = {
    "teacher": ("teacher.json", teacher),
    "overlap": ("overlap.json", rows_and_bars),
    "trainer": ("trainer.json", rows_and_bars),
    "wire": ("wire.json", wire),
    "scaling": ("scaling.json", scaling),
    "largest": ("scaling.json", largest),
    "check": ("capacity.json", check),
    "examples": ("capacity.json", examples),
}


def by_curve(rows: Sequence[Content]) -> list[list[Content]]:
    names = dict.fromkeys(row["curve"] for row in rows)
    return [[row for row in rows if row["curve"] == name] for name in names]


def joined(values: Iterable[object]) -> str:

    return " · ".join(map(str, values))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=Path("docs/performance.md"))
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    text = arguments.page.read_text()
    bodies = {}
    for name, (file_name, told_by) in SECTIONS.items():
        path = arguments.results / file_name
        if path.exists():
            bodies[name] = told_by(json.loads(path.read_text()))
        else:
            print(f"{name}: left as it is, there is no {path}")
    made = filled(text, bodies)
    if not arguments.check:
        arguments.page.write_text(made)
    return int(arguments.check and made != text)


if __name__ == "__main__":
    sys.exit(main())
