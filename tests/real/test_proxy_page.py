"""The proxy's status page in a real browser: what it shows, in both languages, and that it takes no foreign text."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from k8s_consul_registrar.admin.proxy_api import Certificate, SourceRow, UpstreamState, proxy_routes
from k8s_consul_registrar.admin.server import AdminServer
from k8s_consul_registrar.admin.status_api import PROXY_FILES, page_routes
from k8s_consul_registrar.proxy.refusals import Outcome
from support.browser import Page, browser_page
from support.proxy_seen import SeenProxy, a_node, busy_proxy
from support.real_servers import REAL
from support.seen import Healthy

pytestmark = REAL

ROWS = "document.querySelectorAll('#view tbody tr').length"
VIEW = "document.getElementById('view').innerText"
TABS = ("upstreams", "health", "configuration")
HOSTILE = "<img src=x onerror=window.pwned=1></script>\u202egnp.exe"
# Outcomes that are no upstream's fault, so that there is nothing to do about one.
OURS = {"ok", "bad_request", "unauthorized", "tls_handshake_failed", "method_not_allowed", "unknown_path",
        "unknown_node", "unknown_pod", "nodes_not_yet_known", "pods_not_yet_known", "too_many_scrapes",
        "no_credentials", "caller_left", "caller_stalled"}  # fmt: skip


@asynccontextmanager
async def shown(seen: SeenProxy, *flags: str) -> AsyncIterator[tuple[Page, str]]:
    """Serve a proxy and open its page in a browser."""
    routes = [*page_routes(PROXY_FILES), *proxy_routes(seen.view())]
    async with (
        AdminServer(port=0, health=Healthy(), registry=CollectorRegistry(), routes=routes) as server,
        browser_page("--lang=en-US", *flags) as page,
    ):
        await page.look()
        url = f"http://127.0.0.1:{server.port}/"
        await page.open(url)
        yield page, url


async def test_nodes_and_pods_stand_with_their_latest_scrape_and_failures() -> None:
    """The failing ones are one click away, each with its reason and its remedy."""
    async with shown(busy_proxy()) as (page, _):
        await page.wait(f"{ROWS} === 100")
        text = await page.evaluate("document.body.innerText")
        assert "https://10.96.0.1:443" in text
        assert "The certificate of KUBELET_CLIENT_CERT_FILE expires in 9 days" in text
        assert "in 14 hr" in await page.evaluate(
            "document.querySelector('#view .badge.bad').closest('table').innerText"
        )
        await page.evaluate("document.querySelector('a[href=\"#upstreams?state=fails\"]').click()")
        await page.wait(f"{ROWS} > 0 && {ROWS} < 20")
        text = await page.evaluate(VIEW)
        assert "self-signed certificate" in text
        assert "kubelet_unverified" in text
        assert "set KUBELET_CA_FILE" in text
        assert "shop/cart-003" in text
        assert page.problems == []


async def test_health_shows_connections_workers_certificates_and_contested_addresses() -> None:
    """Each figure of the process, and what to do about each way a scrape ended."""
    async with shown(busy_proxy()) as (page, url):
        await page.open(f"{url}#health")
        await page.wait(f"{VIEW}.includes('Certificates')")
        text = await page.evaluate(VIEW)
        for part in (
            "Contested addresses", "192.0.2.10", "worker-x", "of clients\n12", "Accept clients\n4",
            "TLS_CERT_FILE", "in 61 days", "12,480", "48,211",
        ):  # fmt: skip
            assert part in text, part
        await page.open(f"{url}#configuration")
        await page.wait(f"{VIEW}.includes('PROXY_BEARER_TOKEN_FILE')")
        assert page.problems == []


async def test_a_chinese_browser_gets_chinese() -> None:
    """Every heading of every tab is in its language, and the button changes it."""
    async with shown(busy_proxy(), "--accept-lang=zh-CN") as (page, url):
        await page.wait(f"{ROWS} === 100")
        assert await page.evaluate("document.documentElement.lang") == "zh-CN"
        assert "最近采集" in await page.evaluate(VIEW)
        await page.open(f"{url}#health")
        await page.wait(f"{VIEW}.includes('有争议的地址')")
        await page.evaluate("document.getElementById('language').click()")
        await page.wait(f"{VIEW}.includes('Contested addresses')")


async def test_hostile_names_and_reasons_stay_text() -> None:
    """Names, reasons and problems of others are shown as text on every tab."""
    seen = SeenProxy()
    seen.put_nodes(a_node(HOSTILE, "192.0.2.1"), a_node(f"{HOSTILE}2", "192.0.2.2", "192.0.2.1"))
    seen.failed(seen.nodes.current.by_name[HOSTILE], Outcome.UNREACHABLE, HOSTILE)
    seen.put_pod(HOSTILE, HOSTILE, "198.18.0.1")
    seen.sources = [SourceRow(HOSTILE, 1, 1.0, HOSTILE)]
    seen.certificates = [Certificate(HOSTILE, 1.0)]
    seen.unready = HOSTILE
    seen.facts["api_server"] = HOSTILE
    seen.settings[HOSTILE] = HOSTILE
    async with shown(seen) as (page, url):
        for tab in TABS:
            await page.open(f"{url}#{tab}")
            await page.wait(f"document.getElementById('tab-{tab}')?.ariaSelected === 'true' && {ROWS} > 0")
            assert "window.pwned" in await page.evaluate(VIEW)
            assert await page.evaluate("document.querySelectorAll('img').length") == 1
            text = await page.evaluate("document.body.innerText")
            assert "\u202e" not in text
            assert r"\u202egnp.exe" in text
        assert await page.evaluate("window.pwned") is None
        assert page.problems == []


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (360, 760)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_nothing_sticks_out_on_any_screen(width: int, height: int, scheme: str, tmp_path: Path) -> None:
    """From a phone to a desk, in light and dark, every tab fits the width, and its picture is no blank."""
    async with shown(busy_proxy()) as (page, url):
        await page.look(width=width, height=height, scheme=scheme)
        for tab in TABS:
            await page.open(f"{url}#{tab}")
            await page.wait(f"document.getElementById('tab-{tab}')?.ariaSelected === 'true' && {ROWS} > 0")
            assert await page.evaluate("document.documentElement.scrollWidth") <= width
            picture = await page.screenshot()
            (tmp_path / f"{tab}-{width}-{scheme}.png").write_bytes(picture)
            assert len(picture) > 10_000


def test_every_way_to_fail_has_a_hint_and_every_state_a_word() -> None:
    """In both languages."""
    text = (resources.files("k8s_consul_registrar.admin") / "static" / "proxy_words.js").read_text()
    words, hints = text.split("export const HINTS")
    for part in hints.split("zh: {"):
        assert set(re.findall(r"^    (\w+): ", part, re.MULTILINE)) == {one.value for one in Outcome} - OURS
    for part in words.split("zh: {"):
        assert all(f'{state.value}: "' in part for state in UpstreamState)
