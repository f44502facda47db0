"""The status page in a real browser: what it shows, how it is used, and that hostile text cannot change it."""

import re
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from k8s_consul_registrar import __version__
from k8s_consul_registrar.admin.explain import Explainer, explain_route
from k8s_consul_registrar.admin.server import AdminServer
from k8s_consul_registrar.admin.status_api import api_routes, page_routes
from k8s_consul_registrar.admin.target_groups import GroupEncoder
from k8s_consul_registrar.admin.view import About
from k8s_consul_registrar.kube.source_state import Failed, SourceStatus
from k8s_consul_registrar.model import Kind, ObjectKey, Rejection, Source
from k8s_consul_registrar.registrar.brake import Held
from k8s_consul_registrar.registrar.decide import Conflict
from k8s_consul_registrar.registrar.orphans import Stays
from k8s_consul_registrar.registrar.status import Activity, Counts, LostAgent, RegistrarStatus
from support.browser import Page, browser_page
from support.builders import annotated, make_pod
from support.controller_lab import ControllerLab, Seen
from support.real_servers import REAL
from support.seen import Healthy, Registrar, busy_registrar, endpoint_target, pod_rejection, pod_target
from support.waiting import SLACK

pytestmark = REAL

ROWS = "document.querySelectorAll('#view tbody tr').length"
RANGE = "document.getElementById('range')?.textContent"
TO = "\N{EN DASH}"


@asynccontextmanager
async def shown(registrar: Registrar, *flags: str) -> AsyncIterator[tuple[Page, AdminServer]]:
    """Serve a registrar and open its page in a browser."""
    routes = [*page_routes(), *api_routes(registrar)]
    async with (
        AdminServer(port=0, health=Healthy(), registry=CollectorRegistry(), routes=routes) as server,
        browser_page("--lang=en-US", *flags) as page,
    ):
        await page.look()
        await page.open(f"http://127.0.0.1:{server.port}/")
        yield page, server


async def test_ten_thousand_targets_are_there_at_once() -> None:
    """The first page of 10,000 targets, with the figures and banners, is there at once."""
    async with shown(busy_registrar()) as (page, server):
        began = time.monotonic()
        await page.open(f"http://127.0.0.1:{server.port}/#health")
        await page.open(f"http://127.0.0.1:{server.port}/#targets")
        await page.wait(f"{ROWS} === 100")
        assert time.monotonic() - began < SLACK
        text = await page.evaluate("document.body.innerText")
        assert f"1{TO}100 of 10,000" in text
        assert "The brake holds 1,240 removals of pods of media" in text
        assert "leader" in text
        assert f"v{__version__}" in text
        assert page.problems == []


async def test_search_filters_and_pages_are_kept_in_the_address() -> None:
    """Typing, chips, menus and paging narrow the list; a reload and the back button bring it back."""
    async with shown(busy_registrar()) as (page, server):
        await page.wait(f"{ROWS} === 100")
        await page.press("/")
        for key in "gateway 198.18.3.":
            await page.press(key)
        await page.wait("location.hash.includes('q=gateway')")
        await page.wait(
            "[...document.querySelectorAll('td.main')].every(one => /gateway/.test(one.textContent))"
        )
        found = await page.evaluate(RANGE)
        assert re.fullmatch(rf"1{TO}\d+ of \d+", found)
        await page.press("Escape")
        await page.wait(f"{RANGE} === '1{TO}100 of 10,000'")
        await page.evaluate("document.querySelector('[data-chip=refused]').click()")
        await page.wait(f"{RANGE} === '1{TO}1 of 1' && {ROWS} === 1")
        await page.evaluate("document.querySelector('.fold').click()")
        await page.wait("document.querySelector('.details')?.innerText.includes('Permission denied')")
        await page.evaluate("history.back()")
        await page.wait(f"{RANGE} === '1{TO}100 of 10,000'")
        await page.evaluate("document.getElementById('next').click()")
        await page.wait(f"{RANGE} === '101{TO}200 of 10,000'")
        await page.open(f"http://127.0.0.1:{server.port}/#targets?namespace=media&kind=pod&offset=100")
        await page.command("Page.reload")
        await page.wait(f"{RANGE}?.startsWith('101{TO}200 of 1,')")
        assert await page.evaluate("document.getElementById('namespace').value") == "media"
        assert page.problems == []


