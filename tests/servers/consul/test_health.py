"""Consul's health: what counts as an outage, what clears it, and how the gate and the window move."""

import asyncio
import random
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trustme
from aiohttp import web

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.consul.access import ConsulAccess, ConsulAddress
from k8s_consul_registrar.consul.agent import AgentRegistry
from k8s_consul_registrar.consul.catalog import CatalogRegistry
from k8s_consul_registrar.consul.client import ATTEMPTS, ConsulClient
from k8s_consul_registrar.consul.health import Attempt, ConsulHealth, RequestKind, RequestOutcome
from k8s_consul_registrar.errors import (
    ConsulBusy,
    ConsulError,
    ConsulFenced,
    ConsulForbidden,
    ConsulRefused,
    ConsulTokenUnknown,
    ConsulUnreachable,
)
from k8s_consul_registrar.tls import CONSUL, client_tls
from support.builders import our_pod_service
from support.scripted import IMPATIENT, QUICK, client_of, serving
from support.waiting import Clock

TIMING = Timing(retry_first=1.0, retry_cap=8.0, retry_after_cap=30.0)
READ, WRITE = RequestKind.READ, RequestKind.WRITE
OUTAGES = (
    ConsulUnreachable("no answer in time"),
    ConsulBusy("no leader", status=500),
    ConsulBusy("too many", status=429),
    ConsulTokenUnknown("ACL not found"),
)
REFUSALS = (ConsulRefused("bad request", 400), ConsulForbidden("Permission denied"))


class Upper(random.Random):
    """Always the longest delay."""

    def uniform(self, a: float, b: float) -> float:
        """Return the upper end."""
        return b


class World:
    """A health, its clock, and requests in one line each."""

    def __init__(self) -> None:
        self.clock = Clock(100.0)
        self.health = ConsulHealth(TIMING, clock=self.clock, pick=Upper())

    def succeed(self, access: RequestKind, *, is_blocking: bool = False) -> None:
        """Send a request that succeeds."""
        attempt = self.health.begin(access, is_blocking=is_blocking)
        self.health.succeeded(attempt)
        self.health.end(attempt)

    def fail(self, access: RequestKind, error: ConsulError, attempt: Attempt | None = None) -> None:
        """Send a request that fails."""
        attempt = attempt or self.health.begin(access)
        self.health.raised(attempt, error)
        self.health.end(attempt)

    def wait(self) -> float:
        """Return how long the gate is closed, and wait for it."""
        left = max(0.0, self.health.open_at - self.clock.now)
        self.clock.now += left
        return left


def test_before_the_first_answer_consul_is_not_up() -> None:
    """Nothing was sent yet, so nothing is known."""
    health = World().health
    assert (health.is_up, health.reads, health.writes) == (False, RequestOutcome.NONE, RequestOutcome.NONE)
    assert (health.problem, health.concurrency(8)) == ("", 8)
    assert health.open_at < 0


@pytest.mark.parametrize("access", list(RequestKind))
@pytest.mark.parametrize("error", OUTAGES, ids=repr)
def test_outage_shows_and_closes_the_gate(access: RequestKind, error: ConsulError) -> None:
    """Each kind of outage, for reads and writes."""
    world = World()
    world.succeed(READ)
    world.fail(access, error)
    assert (world.health.is_up, world.health.problem) == (False, str(error))
    assert world.wait() == 1.0
    world.succeed(access)
    assert (world.health.is_up, world.health.problem) == (True, "")
    assert world.wait() == 0


@pytest.mark.parametrize("access", list(RequestKind))
@pytest.mark.parametrize("error", [*REFUSALS, ConsulFenced("not leading")], ids=repr)
def test_refusal_or_our_fence_is_no_outage(access: RequestKind, error: ConsulError) -> None:
    """An answer about one request, or about our own lead, changes nothing."""
    world = World()
    world.succeed(READ)
    world.fail(access, error)
    assert world.health.is_up
    assert world.wait() == 0


def test_refusal_alone_does_not_make_consul_up() -> None:
    """A token without any right never had a request that succeeded."""
    world = World()
    world.fail(READ, REFUSALS[1])
    assert not world.health.is_up


