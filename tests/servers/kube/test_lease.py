"""The Lease of `kube.cluster` on recorded conversations: what is sent, what is read, what each refusal means."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.errors import (
    AccessError,
    ClusterBusy,
    ClusterConflict,
    ClusterForbidden,
    ClusterRefused,
)
from k8s_consul_registrar.kube.access import Access
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.kube.cluster import (
    LeaseClient,
    decode_lease,
    default_lease_name,
    encode_lease,
    new_identity,
    pod_namespace,
)
from k8s_consul_registrar.kube.credentials import ClientIdentity, StoredCredentials
from k8s_consul_registrar.model import Lease
from support.files import exchange

STAMP = "2026-11-22T10:00:00.000000Z"
LATER = "2026-11-22T10:00:05.000000Z"
HELD = Lease("a", 15, STAMP, STAMP, 0, "372")
Request = tuple[str, str, Any]


class Server:
    """An API server that gives one answer to everything, and remembers what it was asked."""

    def __init__(self, status: int, text: str) -> None:
        self.requests: list[Request] = []
        self._status = status
        self._text = text

    async def answer(self, request: web.Request) -> web.Response:
        """Answer as recorded."""
        body = await request.json() if request.can_read_body else None
        self.requests.append((request.method, request.path, body))
        return web.Response(status=self._status, text=self._text, content_type="application/json")


@asynccontextmanager
async def answering(
    sample: str = "", *, status: int = 200, text: str = ""
) -> AsyncIterator[tuple[LeaseClient, Server]]:
    """Serve a recorded answer, or another, and yield a client of it."""
    recorded = exchange(sample) if sample else None
    server = Server(recorded.status, recorded.text) if recorded else Server(status, text)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    access = Access(f"http://127.0.0.1:{runner.addresses[0][1]}", StoredCredentials(ClientIdentity()))
    try:
        async with KubeClient(access, Timing()) as client:
            yield LeaseClient(client, "shop", "registrar"), server
    finally:
        await runner.cleanup()


async def test_recorded_lease_is_read() -> None:
    """Every field of the record and the version that an update has to name."""
    async with answering("k8s-lease-update") as (client, server):
        lease = await client.get()
    assert lease == Lease("a", 15, STAMP, LATER, 0)
    assert lease is not None
    assert lease.version == "373"
    assert server.requests == [("GET", "/apis/coordination.k8s.io/v1/namespaces/shop/leases/registrar", None)]


async def test_no_lease_is_no_error() -> None:
    """A recorded 404 to a read means that there is none."""
    async with answering("k8s-lease-get-404") as (client, _):
        assert await client.get() is None


async def test_create_is_what_the_recorded_one_was() -> None:
    """The same request, and the version of what was created."""
    recorded = exchange("k8s-lease-create")
    async with answering("k8s-lease-create") as (client, server):
        created = await client.create(Lease("a", 15, STAMP, STAMP))
    body = {**recorded.body, "metadata": {"name": "registrar", "namespace": "shop"}}
    assert server.requests == [(recorded.method, recorded.path, body)]
    assert (created, created.version) == (HELD, "372")


async def test_update_is_what_the_recorded_one_was() -> None:
    """The object as it was read with a new record in it, by the version read: nothing else is lost."""
    recorded = exchange("k8s-lease-update")
    before = decode_lease(json.dumps(recorded.body).encode())
    async with answering("k8s-lease-update") as (client, server):
        updated = await client.update(before)
    assert server.requests == [(recorded.method, recorded.path, recorded.body)]
    assert (updated.renewed, updated.version) == (LATER, "373")


@pytest.mark.parametrize("verb", ["create", "update"])
async def test_recorded_conflict_is_told_apart(verb: str) -> None:
    """Both 409s mean that another client was first, and so does an update of a Lease that is gone."""
    async with answering(f"k8s-lease-{verb}-409") as (client, _):
        with pytest.raises(
            ClusterConflict, match=f"cannot {verb} leases.coordination.k8s.io in namespace shop"
        ):
            await getattr(client, verb)(HELD)
    async with answering("k8s-lease-get-404") as (client, _):
        with pytest.raises(ClusterConflict):
            await client.update(HELD)
        with pytest.raises(ClusterRefused):
            await client.create(HELD)  # its namespace is not there


@pytest.mark.parametrize("verb", ["get", "create", "update"])
async def test_missing_permission_is_named(verb: str) -> None:
    """A 403 says which verb is missing, and what an election needs in all."""
    async with answering(status=403, text='{"kind":"Status","message":"no","code":403}') as (client, _):
        with pytest.raises(ClusterForbidden) as raised:
            await (client.get() if verb == "get" else getattr(client, verb)(HELD))
    assert f"grant {verb} on leases.coordination.k8s.io" in str(raised.value)
    assert "needs get, create and update on leases.coordination.k8s.io in shop" in str(raised.value)


async def test_busy_server_is_no_conflict() -> None:
    """A 503 is what it is everywhere."""
    async with answering(status=503) as (client, _):
        with pytest.raises(ClusterBusy):
            await client.update(HELD)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"metadata":{}}',
        '{"metadata":{"resourceVersion":"1"},"spec":{"leaseDurationSeconds":"long"}}',
        '{"metadata":{"resourceVersion":"1"},"spec":{"holderIdentity":7}}',
        '{"metadata":{"resourceVersion":"1"},"spec":' + "[" * 5000,
    ],
)
async def test_answer_that_is_no_lease_is_refused(text: str) -> None:
    """Whatever a confused server sends is an error by name, not a crash."""
    async with answering(text=text) as (client, _):
        with pytest.raises(ClusterRefused, match="is no Lease"):
            await client.get()


@pytest.mark.parametrize("spec", ["", ',"spec":{}', ',"spec":{"holderIdentity":null,"renewTime":null}'])
def test_absent_fields_are_empty(spec: str) -> None:
    """Every field of a Lease's spec is optional, and so is the spec."""
    assert decode_lease(f'{{"metadata":{{"resourceVersion":"5"}}{spec}}}'.encode()) == Lease("", 0)


