"""The JSON behind the status page, and the headers of both."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import pytest
from multidict import CIMultiDictProxy
from prometheus_client import CollectorRegistry

from k8s_consul_registrar.admin.server import AdminServer
from k8s_consul_registrar.admin.status_api import (
    FILES,
    MAX_CONFLICTS,
    POLICY,
    api_routes,
    page_routes,
    target_index,
)
from k8s_consul_registrar.admin.view import TargetState
from k8s_consul_registrar.errors import Reason
from k8s_consul_registrar.model import Kind, ObjectKey
from k8s_consul_registrar.registrar.brake import Ground, Proof
from k8s_consul_registrar.registrar.decide import Conflict
from k8s_consul_registrar.registrar.status import RegistrarStatus, Removal
from support.seen import Healthy, Registrar, many_targets, node_target, pod_rejection, pod_target
from support.waiting import PATIENCE, until

PATHS = ("/api/v1/targets", "/api/v1/rejections", "/api/v1/removals", "/api/v1/status")
HOSTILE = (
    '"},{"',
    "</script><script>alert(1)</script>",
    "\x00\x1f\u2028",
    "a\r\nSet-Cookie: a=b",
    "half \ud83d of it",
)


@dataclass(frozen=True)
class Served:
    """A registrar and a client of its endpoints."""

    registrar: Registrar
    url: str
    session: aiohttp.ClientSession

    async def get(self, path: str, **headers: str) -> tuple[int, str, CIMultiDictProxy[str]]:
        """Return status, text and headers."""
        async with self.session.get(self.url + path, headers=headers) as response:
            return response.status, await response.text(), response.headers

    async def json(self, path: str) -> Any:
        """Return what a path answers."""
        status, text, _ = await self.get(path)
        assert status == 200, text
        return json.loads(text)

    async def ids(self, query: str) -> list[str]:
        """Return the IDs of the targets a query finds."""
        return [target["id"] for target in (await self.json(f"/api/v1/targets?{query}"))["targets"]]


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    """Serve a registrar that has nothing yet."""
    registrar = Registrar()
    routes = [*page_routes(), *api_routes(registrar, clock=lambda: 1000.0)]
    async with (
        AdminServer(port=0, health=Healthy(), registry=CollectorRegistry(), routes=routes) as server,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE)) as session,
    ):
        yield Served(registrar, f"http://127.0.0.1:{server.port}", session)


async def test_target_is_shown_with_everything_known_of_it(served: Served) -> None:
    """Object, address, how it is scraped, shard, tags, meta and where it stands."""
    meta = {"param_module": "http_2xx", "scheme": "https"}
    target = pod_target(
        "web-1", state=TargetState.REFUSED, detail="403", tags=("a",), address="2001:db8::1", meta=meta
    )
    served.registrar.put(target)
    assert (await served.json("/api/v1/targets")) == {
        "total": 1,
        "found": 1,
        "offset": 0,
        "targets": [
            {
                "id": "pod--shop--web-1",
                "name": "pod--shop--web-1",
                "object": {"kind": "pod", "namespace": "shop", "name": "web-1"},
                "node": "node-1",
                "address": "2001:db8::1",
                "port": 9102,
                "socket": "[2001:db8::1]:9102",
                "scheme": "https",
                "path": "/metrics",
                "params": {"module": "http_2xx"},
                "shard": "shard-1",
                "tags": ["a"],
                "labels": dict(target.service.meta),
                "state": "refused",
                "detail": "403",
            }
        ],
    }


async def test_targets_are_found_by_any_of_their_texts(served: Served) -> None:
    """Every term must be somewhere, in any case; filters come on top."""
    served.registrar.put(
        pod_target("web-1", detail="Permission denied", tags=("Blue",), meta={"team": "Search"}),
        pod_target("web-2", "billing", TargetState.PENDING, address="203.0.113.9", port=8080),
        node_target(4),
    )
    assert await served.ids("q=WEB") == ["pod--billing--web-2", "pod--shop--web-1"]
    assert await served.ids("q=web+blue") == ["pod--shop--web-1"]
    assert await served.ids("q=permission") == ["pod--shop--web-1"]
    assert await served.ids("q=203.0.113.9:8080") == ["pod--billing--web-2"]
    assert await served.ids("q=billing/web") == ["pod--billing--web-2"]
    assert await served.ids("q=search") == ["pod--shop--web-1"]
    assert await served.ids("q=web+nowhere") == []
    assert await served.ids("kind=node") == ["node--192.0.2.5-4"]
    assert await served.ids("namespace=shop&q=web") == ["pod--shop--web-1"]
    assert await served.ids("state=pending") == ["pod--billing--web-2"]
    assert len(await served.ids("state=pending&state=registered")) == 3


async def test_pages_follow_one_another_in_order(served: Served) -> None:
    """All pages together are all targets by ID, each once."""
    served.registrar.held = many_targets(2345)
    found: list[str] = []
    for offset in range(0, 2500, 500):
        found += await served.ids(f"limit=500&offset={offset}")
    assert found == sorted(served.registrar.held)
    assert await served.ids("offset=5000") == []
    assert len(await served.ids("")) == 100


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=1001", "limit=x", "offset=-1", "offset=", "kind=service", "state=lost", "sort=id",
     f"q={'x' * 201}"],
)  # fmt: skip
async def test_senseless_query_is_refused_in_words(served: Served, query: str) -> None:
    """400 with one error in JSON."""
    status, text, _ = await served.get(f"/api/v1/targets?{query}")
    assert status == 400
    assert list(json.loads(text)) == ["error"]


async def test_change_is_seen_within_a_second_or_so(served: Served) -> None:
    """The index is kept while nothing changes and follows what does."""
    served.registrar.held = many_targets(50)
    assert (await served.json("/api/v1/status"))["counts"]["targets"] == 50
    await served.json("/api/v1/targets")
    assert served.registrar.walks == 1
    served.registrar.put(pod_target("newcomer"))

    async def is_seen() -> bool:
        return await served.ids("q=newcomer") == ["pod--shop--newcomer"]

    await until(is_seen)


async def test_unused_index_is_dropped() -> None:
    """Memory goes back when the page is closed."""
    registrar = Registrar(many_targets(50))
    index = target_index(registrar)
    await index.snapshot()
    index._drop()
    assert len((await index.snapshot()).rows) == 50
    assert registrar.walks == 2
    assert index._dropping is not None
    index._dropping.cancel()


async def test_rejections_are_counted_by_reason_and_found(served: Served) -> None:
    """Sorted by object, with the ID that Consul still holds; filters by reason, namespace and text."""
    served.registrar.rejected = [
        pod_rejection("web-2", Reason.NO_PORT, "no port is annotated"),
        pod_rejection("web-1", Reason.NO_PORT, "no port is annotated", "billing"),
        pod_rejection("web-3", Reason.INVALID_PATH, "control characters"),
    ]
    answer = await served.json("/api/v1/rejections?reason=no_port")
    assert answer["reasons"] == {"no_port": 2, "invalid_path": 1}
    assert (answer["total"], answer["found"]) == (3, 2)
    assert answer["rejections"][0] == {
        "object": {"kind": "pod", "namespace": "billing", "name": "web-1"},
        "reason": "no_port",
        "detail": "no port is annotated",
        "kept_id": "pod--billing--web-1",
    }
    for query, count in (
        ("q=CONTROL", 1),
        ("q=shop/web", 2),
        ("namespace=billing", 1),
        ("kind=node", 0),
        ("limit=1", 1),
    ):
        assert len((await served.json(f"/api/v1/rejections?{query}"))["rejections"]) == count


async def test_status_counts_and_bounds_what_it_lists(served: Served) -> None:
    """Every state is counted, zero included; of ten thousand conflicts the first are listed, all are counted."""
    served.registrar.put(pod_target("a", state=TargetState.CONFLICT), node_target(1))
    served.registrar.status.conflicts = {
        f"id-{number}": Conflict(ObjectKey(Kind.POD, "shop", "a"), "somebody")
        for number in range(MAX_CONFLICTS + 5)
    }
    status = await served.json("/api/v1/status")
    assert status["counts"]["states"] == {
        "registered": 1, "pending": 0, "refused": 0, "conflict": 1, "standby": 0, "kept": 0,
        "blocked": 0, "withheld": 0, "unwanted": 0,
    }  # fmt: skip
    assert status["counts"]["kinds"] == {"pod": 1, "node": 1}
    assert status["counts"]["conflicts"] == MAX_CONFLICTS + 5
    assert len(status["conflicts"]) == MAX_CONFLICTS
    assert status["namespaces"] == ["shop"]
    assert status["now"] == 1000.0


async def test_removals_are_shown_newest_first_and_found(served: Served) -> None:
    """Each with its proof; searched by ID, and chosen by proof, namespace and kind."""
    for number in range(3):
        ground = Ground.EVENT if number else Ground.ABSENCE
        proof = Proof(ground, number, "no mass removal", ObjectKey(Kind.POD, "shop", f"web-{number}"))
        served.registrar.status.removals.appendleft(
            Removal(1000.0 + number, f"pod--shop--web-{number}", proof, "r-1")
        )
    answer = await served.json("/api/v1/removals")
    assert [one["id"] for one in answer["removals"]] == [f"pod--shop--web-{number}" for number in (2, 1, 0)]
    assert answer["removals"][2] == {
        "at": 1000.0, "id": "pod--shop--web-0", "object": {"kind": "pod", "namespace": "shop", "name": "web-0"},
        "place": "", "proof": "confirmed absence", "generation": 0, "brake": "no mass removal", "leader": "r-1",
        "is_answered": True,
    }  # fmt: skip
    for query, count in (("proof=event", 2), ("q=web-1", 1), ("namespace=pay", 0), ("kind=pod&limit=2", 2)):
        assert len((await served.json(f"/api/v1/removals?{query}"))["removals"]) == count
    assert (await served.json("/api/v1/status"))["counts"]["removals"] == {"event": 2, "confirmed absence": 1}


@pytest.mark.parametrize("text", HOSTILE)
async def test_hostile_text_stays_inside_its_value(served: Served, text: str) -> None:
    """Foreign names come back as they were, as one JSON value."""
    served.registrar.put(
        pod_target(text, text, detail=text, tags=(text,), meta={text: text, "metrics_path": text})
    )
    served.registrar.rejected = [pod_rejection(text, text, text, text)]
    served.registrar.about = replace(served.registrar.about, cluster=text)
    served.registrar.status = RegistrarStatus(source_problems={"pods": text})
    (target,) = (await served.json("/api/v1/targets"))["targets"]
    assert (target["object"]["name"], target["labels"][text], target["tags"]) == (text, text, [text])
    (rejection,) = (await served.json("/api/v1/rejections"))["rejections"]
    assert (rejection["reason"], rejection["detail"]) == (text, text)
    status = await served.json("/api/v1/status")
    assert (status["cluster"], status["unready"]) == (text, f"not synced yet: {text}")


@pytest.mark.parametrize("path", PATHS)
async def test_api_is_no_page_and_is_kept_nowhere(served: Served, path: str) -> None:
    """The type is JSON and stays JSON, no other origin may read it, and no cache keeps it."""
    for query, status in (("", 200), ("?nonsense=1", 400)):
        given, _, headers = await served.get(path + query, Origin="https://attacker.example")
        assert given == status
        assert headers["Content-Type"] == "application/json"
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert not any(name.lower().startswith("access-control") for name in headers)


async def test_page_has_the_strictest_policy(served: Served) -> None:
    """The exact policy on every file; nothing inline, nothing from elsewhere, in no frame."""
    assert POLICY == (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    for name in FILES:
        status, text, headers = await served.get("/" if name == "page.html" else f"/{name}")
        assert status == 200
        assert headers["Content-Security-Policy"] == POLICY
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in text
        again = await served.get(
            "/" if name == "page.html" else f"/{name}", **{"If-None-Match": headers["ETag"]}
        )
        assert again[:2] == (304, "")


async def test_unknown_paths_and_methods_get_nothing(served: Served) -> None:
    """404 without an echo, 405 for every method but GET; no file beside those of the page is reached."""
    for path in ("/api", "/api/v1", "/api/v1/", "/api/v2/targets", "/page.py", "/static/page.js", "/../page.py",
                 "/%2e%2e/server.py", "/page.js/", "/<script>alert(1)</script>"):  # fmt: skip
        status, text, headers = await served.get(path)
        assert (status, headers["Content-Type"].split(";")[0]) == (404, "text/plain")
        assert "script" not in text
    for path in (*PATHS, "/", "/page.js"):
        for method in ("POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE"):
            async with served.session.request(method, served.url + path) as response:
                assert response.status == 405


async def test_hostile_host_is_not_echoed(served: Served) -> None:
    """No address is made of the Host header: there is nothing to poison, and every link is relative."""
    for path in (*PATHS, "/", "/nowhere", "/api/v1/"):
        _, text, headers = await served.get(
            path, Host="rebound.attacker.example", **{"X-Forwarded-Host": "evil.example"}
        )
        assert "attacker" not in text + str(headers)
        assert "evil" not in text + str(headers)


def test_every_reason_has_a_hint() -> None:
    """The page knows what to do about each reason."""
    page = next(route for route in page_routes() if route.path == "/words.js")
    body = page.handler.__closure__  # type: ignore[union-attr]  # a function of this project
    text = next(cell.cell_contents for cell in body or () if isinstance(cell.cell_contents, bytes)).decode()
    english, chinese = text.split("export const HINTS")[1].split("zh: {")
    for reason in Reason:
        assert f"\n    {reason}: " in english
        assert f"\n    {reason}: " in chinese