async def test_refresh_keeps_scroll_focus_and_what_is_unfolded() -> None:
    """New data comes in by itself, in place: nothing moves under the reader."""
    registrar = busy_registrar()
    async with shown(registrar) as (page, _):
        await page.wait(f"{ROWS} === 100")
        await page.evaluate(
            "(() => { const fold = document.querySelectorAll('.fold')[20]; fold.click(); "
            "fold.isConnected; window.scrollTo(0, 600); })()"
        )
        await page.wait("document.querySelectorAll('.details').length === 1 && scrollY === 600")
        chosen = "document.activeElement.dataset.id"
        focused = await page.evaluate(chosen)
        assert focused
        registrar.put(pod_target("newcomer", "shop"))
        await page.wait(f"{RANGE} === '1{TO}100 of 10,001'")
        assert await page.evaluate("scrollY") == 600
        assert await page.evaluate(chosen) == focused
        assert await page.evaluate("document.querySelectorAll('.details').length") == 1
        assert page.problems == []


@asynccontextmanager
async def explaining() -> AsyncIterator[tuple[Page, AdminServer, ControllerLab]]:
    """Serve a registrar that explains its objects, and open its page in a browser."""
    seen = Seen()
    explainer = Explainer(seen.lab.core, seen.lab.cluster, GroupEncoder(), "prometheus.io/", {})
    routes = [*page_routes(), *api_routes(seen.view), explain_route(explainer)]
    async with (
        seen.lab.running(),
        AdminServer(port=0, health=Healthy(), registry=CollectorRegistry(), routes=routes) as server,
        browser_page("--lang=en-US") as page,
    ):
        await page.look()
        yield page, server, seen.lab


async def test_object_is_explained_condition_by_condition(tmp_path: Path) -> None:
    """A target to its labels, a rejected Pod to its reason, a slip in words; by typing, by link and in Chinese."""
    view = "document.getElementById('view').innerText"
    async with explaining() as (page, server, lab):
        lab.cluster.put_list([make_pod("web-1"), make_pod("web-2", annotations=annotated(port="none"))])
        await lab.until("web-1")
        await page.open(f"http://127.0.0.1:{server.port}/#explain")
        await page.wait(f"{view}.includes('Name a Pod, Service or Node')")
        await page.press("/")
        for key in "pod shop/web-1":
            await page.press(key)
        await page.press("Enter")
        await page.wait(f"{view}.includes('__meta_consul_service_metadata_pod')")
        text = await page.evaluate(view)
        assert "pod shop/web-1 a target" in text
        assert "as it should be" in text
        for width in (360, 1280):
            await page.look(width=width)
            assert await page.evaluate("document.documentElement.scrollWidth") <= width
            (tmp_path / f"explain-{width}.png").write_bytes(await page.screenshot())
        await page.open(f"http://127.0.0.1:{server.port}/#rejections")
        await page.wait(f"{ROWS} === 1")
        await page.evaluate("document.querySelector('#view td a').click()")
        await page.wait(f"{view}.includes('rejected: unknown_port_name')")
        assert "pod shop/web-2 not a target" in await page.evaluate(view)
        await page.evaluate("document.getElementById('language').click()")
        await page.wait(f"{view}.includes('不是采集目标')")
        await page.open(f"http://127.0.0.1:{server.port}/#explain?q=pots+shop%2Fweb-1")
        await page.wait(f"{view}.includes('is none of these')")
        await page.open(f"http://127.0.0.1:{server.port}/#explain?q=203.0.113.9")
        await page.wait(f"{view}.includes('没有目标使用这个地址')")
        assert [one for one in page.problems if "400" not in one] == []


async def test_registrar_that_goes_silent_is_told_and_what_was_known_stays() -> None:
    """The last data stay, with a banner that says from when they are."""
    async with shown(busy_registrar(500)) as (page, server):
        await page.wait(f"{ROWS} === 100")
        await server.__aexit__(None, None, None)
        await page.wait("document.getElementById('banners').innerText.includes('does not answer')")
        assert await page.evaluate(ROWS) == 100


async def test_page_works_by_keyboard_only() -> None:
    """Tabs are reached by arrow keys, rows unfold by Enter, the search by its key."""
    async with shown(busy_registrar(500)) as (page, _):
        await page.wait(f"{ROWS} === 100")
        await page.evaluate("document.querySelector('.fold').focus()")
        await page.press("Enter")
        await page.wait("document.activeElement.getAttribute('aria-expanded') === 'true'")
        await page.evaluate("document.querySelector('[role=tab][aria-selected=true]').focus()")
        for tab in ("rejections", "conflicts", "removals", "explain", "health", "configuration"):
            await page.press("ArrowRight")
            await page.wait(f"document.activeElement.id === 'tab-{tab}' && location.hash === '#{tab}'")
        await page.wait("document.getElementById('view').innerText.includes('CONSUL_HTTP_TOKEN')")
        await page.press("ArrowRight")
        await page.wait("document.activeElement.id === 'tab-targets'")
        await page.press("/")
        assert await page.evaluate("document.activeElement.id") == "q"