def test_fields_of_others_in_the_lease_stay() -> None:
    """Labels, owners and fields of a newer API are written back as they were read."""
    origin = {
        "metadata": {"resourceVersion": "5", "labels": {"team": "x"}, "ownerReferences": [{"uid": "u"}]},
        "spec": {"holderIdentity": "b", "strategy": "OldestEmulationVersion"},
    }
    lease = decode_lease(json.dumps(origin).encode())
    sent = json.loads(encode_lease(lease, "shop", "registrar"))
    assert sent["metadata"]["labels"] == {"team": "x"}
    assert sent["metadata"]["ownerReferences"] == [{"uid": "u"}]
    assert sent["spec"]["strategy"] == "OldestEmulationVersion"


def test_release_is_written_as_an_empty_holder() -> None:
    """client-go releases so, and the API server takes it."""
    sent = json.loads(encode_lease(Lease("", 1, STAMP, STAMP, 4, "9"), "shop", "registrar"))
    assert sent["spec"] == {
        "holderIdentity": "",
        "leaseDurationSeconds": 1,
        "acquireTime": STAMP,
        "renewTime": STAMP,
        "leaseTransitions": 4,
    }
    assert sent["metadata"] == {"namespace": "shop", "name": "registrar", "resourceVersion": "9"}


def test_names_are_readable_where_they_can_be() -> None:
    """Cluster and instance as they are, with a dot between, which neither then has."""
    assert default_lease_name("lab", "") == "k8s-consul-registrar-lab"
    assert default_lease_name("lab", "blue") == "k8s-consul-registrar-lab.blue"


def test_two_registrars_never_share_a_lease_by_accident() -> None:
    """Names that would read alike get a digest; every name is one that Kubernetes takes."""
    pairs = [
        ("a.b", ""), ("a", "b"), ("a-b", ""), ("A", "b"), ("a", "B"), ("a_b", ""), ("A.B", ""), ("-", ""),
        ("_", ""), ("a-", "b"), ("a", "-b"), ("x" * 50, "Y" * 50), ("", ""), ("", "a"), ("a", ""),
    ]  # fmt: skip
    names = [default_lease_name(*pair) for pair in pairs]
    assert len(set(names)) == len(names)
    for name in names:
        assert len(name) <= 253
        parts = name.split(".")
        assert all(part and part.strip("-") == part and part.replace("-", "").isalnum() for part in parts)
        assert name == name.lower()


def test_every_run_has_an_identity_of_its_own() -> None:
    """A restarted container must not take its own old lease for its own."""
    names = {new_identity("pod-1") for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith("pod-1_") for name in names)


def test_pod_s_namespace_is_read(tmp_path: Path) -> None:
    """As the kubelet mounts it; without it the setting to give is named."""
    with pytest.raises(AccessError, match="LEASE_NAMESPACE is not set: cannot read"):
        pod_namespace(tmp_path)
    (tmp_path / "namespace").write_text("monitoring\n")
    assert pod_namespace(tmp_path) == "monitoring"
    (tmp_path / "namespace").write_bytes(b"\xff/../x")
    with pytest.raises(AccessError, match="names no namespace"):
        pod_namespace(tmp_path)
