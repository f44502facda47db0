"""The sandbox answers recorded requests as the real servers did."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from k8s_consul_registrar.sandbox import Sandbox
from k8s_consul_registrar.sandbox.store import Store
from support.files import SAMPLES, Exchange, ask, assert_alike, differences, exchange
from support.waiting import until

FIRST_VERSION = 300  # above the versions the recordings call too old, below those from the future


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    """Run a sandbox that holds the recorded Pods and Nodes."""
    async with Sandbox(store=Store(revision=FIRST_VERSION), bookmark_period=0.3) as running:
        for name, kind in (("k8s-pods-list", "Pod"), ("k8s-nodes-list", "Node")):
            for item in json.loads(exchange(name).text)["items"]:
                running.kube.create({"kind": kind, "apiVersion": "v1", **item})
        yield running


@pytest.fixture
async def kube(sandbox: Sandbox) -> AsyncIterator[aiohttp.ClientSession]:
    """Open a session that the API server and the kubelets let in."""
    tls = ssl.create_default_context(cadata=sandbox.ca_pem.decode())
    headers = {
        "Authorization": f"Bearer {sandbox.admin_token}",
        "User-Agent": "Python/3",
        "Accept-Encoding": "identity",
    }
    connector = aiohttp.TCPConnector(ssl=tls)
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
        yield session


@pytest.mark.parametrize(
    "name",
    [
        "k8s-pods-list",
        "k8s-pods-list-rv0",
        "k8s-pods-list-page1",
        "k8s-pods-list-selectors",
        "k8s-pods-list-bad-continue",
        "k8s-nodes-list",
        "k8s-404",
        "k8s-lease-get-404",
        "k8s-pods-watch-expired",
        "k8s-pods-watch-initial-events",
    ],
)
async def test_reads_are_answered_as_recorded(
    sandbox: Sandbox, kube: aiohttp.ClientSession, name: str
) -> None:
    """A read gets the status, headers and body the real API server sent."""
    recorded = _on_this_history(exchange(name), sandbox.kube.store)
    path = recorded.path.replace("timeoutSeconds=3", "timeoutSeconds=1")
    if "watch" in name:
        recorded = recorded._replace(text=_without_bookmarks_of_quiet(recorded.text))
    answer = await ask(kube, sandbox.kube.url, recorded, path=path)
    if "watch" in name:
        answer = answer._replace(text=_without_bookmarks_of_quiet(answer.text))
    assert_alike(recorded, answer)


async def test_list_from_the_future(sandbox: Sandbox, kube: aiohttp.ClientSession) -> None:
    """A list from a version not reached is a 504 that names the current one."""
    recorded = exchange("k8s-pods-list-future")
    answer = await ask(kube, sandbox.kube.url, recorded)
    current = str(sandbox.kube.store.revision)
    assert_alike(recorded._replace(text=recorded.text.replace("current: 371", f"current: {current}")), answer)


async def test_watch_from_the_future_is_silent(sandbox: Sandbox, kube: aiohttp.ClientSession) -> None:
    """A watch from a version not reached says nothing, not even what changes meanwhile, and ends cleanly."""
    recorded = exchange("k8s-pods-watch-future")
    path = recorded.path.replace("timeoutSeconds=3", "timeoutSeconds=1&allowWatchBookmarks=true")
    watching = asyncio.create_task(ask(kube, sandbox.kube.url, recorded, path=path))
    await until(lambda: bool(sandbox.kube.store._listeners))
    sandbox.kube.delete("Pod", "cart-7d9f8c6b5-abcde", "shop")
    assert_alike(recorded, await watching)


async def test_pages_follow_each_other(sandbox: Sandbox, kube: aiohttp.ClientSession) -> None:
    """The second page continues the first from its own continue token."""
    first = await ask(kube, sandbox.kube.url, exchange("k8s-pods-list-page1"))
    token = json.loads(first.text)["metadata"]["continue"]
    recorded = exchange("k8s-pods-list-page2")
    answer = await ask(kube, sandbox.kube.url, recorded, path=f"/api/v1/pods?limit=4&continue={token}")
    assert_alike(recorded, answer)


async def test_lease_life(sandbox: Sandbox, kube: aiohttp.ClientSession) -> None:
    """Creating, re-creating, updating and updating stale a Lease go as recorded."""
    created = exchange("k8s-lease-create")
    answer = await ask(kube, sandbox.kube.url, created)
    assert_alike(created, answer)
    metadata = json.loads(answer.text)["metadata"]
    again = exchange("k8s-lease-create-409")
    assert_alike(again, await ask(kube, sandbox.kube.url, again))
    for name in ("k8s-lease-update", "k8s-lease-update-409"):
        recorded = exchange(name)
        given = {field: metadata[field] for field in ("uid", "resourceVersion", "creationTimestamp")}
        body = {**recorded.body, "metadata": {**recorded.body["metadata"], **given}}
        assert_alike(recorded, await ask(kube, sandbox.kube.url, recorded, body=body))


async def test_refusals_of_identity_and_permission(sandbox: Sandbox, kube: aiohttp.ClientSession) -> None:
    """An unknown token is refused with 401, a known one without the permission with 403 naming it."""
    recorded = exchange("k8s-401")
    kube.headers["Authorization"] = "Bearer nobody"
    assert_alike(recorded, await ask(kube, sandbox.kube.url, recorded))
    status, headers, body = _recorded_http("k8s-403-pods-list.http")
    token = sandbox.token("system:serviceaccount:monitoring:proxy", ("get", "nodes/metrics"))
    kube.headers["Authorization"] = f"Bearer {token}"
    answer = await ask(kube, sandbox.kube.url, recorded)
    assert answer.status == status
    assert answer.headers["Content-Type"] == headers["content-type"]
    assert json.loads(answer.text) == json.loads(body)


async def test_watch_of_a_pods_life(sandbox: Sandbox, kube: aiohttp.ClientSession) -> None:
    """Creation, status, annotation, graceful and final deletion give the recorded events."""
    recorded = exchange("k8s-pods-watch")
    events = [json.loads(line) for line in recorded.text.splitlines()]
    since = sandbox.kube.store.revision
    path = f"/api/v1/pods?watch=1&resourceVersion={since}&allowWatchBookmarks=true&timeoutSeconds=1"
    created, running, annotated = (event["object"] for event in events[:3])
    pods = f"{sandbox.kube.url}/api/v1/namespaces/web/pods"
    pod = f"{pods}/{created['metadata']['name']}"
    given = {field: created["metadata"][field] for field in ("name", "labels", "annotations")}
    containers = [{"name": "app", "image": "registry.example/app:1.0", "ports": [_http_port()]}]
    manifest = {"metadata": given, "spec": {"nodeName": "real-node-b", "containers": containers}}
    merge = {"Content-Type": "application/merge-patch+json"}
    async with kube.post(pods, json=manifest) as response:
        assert response.status == 201
    async with kube.patch(f"{pod}/status", json={"status": running["status"]}, headers=merge) as response:
        assert response.status == 200
    patch = {"metadata": {"annotations": annotated["metadata"]["annotations"]}}
    async with kube.patch(pod, json=patch, headers=merge) as response:
        assert response.status == 200
    for query in ("", "?gracePeriodSeconds=0"):
        async with kube.delete(pod + query) as response:
            assert response.status == 200
    answer = await ask(kube, sandbox.kube.url, recorded, path=path)
    got = [json.loads(line) for line in answer.text.splitlines()]
    expected = [event for event in events if event["type"] != "BOOKMARK"]
    assert list(differences(expected, [event for event in got if event["type"] != "BOOKMARK"])) == []
    assert list(differences(events[-1], got[-1])) == []


def _http_port() -> dict[str, Any]:
    return {"name": "http", "containerPort": 8080}


def _on_this_history(recorded: Exchange, store: Store) -> Exchange:
    """Return the exchange with the one version a message names as this store would name it."""
    text = recorded.text.replace(
        "too old resource version: 2 (395)", f"too old resource version: 2 ({FIRST_VERSION})"
    )
    assert store.revision > FIRST_VERSION
    return recorded._replace(text=text)


def _without_bookmarks_of_quiet(text: str) -> str:
    """Return a watch's body without the bookmarks that only tell the time."""
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if "BOOKMARK" not in line or "initial-events-end" in line)


