"""The catalog registry on the sandbox's Consul, and on servers that misbehave."""

import asyncio
import json
import math
import tracemalloc
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web
from msgspec.structs import replace

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.consul.agent import AgentRegistry
from k8s_consul_registrar.consul.batches import MOST_FAULTS_IN_A_ROW
from k8s_consul_registrar.consul.catalog import CatalogRegistry
from k8s_consul_registrar.consul.client import ATTEMPTS, ConsulClient
from k8s_consul_registrar.consul.health import RequestOutcome
from k8s_consul_registrar.errors import (
    ConsulBusy,
    ConsulFiltered,
    ConsulForbidden,
    ConsulRefused,
    ConsulUnreachable,
)
from k8s_consul_registrar.sandbox.consul import Consul
from k8s_consul_registrar.sandbox.consul_release import CONSUL_1_8, NEWEST, ConsulOptions, ConsulRelease
from support.builders import make_service, our_pod_service
from support.doors import HttpDoor
from support.processes import LOOPBACK
from support.real_servers import held
from support.scripted import client_of, serving
from support.waiting import most_between_turns

NODE = "k8s-lab"
SERVICES = [our_pod_service(f"p{number}") for number in range(150)]
NODE_READ = {"Results": [{"Node": {"Node": NODE, "Meta": {"external-node": "true"}}}], "Errors": None}


class CountingDoor(HttpDoor):
    """Stands before a Consul and counts the requests that were too large."""

    refused = 0

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        response = await super()._serve(request)
        self.refused += response.status == 413
        return response


def registry_of(client: ConsulClient) -> CatalogRegistry:
    """Return a registry that is quick to try again."""
    return CatalogRegistry(client, NODE)


def verbs(operations: list[dict[str, dict[str, str]]]) -> set[str]:
    """Return the verbs of a transaction."""
    return {body["Verb"] for operation in operations for body in operation.values()}


