"""Our docstrings as Markdown: they are written to be read in the source, in a form that no parser knows.

`name: text` becomes an item of a list, `Raises: …` a paragraph of its own, and what is laid out by spaces or drawn
stays as it is.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from textwrap import indent
from typing import Any

import griffe

_SECTION = re.compile(r"(Args|Raises|Returns|Source|Notation): ?(.*)")
_ITEM = re.compile(r"((?:\w+, )*\w+): (.+)")
_COLUMNS = re.compile(r"\S {3,}\S")
_DRAWN = re.compile(r"[├└│]")
_COMMENT = re.compile(r"  # (.+)$")


def markdown(docstring: str, names: frozenset[str] = frozenset()) -> str:
    """Pure. names: the parameters or attributes that the docstring may speak of."""
    paragraphs = _paragraphs(inspect.cleandoc(docstring).splitlines())
    return "\n\n".join(block for paragraph in paragraphs for block in _blocks(paragraph, names))


def _paragraphs(lines: Sequence[str]) -> list[list[str]]:
    """Lines between empty ones."""
    groups = groupby(lines, key=lambda line: bool(line.strip()))
    return [list(group) for has_text, group in groups if has_text]


def _blocks(paragraph: Sequence[str], names: frozenset[str]) -> Iterator[str]:
    """One paragraph, as one or more blocks of Markdown."""
    if any(_DRAWN.search(line) for line in paragraph) or all(line.startswith("    ") for line in paragraph):
        yield _code(paragraph)
        return
    prose: list[str] = []
    for head, below in _with_what_is_below(paragraph):
        section, item = _SECTION.fullmatch(head), _ITEM.fullmatch(head)
        is_item = item is not None and set(item[1].split(", ")) <= names
        if prose and (section or is_item):
            yield "\n".join(prose)
            prose = []
        if section and below and not section[2]:
            yield f"**{section[1]}**"
            yield from _entries(below)
        elif section:
            prose = [" ".join([f"**{section[1]}** {section[2]}", *(line.strip() for line in below)])]
        elif item and is_item:
            yield _item(item, below)
        elif any(_COLUMNS.search(line) for line in below):
            yield "\n".join([*prose, head])
            yield _code(below)
            prose = []
        else:
            prose += [head, *(line.strip() for line in below)]
    if prose:
        yield "\n".join(prose)


def _with_what_is_below(lines: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Every line that is not indented, with the indented ones after it."""
    heads: list[tuple[str, list[str]]] = []
    for line in lines:
        if line.startswith(" ") and heads:
            heads[-1][1].append(line)
        else:
            heads.append((line, []))
    return heads


def _entries(lines: Sequence[str]) -> Iterator[str]:
    """What a section lists; an entry may go on in lines that are indented further."""
    for head, below in _with_what_is_below(inspect.cleandoc("\n" + "\n".join(lines)).splitlines()):
        item = _ITEM.fullmatch(head)
        yield _item(item, below) if item else " ".join([head, *(line.strip() for line in below)])


def _item(item: re.Match[str], below: Sequence[str]) -> str:
    named = ", ".join(f"`{name}`" for name in item[1].split(", "))
    if any(_COLUMNS.search(line) for line in below):
        return f"- {named}: {item[2]}\n\n" + indent(_code(below), "    ")
    return " ".join([f"- {named}: {item[2]}", *(line.strip() for line in below)])


def _code(lines: Sequence[str]) -> str:
    return "```text\n" + inspect.cleandoc("\n" + "\n".join(lines)) + "\n```"


class OurDocstrings(griffe.Extension):
    """Applies `markdown` to the docstrings of a package that is documented."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Once, when all of it was read."""
        _rewrite(pkg)


def _rewrite(documented: griffe.Object) -> None:
    members = [member for member in documented.members.values() if isinstance(member, griffe.Object)]
    names = {member.name for member in members}
    if isinstance(documented, griffe.Function):
        names = {parameter.name for parameter in documented.parameters}
    if documented.docstring is not None:
        fields = _commented_fields(members) if isinstance(documented, griffe.Class) else []
        documented.docstring.value = "\n\n".join([markdown(documented.docstring.value, frozenset(names)), *fields])
    for member in members:
        _rewrite(member)


def _commented_fields(members: Sequence[griffe.Object]) -> list[str]:
    """A class's annotated fields that are explained by a comment behind them, as items of a list."""
    attributes = [member for member in members if isinstance(member, griffe.Attribute) and member.annotation]
    comments = [(attribute.name, _COMMENT.search(attribute.source)) for attribute in attributes]
    return [f"- `{name}`: {comment[1]}" for name, comment in comments if comment]
