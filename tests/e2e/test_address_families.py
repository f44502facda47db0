"""Registrar and proxy in an IPv6-only and in a dual-stack cluster: what Consul and the discoveries hold can be scraped."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import aiohttp
import pytest
from yarl import URL

from e2e.test_proxy_pods import SHOWN, an_application, annotations
from k8s_consul_registrar.sandbox.kubelet import recorded_metrics
from support.cluster import PROXY_RULES, REGISTRAR_RULES, rule
from support.daemon import Daemon
from support.lab import LIMIT, Lab, SandboxLab, Scraped, running_lab
from support.processes import has_ipv6

pytestmark = pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")

SIX = "::1"
# An address of the Node at which neither its kubelet nor its Pod listens.
FOUR = "127.0.0.9"
POD = "pod--shop--web-1"
FAMILIES = {"NODE_IP_FAMILY": "ipv6", "POD_IP_FAMILY": "ipv6"}


@asynccontextmanager
async def a_cluster(*addresses: str) -> AsyncIterator[SandboxLab]:
    """Run a Node with these addresses."""
    async with running_lab() as lab, a_node(lab, *addresses):
        yield lab


@asynccontextmanager
async def a_node(lab: Lab, *addresses: str) -> AsyncIterator[None]:
    """Run a Node with these addresses, whose kubelet and whose Pod, on its network, listen at ::1 only."""
    async with an_application([], SIX) as port:
        kubelet = await lab.cluster.start_kubelet("node-a", SIX)
        internal = [("InternalIP", one) for one in addresses]
        await lab.cluster.add_node("node-a", *internal, kubelet_port=kubelet.port)
        await lab.cluster.add_pod(
            ips=addresses,
            host_ips=addresses,
            host_network=True,
            ports={"metrics": port},
            annotations=annotations(port),
        )
        rules = [*REGISTRAR_RULES, *PROXY_RULES, rule("list watch", "pods")]
        lab.token_file.write_text(await lab.cluster.token(rules))
        yield


async def a_proxy(lab: Lab, **environment: str) -> Daemon:
    """Return a proxy that relays Pods too."""
    token = lab.folder / "shown"
    token.write_text(SHOWN["Authorization"].removeprefix("Bearer "))
    return await lab.proxy(PROXY_PODS="true", PROXY_BEARER_TOKEN_FILE=str(token), **environment)


async def get(url: str) -> Scraped:
    """Scrape a URL as Prometheus would."""
    async with (
        aiohttp.ClientSession(timeout=LIMIT) as session,
        session.get(URL(url, encoded=True), headers=SHOWN) as answer,
    ):
        return Scraped(answer.status, dict(answer.headers), await answer.read())


def urls_of(groups: list[Mapping[str, object]]) -> set[str]:
    """Return the URLs that Prometheus makes of groups of targets."""
    found = set()
    for group in groups:
        labels, targets = group["labels"], group["targets"]
        assert isinstance(labels, dict)
        assert isinstance(targets, list)
        found |= {f"{labels['__scheme__']}://{one}{labels['__metrics_path__']}" for one in targets}
    return found


each_cluster = pytest.mark.parametrize(
    ("addresses", "settings"), [((SIX,), {}), ((FOUR, SIX), FAMILIES)], ids=["ipv6-only", "dual-stack"]
)


@each_cluster
async def test_node_and_pod_are_scraped_over_ipv6_by_what_consul_and_the_discoveries_say(
    addresses: tuple[str, ...], settings: dict[str, str]
) -> None:
    """Only the path and the targets have brackets; the ID is that of the Node's first address."""
    async with a_cluster(*addresses) as lab, await a_proxy(lab, **settings) as proxy:
        await proxy.ready()
        file = lab.folder / "targets.json"
        more = {"POD_ADDRESS": "proxy", "PROXY_NODE_PORT": str(await proxy.port("port"))}
        more |= {"HTTP_SD_PORT": "0", "FILE_SD_PATH": str(file)}
        async with await lab.registrar(**more, **settings) as registrar:
            node = f"node--{addresses[0]}"
            await registrar.until(lambda: lab.has(node, POD))
            expected = {node: recorded_metrics(), POD: b"a_metric 1\n"}
            urls = {}
            for service_id, service in lab.services.items():
                assert service.address == SIX
                path = lab.meta(service_id)["metrics_path"]
                urls[service_id] = f"http://[{service.address}]:{service.port}{path}"
                for url in (urls[service_id], urls[service_id].replace("s/[::1]", "s/%5B::1%5D")):
                    answer = await get(url)
                    assert (answer.status, answer.body) == (200, expected[service_id]), (url, answer)
            discovery = f"http://[::1]:{await registrar.port('http_sd_port')}/sd/targets"

            async def are_served() -> bool:
                served = await get(discovery)
                return served.status == 200 and urls_of(json.loads(served.body)) == set(urls.values())

            await registrar.until(are_served)
            await registrar.until(
                lambda: file.exists() and urls_of(json.loads(file.read_text())) == set(urls.values())
            )


async def test_by_name_the_proxy_reaches_a_dual_stack_node_in_the_family() -> None:
    """Without the setting it dials the Node's first address, at which nothing listens."""
    path = "/api/v1/nodes/node-a/proxy/metrics/cadvisor"
    async with a_cluster(FOUR, SIX) as lab:
        for settings, status in (({}, 502), ({"NODE_IP_FAMILY": "ipv6"}, 200)):
            async with await a_proxy(lab, **settings) as proxy:
                await proxy.ready()
                assert (await get(f"http://[::1]:{await proxy.port('port')}{path}")).status == status


async def test_another_family_updates_services_in_place() -> None:
    """No ID changes, so nothing is removed and no target is lost on the way."""
    async with a_cluster(FOUR, SIX) as lab:
        async with await lab.registrar() as registrar:
            await registrar.until(lambda: lab.has(f"node--{FOUR}", POD))
            assert {one.address for one in lab.services.values()} == {FOUR}
        lab.consul.writes.clear()
        async with await lab.registrar(**FAMILIES) as registrar:
            await registrar.until(lambda: {one.address for one in lab.services.values()} == {SIX})
            await registrar.until(lambda: "[::1]" in lab.meta(f"node--{FOUR}")["metrics_path"])
        assert sorted(lab.writes) == [f"register node--{FOUR}", f"register {POD}"]