@pytest.mark.parametrize("error", REFUSALS, ids=repr)
def test_refused_read_ends_an_outage_of_reads_only(error: ConsulError) -> None:
    """Consul answers again; a refused write proves nothing, since Raft may not have seen it."""
    world = World()
    world.succeed(READ)
    world.fail(READ, OUTAGES[0])
    world.fail(READ, error)
    assert world.health.is_up
    world.fail(WRITE, OUTAGES[0])
    world.fail(WRITE, error)
    assert not world.health.is_up


def test_failed_write_is_cleared_by_a_write_only() -> None:
    """Neither a small read nor a blocking query that ends; a consistent read where nothing is owed."""
    world = World()
    world.succeed(WRITE)
    world.fail(WRITE, OUTAGES[0])
    world.succeed(READ)
    world.succeed(READ, is_blocking=True)
    assert (world.health.is_up, world.health.reads) == (False, RequestOutcome.SUCCESS)
    assert world.health.problem == str(OUTAGES[0])
    assert world.wait() == 1.0
    world.health.clear_writes_by_read()
    assert world.health.is_up
    world.fail(WRITE, OUTAGES[0])
    world.fail(READ, OUTAGES[1])
    world.health.clear_writes_by_read()
    assert world.health.writes is RequestOutcome.FAILURE, "the read failed"


def test_gate_closes_for_longer_each_time() -> None:
    """It doubles up to the cap, whatever reads succeed in between, and starts again after a recovery."""
    world = World()
    waits = []
    for _ in range(6):
        world.fail(WRITE, OUTAGES[0])
        waits.append(world.wait())
        world.succeed(READ)
    assert waits == [1, 2, 4, 8, 8, 8]
    world.succeed(WRITE)
    world.fail(READ, OUTAGES[0])
    assert world.wait() == 1


def test_requests_that_heed_no_gate_do_not_keep_it_closed() -> None:
    """A loop that tries again on its own, while the gate is closed, starves no task that waits for it."""
    world = World()
    world.fail(READ, OUTAGES[0])
    opens_at = world.health.open_at
    for _ in range(5):
        world.clock.now += 0.1
        world.fail(READ, ConsulUnreachable("another reason"))
    assert (world.health.open_at, world.health.problem) == (opens_at, "another reason")


def test_requests_that_fail_together_count_once() -> None:
    """Thirty-two timeouts of one moment are one step of the backoff."""
    world = World()
    attempts = [world.health.begin(WRITE) for _ in range(32)]
    world.clock.now += 5
    for attempt in attempts:
        world.fail(WRITE, OUTAGES[0], attempt)
    assert world.wait() == 1


@pytest.mark.parametrize(("asked", "waited"), [(None, 1), (0.0, 1), (7.0, 7), (1e9, 30)])
def test_retry_after_is_honoured_up_to_a_cap(asked: float | None, waited: float) -> None:
    """The gate stays closed for as long as Consul asks, within reason."""
    world = World()
    world.fail(READ, ConsulBusy("too many", asked, 429))
    assert world.wait() == waited


def test_concurrency_grows_from_one_after_an_outage() -> None:
    """It doubles with each success; a blocking query that ends is none."""
    world = World()
    world.fail(WRITE, OUTAGES[0])
    seen = [world.health.concurrency(32)]
    for _ in range(6):
        world.succeed(READ, is_blocking=True)
        world.succeed(WRITE)
        seen.append(world.health.concurrency(32))
    assert seen == [1, 2, 4, 8, 16, 32, 32]


def test_429_halves_what_is_in_flight() -> None:
    """Once for all requests of one moment; then it grows by one a round, not at once."""
    world = World()
    attempts = [world.health.begin(WRITE) for _ in range(16)]
    world.clock.now += 1
    for attempt in attempts[8:]:
        world.health.raised(attempt, ConsulBusy("too many", status=429), is_last=False)
    assert world.health.concurrency(32) == 4
    assert world.health.writes is RequestOutcome.NONE, "it is sent again"
    before = world.health.concurrency(32)
    world.succeed(WRITE)
    assert world.health.concurrency(32) == before
    for _ in range(before):
        world.succeed(WRITE)
    assert world.health.concurrency(32) == before + 1