def proving(
    write: Callable[[web.Request, list[dict[str, dict[str, str]]]], Awaitable[web.Response]],
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Answer what proves the node, and leave writes to the test."""

    async def answer(request: web.Request) -> web.Response:
        operations = await request.json()
        if verbs(operations) != {"get"}:
            return await write(request, operations)
        if "Node" in operations[0]:
            return web.json_response(NODE_READ)
        errors = [{"OpIndex": 0, "What": 'check "serfHealth" on node "k8s-lab" doesn\'t exist'}]
        return web.json_response({"Results": None, "Errors": errors}, status=409)

    return answer


def accepted(operations: list[dict[str, dict[str, str]]], index: int = 5) -> web.Response:
    """Answer that all was written."""
    ids = [json.loads(json.dumps(one))["Service"]["Service"]["ID"] for one in operations]
    results = [{"Service": {"ID": service_id, "ModifyIndex": index}} for service_id in ids]
    return web.json_response({"Results": results, "Errors": None})


async def test_round_trip() -> None:
    """A written service is read, replaced only over the record that was read, and removed."""
    async with Consul() as consul, client_of(consul.url, timing=Timing()) as client:
        registry = registry_of(client)
        assert await held(registry) == {}
        written = await registry.register(SERVICES)
        assert (written.done, written.failures, written.stale) == (150, (), ())
        there = await held(registry)
        assert there == {service.id: service for service in SERVICES}
        assert {one.id: one.index for one in there.values()} == written.indexes
        bad = make_service("bad", {"a/b": "x"})
        mixed = await registry.register([*SERVICES[:2], bad, our_pod_service("new")])
        assert (mixed.done, mixed.stale) == (1, tuple(one.id for one in SERVICES[:2]))
        assert [failure.id for failure in mixed.failures] == ["bad"]
        removed = await registry.deregister(list(there.values()))
        assert (removed.done, removed.stale) == (150, ())
        assert set(await held(registry)) == {"pod--shop--new"}


@pytest.mark.parametrize("kind", [CatalogRegistry, AgentRegistry])
async def test_read_of_everything_lets_changes_through(kind: type[CatalogRegistry | AgentRegistry]) -> None:
    """A change needs several turns of the loop until it is at Consul, so none may take long."""
    async with Consul() as consul, client_of(consul.url, timing=Timing()) as client:
        registry = registry_of(client) if kind is CatalogRegistry else AgentRegistry(client)
        await registry.register(SERVICES)
        assert await most_between_turns(registry.services()) <= 30


async def test_readiness_on_the_sandbox() -> None:
    """A check is read with its service."""
    async with Consul() as consul, client_of(consul.url, timing=Timing()) as client:
        registry = registry_of(client)
        ready = replace(our_pod_service("a"), ready=True)
        await registry.register([ready, our_pod_service("b")])
        assert {one.name: one.ready for one in (await held(registry)).values()} == {
            "pod--shop--a": True,
            "pod--shop--b": None,
        }


async def test_few_transactions_and_few_at_once() -> None:
    """A transaction takes 128 services; no more are under way than allowed."""
    now, most, sizes = 0, 0, []
    are_many = asyncio.Event()

    async def write(_: web.Request, operations: list[dict[str, dict[str, str]]]) -> web.Response:
        nonlocal now, most
        now += 1
        most = max(most, now)
        sizes.append(len(operations))
        if now == 3:
            are_many.set()
        await are_many.wait()
        await asyncio.sleep(0.01)
        now -= 1
        return accepted(operations)

    services = [our_pod_service(f"p{number}") for number in range(1000)]
    async with serving(proving(write)) as url, client_of(url) as client:
        written = await CatalogRegistry(client, NODE, concurrency=3).register(services)
    assert (written.done, most) == (1000, 3)
    assert sorted(sizes, reverse=True) == [128] * 7 + [104]


@pytest.mark.parametrize("release", [CONSUL_1_8, NEWEST], ids=["64", "128"])
async def test_transactions_are_as_long_as_the_release_allows(release: ConsulRelease) -> None:
    """A refusal of 128 operations tells, and all that follow have at most 64, reads as well."""
    services = [our_pod_service(f"p{number}") for number in range(1000)]
    async with (
        Consul(ConsulOptions(release)) as consul,
        CountingDoor(consul.url) as door,
        client_of(f"http://{LOOPBACK}:{door.port}", timing=Timing()) as client,
    ):
        registry = CatalogRegistry(client, NODE, concurrency=1)
        assert registry.batch_size == NEWEST.most_operations
        assert (await registry.register(services)).done == 1000
        assert registry.batch_size == release.most_operations
        written = [write.json() for write in consul.writes if write.path == "/v1/txn"]
        lengths = [len(one) for one in written if "Service" in one[0]]
        assert len(lengths) <= math.ceil(1000 / release.most_operations) + 1
        # The second batch is packed before the first one is answered.
        assert door.refused == (2 if release is CONSUL_1_8 else 0)
        found = [one async for one in registry.lookup([one.id for one in services])]
        assert len(found) == 1000
        reader = CatalogRegistry(client, NODE)
        found = [one async for one in reader.lookup([one.id for one in [*services, our_pod_service("none")]])]
        assert len(found) == 1000


@pytest.mark.parametrize("is_said", [True, False], ids=["said by Consul", "counted by us"])
@pytest.mark.parametrize("shown", [0, 1])
async def test_read_in_a_transaction_that_acls_filtered_proves_no_absence(is_said: bool, shown: int) -> None:
    """Neither of a service nor of the node: 1.11 and later say that they left something out, 1.8 does not."""
    service = {"Service": {"ID": "pod--shop--p0", "Service": "x"}}

    async def answer(request: web.Request) -> web.Response:
        filtered = {"ResultsFilteredByACLs": True} if is_said else {}
        is_node = "Node" in (await request.json())[0]
        results = [] if is_node else [service] * shown
        return web.json_response({"Results": results, "Errors": None, **filtered})

    async with serving(answer) as url, client_of(url) as client:
        registry = registry_of(client)
        with pytest.raises(ConsulFiltered, match="may not see"):
            _ = [one async for one in registry.lookup(["pod--shop--p0", "pod--shop--p1"])]
        with pytest.raises(ConsulFiltered, match='lacks node "k8s-lab" read'):
            await registry.register(SERVICES[:1])


async def test_too_many_requests_are_sent_again() -> None:
    """A 429 passes; the writes are then made once."""
    refusals = 2

    async def write(_: web.Request, operations: list[dict[str, dict[str, str]]]) -> web.Response:
        nonlocal refusals
        if refusals:
            refusals -= 1
            return web.Response(status=429, text="busy", headers={"Retry-After": "0"})
        return accepted(operations)

    async with serving(proving(write)) as url, client_of(url) as client:
        written = await registry_of(client).register(SERVICES)
    assert (written.done, len(written.indexes)) == (150, 150)


@pytest.mark.parametrize(("status", "requests"), [(429, ATTEMPTS), (500, 1), (503, 1)])
async def test_busy_consul_ends_the_call(status: int, requests: int) -> None:
    """A 429 is answered by a few attempts, a 5xx by none: the gate decides when to come again."""
    count = 0

    async def write(*_: object) -> web.Response:
        nonlocal count
        count += 1
        return web.Response(status=status, text="No cluster leader")

    async with serving(proving(write)) as url, client_of(url) as client:
        with pytest.raises(ConsulBusy, match="No cluster leader"):
            await registry_of(client).register(SERVICES[:10])
        assert client.health.writes is RequestOutcome.FAILURE
    assert count == requests


async def test_writes_that_always_fail_are_searched_seldom() -> None:
    """While reads work and every write is a 500, no service is blamed, and searches get rarer."""
    count = 0

    async def write(*_: object) -> web.Response:
        nonlocal count
        count += 1
        return web.Response(status=500, text="raft is stuck")

    async with serving(proving(write)) as url, client_of(url) as client:
        registry = registry_of(client)
        for _ in range(12):
            with pytest.raises(ConsulBusy, match="raft is stuck"):
                await registry.register(SERVICES[:64])
        assert not client.health.is_up
    assert count < 12 + 4 * (MOST_FAULTS_IN_A_ROW + 1)


@pytest.mark.parametrize("position", [0, 17, 63])
async def test_one_service_at_fault_is_found_and_blocks_no_other(position: int) -> None:
    """A service for which Consul always answers 500 fails alone; the others of its transaction are written."""
    bad = f"pod--shop--p{position}"

    async def write(_: web.Request, operations: list[dict[str, dict[str, str]]]) -> web.Response:
        if f'"{bad}"' in json.dumps(operations):
            return web.Response(status=500, text="this one breaks me")
        return accepted(operations)

    async with serving(proving(write)) as url, client_of(url) as client:
        registry = registry_of(client)
        with pytest.raises(ConsulBusy):
            await registry.register(SERVICES[:64])
        written = await registry.register(SERVICES[:64])
        assert (written.done, [failure.id for failure in written.failures]) == (63, [bad])
        assert client.health.is_up
        again = await registry.register([SERVICES[position]])
        assert [failure.id for failure in again.failures] == [bad]
        assert client.health.is_up


async def test_connection_that_breaks_leaves_the_outcome_unknown() -> None:
    """A write that may have been made ends the batch; the next full read shows what became of it."""
    requests = 0

    async def write(request: web.Request, _: object) -> web.Response:
        nonlocal requests
        requests += 1
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with serving(proving(write)) as url, client_of(url) as client:
        with pytest.raises(ConsulUnreachable):
            await registry_of(client).register(SERVICES[:10])
    # aiohttp itself repeats a PUT once when a kept connection breaks; our writes bear that, being `cas`.
    assert requests <= 2


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b"<html>"),
        (409, b'{"Results":null,"Errors":null}'),
        (409, b'{"Results":null,"Errors":[]}'),
        (200, b'{"Results":[],"Errors":[{"OpIndex":0,"What":"x"}]}'),
        (409, b'{"Results":null,"Errors":[{"OpIndex":10,"What":"x"}]}'),
        (409, b'{"Results":null,"Errors":[{"OpIndex":-1,"What":"x"}]}'),
        (404, b"no such path"),
    ],
)
async def test_answer_that_makes_no_sense_ends_the_batch(status: int, body: bytes) -> None:
    """Something between us and Consul, or another Consul, is not asked forever."""

    async def write(*_: object) -> web.Response:
        return web.Response(status=status, body=body)

    async with serving(proving(write)) as url, client_of(url) as client:
        with pytest.raises(ConsulRefused):
            await registry_of(client).register(SERVICES[:10])


async def test_unreadable_body_is_halved_down_to_the_one_at_fault() -> None:
    """A 400 or 413 names no operation: halves find it."""

    async def write(_: web.Request, operations: list[dict[str, dict[str, str]]]) -> web.Response:
        if "pod--shop--p17" in json.dumps(operations):
            return web.Response(status=413, text="Request body too large")
        return accepted(operations)

    async with serving(proving(write)) as url, client_of(url) as client:
        written = await registry_of(client).register(SERVICES)
    assert (written.done, [failure.id for failure in written.failures]) == (149, ["pod--shop--p17"])


async def test_node_that_keeps_vanishing_ends_the_batch() -> None:
    """The node is made again once; a Consul that then still lacks it is at odds with itself."""

    async def write(*_: object) -> web.Response:
        errors = [{"OpIndex": 0, "What": "Missing node registration"}]
        return web.json_response({"Results": None, "Errors": errors}, status=409)

    async with serving(proving(write)) as url, client_of(url) as client:
        with pytest.raises(ConsulRefused, match="missing again"):
            await registry_of(client).register(SERVICES[:3])


async def test_unknown_token_ends_the_batch() -> None:
    """A token that Consul does not know is no failure of a single service."""

    async def write(*_: object) -> web.Response:
        return web.Response(status=403, text="ACL not found")

    async with serving(proving(write)) as url, client_of(url) as client:
        with pytest.raises(ConsulForbidden, match="ACL not found"):
            await registry_of(client).register(SERVICES[:3])


def listing(body: bytes, **headers: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Answer reads of the node with this list."""

    async def answer(request: web.Request) -> web.Response:
        if request.path.startswith("/v1/health/node/"):
            return web.Response(body=b"[]")
        return web.Response(body=body, headers={"X-Consul-Index": "7", **headers})

    return answer


NODE_TEXT = b'"Node":{"Node":"k8s-lab","Meta":{"external-node":"true"}}'


async def test_unreadable_record_holds_its_id() -> None:
    """A record whose port is text is foreign; one without an ID fails the read."""
    body = b'{%s,"Services":[{"ID":"x","Port":"y"},{"ID":"z","Service":"z"}]}' % NODE_TEXT
    async with serving(listing(body)) as url, client_of(url) as client:
        assert await held(registry_of(client)) == {
            "x": make_service("x", name="", address="", port=0),
            "z": make_service("z", address="", port=0),
        }
    body = b'{%s,"Services":[{"Service":"z"}]}' % NODE_TEXT
    async with serving(listing(body)) as url, client_of(url) as client:
        with pytest.raises(ConsulRefused):
            await held(registry_of(client))


async def test_empty_list_that_acls_filtered_proves_nothing() -> None:
    """Consul's own word that something was left out is heeded where nothing is left."""
    header = {"X-Consul-Results-Filtered-By-ACLs": "true"}
    empty = b'{%s,"Services":[]}' % NODE_TEXT
    async with serving(listing(empty, **header)) as url, client_of(url) as client:
        with pytest.raises(ConsulFiltered):
            await held(registry_of(client))
    one = b'{%s,"Services":[{"ID":"z"}]}' % NODE_TEXT
    for headers, is_filtered in ((header, True), ({}, False)):
        async with serving(listing(one, **headers)) as url, client_of(url) as client:
            registry = registry_of(client)
            assert set(await held(registry)) == {"z"}
            assert registry.is_filtered is is_filtered


@pytest.mark.parametrize("made_after", [0, 1, math.inf])
async def test_node_made_while_it_is_listed_is_listed_again(made_after: float) -> None:
    """Missing from the list and there when it is asked for by name: made in between, or hidden if that repeats."""
    lists = 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal lists
        if request.path == "/v1/txn":
            return await proving(unexpected)(request)
        if not request.path.startswith("/v1/catalog/node-services/") or "filter" in request.query:
            return web.Response(body=b"[]", headers={"X-Consul-Index": "7"})
        lists += 1
        shown = b'{%s,"Services":[{"ID":"z"}]}' % NODE_TEXT
        return web.Response(
            body=shown if lists > made_after else b'{"Node":null,"Services":[]}',
            headers={"X-Consul-Index": "7"},
        )

    async with serving(answer) as url, client_of(url) as client:
        if made_after is math.inf:
            with pytest.raises(ConsulFiltered, match="is not shown"):
                await held(registry_of(client))
        else:
            assert set(await held(registry_of(client))) == {"z"}
    assert lists == min(made_after + 1, 2)


async def unexpected(_request: web.Request, _operations: object) -> web.Response:
    """Fail on a write."""
    raise AssertionError


@pytest.mark.parametrize("missing", [1, 30, 100])
async def test_list_that_breaks_off_is_no_list(missing: int) -> None:
    """Whatever was yielded, the end is an error: here of the body, there of the connection."""
    record = json.dumps({"ID": "x", "Service": "x", "Meta": {"k": "v" * 50}}).encode()
    body = b'{%s,"Services":[%s]}' % (NODE_TEXT, b",".join([record] * 50))
    async with serving(listing(body[:-missing])) as url, client_of(url) as client:
        with pytest.raises(ConsulRefused, match="too soon"):
            await held(registry_of(client))

    async def cut(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        if "health" in request.path:
            await response.write(b"[]")
            return response
        await response.write(body[:-missing])
        assert request.transport is not None
        request.transport.abort()
        return response

    async with serving(cut) as url, client_of(url) as client:
        with pytest.raises(ConsulUnreachable):
            await held(registry_of(client))


@pytest.mark.parametrize("status", [403, 500])
async def test_refused_read_is_an_error(status: int) -> None:
    """No list is never an empty list."""

    async def refuse(_: web.Request) -> web.Response:
        return web.Response(status=status, text="why")

    async with serving(refuse) as url, client_of(url) as client:
        with pytest.raises((ConsulForbidden, ConsulBusy), match="why"):
            await held(registry_of(client))


async def test_reader_that_stops_leaves_no_connection_in_use() -> None:
    """A list that is not read to its end is closed."""
    async with Consul() as consul, client_of(consul.url, timing=Timing()) as client:
        registry = registry_of(client)
        await registry.register(SERVICES)
        services = registry.services()
        assert (await anext(services)).id
        await services.aclose()  # type: ignore[attr-defined]  # an async generator, promised as an iterator
        assert len(await held(registry)) == 150


async def test_long_list_is_never_held_whole() -> None:
    """Twenty thousand services cost the reader less memory than a quarter of their text."""
    record = json.dumps({"ID": "x", "Service": "x", "Meta": {f"k{n}": "v" * 50 for n in range(10)}}).encode()
    piece = b",".join([record] * 100)

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        if "health" in request.path or "filter" in request.query:
            await response.write(b"null")
            return response
        await response.write(b'{%s,"Services":[' % NODE_TEXT + piece)
        for _ in range(199):
            await response.write(b"," + piece)
        await response.write(b"]}")
        return response

    async with serving(stream) as url, client_of(url) as client:
        registry = registry_of(client)
        await held(registry)  # what is made once is made now
        tracemalloc.start()
        count = 0
        async for _ in registry.services():
            count += 1
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert count == 20_000
    assert peak < len(piece) * 200 / 4
