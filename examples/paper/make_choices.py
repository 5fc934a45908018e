r"""Writes multiple-choice questions as rows for `vopd-client eval --verifier choice`: options shuffled, letters set.

    python examples/paper/make_choices.py Idavidrein/gpqa:gpqa_diamond:train gpqa-diamond.jsonl
    python examples/paper/make_choices.py gpqa.parquet gpqa-diamond.jsonl --seed 1

The columns are GPQA's, one for the right option and one for each wrong one; flags name those of other sets. The data
set is a .parquet file, or one of the hub: name, name:split or name:configuration:split. Every question's options are
shuffled by the seed and its place, so that another number of rows changes no question.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WRONG = ["Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"]
LETTERS = "ABCDEFGHIJ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_set")
    parser.add_argument("output", type=Path)
    parser.add_argument("--question-column", default="Question")
    parser.add_argument("--right-column", default="Correct Answer")
    parser.add_argument("--wrong-columns", nargs="+", default=WRONG, metavar="COLUMN")
    parser.add_argument("--kind-column", help="a column that results are broken down by, such as High-level domain")
    parser.add_argument("--seed", type=int, default=42)
    given = parser.parse_args()
    rows = read(given.data_set)
    columns = [given.question_column, given.right_column, *given.wrong_columns]
    missing = sorted({*columns, *filter(None, [given.kind_column])} - set(rows[0]))
    if missing:
        parser.error(f"{given.data_set} has no column {', '.join(missing)}; it has {', '.join(rows[0])}")
    made = [
        question(row, columns, seed=given.seed, place=place, kind=row[given.kind_column] if given.kind_column else None)
        for place, row in enumerate(rows)
    ]
    given.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")
    print(f"{len(made)} questions in {given.output}")


def read(data_set: str) -> list[Mapping[str, Any]]:
    if data_set.endswith(".parquet"):
        import pyarrow.parquet

        rows: list[Mapping[str, Any]] = pyarrow.parquet.read_table(data_set).to_pylist()
        return rows
    import datasets

    name, *configuration, split = data_set.split(":") if ":" in data_set else (data_set, "train")
    return list(datasets.load_dataset(name, *configuration, split=split))


def question(
    row: Mapping[str, Any], columns: Sequence[str], *, seed: int, place: int, kind: str | None = None
) -> dict[str, str]:
    """The question with its options below, and the letter of the right one. columns: question, right, wrong..."""
    asked, right, *wrong = (str(row[column]).strip() for column in columns)
    options = [right, *wrong]
    order = list(range(len(options)))
    random.Random(f"{seed}:{place}").shuffle(order)
    lines = [f"{letter}. {options[index]}" for letter, index in zip(LETTERS, order, strict=False)]
    made = {"prompt": "\n".join([asked, "", *lines]), "answer": LETTERS[order.index(0)], "verifier": "choice"}
    return made | ({"kind": kind} if kind else {})


if __name__ == "__main__":
    main()