async def test_each_kind_has_a_filter_in_both_languages() -> None:
    """Endpoints beside Pods and Nodes, and where only rejections are of a kind as well."""
    registrar = busy_registrar(500)
    registrar.put(endpoint_target("web-1"), endpoint_target("web-2"))
    words = "[...document.getElementById('kind').options].map(one => one.textContent).join()"
    async with shown(registrar) as (page, _):
        await page.wait(f"{RANGE} === '1{TO}100 of 502'")
        assert await page.evaluate(words) == "every kind,Pod,Node,Endpoint"
        choose = "(() => { const kind = document.getElementById('kind'); kind.value = 'endpoint'; kind.dispatchEvent(new Event('change')); })()"
        await page.evaluate(choose)
        await page.wait(
            f"{RANGE} === '1{TO}2 of 2' && {ROWS} === 2 && location.hash.includes('kind=endpoint')"
        )
        assert "shop/web" in await page.evaluate("document.querySelector('td.main').textContent")
        await page.evaluate("document.getElementById('language').click()")
        await page.wait(f"{words} === '所有类型,Pod,节点,端点'")
        assert await page.evaluate("document.querySelector('td:nth-child(2)').textContent") == "端点"
        assert page.problems == []
    alone = busy_registrar(500)
    detail = "the scheme 'ftp' is neither http nor https"
    alone.rejected.append(Rejection(ObjectKey(Kind.ENDPOINT, "shop", "web"), "invalid_scheme", detail))
    async with shown(alone) as (page, server):
        await page.open(f"http://127.0.0.1:{server.port}/#rejections?kind=endpoint")
        await page.wait(f"{ROWS} === 1 && document.getElementById('kind').value === 'endpoint'")


async def test_rejections_say_what_to_do() -> None:
    """Each rejected Pod stands with its reason, its detail, and how to mend it."""
    async with shown(busy_registrar(500)) as (page, server):
        await page.open(f"http://127.0.0.1:{server.port}/#rejections")
        await page.wait(f"{ROWS} === 4")
        text = await page.evaluate("document.getElementById('view').innerText")
        assert "billing/import-29471" in text
        assert "no_port" in text
        assert "Set prometheus.io/port, or declare a TCP port of the container or Service." in text
        assert "Consul still holds pod--billing--import-29471" in text


async def test_page_is_chinese_in_a_chinese_browser() -> None:
    """The browser's language chooses the words; the button changes and keeps the choice."""
    async with shown(busy_registrar(500), "--accept-lang=zh-CN") as (page, _):
        await page.wait(f"{ROWS} === 100")
        assert await page.evaluate("document.documentElement.lang") == "zh-CN"
        assert "采集目标" in await page.evaluate("document.getElementById('tabs').innerText")
        await page.evaluate("document.getElementById('language').click()")
        await page.command("Page.reload")
        await page.wait("document.getElementById('tabs')?.innerText.startsWith('Targets')")


HOSTILE = (
    "<script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    '"><svg onload=window.pwned=1>',
    "' onmouseover='window.pwned=1",
    "javascript:window.pwned=1",
    "{{pwned}}${pwned}`pwned`",
    "nul\x00 bell\x07 escape\x1b[31m \u202egnp.exe\u202c \u2028 \ufeff",
    "half \ud83d of a pair",
    "</script></style></textarea><!--",
)


def hostile_registrar() -> Registrar:
    """Return a registrar in which every text that anybody else can choose is hostile."""
    registrar = Registrar()
    for number, text in enumerate(HOSTILE):
        registrar.put(
            pod_target(
                f"{text}{number}", text, name=text, address=text, detail=text, tags=(text,),
                meta={text: text, "metrics_path": text, "scheme": text, "param_x": text, f"param_{text}": text,
                      "node": text, "shard_path": text},
            )
        )  # fmt: skip
        registrar.rejected.append(pod_rejection(f"{text}{number}", text, text, text))
    registrar.rejected.append(pod_rejection("proto", "constructor", "__proto__", "toString"))
    every = "".join(HOSTILE)
    registrar.about = About(every, every, every, every, {every: every}, 1.0)
    registrar.holder = every
    registrar.known = {Source(Kind.POD, every): SourceStatus(Failed(1.0, every, "unreachable"))}
    registrar.status = RegistrarStatus(
        recent=deque([Activity(is_resync=True, at=1.0, counts=Counts(1))]),
        conflicts={every: Conflict(ObjectKey(Kind.POD, every, every), every)},
        held=(Held(Source(Kind.POD, every), HOSTILE, 1.0, 2.0),),
        lost_agents=(LostAgent(every, 1.0, 2.0, {every: 1}),),
        consul_problem=every,
        source_problems={every: every},
    )
    return registrar


