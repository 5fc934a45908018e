"""The admin listener's status page, looked at in Chromium."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from typing import Any

import httpx2
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, expect

from browser import Watched, headless_chromium, watched_page
from scripted_status import BUSY_JOBS, Job, ScriptedTeacher, busy_status, idle_status
from vopd_server.admin_api import make_admin_app
from vopd_server.http_listener import HttpListener
from vopd_server.status import EngineCounters, ServiceStatus

pytestmark = pytest.mark.asyncio(loop_scope="module")
LONG_ID = "a-tenant-whose-name-goes-on-and-on." * 3
WITHIN_MS = 8000  # of which a test on a quiet machine needs one or two thousand


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chromium() -> AsyncIterator[Browser]:
    async with headless_chromium() as browser:
        yield browser


@asynccontextmanager
async def listening(teacher: ScriptedTeacher, port: int = 0) -> AsyncIterator[HttpListener]:
    listener = HttpListener(make_admin_app(teacher), host="127.0.0.1", port=port)
    await listener.start()
    try:
        yield listener
    finally:
        await listener.stop(is_idle=False)


@asynccontextmanager
async def shown(
    browser: Browser, status: ServiceStatus, **options: Any
) -> AsyncIterator[tuple[ScriptedTeacher, Watched]]:
    """The page, with its first answer. At the end it has not complained, nor asked anyone but the teacher."""
    teacher = ScriptedTeacher(status)
    async with listening(teacher) as listener, watched_page(browser, **options) as watched:
        await watched.page.goto(f"{listener.url}/")
        await expect(watched.page.locator("#state")).to_have_text(status.state)
        yield teacher, watched
        assert watched.complaints == []
        assert watched.origins == {listener.url}


def with_tenants(*jobs: Job, **changes: Any) -> ServiceStatus:
    return replace(busy_status(jobs=jobs), **changes)


async def cells(page: Page, tenant_id: str) -> dict[str, str]:
    """What the row of a tenant says, by the names of its fields."""
    row = page.locator("#tenants tr", has=page.locator("[data-field=id]", has_text=tenant_id))
    found: dict[str, str] = await row.evaluate(
        "row => Object.fromEntries([...row.querySelectorAll('[data-field]')].map(f => [f.dataset.field, f.innerText]))"
    )
    return found


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WITHIN_MS / 1000):
        while not holds():  # noqa: ASYNC110  # what changes is in another process
            await asyncio.sleep(0.05)


# ---------------------------------------------------------------- what is served


async def test_the_status_is_json_and_the_root_leads_to_the_page() -> None:
    status = busy_status()
    async with listening(ScriptedTeacher(status)) as listener, httpx2.AsyncClient(trust_env=False) as http:
        answer = await http.get(f"{listener.url}/status.json")
        assert answer.json() == json.loads(json.dumps(asdict(status)))
        assert answer.headers["cache-control"] == "no-store"
        root = await http.get(f"{listener.url}/")
        assert (root.status_code, root.headers["location"]) == (307, "status")
        assert (await http.get(f"{listener.url}/readyz")).text == "ready\n"
        metrics = (await http.get(f"{listener.url}/metrics")).text
        assert 'vopd_tenant_running_sequences{tenant="code-rl"} 18.0' in metrics


async def test_the_page_may_load_nothing_and_run_only_what_is_its_own() -> None:
    async with listening(ScriptedTeacher(idle_status())) as listener, httpx2.AsyncClient(trust_env=False) as http:
        page = await http.get(f"{listener.url}/status")
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy.pop("default-src") == "'none'"
    assert {policy.pop(name).split("-")[0] for name in ("script-src", "style-src")} == {"'sha256"}
    assert policy.pop("connect-src") == "'self'"
    assert policy.pop("img-src") == "data:"
    assert set(policy.values()) == {"'none'"}
    assert page.headers["x-content-type-options"] == "nosniff"


# ---------------------------------------------------------------- what is shown


async def test_the_page_says_what_runs_and_how_fast(chromium: Browser) -> None:
    jobs = (Job("alice", 12_000, swing=0, queued=3, running=2), Job("bob", 345, swing=0, held=4))
    counters = EngineCounters(batches=10, batch_tokens=1_000, padding_tokens=25, context_tokens_reused=325)
    status = with_tenants(*jobs, window_tokens=50_000, running_tokens=41_234, engine_counters=counters)
    async with shown(chromium, status) as (_, watched):
        assert await watched.text("h1") == "Qwen/Qwen3-8B"
        facts = "transformers 5.19.0 · bfloat16 · revision b968826d9c46 · vopd 0.1.0 · up 3 d 4 h · 3 calls in flight"
        assert await watched.text("#facts") == facts
        assert await watched.text("#rate") == "12,345"
        assert await watched.text("#rate-note") == "6.5 sequences a second"
        assert await watched.text("#window") == "41,234"
        assert await watched.text("#window-note") == "of 50,000 tokens, 82 %"
        assert await watched.text("#sequences") == "2 sequences running, 3 queued, 4 held back"
        assert await watched.text("#padding") == "2.5 %"
        assert await watched.text("#reuse") == "25 %"  # 325 of the 975 + 325 that would have been read
        width = await watched.page.eval_on_selector("#window-bar i", "bar => bar.style.width")
        assert width == "82.468%"
        assert "the same to 0.00021 nats" in await watched.text("#probe")
        assert await watched.page.title() == "Qwen/Qwen3-8B · vopd teacher"


async def test_reuse_of_an_engine_that_counts_nothing_else_is_of_the_tokens_scored(chromium: Browser) -> None:
    status = with_tenants(Job("alice", 10, swing=0), engine_counters=EngineCounters(context_tokens_reused=27_000))
    async with shown(chromium, status) as (_, watched):
        assert await watched.text("#padding") == "–"
        assert await watched.text("#reuse") == "25 %"  # of 10 a second for three hours


async def test_a_row_says_everything_of_its_tenant(chromium: Browser) -> None:
    async with shown(chromium, busy_status()) as (_, watched):
        row = await cells(watched.page, "math-7b-ablation")
        assert (row["weight"], row["held"], row["queued"], row["running"]) == ("weight 2", "14", "96", "31")
        assert row["waits-for"] == "the engine"
        assert row["share"].endswith("% · fair 44 %")  # 2 of 4.5
        assert row["reserved"].endswith(" k of 524 k")
        assert row["rejections"].split() == ["128", "RESOURCE_EXHAUSTED", "3", "DEADLINE_EXCEEDED"]
        assert row["scored-tokens"] == "102 M tokens"
        assert (await cells(watched.page, "nightly-eval"))["waits-for"] == "its tokens a minute"
        idle = await cells(watched.page, "sandbox")
        assert [idle[name] for name in ("rate", "share", "wait", "no-rejections")] == ["0", "idle", "–", "0"]


async def test_the_bound_that_is_nearer_is_shown_and_one_that_is_reached_stands_out(chromium: Browser) -> None:
    status = busy_status(jobs=(Job("alice", 10), Job("bob", 5)))
    alice, bob = status.tenants
    near = replace(alice, reserved_tokens=10, reserved_bytes=1_900_000_000)
    status = replace(status, tenants=(near, replace(bob, is_revoked=True)))
    async with shown(chromium, status) as (_, watched):
        assert (await cells(watched.page, "alice"))["reserved"] == "1.9 GB of 2 GB"
        full = watched.page.locator("#tenants .bar.full")
        await expect(full).to_have_count(1)
        assert (await cells(watched.page, "bob"))["revoked"] == "revoked"
        await expect(watched.page.locator(".tag:visible")).to_have_count(1)


async def test_rows_come_go_and_change_places_as_the_numbers_do(chromium: Browser) -> None:
    async with shown(chromium, with_tenants(Job("a", 300, swing=0), Job("b", 200, swing=0))) as (teacher, watched):
        ids = watched.page.locator("#tenants [data-field=id]")
        await expect(ids).to_have_text(["a", "b"])
        first = await watched.page.evaluate_handle("document.querySelector('#tenants tr')")
        teacher.status_now = with_tenants(Job("a", 300, swing=0), Job("b", 4_321, swing=0), Job("c", 310, swing=0))
        await expect(ids).to_have_text(["b", "c", "a"], timeout=WITHIN_MS)
        await expect(watched.page.locator("#rate")).to_have_text("4,931")
        assert (await cells(watched.page, "b"))["rate"] == "4,321"
        assert await first.evaluate("row => row.isConnected")  # moved, not made anew
        teacher.status_now = with_tenants(Job("b", 12, swing=0))
        await expect(ids).to_have_text(["b"], timeout=WITHIN_MS)
        points = await watched.page.get_attribute("#tenants .line", "d")
        assert points is not None
        assert points.count("L") >= 2
        assert points.count("M") == 1


async def test_what_a_tenant_calls_itself_is_text(chromium: Browser) -> None:
    evil = "<img src=x onerror=alert(1)>"
    status = with_tenants(Job(evil, 100, rejections={"</ul><script>alert(2)</script>": 1}), model_id="<b>model</b>")
    async with shown(chromium, status) as (_, watched):
        assert await watched.text("#tenants [data-field=id]") == evil
        assert await watched.text("h1") == "<b>model</b>"
        assert "<script>alert(2)" in await watched.text("#tenants [data-field=rejections]")
        assert await watched.page.locator("img").count() == await watched.page.locator("h1 b").count() == 0


async def test_without_tenants_and_without_a_model_the_page_says_so(chromium: Browser) -> None:
    starting = replace(
        idle_status(), state="starting", model_id="", model_revision="", engine="", engine_version="", dtype="",
        window_tokens=0, golden_probe="",
    )  # fmt: skip
    async with shown(chromium, starting) as (teacher, watched):
        assert await watched.text("#facts") == "vopd 0.1.0 · up 42 s · 0 calls in flight"
        assert [await watched.text(number) for number in ("#rate", "#window", "#reuse")] == ["0", "–", "–"]
        assert "A tenant appears here with its key" in await watched.text("#empty")
        await expect(watched.page.locator("table")).to_be_hidden()
        teacher.status_now = busy_status()
        await expect(watched.page.locator("#state")).to_have_text("ready", timeout=WITHIN_MS)
        await expect(watched.page.locator("#tenants tr")).to_have_count(len(BUSY_JOBS))
        await expect(watched.page.locator("#empty")).to_be_hidden()


async def test_a_broken_keys_file_is_told_until_it_is_mended(chromium: Browser) -> None:
    problem = "keys file /keys/keys.json: line 3: no JSON"
    async with shown(chromium, replace(idle_status(), keys_problem=problem)) as (teacher, watched):
        told = await watched.text("#keys-problem")
        assert told.lower() == f"{problem}; the keys from before stay in force".lower()
        teacher.status_now = idle_status()
        await expect(watched.page.locator("#keys-problem")).to_be_hidden(timeout=WITHIN_MS)


async def test_numbers_have_units_that_people_read(chromium: Browser) -> None:
    async with shown(chromium, idle_status()) as (_, watched):
        for call, said in {
            "duration(0)": "0 ms",
            "duration(0.24)": "240 ms",
            "duration(2.44)": "2.4 s",
            "duration(59.97)": "59 s",
            "duration(200)": "3 min 20 s",
            "duration(86399)": "23 h 59 min",
            "duration(273600)": "3 d 4 h",
            "rate(0)": "0",
            "rate(9.96)": "10",
            "rate(12345.6)": "12,346",
            "percent(0.0412)": "4.1 %",
            "percent(0.0999)": "10 %",
            "short(9999)": "9,999",
            "short(12345)": "12.3 k",
            "short(999600)": "1 M",
            "bytes(512)": "512 B",
            "bytes(1536000000)": "1.54 GB",
        }.items():
            assert await watched.page.evaluate(call) == said, call


# ---------------------------------------------------------------- how it asks


async def test_a_teacher_that_goes_away_is_missed_and_found_again(chromium: Browser) -> None:
    teacher = ScriptedTeacher(with_tenants(Job("alice", 100, swing=0)))
    async with watched_page(chromium) as watched:
        lost, state = watched.page.locator("#lost"), watched.page.locator("#state")
        async with listening(teacher) as listener:
            port = int(listener.url.rpartition(":")[2])
            await watched.page.goto(f"{listener.url}/status")
            await expect(state).to_have_text("ready")
            await expect(lost).to_be_hidden()
        await expect(lost).to_be_visible(timeout=WITHIN_MS)
        since = await watched.text("#lost-since")
        assert since.startswith("No answer since ")
        await expect(lost).to_have_text(re.compile(r"\d s ago\. Below is what the teacher last said\."))
        await expect(watched.page.locator("#lost-ago")).not_to_have_text(await watched.text("#lost-ago"))
        assert await watched.text("#lost-since") == since
        await expect(state).to_have_text("no answer")
        assert await watched.text("#rate") == "100"
        teacher.status_now = with_tenants(Job("alice", 200, swing=0))
        async with listening(teacher, port):
            await expect(lost).to_be_hidden(timeout=WITHIN_MS)
            await expect(state).to_have_text("ready")
            await expect(watched.page.locator("#rate")).to_have_text("200")
        assert all("Failed to load resource" in complaint for complaint in watched.complaints)


async def test_an_answer_that_does_not_come_counts_as_none(chromium: Browser) -> None:
    async with shown(chromium, idle_status()) as (_, watched):
        await watched.page.route("**/status.json", lambda _route: None)
        await expect(watched.page.locator("#lost")).to_be_visible(timeout=WITHIN_MS)
        await watched.page.unroute("**/status.json")
        await expect(watched.page.locator("#lost")).to_be_hidden(timeout=WITHIN_MS)


async def test_a_page_that_nobody_looks_at_does_not_ask(chromium: Browser) -> None:
    async with shown(chromium, idle_status()) as (teacher, watched):
        await watched.page.evaluate("Object.defineProperty(document, 'hidden', {get: () => window.isHidden})")

        async def show(is_hidden: bool) -> None:
            await watched.page.evaluate(f"isHidden = {json.dumps(is_hidden)}")
            await watched.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")

        await show(is_hidden=True)
        num_asked = teacher.num_asked
        await asyncio.sleep(2.2)
        assert teacher.num_asked <= num_asked + 1  # one may have been on its way
        num_asked = teacher.num_asked
        await show(is_hidden=False)
        await until(lambda: teacher.num_asked > num_asked + 1)


# ---------------------------------------------------------------- how it looks


async def test_it_is_dark_where_the_reader_wants_it_dark(chromium: Browser) -> None:
    def brightness(color: str) -> float:
        return sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(","))) / 3

    for scheme, is_dark in (("light", False), ("dark", True)):
        async with shown(chromium, busy_status(), color_scheme=scheme) as (_, watched):
            for selector in ("body", ".tenants"):
                style = f"getComputedStyle(document.querySelector('{selector}'))"
                behind, text = [
                    brightness(await watched.page.evaluate(f"{style}.{name}")) for name in ("backgroundColor", "color")
                ]
                assert (behind < 60, text > 200) == (is_dark, is_dark)
                assert abs(behind - text) > 170


@pytest.mark.parametrize("width", [320, 390, 760, 761, 1024, 1440])
async def test_nothing_is_wider_than_the_screen(chromium: Browser, width: int) -> None:
    status = with_tenants(*BUSY_JOBS, Job(LONG_ID, 1e7, rejections={"RESOURCE_EXHAUSTED": 10**7}), model_id="m/" * 60)
    viewport = {"width": width, "height": 800}
    async with shown(chromium, status, viewport=viewport) as (_, watched):
        await expect(watched.page.locator("#tenants tr")).to_have_count(len(BUSY_JOBS) + 1)
        assert await watched.page.evaluate("document.documentElement.scrollWidth") <= width
        if width < 761:  # where a row is a card, which nothing sticks out of
            outside = "row => [...row.querySelectorAll('*')].filter(x => x.getBoundingClientRect().right > innerWidth)"
            assert await watched.page.eval_on_selector("#tenants tr", f"row => ({outside})(row).length") == 0