# ------------------------------------------------------------------ the client records by itself

Server = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _answering(status: int, text: str = "") -> Server:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status, text=text)

    return answer


async def _hang(_: web.Request) -> web.Response:
    await asyncio.sleep(30)
    raise AssertionError


async def _cut(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "100"})
    await response.prepare(request)
    await response.write(b"[")
    assert request.transport is not None
    request.transport.abort()
    return response


FAILURE, NONE = RequestOutcome.FAILURE, RequestOutcome.NONE


@pytest.mark.parametrize("method", ["GET", "PUT"])
@pytest.mark.parametrize(
    ("server", "outcome"),
    [
        pytest.param(_hang, FAILURE, id="timeout"),
        pytest.param(_cut, FAILURE, id="cut"),
        pytest.param(_answering(500, "No cluster leader"), FAILURE, id="500"),
        pytest.param(_answering(503), FAILURE, id="503"),
        pytest.param(_answering(429), FAILURE, id="429"),
        pytest.param(_answering(403, "ACL not found"), FAILURE, id="unknown token"),
        pytest.param(_answering(403, "token not found"), FAILURE, id="unknown token, newer"),
        pytest.param(_answering(403, "Permission denied"), NONE, id="403"),
        pytest.param(_answering(400, "Invalid"), NONE, id="400"),
        pytest.param(_answering(404), NONE, id="404"),
        pytest.param(_answering(301), NONE, id="301"),
    ],
)
async def test_client_records_each_outcome(method: str, server: Server, outcome: RequestOutcome) -> None:
    """Reads and writes apart; the other kind is left alone."""
    timing = IMPATIENT if server is _hang else QUICK
    async with serving(server) as url, client_of(url, token="s3cret-token", timing=timing) as client:
        with pytest.raises(ConsulError):
            await client.request(method, "/v1/x")
        health = client.health
        own, other = (health.reads, health.writes) if method == "GET" else (health.writes, health.reads)
        assert (own, other) == (outcome, NONE)
        assert bool(health.problem) is (outcome is FAILURE)
        assert "s3cret-token" not in health.problem


async def test_client_records_a_refused_connection_and_a_bad_url() -> None:
    """An address at which nothing listens, and one that is none, are outages."""
    for url in ("http://127.0.0.1:9", "http://a..b:8500"):
        async with client_of(url) as client:
            with pytest.raises(ConsulUnreachable):
                await client.request("PUT", "/v1/x")
            assert client.health.writes is RequestOutcome.FAILURE
            with pytest.raises(ConsulUnreachable):
                async with client.stream("/v1/x"):
                    pass
            assert client.health.reads is RequestOutcome.FAILURE


async def test_client_records_a_failure_of_tls(tmp_path: Path) -> None:
    """A certificate that cannot be verified is an outage."""
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    runner = web.AppRunner(web.Application())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=server).start()
    address = ConsulAddress(f"https://127.0.0.1:{runner.addresses[0][1]}")
    access = ConsulAccess(address, tls=client_tls(CONSUL))
    async with ConsulClient(access, QUICK) as client:
        with pytest.raises(ConsulUnreachable):
            await client.request("GET", "/v1/x")
        assert client.health.reads is RequestOutcome.FAILURE
        assert "certificate" in client.health.problem
    await runner.cleanup()


async def test_cancelled_request_records_nothing() -> None:
    """It was given up by us."""
    async with serving(_hang) as url, client_of(url) as client:
        task = asyncio.create_task(client.request("PUT", "/v1/x"))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert client.health.writes is RequestOutcome.NONE


@pytest.mark.parametrize(
    ("server", "outcome"),
    [
        (_answering(200, "[]"), RequestOutcome.SUCCESS),
        (_cut, FAILURE),
        (_answering(500), FAILURE),
        (_hang, FAILURE),
    ],
)
async def test_stream_counts_at_its_end(server: Server, outcome: RequestOutcome) -> None:
    """Its head alone is no success, and breaking off in the middle is a failure."""

    async def read(client: ConsulClient) -> None:
        async with client.stream("/v1/x") as answer:
            assert client.health.reads is RequestOutcome.NONE
            async for _ in answer.chunks:
                assert client.health.reads is RequestOutcome.NONE

    timing = IMPATIENT if server is _hang else QUICK
    async with serving(server) as url, client_of(url, timing=timing) as client:
        if outcome is RequestOutcome.SUCCESS:
            await read(client)
        else:
            with pytest.raises(ConsulError):
                await read(client)
        assert client.health.reads is outcome


