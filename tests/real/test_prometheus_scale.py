"""Thousands of targets between a real Consul and a real Prometheus, both with their limits as they come."""

import asyncio
import contextlib
import logging
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from support.files import ROOT
from support.lab import ChaosLab, chaos, chaos_lab, scaled
from support.real_servers import RealConsul, RealPrometheus, real_consul, real_prometheus
from support.waiting import PATIENCE, until

pytestmark = chaos("prometheus-scale", soak_seconds=400)

log = logging.getLogger(__name__)

EXAMPLE = ROOT / "deploy" / "prometheus.yml"
TARGETS = 2000
LOOKS_FOR = scaled(20, 60)  # seconds in which a discovery that never gets there is watched
GROUPED = {"POD_SERVICE_NAME": "{cluster}-pods", "NODE_SERVICE_NAME": "{cluster}-nodes"}
SERVICES = "services: [lab-pods, lab-nodes]"
# One for each name, one for the list of names, and what Prometheus has open beside them for a moment.
FEW = 10
ESTABLISHED = "01"  # proc(5), /proc/net/tcp


def config(consul: RealConsul, *discovery: str) -> str:
    """Return the example's text with these lines in its discovery, and an interval in which nothing is scraped."""
    lines = "".join(f"\n        {line}" for line in discovery)
    text = EXAMPLE.read_text()
    for old, new in (
        ("server: localhost:8500 #", f"server: {consul.address}{lines} #"),
        ("scrape_interval: 30s", "scrape_interval: 10h"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


class Found(NamedTuple):
    """The targets that a Prometheus had found when the look ended."""

    targets: int
    connections: int  # the most at once
    errors: int
    seconds: float


async def _look(prometheus: RealPrometheus, consul: RealConsul) -> Found:
    """Watch a Prometheus until it has found all targets and kept them for a while, or `LOOKS_FOR`."""
    loop = asyncio.get_running_loop()
    began, most, found = loop.time(), 0, 0
    until = began + LOOKS_FOR
    took = float(LOOKS_FOR)
    while loop.time() < until:
        most = max(most, _connections(prometheus.program.pid, consul))
        found = len(await prometheus.targets())
        if found == TARGETS and took == LOOKS_FOR:
            took = loop.time() - began
            until = min(until, loop.time() + 5)
        await asyncio.sleep(0.1)
    return Found(found, most, await _errors(prometheus), took)


def _connections(pid: int, consul: RealConsul) -> int:
    """Count the connections that a process has to a Consul, by its own list of sockets."""
    port = f":{int(consul.address.rpartition(':')[2]):04X}"
    sockets = set()
    for one in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            sockets.add(str(one.readlink()))
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    # Fields: number, local, remote, state, five more, inode.
    return sum(
        line[2].endswith(port) and line[3] == ESTABLISHED and f"socket:[{line[9]}]" in sockets
        for line in lines
    )


async def _errors(prometheus: RealPrometheus) -> int:
    """Return how many requests of its discovery failed."""
    async with aiohttp.ClientSession() as session, session.get(f"{prometheus.url}/metrics") as answer:
        (value,) = re.findall(
            r"^prometheus_sd_consul_rpc_failures_total (\S+)$", await answer.text(), re.MULTILINE
        )
    return int(float(value))


async def _names(lab: ChaosLab) -> Counter[str]:
    """Count the services of our node by name."""
    _, answer = await lab.real.request("GET", f"/v1/catalog/node/{lab.node}")
    return Counter(one["Service"] for one in ((answer or {}).get("Services") or {}).values())


async def _register(lab: ChaosLab, **environment: str) -> Counter[str]:
    """Have the registrar write everything, end it, and return how many services stand under each name."""
    async with await lab.chaotic(**environment) as daemon:
        await daemon.until(daemon.is_ready, within=2 * PATIENCE)
        await daemon.until(lambda: bool(daemon.said("resync")), within=2 * PATIENCE)
        await daemon.terminate()
    return await _names(lab)


async def _has_default_limit(consul: RealConsul) -> bool:
    """Return True if a Consul lets one client have 200 connections, its default since 1.7.1."""
    _, told = await consul.request("GET", "/v1/agent/self")
    limit: Any = told["DebugConfig"]["HTTPMaxConnsPerClient"]
    return bool(limit == 200)


async def _found(names: int, environment: Mapping[str, str], *discovery: str) -> Found:
    """Register all under this many names at a Consul of their own, and let a Prometheus look for them.

    Consul counts the connections of a client that was killed until their queries end, minutes later, and it
    tells clients apart by their address: another test there would begin without any to spare.
    """
    async with real_consul() as consul, chaos_lab(consul) as lab:
        assert await _has_default_limit(consul)
        lab.put_pods(TARGETS - 3)
        lab.put_nodes(3)
        held = await _register(lab, **environment)
        assert (held.total(), len(held)) == (TARGETS, names)
        async with real_prometheus(config(consul, *discovery)) as prometheus:
            return await _look(prometheus, consul)


async def test_name_for_each_target_and_names_that_are_shared() -> None:
    """Grouped, all 2,000 targets are found by a few connections; with a name each, that takes hundreds."""
    grouped = await _found(2, GROUPED)
    listed = await _found(2, GROUPED, SERVICES)
    each = await _found(TARGETS, {})
    # For docs/prometheus.md: SOAK=1 pytest -rP --log-level=INFO
    log.info("each %s, grouped %s, listed %s", each, grouped, listed)
    for one in (grouped, listed):
        assert (one.targets, one.errors) == (TARGETS, 0)
        assert one.connections <= FEW
    assert each.connections > 10 * FEW


async def test_server_takes_its_shard_by_tag() -> None:
    """Each of two servers finds just the targets that carry its tag, and Consul sends it no others."""
    settings = {**GROUPED, "SHARD_PATHS": "shard-1,shard-2", "SERVICE_TAGS": "shard_path={shard_path}"}
    async with real_consul() as consul, chaos_lab(consul) as lab:
        lab.put_pods(TARGETS - 3)
        lab.put_nodes(3)
        await _register(lab, **settings)
        records = await lab.records()
        assert len(records) == TARGETS
        together: set[str] = set()
        for shard in ("shard-1", "shard-2"):
            wanted = {service_id for service_id, one in records.items() if one.shard == shard}
            assert 0 < len(wanted) < TARGETS
            text = config(consul, SERVICES, f'tags: ["shard_path={shard}"]')
            async with real_prometheus(text) as prometheus:
                await _finds(prometheus, wanted)
            together |= wanted
        assert together == lab.wanted.keys()


async def _finds(prometheus: RealPrometheus, wanted: set[str]) -> None:
    """Wait until a Prometheus has just these service IDs, before any relabelling that could have dropped others."""

    async def are_found() -> bool:
        found = [each["discoveredLabels"]["__meta_consul_service_id"] for each in await prometheus.targets()]
        return len(found) == len(wanted) and set(found) == wanted

    await until(are_found, every=0.5)
    url = f"{prometheus.url}/api/v1/targets?state=dropped"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        dropped = (await answer.json())["data"]["droppedTargets"]
    assert dropped == []