def _recorded_http(name: str) -> tuple[int, dict[str, str], str]:
    head, _, body = (SAMPLES / name).read_bytes().decode().replace("\r\n", "\n").partition("\n\n")
    status_line, *lines = head.splitlines()
    headers = dict(line.split(": ", 1) for line in lines)
    return int(status_line.split()[1]), headers, body


async def test_kubelet_answers_as_recorded(sandbox: Sandbox, kube: aiohttp.ClientSession) -> None:
    """A kubelet's metrics and refusals have the recorded status, headers and texts."""
    kubelet = await sandbox.add_kubelet("real-node")
    metrics = f"{kubelet.url}/metrics/cadvisor"
    _, headers, _ = _recorded_http("kubelet-cadvisor-headers.txt")
    async with kube.get(metrics) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == headers["content-type"]
        assert response.headers["Transfer-Encoding"] == "chunked"
        plain = await response.text()
    assert plain.startswith("# HELP cadvisor_version_info")
    async with kube.get(metrics, headers={"Accept-Encoding": "gzip"}) as response:
        assert response.headers["Content-Encoding"] == "gzip"
        assert int(response.headers["Content-Length"]) < len(plain) / 5
        assert await response.text() == plain
    user = "system:serviceaccount:monitoring:proxy"
    for name, token in (
        ("kubelet-403.http", sandbox.token(user, ("list", "nodes"))),
        ("kubelet-401-headers.txt", "nobody"),
    ):
        status, headers, body = _recorded_http(name)
        async with kube.get(metrics, headers={"Authorization": f"Bearer {token}"}) as response:
            assert response.status == status
            assert response.headers["Content-Type"] == headers["content-type"]
            assert response.headers["Content-Length"] == headers["content-length"]
            text = body or (SAMPLES / "kubelet-401-body.txt").read_text()
            assert (await response.text()).rstrip("\n") == text.rstrip("\n")


