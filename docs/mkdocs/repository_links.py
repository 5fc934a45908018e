"""Links of the repository's Markdown files as links of the site. Pure, but for looking whether a file exists."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

# Code comes first in the alternation, so that a link inside it is left alone.
_LINK = re.compile(
    r"(?P<code>^```.*?^```|`[^`\n]*`)|\[(?P<text>[^\[\]]*)\]\((?P<target>[^()\s]+)\)", re.DOTALL | re.MULTILINE
)
_ELSEWHERE = re.compile(r"[a-z]+:|#|/")


def site_links(
    markdown: str, source: Path, *, repository: Path, pages: Mapping[Path, str], complain: Callable[[str], None]
) -> str:
    """The same text with links that hold on the site, all of whose pages lie beside each other.

    A file below docs/ is linked as it lies there, a file of `pages` by its page; where the text of the link is a file
    name it becomes the page's title. What else the repository holds has no address that a reader could follow, so it is
    named as a path. `complain` hears of what does not exist.

    Args: source: the file that `markdown` is of, or stands for. pages: files outside docs/ that are pages of the site.
    """
    docs = repository / "docs"

    def rewritten(match: re.Match[str]) -> str:
        text, (target, hash_, fragment) = match["text"], (match["target"] or "").partition("#")
        if match["code"] or _ELSEWHERE.match(match["target"]):
            return match[0]
        path = Path(os.path.normpath(source.parent / target))
        if path in pages or path.is_relative_to(docs):
            page = pages.get(path) or path.relative_to(docs).as_posix()
            return f"[{_title(path) if text == target else text}]({page}{hash_}{fragment})"
        if not (path.is_relative_to(repository) and path.exists()):
            complain(f"{source} links to {target}, which does not exist")
            return match[0]
        named = path.relative_to(repository).as_posix()
        return f"`{named}`" if named.endswith(text.strip("`")) else f"{text} (`{named}`)"

    return _LINK.sub(rewritten, markdown)


def _title(path: Path) -> str:
    """The first heading of a Markdown file; the file's name where there is none, or no file yet."""
    lines = path.read_text().splitlines() if path.suffix == ".md" and path.exists() else []
    return next((line.removeprefix("# ") for line in lines if line.startswith("# ")), path.name)
