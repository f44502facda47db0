"""Targets served to collectors: with Consul, without it, and by a standby."""

from typing import Any

import aiohttp

from support.cluster import rule
from support.daemon import Daemon
from support.lab import running_lab

ELECTION = {
    "LEADER_ELECTION": "true",
    "CONSUL_BACKEND": "catalog",
    "LEASE_NAMESPACE": "default",
    "LEASE_DURATION": "30",
    "LEASE_RENEW_DEADLINE": "20",
    "LEASE_RETRY_PERIOD": "0.3",
}
LEASES = rule("get create update", "leases", group="coordination.k8s.io")


async def served(daemon: Daemon) -> dict[str, dict[str, Any]]:
    """Return what is served, by service ID; empty while it is 503."""
    url = f"http://127.0.0.1:{await daemon.port('http_sd_port')}/sd/targets"
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        if response.status == 503:
            return {}
        assert response.status == 200
        groups = await response.json()
    return {group["labels"]["__meta_consul_service_id"]: group for group in groups}


async def test_without_consul_targets_are_served() -> None:
    """CONSUL_BACKEND=none needs no Consul: Pods come and go in what is served."""
    async with running_lab() as lab:
        environment = {"CONSUL_BACKEND": "none", "HTTP_SD_PORT": "0", "CONSUL_ADDRESS": "127.0.0.1:9"}
        async with await lab.registrar(**environment) as daemon:
            await lab.cluster.add_pod()
            await daemon.until(lambda: _serves(daemon, "pod--shop--web-1"))
            (group,) = (await served(daemon)).values()
            assert group["labels"]["__metrics_path__"] == "/metrics"
            await lab.cluster.delete_pod()
            await daemon.until(lambda: _serves(daemon))
            await daemon.ready()
            (start,) = daemon.said("registrar starts")
            assert start["backend"] == "none"
            assert "consul" not in start


async def test_blindness_keeps_what_is_served() -> None:
    """Losing the API server changes nothing for collectors."""
    async with running_lab() as lab, await lab.registrar(CONSUL_BACKEND="none", HTTP_SD_PORT="0") as daemon:
        await lab.cluster.add_pod()
        await daemon.until(lambda: _serves(daemon, "pod--shop--web-1"))
        lab.api_door.refuse()
        await daemon.until_said("cannot list; nothing of it is deregistered meanwhile", "pods")
        assert set(await served(daemon)) == {"pod--shop--web-1"}


async def test_leader_and_standby_serve_the_same_shards() -> None:
    """One replica writes; both serve, and what chance gave a service is the same with both."""
    async with running_lab() as lab:
        lab.token_file.write_text(
            await lab.cluster.token([rule("list watch", "pods nodes"), rule("get", "namespaces"), LEASES])
        )
        settings = {**ELECTION, "HTTP_SD_PORT": "0", "SHARD_PATHS": ",".join(f"s{n}" for n in range(40))}
        async with await lab.registrar(**settings) as first:
            await first.until_said("became leader")
            for number in range(5):
                await lab.cluster.add_pod(f"web-{number}")
            names = [f"pod--shop--web-{number}" for number in range(5)]
            await first.until(lambda: _serves(first, *names))
            async with await lab.registrar(**settings) as second:
                await second.until(lambda: _serves(second, *names))
                await second.until(lambda: _same(first, second))
                assert await second.metric("leader") == 0
                await second.until(second.is_ready)
                writes = len(lab.writes)
                assert await first.terminate() == 0
                await second.until_said("became leader")
                await lab.cluster.add_pod("web-9")
                await second.until(lambda: _serves(second, *names, "pod--shop--web-9"))
                await second.until(lambda: len(lab.writes) > writes)


async def _serves(daemon: Daemon, *ids: str) -> bool:
    return set(await served(daemon)) == set(ids)


async def _same(first: Daemon, second: Daemon) -> bool:
    return await served(first) == await served(second)
