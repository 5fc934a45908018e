"""Writes docs/images/status-page.png: the status page of a made-up teacher that has been busy for five minutes.

    .venv/bin/python tests/status_page_picture.py docs/images/status-page.png [light | dark]

The font is the system's; Inter (Debian: fonts-inter) comes close to what phones and laptops have.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Literal

from browser import headless_chromium, watched_page
from scripted_status import ScriptedTeacher, busy_status
from vopd_server.admin_api import make_admin_app
from vopd_server.http_listener import HttpListener

SECONDS = 310
SIZE = {"width": 1280, "height": 800}


async def take_picture(path: Path, scheme: Literal["light", "dark"]) -> None:
    """The page's clock goes as fast as it is asked: five minutes take one."""
    teacher = ScriptedTeacher(busy_status())
    listener = HttpListener(make_admin_app(teacher), host="127.0.0.1", port=0)
    await listener.start()
    try:
        async with (
            headless_chromium() as browser,
            watched_page(browser, color_scheme=scheme, viewport=SIZE, device_scale_factor=2) as watched,
        ):
            page = watched.page
            await page.clock.install()
            await page.goto(f"{listener.url}/status")
            for second in range(1, SECONDS):
                teacher.status_now = busy_status(second)
                async with page.expect_response("**/status.json"):
                    await page.clock.run_for(1000)
            await page.wait_for_timeout(1000)  # for the bars to arrive
            await page.screenshot(path=path, full_page=True)
    finally:
        await listener.stop(is_idle=False)


if __name__ == "__main__":
    asyncio.run(take_picture(Path(sys.argv[1]), "dark" if sys.argv[2:] == ["dark"] else "light"))
