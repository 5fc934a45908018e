"""What mkdocs calls while it builds the site: pages that are made of other files, and links that hold."""

from __future__ import annotations

import logging
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from readme_pages import split_readme
from repository_links import site_links
from settings_reference import settings_page
from wire_reference import read_proto, wire_page

REPOSITORY = Path(__file__).parent.parent.parent
PAGES = {REPOSITORY / "README.md": "index.md", REPOSITORY / "CONTRIBUTING.md": "contributing.md"}
MADE_OF = {"index.md": "README.md", "quick-start.md": "README.md", "contributing.md": "CONTRIBUTING.md"}

# mkdocs counts its own loggers' warnings, and `--strict` fails for one.
complain = logging.getLogger("mkdocs.hooks").warning


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that no file of docs/ holds."""
    home, quick_start = split_readme((REPOSITORY / "README.md").read_text())
    made = {
        "index.md": home,
        "quick-start.md": quick_start,
        "contributing.md": (REPOSITORY / "CONTRIBUTING.md").read_text(),
        "wire-reference.md": wire_page(read_proto(REPOSITORY / "proto" / "teacher.proto")),
        "settings-reference.md": settings_page(),
    }
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site has them, whichever file the page was made of."""
    name = page.file.src_uri
    source = REPOSITORY / MADE_OF[name] if name in MADE_OF else REPOSITORY / "docs" / name
    return site_links(markdown, source, repository=REPOSITORY, pages=PAGES, complain=complain)
