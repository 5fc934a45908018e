"""README.md as two pages of the site: what this is, and how to begin. Pure."""

from __future__ import annotations

import re

HOME_SECTIONS = frozenset({"How it compares"})
LEFT_OUT = frozenset({"Further"})  # the site has its own navigation
FRONT_MATTER = "---\nhide: [navigation]\n---\n"
FIRST_STEPS = """\
[Quick start](docs/quick-start.md){ .md-button .md-button--primary }
[As a library](docs/library.md){ .md-button }
[Serve a teacher](docs/deployment.md){ .md-button }

"""
_HEADING = re.compile(r"^## (.+)$", re.MULTILINE)


def split_readme(readme: str) -> tuple[str, str]:
    """The home page and the quick start, both with README's links. A section that nobody placed is a quick start's."""
    introduction, *rest = _HEADING.split(readme)
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    home, quick_start = [FRONT_MATTER, introduction, FIRST_STEPS], ["# Quick start\n\n"]
    for title, text in sections.items():
        if title not in LEFT_OUT:
            (home if title in HOME_SECTIONS else quick_start).append(f"## {title}{text}")
    return "".join(home), "".join(quick_start)
