"""The sandbox's API server over its sockets."""

import asyncio
import json
import ssl
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from k8s_consul_registrar.sandbox import KubeletCertificate, Sandbox, objects
from k8s_consul_registrar.sandbox.resources import NODES
from support.waiting import PATIENCE, until

MERGE = {"Content-Type": "application/strategic-merge-patch+json"}
MANIFEST: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "a"},
    "spec": {"containers": [{"name": "app", "image": "app"}]},
}


class Client:
    """A client of the API server, as an administrator unless another token is given."""

    def __init__(self, session: aiohttp.ClientSession, root: str) -> None:
        self.session = session
        self.root = root

    async def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Send a request and return its status and decoded body."""
        extra = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.request(method, self.root + path, json=body, headers=extra) as response:
            return response.status, await response.json()

    async def events(self, path: str) -> AsyncIterator[dict[str, Any]]:
        """Follow a watch."""
        async with self.session.get(self.root + path) as response:
            assert response.status == 200
            async for line in response.content:
                yield json.loads(line)


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    """Run an empty sandbox."""
    async with Sandbox() as running:
        yield running


@pytest.fixture
async def client(sandbox: Sandbox) -> AsyncIterator[Client]:
    """Open an administrator's client."""
    connector = aiohttp.TCPConnector(ssl=trusting(sandbox))
    headers = {"Authorization": f"Bearer {sandbox.admin_token}"}
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
        yield Client(session, sandbox.kube.url)


def trusting(sandbox: Sandbox) -> ssl.SSLContext:
    """Return a TLS context that trusts the sandbox's authority."""
    return ssl.create_default_context(cadata=sandbox.ca_pem.decode())


PODS = "/api/v1/namespaces/default/pods"


async def test_metrics_count_requests_by_verb_and_resource(sandbox: Sandbox, client: Client) -> None:
    """A list, a watch and a get are counted apart, as the real server's apiserver_request_total does."""
    await client("GET", "/api/v1/pods")
    await client("GET", "/api/v1/pods?limit=1")
    await client("GET", "/api/v1/namespaces/kube-system")
    assert [event async for event in client.events("/api/v1/nodes?watch=1&timeoutSeconds=1")] == []
    async with client.session.get(f"{client.root}/metrics") as response:
        lines = set((await response.text()).splitlines())
    assert lines == {
        'apiserver_request_total{verb="LIST",resource="pods"} 2',
        'apiserver_request_total{verb="GET",resource="namespaces"} 1',
        'apiserver_request_total{verb="WATCH",resource="nodes"} 1',
    }


async def test_minimal_manifest_becomes_a_pending_pod(client: Client) -> None:
    """POST fills in identity, defaults and status, whatever status the manifest claims."""
    status, pod = await client("POST", PODS, {**MANIFEST, "status": {"phase": "Running"}})
    assert status == 201
    assert pod["status"] == {"phase": "Pending", "qosClass": "BestEffort"}
    assert pod["spec"]["containers"][0]["imagePullPolicy"] == "Always"
    assert pod["metadata"]["namespace"] == "default"
    assert {"uid", "resourceVersion", "creationTimestamp"} <= pod["metadata"].keys()


async def test_status_and_object_are_written_apart(client: Client) -> None:
    """PATCH of /status changes the status alone, PATCH of the object all but it; podIP rules podIPs."""
    await client("POST", PODS, MANIFEST)
    status = {"phase": "Running", "podIP": "10.0.0.1"}
    code, pod = await client(
        "PATCH", f"{PODS}/a/status", {"status": status, "spec": {"nodeName": "x"}}, **MERGE
    )
    assert code == 200
    assert pod["status"]["podIPs"] == [{"ip": "10.0.0.1"}]
    assert "nodeName" not in pod["spec"]
    patch = {"metadata": {"labels": {"a": "b"}}, "status": {"phase": "Failed"}}
    code, pod = await client("PATCH", f"{PODS}/a", patch, **MERGE)
    assert (pod["metadata"]["labels"], pod["status"]["phase"]) == ({"a": "b"}, "Running")
    code, pod = await client("PATCH", f"{PODS}/a/status", {"status": {"podIP": "10.0.0.2"}}, **MERGE)
    assert pod["status"]["podIPs"] == [{"ip": "10.0.0.2"}]
    code, pod = await client("PATCH", f"{PODS}/a", {"metadata": {"labels": None}}, **MERGE)
    assert "labels" not in pod["metadata"]


