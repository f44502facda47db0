"""The JSON behind the proxy's status page."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from k8s_consul_registrar.admin.proxy_api import Certificate, SourceRow, proxy_routes
from k8s_consul_registrar.admin.server import AdminServer
from k8s_consul_registrar.admin.status_api import FILES, POLICY, PROXY_FILES, page_routes
from k8s_consul_registrar.proxy.refusals import Outcome
from k8s_consul_registrar.proxy.stats import NO_STATS
from support.proxy_seen import SeenProxy, a_node
from support.seen import Healthy
from support.waiting import PATIENCE

pytestmark = pytest.mark.both_loops


@dataclass(frozen=True)
class Served:
    """A proxy and a client of its endpoints."""

    seen: SeenProxy
    url: str
    session: aiohttp.ClientSession

    async def get(self, path: str) -> tuple[int, Any]:
        """Return status and JSON."""
        async with self.session.get(self.url + path) as response:
            assert response.headers["Cache-Control"] == "no-store"
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            return response.status, json.loads(await response.text())


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    """Serve a proxy that knows nothing yet."""
    seen = SeenProxy()
    routes = [*page_routes(PROXY_FILES), *proxy_routes(seen.view(), clock=lambda: 1000.0)]
    async with (
        AdminServer(port=0, health=Healthy(), registry=CollectorRegistry(), routes=routes) as server,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE)) as session,
    ):
        yield Served(seen, f"http://127.0.0.1:{server.port}", session)


async def test_each_node_and_pod_is_shown_with_its_latest_scrape(served: Served) -> None:
    """Answered, failed with its reason, or not scraped yet; a Node's further address counts for it as well."""
    seen = served.seen
    seen.put_nodes(
        a_node("a", "192.0.2.1", "2001:db8::1"), a_node("b", "192.0.2.2"), a_node("c", "192.0.2.3")
    )
    table = seen.nodes.current
    seen.scraped(table.by_name["a"], 0.5, ago=60, expires_in=-1.0)
    seen.scraped(table.by_address["2001:db8::1", 10250], 0.25, expires_in=3600.0)
    seen.failed(table.by_name["b"], Outcome.UNREACHABLE, "refused", ago=5)
    seen.failed(table.by_name["b"], Outcome.TIMEOUT, "too late")
    seen.put_pod("shop", "web-1", "198.18.0.1")
    status, answer = await served.get("/api/v1/upstreams")
    assert status == 200
    assert (answer["total"], answer["found"], answer["offset"]) == (4, 4, 0)
    rows = {one["object"]["name"]: one for one in answer["upstreams"]}
    assert {name: one["state"] for name, one in rows.items()} == {
        "a": "answers",
        "b": "fails",
        "c": "idle",
        "web-1": "idle",
    }
    assert (rows["a"]["seconds"], rows["a"]["address"], rows["a"]["failures"]) == (0.25, "192.0.2.1:10250", 0)
    assert (rows["b"]["outcome"], rows["b"]["reason"], rows["b"]["failures"]) == ("timeout", "too late", 2)
    assert rows["a"]["expires_at"] > rows["a"]["at"]
    assert (rows["c"]["at"], rows["c"]["seconds"], rows["c"]["expires_at"]) == (None, None, None)
    assert rows["web-1"]["object"] == {"kind": "pod", "namespace": "shop", "name": "web-1"}


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("state=fails", ["b"]),
        ("kind=pod", ["web-1"]),
        ("namespace=shop", ["web-1"]),
        ("q=TOO+late", ["b"]),
        ("q=198.18.0.1:9102", ["web-1"]),
        ("limit=1&offset=1", ["b"]),
    ],
)
async def test_upstreams_are_found_by_text_and_facet(query: str, names: list[str], served: Served) -> None:
    """Name, address, state and reason are searched."""
    served.seen.put_nodes(a_node("a", "192.0.2.1"), a_node("b", "192.0.2.2"))
    served.seen.failed(served.seen.nodes.current.by_name["b"], Outcome.TIMEOUT, "too late")
    served.seen.put_pod("shop", "web-1", "198.18.0.1")
    _, answer = await served.get(f"/api/v1/upstreams?{query}")
    assert sorted(one["object"]["name"] for one in answer["upstreams"]) == names or query.startswith("limit")
    assert len(answer["upstreams"]) == len(names)


async def test_a_query_that_makes_no_sense_is_refused(served: Served) -> None:
    """A state of the registrar is none here."""
    for query in ("state=registered", "kind=x", "limit=0", "reason=x"):
        status, answer = await served.get(f"/api/v1/upstreams?{query}")
        assert (status, list(answer)) == (400, ["error"])


async def test_the_status_shows_connections_workers_certificates_and_contests(served: Served) -> None:
    """Everything that is no Node or Pod."""
    seen = served.seen
    seen.put_nodes(a_node("a", "192.0.2.1"), a_node("b", "192.0.2.2", "192.0.2.1"))
    seen.relay.figures = replace(
        NO_STATS, callers=3, kept=2, running=1, waiting=4, workers=2, worker_deaths=7
    )
    seen.certificates = [Certificate("TLS_CERT_FILE", 2000.0), Certificate("KUBECONFIG", None)]
    seen.sources = [SourceRow("nodes", 2, 12.5, "403")]
    seen.unready = "draining"
    seen.settings["PORT"] = "8080"
    status, answer = await served.get("/api/v1/status")
    assert status == 200
    assert answer["connections"] == {"clients": 3, "kept": 2, "running": 1, "waiting": 4}
    assert answer["workers"] == [2, 7]
    assert answer["certificates"] == [
        {"of": "TLS_CERT_FILE", "expires_at": 2000.0},
        {"of": "KUBECONFIG", "expires_at": None},
    ]
    assert answer["sources"] == [{"name": "nodes", "objects": 2, "behind": 12.5, "problem": "403"}]
    assert answer["contests"] == [{"address": "192.0.2.1", "winner": "a", "losers": ["b"]}]
    assert (answer["unready"], answer["now"], answer["settings"]) == (
        "draining",
        1000.0,
        [{"name": "PORT", "value": "8080"}],
    )
    assert answer["counts"]["states"] == {"answers": 0, "fails": 0, "idle": 2}


async def test_the_page_has_the_strictest_policy(served: Served) -> None:
    """The same page as the registrar's, with the proxy's views and words."""
    for name in FILES:
        path = "/" if name == "page.html" else f"/{name}"
        async with served.session.get(served.url + path) as response:
            text = await response.text()
            assert response.status == 200
            assert response.headers["Content-Security-Policy"] == POLICY
        if name in PROXY_FILES:
            assert "proxy" in text.splitlines()[0]
