"""The registry of an agent, on the sandbox's Consul and on servers that misbehave."""

import asyncio

import pytest
from aiohttp import web

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.consul.agent import AgentRegistry
from k8s_consul_registrar.consul.batches import MOST_FAULTS_IN_A_ROW
from k8s_consul_registrar.consul.health import RequestOutcome
from k8s_consul_registrar.errors import ConsulBusy, ConsulFiltered, ConsulTokenUnknown, ConsulUnreachable
from k8s_consul_registrar.model import Drift
from k8s_consul_registrar.sandbox.consul import Consul
from k8s_consul_registrar.sandbox.consul_release import ConsulOptions
from support.builders import make_service, our_pod_service
from support.real_servers import held
from support.scripted import client_of, serving
from support.waiting import until


async def test_register_read_and_deregister() -> None:
    """A registered service is read back equal, whatever characters its ID has, and goes when asked."""
    services = [our_pod_service(f"p{number}") for number in range(100)]
    services.append(make_service("node--2001:db8:1::5", {"cluster": "lab"}))
    services.append(make_service("odd/ID ?#%25", {"cluster": "lab"}))
    async with Consul() as consul, client_of(consul.url, timing=Timing()) as client:
        registry = AgentRegistry(client)
        written = await registry.register(services)
        assert (written.done, written.failures) == (102, ())
        assert await held(registry) == {service.id: service for service in services}
        gone = await registry.deregister([*services, make_service("never-there")])
        assert (gone.done, gone.failures) == (103, ())
        assert await held(registry) == {}


async def test_refused_service_does_not_hold_up_the_rest() -> None:
    """The refused service carries Consul's own reason."""
    services = [our_pod_service(f"p{number}") for number in range(50)]
    services.insert(0, make_service("bad", {"a/b": "x"}))
    async with Consul() as consul, client_of(consul.url, timing=Timing()) as client:
        written = await AgentRegistry(client).register(services)
        assert written.done == 50
        (failure,) = written.failures
        assert failure.id == "bad"
        assert "Key contains invalid characters" in failure.problem


async def test_missing_right_is_the_services_own_failure() -> None:
    """Rights are given by service name, so a 403 is reported for each service and is no outage."""

    async def deny(_: web.Request) -> web.Response:
        return web.Response(status=403, text="Permission denied")

    async with serving(deny) as url, client_of(url) as client:
        written = await AgentRegistry(client).register([our_pod_service("a")])
        assert client.health.writes is RequestOutcome.NONE
    assert written.done == 0
    assert "403" in written.failures[0].problem


async def test_service_hidden_from_the_token_concerns_only_its_id() -> None:
    """Consul denies the look at it by 403: that is no outage, and no sign that it is gone."""

    async def hide(request: web.Request) -> web.Response:
        if request.path == "/v1/agent/services":
            return web.json_response({})
        if request.path.startswith("/v1/agent/service/register"):
            return web.Response()
        return web.Response(status=403, text="Permission denied")

    async with serving(hide) as url, client_of(url) as client:
        registry = AgentRegistry(client)
        await registry.register([our_pod_service("a")])
        with pytest.raises(ConsulFiltered, match="pod--shop--a"):
            _ = [one async for one in registry.lookup(["pod--shop--a"])]
        assert await registry.drift() is not Drift.EMPTIED
        assert client.health.reads is not RequestOutcome.FAILURE


async def test_unknown_token_ends_the_call() -> None:
    """A token that Consul does not know is not the failure of a single service."""
    async with (
        Consul(ConsulOptions(token="right")) as consul,
        client_of(consul.url, token="wrong", timing=Timing()) as client,
    ):
        with pytest.raises(ConsulTokenUnknown):
            await AgentRegistry(client).register([our_pod_service("a")])
        assert client.health.writes is RequestOutcome.FAILURE


async def test_one_service_at_fault_blocks_no_other() -> None:
    """A service for which Consul always answers 500 is blamed once others are written meanwhile."""

    async def stumbling(request: web.Request) -> web.Response:
        body = await request.json()
        return web.Response(status=500 if body["ID"].endswith("bad") else 200)

    async with serving(stumbling) as url, client_of(url) as client:
        registry = AgentRegistry(client)
        bad, good = our_pod_service("bad"), our_pod_service("good")
        with pytest.raises(ConsulBusy):
            await registry.register([bad])
        assert client.health.writes is RequestOutcome.FAILURE
        assert (await registry.register([good])).done == 1
        for _ in range(3):
            assert [one.id for one in (await registry.register([bad])).failures] == [bad.id]
            assert client.health.is_up
            assert client.health.open_at < 0