async def test_stream_that_we_leave_records_nothing() -> None:
    """A reader that has seen enough proves neither."""

    async def long(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(100):
            await response.write(b"x" * 65536)
        return response

    async with serving(long) as url, client_of(url) as client:
        async with client.stream("/v1/x") as answer:
            await anext(answer.chunks)
        assert client.health.reads is RequestOutcome.NONE


async def test_probe_clears_a_failed_write_when_nothing_is_owed() -> None:
    """It is a consistent transaction of reads, made by a standby too, and needs no right."""
    seen: list[tuple[str, str]] = []

    async def answer(request: web.Request) -> web.Response:
        if request.path == "/v1/agent/service/register":
            return web.Response(status=500)
        seen.append((request.path_qs, await request.text()))
        return web.json_response({"Results": None, "Errors": [{"OpIndex": 0, "What": "none"}]}, status=409)

    async with serving(answer) as url, client_of(url) as client:
        with pytest.raises(ConsulBusy):
            await client.request("PUT", "/v1/agent/service/register")
        await client.probe(is_write_owed=True)
        assert (client.health.is_up, client.health.reads) == (False, RequestOutcome.SUCCESS)
        await client.probe(is_write_owed=False)
        assert client.health.is_up
    assert all(path == "/v1/txn?consistent=" and '"get"' in body for path, body in seen)


async def test_transactions_of_reads_are_reads() -> None:
    """A lookup or the proof of the node is no write, so it neither clears a failed write nor is one."""
    async with serving(_answering(500)) as url, client_of(url) as client:
        with pytest.raises(ConsulBusy):
            await CatalogRegistry(client, "n").register([])
        with pytest.raises(ConsulBusy):
            await anext(CatalogRegistry(client, "n").lookup(["a"]))
        assert (client.health.reads, client.health.writes) == (RequestOutcome.FAILURE, RequestOutcome.NONE)


async def test_unknown_service_is_no_outage_whatever_the_status() -> None:
    """Consul 1.8 with ACLs answers 500 to the deregistration of a service that is not there."""
    async with serving(_answering(500, 'Unknown service "x"')) as url, client_of(url) as client:
        assert (await AgentRegistry(client).deregister([our_pod_service("a")])).done == 1
        assert client.health.is_up


@pytest.mark.parametrize("retry_after", ["", "0", "99999999999999999999", "-1", "\u0663", "x"])
async def test_storm_of_429_is_answered_with_few_requests(retry_after: str) -> None:
    """A limiter that refuses everything sees a handful of attempts per write, jittered, and then none."""
    count = 0

    async def limit(_: web.Request) -> web.Response:
        nonlocal count
        count += 1
        headers = {"Retry-After": retry_after} if retry_after.isascii() else {}
        return web.Response(status=429, headers=headers)

    async with serving(limit) as url, client_of(url) as client:
        registry = AgentRegistry(client, concurrency=8)
        with pytest.raises(ConsulBusy):
            await registry.register([our_pod_service(f"p{n}") for n in range(500)])
        assert count <= 8 * ATTEMPTS
        assert client.health.concurrency(32) == 1
        assert not client.health.is_up


async def test_limiter_that_lets_some_through_is_survived() -> None:
    """Everything is written in the end, without an outage, at a pace that the limiter takes."""
    count = 0

    async def limit(_: web.Request) -> web.Response:
        nonlocal count
        count += 1
        return web.Response(status=200 if count % 3 else 429)

    async with serving(limit) as url, client_of(url) as client:
        registry = AgentRegistry(client, concurrency=8)
        for start in range(0, 60, 20):
            services = [our_pod_service(f"p{n}") for n in range(start, start + 20)]
            assert (await registry.register(services)).done == 20
        assert client.health.is_up
    assert count <= 60 * 2