@pytest.mark.parametrize(
    ("method", "path", "body", "answer"),
    [
        ("POST", "/api/v1/namespaces/nowhere/pods", MANIFEST, (404, "NotFound")),
        ("POST", PODS, {**MANIFEST, "metadata": {}}, (422, "Invalid")),
        ("POST", PODS, {**MANIFEST, "spec": {}}, (422, "Invalid")),
        ("POST", PODS, {**MANIFEST, "metadata": {"name": "b", "namespace": "other"}}, (400, "BadRequest")),
        ("POST", PODS, {**MANIFEST, "kind": "Node"}, (400, "BadRequest")),
        ("POST", PODS, ["no object"], (400, "BadRequest")),
        ("POST", PODS, MANIFEST, (409, "AlreadyExists")),
        ("PUT", f"{PODS}/a", {"metadata": {"name": "b"}}, (400, "BadRequest")),
        ("PUT", f"{PODS}/a", {"metadata": {"resourceVersion": "1"}}, (409, "Conflict")),
        ("PUT", f"{PODS}/a", {"metadata": {"uid": "another"}}, (409, "Conflict")),
        ("PUT", f"{PODS}/b", {"metadata": {"name": "b"}}, (404, "NotFound")),
        ("PATCH", f"{PODS}/a", {}, (415, "UnsupportedMediaType")),
        ("DELETE", f"{PODS}/b", None, (404, "NotFound")),
        ("DELETE", f"{PODS}/a", {"preconditions": {"uid": "another"}}, (409, "Conflict")),
        ("PATCH", PODS, None, (405, "MethodNotAllowed")),
    ],
)
async def test_writes_that_are_refused(
    client: Client, method: str, path: str, body: Any, answer: tuple[int, str]
) -> None:
    """Each refusal is a Status with the API server's code and reason, and changes nothing."""
    await client("POST", PODS, MANIFEST)
    _, before = await client("GET", f"{PODS}/a")
    status, refusal = await client(method, path, body)
    assert (refusal["code"], refusal["reason"]) == answer
    assert (status, refusal["kind"]) == (answer[0], "Status")
    assert await client("GET", f"{PODS}/a") == (200, before)


async def test_unknown_paths_are_no_statuses(client: Client) -> None:
    """A path the server does not know is answered as text."""
    async with client.session.get(f"{client.root}/api/v1/secrets") as response:
        assert response.status == 404
        assert await response.text() == "404 page not found\n"


async def test_graceful_deletion_ends_after_its_time(client: Client, sandbox: Sandbox) -> None:
    """A Pod on a node is marked, stays readable, and goes when its grace is over."""
    manifest = {**MANIFEST, "spec": {**MANIFEST["spec"], "nodeName": "n1"}}
    _, pod = await client("POST", PODS, manifest)
    since = pod["metadata"]["resourceVersion"]
    status, marked = await client("DELETE", f"{PODS}/a", {"gracePeriodSeconds": 1})
    assert (status, marked["metadata"]["deletionGracePeriodSeconds"]) == (200, 1)
    status, again = await client("DELETE", f"{PODS}/a")
    assert (status, again["metadata"]["deletionTimestamp"]) == (200, marked["metadata"]["deletionTimestamp"])
    path = f"/api/v1/pods?watch=1&resourceVersion={since}&timeoutSeconds=3"
    kinds = []
    async for event in client.events(path):
        kinds.append(event["type"])
        if kinds[-1] == "DELETED":
            break
    assert kinds == ["MODIFIED", "MODIFIED", "DELETED"]
    assert (await client("GET", f"{PODS}/a"))[0] == 404


async def test_deleting_a_collection_deletes_what_is_selected(client: Client, sandbox: Sandbox) -> None:
    """A DELETE of a collection takes the objects of its namespace that match, and returns them."""
    for name, namespace, app in (("a", "default", "x"), ("b", "default", "y"), ("c", "team", "x")):
        sandbox.kube.create(objects.pod(name, namespace=namespace, labels={"app": app}))
    status, deleted = await client("DELETE", f"{PODS}?labelSelector=app%3Dx&gracePeriodSeconds=0")
    assert (status, deleted["kind"]) == (200, "PodList")
    assert [item["metadata"]["name"] for item in deleted["items"]] == ["a"]
    _, left = await client("GET", "/api/v1/pods")
    assert [item["metadata"]["name"] for item in left["items"]] == ["b", "c"]