async def test_second_service_that_fails_shows_the_outage_again() -> None:
    """A service that was blamed does not hide that Consul writes nothing."""
    fails = {"bad"}

    async def stumbling(request: web.Request) -> web.Response:
        body = await request.json()
        is_failing = body["ID"].rpartition("-")[2] in fails
        return web.Response(status=500 if is_failing else 200)

    async with serving(stumbling) as url, client_of(url) as client:
        registry = AgentRegistry(client)
        bad, good = our_pod_service("bad"), our_pod_service("good")
        with pytest.raises(ConsulBusy):
            await registry.register([bad])
        await registry.register([good])
        assert (await registry.register([bad])).failures
        fails.add("good")
        for service in (good, bad):
            with pytest.raises(ConsulBusy):
                await registry.register([service])
        assert not client.health.is_up


async def test_dead_consul_ends_the_batch() -> None:
    """When Consul cannot be reached the batch ends in that error, quickly."""
    async with client_of("http://127.0.0.1:9") as client:
        with pytest.raises(ConsulUnreachable):
            await AgentRegistry(client).register([our_pod_service(f"p{number}") for number in range(1000)])


async def test_consul_without_a_leader_ends_the_batch() -> None:
    """Faults of Consul's own in a row are Consul's trouble; a single one is that of its service."""
    requests = 0

    async def failing(_: web.Request) -> web.Response:
        nonlocal requests
        requests += 1
        return web.Response(status=500, text="No cluster leader")

    async with serving(failing) as url, client_of(url) as client:
        with pytest.raises(ConsulBusy, match="No cluster leader"):
            await AgentRegistry(client, concurrency=4).register(
                [our_pod_service(f"p{number}") for number in range(500)]
            )
    assert requests < MOST_FAULTS_IN_A_ROW + 10


async def test_one_fault_among_successes_is_its_services() -> None:
    """A service at which Consul stumbles is separated from the rest."""

    async def stumbling(request: web.Request) -> web.Response:
        body = await request.json()
        return web.Response(status=500 if body["ID"].endswith("p7") else 200)

    async with serving(stumbling) as url, client_of(url) as client:
        written = await AgentRegistry(client).register([our_pod_service(f"p{n}") for n in range(60)])
    assert written.done == 59
    assert [failure.id for failure in written.failures] == ["pod--shop--p7"]


async def test_newer_agents_404_for_an_unknown_service_is_done() -> None:
    """From 1.11 on an agent answers 404 where earlier ones said 200; both mean it is not there."""

    async def unknown(_: web.Request) -> web.Response:
        return web.Response(status=404, text="Unknown service ID")

    async with serving(unknown) as url, client_of(url) as client:
        assert (await AgentRegistry(client).deregister([our_pod_service("a")])).done == 1


async def test_concurrency_is_bounded() -> None:
    """No more requests are under way than allowed."""
    now, most = 0, 0
    are_many = asyncio.Event()

    async def counting(_: web.Request) -> web.Response:
        nonlocal now, most
        now += 1
        most = max(most, now)
        if now == 5:
            are_many.set()
        await are_many.wait()
        await asyncio.sleep(0.005)
        now -= 1
        return web.Response()

    async with serving(counting) as url, client_of(url) as client:
        await AgentRegistry(client, concurrency=5).register([our_pod_service(f"p{n}") for n in range(40)])
    assert most == 5


async def test_history_that_goes_back_is_drift_of_an_agents_node() -> None:
    """A snapshot was restored under an agent that kept running, and everything is as it was but the index."""
    index, changed = 100, asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        if request.path == "/v1/agent/self":
            return web.json_response({"Config": {"NodeName": "n"}})
        if request.path == "/v1/agent/services":
            return web.json_response({})
        if request.query.get("index") == str(index):
            await changed.wait()
        body = {"Node": {"Node": "n"}, "Services": []}
        return web.json_response(body, headers={"X-Consul-Index": str(index)})

    async with serving(answer) as url, client_of(url) as client:
        registry = AgentRegistry(client)
        assert await held(registry) == {}
        assert await registry.drift() is Drift.NONE
        index = 7
        changed.set()

        async def is_changed() -> bool:
            return await registry.drift() is Drift.CHANGED

        await until(is_changed)
        changed.clear()
        assert await held(registry) == {}
        assert await registry.drift() is Drift.NONE