async def test_hostile_text_is_shown_as_text() -> None:
    """Hostile names, annotations and errors are shown as text on every tab, in both languages."""
    async with shown(hostile_registrar()) as (page, server):
        await page.evaluate(
            "addEventListener('securitypolicyviolation', (event) => console.error(event.violatedDirective))"
        )
        tags = "[...new Set([...document.querySelectorAll('*')].map((one) => one.localName))].sort().join()"
        for tab in ("targets", "rejections", "conflicts", "health", "configuration"):
            await page.open(f"http://127.0.0.1:{server.port}/#{tab}")
            await page.wait(f"document.getElementById('tab-{tab}')?.ariaSelected === 'true' && {ROWS} > 0")
            await page.evaluate("document.querySelectorAll('.fold').forEach((one) => one.click())")
            await page.evaluate("document.getElementById('language').click()")
            assert "window.pwned" in await page.evaluate("document.getElementById('view').innerText")
            assert await page.evaluate("document.querySelectorAll('script, svg, style').length") == 1
            assert await page.evaluate("document.querySelectorAll('img').length") == 1
            found = await page.evaluate(
                "[...document.querySelectorAll('*')].flatMap((one) => [...one.attributes])"
                ".filter((one) => /^on|^style$|^srcdoc$/.test(one.name)).length"
            )
            assert found == 0
            assert "object" not in (await page.evaluate(tags)).split(",")
            text = await page.evaluate("document.body.innerText")
            assert not re.search("[\x00\x07\x1b\u202e\u2028\ufeff]", text)
            assert r"\u202egnp.exe\u202c" in text
        assert await page.evaluate("window.pwned") is None
        assert page.problems == []


async def test_policy_refuses_what_a_mistake_of_ours_would_let_in() -> None:
    """Inline handlers, inline scripts, HTML out of text and other hosts are refused by the browser itself."""
    async with shown(busy_registrar(100)) as (page, _):
        await page.wait(f"{ROWS} > 0")
        refused = await page.evaluate(
            "(() => { try { document.body.innerHTML = '<b>x</b>'; return '' } catch (error) { return error.name } })()"
        )
        assert refused == "TypeError"
        await page.evaluate(
            "(() => { const one = document.createElement('button'); one.id = 'trap'; document.body.append(one); "
            "try { one.setAttribute('onclick', 'window.pwned = 1') } catch {} one.click(); })()"
        )
        assert await page.evaluate("window.pwned") is None
        assert (
            await page.evaluate("fetch('http://192.0.2.1/').then(() => 'sent', () => 'refused')") == "refused"
        )
        assert any("Content Security Policy" in problem for problem in page.problems)


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (360, 760)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_nothing_sticks_out_on_any_screen(width: int, height: int, scheme: str, tmp_path: Path) -> None:
    """From a phone to a desk, in light and dark, every tab fits the width, and its picture is no blank."""
    async with shown(busy_registrar(3000)) as (page, server):
        await page.look(width=width, height=height, scheme=scheme)
        for tab in ("targets", "rejections", "conflicts", "health", "configuration"):
            await page.open(f"http://127.0.0.1:{server.port}/#{tab}")
            await page.wait(f"document.getElementById('tab-{tab}')?.ariaSelected === 'true' && {ROWS} > 0")
            await page.evaluate("document.querySelector('.fold')?.click()")
            assert await page.evaluate("document.documentElement.scrollWidth") <= width
            picture = await page.screenshot()
            (tmp_path / f"{tab}-{width}-{scheme}.png").write_bytes(picture)
            assert len(picture) > 10_000
        background = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(246, 247, 248)", "dark": "rgb(18, 23, 26)"}[scheme]


def test_every_word_is_there_in_both_languages() -> None:
    """No word and no hint of one language lacks in the other, on either page and in what they share."""
    static = resources.files("k8s_consul_registrar.admin") / "static"
    for file in ("language.js", "words.js", "proxy_words.js"):
        for part in (static / file).read_text().split("let language")[0].split("export const HINTS"):
            english, chinese = part.split("zh: {")
            names = [re.findall(r'(\w+): "', half) for half in (english, chinese)]
            assert names[0] == names[1]
            assert len(names[0]) == len(set(names[0])) > 10
    assert all(f'stays_{why.value}: "' in (static / "words.js").read_text() for why in Stays)
