"""The docs site as `make docs` builds it: whatever it links to is there, and it loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest

import vopd_client
from browser import headless_chromium, watched_page
from conftest import REPOSITORY

# Attributes that make a browser fetch something while it shows a page; <a href> and <link rel=canonical> do not.
FETCHED = {"script": "src", "img": "src", "source": "src", "iframe": "src", "video": "src", "audio": "src"}
FETCHED_LINKS = {"stylesheet", "icon", "preload", "preconnect", "dns-prefetch", "prefetch", "modulepreload"}


@dataclass
class PageParts(HTMLParser):
    """What a page has and what it refers to."""

    ids: set[str] = field(default_factory=set)
    references: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        self.references += [values[name] for name in ("href", "src") if name in values]
        if tag == "link" and FETCHED_LINKS & set(values.get("rel", "").split()):
            self.fetched.append(values["href"])
        elif FETCHED.get(tag) in values:
            self.fetched.append(values[FETCHED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with --strict, under which a link or an anchor that leads nowhere is an error."""
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    built = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return directory


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, PageParts]:
    parsed = {}
    for path in site.rglob("*.html"):
        parsed[path] = PageParts()
        parsed[path].feed(path.read_text())
    return parsed


def is_elsewhere(reference: str) -> bool:
    return bool(urlsplit(reference).scheme or urlsplit(reference).netloc)


def test_every_page_of_the_navigation_is_there(pages: dict[Path, PageParts]) -> None:
    found = {path.name for path in pages}
    sources = {path.with_suffix(".html").name for path in (REPOSITORY / "docs").glob("*.md")}
    made = {"index.html", "quick-start.html", "contributing.html", "wire-reference.html", "settings-reference.html"}
    assert sources | made <= found


def test_every_link_and_every_anchor_leads_somewhere(site: Path, pages: dict[Path, PageParts]) -> None:
    lost = []
    for path, page in pages.items():
        for reference in page.references:
            if is_elsewhere(reference):
                continue
            parts = urlsplit(reference)
            base = site if parts.path.startswith("/") else path.parent
            target = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            has_no_anchors = not parts.fragment or target not in pages
            if not target.exists() or not (has_no_anchors or unquote(parts.fragment) in pages[target].ids):
                lost.append(f"{path.name}: {reference}")
    assert not lost


def test_nothing_is_fetched_from_elsewhere(site: Path, pages: dict[Path, PageParts]) -> None:
    fetched = {reference for page in pages.values() for reference in page.fetched}
    assert "mkdocs/style.css" in fetched  # what is looked at is what there is
    assert not {reference for reference in fetched if is_elsewhere(reference)}
    for sheet in site.rglob("*.css"):
        text = sheet.read_text()
        assert not re.search(r"url\(\s*['\"]?(https?:)?//", text), sheet
        assert not re.search(r"@import\s", text), sheet


def test_what_the_repository_holds_and_the_site_does_not_is_named_and_not_linked(site: Path) -> None:
    html = (site / "deployment.html").read_text()
    assert "<code>deploy/monitoring/alerts.yml</code>" in html
    assert "../deploy" not in html


def test_the_reference_has_every_public_name(site: Path, pages: dict[Path, PageParts]) -> None:
    ids = pages[site / "api-client.html"].ids
    documented = {identifier.rsplit(".", 1)[-1] for identifier in ids}
    assert set(vopd_client.__all__) - {"Support", "errors", "losses", "types"} <= documented
    assert {"vopd_client.errors.HandshakeError", "vopd_client.losses.loss_from_logits"} <= ids


def test_the_library_page_shows_the_hand_written_loop(site: Path) -> None:
    shown = re.sub(r"<[^>]+>", "", (site / "library.html").read_text())
    assert "compare_tokenizers(student, teacher)  # equal ids must mean equal text" in shown
    assert "--8<--" not in shown


# ---------------------------------------------------------------- in a browser


@pytest.fixture
def served(site: Path) -> Iterator[str]:
    """The address of the site."""
    handler = partial(QuietHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """The test's output is about the pages."""


async def test_in_a_browser_the_site_asks_nobody_else_and_its_search_finds_things(served: str) -> None:
    async with headless_chromium() as browser, watched_page(browser, viewport={"width": 390, "height": 844}) as watched:
        for name in ("index", "api-client", "wire-reference", "performance"):
            await watched.page.goto(f"{served}/{name}.html")
            too_wide = await watched.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
            assert too_wide <= 0, f"{name}.html scrolls sideways on a phone"
        await watched.page.set_viewport_size({"width": 1360, "height": 900})
        await watched.page.goto(f"{served}/index.html")
        await watched.page.fill("input.md-search__input", "HandshakeError")
        found = "a.md-search-result__link[href*='troubleshooting.html?h=handshakeerror#handshakeerror']"
        await watched.page.wait_for_selector(found, state="attached")
        assert watched.origins == {served}
        assert watched.complaints == []