# In the order they were recorded: each builds on what those before have written.
CONSUL_CONVERSATION = (
    "consul-agent-register",
    "consul-agent-register-node",
    "consul-agent-register-v6",
    "consul-agent-services",
    "consul-agent-services-filter",
    "consul-agent-service-hash",
    "consul-agent-service-404",
    "consul-agent-register-meta-key",
    "consul-agent-register-meta-long",
    "consul-agent-register-meta-many",
    "consul-agent-register-no-name",
    "consul-agent-register-bad-port",
    "consul-agent-register-any-address",
    "consul-agent-register-port-out-of-range",
    "consul-agent-deregister",
    "consul-agent-deregister-unknown",
    "consul-catalog-register-node",
    "consul-txn-set",
    "consul-catalog-services",
    "consul-health-service",
    "consul-catalog-node-services",
    "consul-catalog-node-services-none",
    "consul-txn-cas-stale",
    "consul-txn-delete-id-only",
    "consul-txn-delete-unknown",
    "consul-txn-delete",
    "consul-txn-unknown-node",
    "consul-txn-too-many",
    "consul-status-leader",
    "consul-404",
)


async def test_consul_converses_as_recorded(sandbox: Sandbox) -> None:
    """The whole recorded conversation with Consul 1.8.7 goes the same with the sandbox."""
    async with aiohttp.ClientSession(headers={"Accept-Encoding": "gzip"}) as session:
        for name in CONSUL_CONVERSATION:
            recorded = exchange(name)
            assert_alike(recorded, await ask(session, sandbox.consul.url, recorded))


def test_every_recorded_exchange_is_held_against_the_sandbox() -> None:
    """No recorded conversation with Consul is left out."""
    assert {path.stem for path in SAMPLES.glob("consul-*.json")} == set(CONSUL_CONVERSATION)