async def test_deleting_a_namespace_empties_it(client: Client, sandbox: Sandbox) -> None:
    """The objects of a namespace go with it, and other resources' deletes answer a Status."""
    sandbox.kube.create(objects.pod("a", namespace="shop"))
    status, answer = await client("DELETE", "/api/v1/namespaces/shop")
    assert (status, answer["status"]) == (200, "Success")
    _, pods = await client("GET", "/api/v1/pods")
    assert pods["items"] == []


async def test_watch_follows_what_happens(client: Client, sandbox: Sandbox) -> None:
    """A watch from now on sees creations, changes and deletions by any way, in order."""
    path = f"/api/v1/nodes?watch=1&resourceVersion={sandbox.kube.store.revision}&timeoutSeconds=60"
    seen: list[tuple[str, str]] = []

    async def follow() -> None:
        async for event in client.events(path):
            seen.append((event["type"], event["object"]["metadata"]["name"]))
            if len(seen) == 3:
                return

    following = asyncio.create_task(follow())
    await until(lambda: bool(sandbox.kube.store._listeners))
    sandbox.kube.create(objects.node("n1"))
    sandbox.kube.update(objects.node("n1", is_ready=False))
    sandbox.kube.delete("Node", "n1")
    await asyncio.wait_for(following, PATIENCE)
    assert seen == [("ADDED", "n1"), ("MODIFIED", "n1"), ("DELETED", "n1")]


async def test_watch_ends_when_the_store_is_restored(client: Client, sandbox: Sandbox) -> None:
    """Restoring an older history closes the watches; the old version then lies in the future."""
    backup = sandbox.kube.store.backup()
    sandbox.kube.create(objects.node("n1"))
    version = sandbox.kube.store.revision

    async def follow() -> list[dict[str, Any]]:
        path = f"/api/v1/nodes?watch=1&resourceVersion={version}&timeoutSeconds=600"
        return [event async for event in client.events(path)]

    following = asyncio.create_task(follow())
    await until(lambda: bool(sandbox.kube.store._listeners))
    sandbox.kube.store.restore(backup)
    assert await asyncio.wait_for(following, PATIENCE) == []
    status, refusal = await client("GET", f"/api/v1/nodes?resourceVersion={version}")
    assert (status, refusal["details"]["causes"][0]["reason"]) == (504, "ResourceVersionTooLarge")


async def test_watch_ends_when_its_client_leaves(client: Client, sandbox: Sandbox) -> None:
    """The store has no listener left once the client has closed its connection."""
    async for event in client.events("/api/v1/namespaces?watch=1"):
        assert event["type"] == "ADDED"
        break
    await until(lambda: not sandbox.kube.store._listeners)


async def test_big_lists_are_compressed_when_asked(client: Client, sandbox: Sandbox) -> None:
    """A list of 128 KiB or more comes in gzip to who accepts it, and is the same list."""
    for number in range(100):
        sandbox.kube.create(objects.pod(f"p{number:03d}", annotations={"padding": "x" * 2000}))
    lists = []
    for encoding, answered in (("gzip", "gzip"), ("identity", None), ("gzip;q=0", None)):
        headers = {"Accept-Encoding": encoding}
        async with client.session.get(f"{client.root}/api/v1/pods", headers=headers) as response:
            assert response.headers.get("Content-Encoding") == answered
            lists.append(await response.json())
    assert len(lists[0]["items"]) == 100
    assert lists[0] == lists[1] == lists[2]


async def test_permissions_by_verb_resource_and_namespace(client: Client, sandbox: Sandbox) -> None:
    """A token may do what its rules say, asks about it truly, and learns what it lacks."""
    token = sandbox.token("lister", ("list", "pods", "shop"))
    limited = {"Authorization": f"Bearer {token}"}
    assert (await client("GET", "/api/v1/namespaces/shop/pods", **limited))[0] == 200
    status, refusal = await client("GET", "/api/v1/namespaces/web/pods?watch=1", **limited)
    assert status == 403
    assert refusal["message"] == (
        'pods is forbidden: User "lister" cannot watch resource "pods" in API group "" in the namespace "web"'
    )
    status, refusal = await client("GET", "/apis/coordination.k8s.io/v1/namespaces/shop/leases/r", **limited)
    assert refusal["message"] == (
        'leases.coordination.k8s.io "r" is forbidden: User "lister" cannot get resource "leases" '
        'in API group "coordination.k8s.io" in the namespace "shop"'
    )
    for namespace, is_allowed in (("shop", True), ("web", False)):
        attributes = {"verb": "list", "resource": "pods", "namespace": namespace}
        review = {"spec": {"resourceAttributes": attributes}}
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        status, answer = await client("POST", path, review, **limited)
        assert (status, answer["status"]["allowed"]) == (201, is_allowed)


async def test_certificates_stand_for_users(sandbox: Sandbox, tmp_path: Path) -> None:
    """A client certificate of the cluster's authority logs its common name in; nothing at all does not."""
    pair = sandbox.client_certificate("carla", ("list", "nodes"))
    tls = trusting(sandbox)
    (tmp_path / "both.pem").write_bytes(pair.key + pair.certificate)
    tls.load_cert_chain(tmp_path / "both.pem")
    async with aiohttp.ClientSession() as session:
        for path, context, code in (
            ("/api/v1/nodes", tls, 200),
            ("/api/v1/pods", tls, 403),
            ("/api/v1/nodes", trusting(sandbox), 401),
            ("/version", trusting(sandbox), 200),
            ("/readyz", trusting(sandbox), 200),
        ):
            async with session.get(sandbox.kube.url + path, ssl=context) as response:
                assert response.status == code


async def test_kubeconfig_is_private_and_leads_here(sandbox: Sandbox, tmp_path: Path) -> None:
    """The kubeconfig names the server, its authority and a token, and only its owner may read it."""
    path = sandbox.write_kubeconfig(tmp_path / "config")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    config = yaml.safe_load(path.read_text())
    assert config["clusters"][0]["cluster"]["server"] == sandbox.kube.url
    assert config["users"][0]["user"]["token"] == sandbox.admin_token


@pytest.mark.parametrize(
    ("path", "rules", "code"),
    [
        ("/metrics", [("get", "nodes/metrics")], 200),
        ("/metrics/resource", [("get", "nodes/metrics")], 200),
        ("/metrics/probes", [("get", "nodes/metrics")], 200),
        ("/metrics/nothing", [("get", "nodes/metrics")], 404),
        ("/stats/summary", [("get", "nodes/metrics")], 403),
        ("/pods", [("get", "nodes/metrics")], 403),
        ("/exec/shop/a/app", [("get", "nodes/metrics")], 403),
        ("/healthz", [("get", "nodes/metrics")], 403),
        ("/healthz", [("get", "nodes/healthz")], 200),
        ("/healthz", [("get", "nodes/proxy")], 200),
        ("/metrics/cadvisor", [("list", "nodes"), ("list", "pods")], 403),
    ],
)
async def test_kubelets_check_permissions(
    sandbox: Sandbox, path: str, rules: list[tuple[str, str]], code: int
) -> None:
    """Each kubelet path needs its own subresource of nodes."""
    kubelet = await sandbox.add_kubelet("n1")
    headers = {"Authorization": f"Bearer {sandbox.token('scraper', *rules)}"}
    async with aiohttp.ClientSession(headers=headers) as session:
        async with session.get(kubelet.url + path, ssl=trusting(sandbox)) as response:
            assert response.status == code
        async with session.head(kubelet.url + path, ssl=trusting(sandbox)) as response:
            assert response.status == 403
    assert [seen.path for seen in kubelet.requests] == [path, path]
    assert kubelet.request_count == 2


@pytest.mark.parametrize(
    ("kind", "server_name", "is_trusted"),
    [
        (KubeletCertificate.ADDRESS, None, True),
        (KubeletCertificate.NAME_ONLY, None, False),
        (KubeletCertificate.NAME_ONLY, "n1", True),
        (KubeletCertificate.SELF_SIGNED, "n1", False),
    ],
)
async def test_kubelet_certificates(
    sandbox: Sandbox, kind: KubeletCertificate, server_name: str | None, is_trusted: bool
) -> None:
    """Each kind of kubelet certificate is trusted exactly for the names it has."""
    kubelet = await sandbox.add_kubelet("n1", "127.0.0.2", certificate=kind)
    node = sandbox.kube.store.get(NODES, "n1")
    assert node is not None
    assert node.decode()["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"] == kubelet.port
    async with aiohttp.ClientSession() as session:
        request = session.get(kubelet.url, ssl=trusting(sandbox), server_hostname=server_name)
        if is_trusted:
            async with request as response:
                assert response.status == 401
        else:
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await request
