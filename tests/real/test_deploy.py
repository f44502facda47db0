"""The agent's flags and the Prometheus file of `deploy/`, tried on real servers."""

import asyncio
import signal
import subprocess
from typing import Any

import pytest
import yaml

from support.files import DEPLOY
from support.real_servers import REAL, RealConsul, prometheus_tools, real_consul, real_prometheus
from support.waiting import until

pytestmark = REAL


def agent_flags() -> tuple[str, list[str]]:
    """Return the node name and the flags of the deployed agent, with the placeholders a test fills in gone."""
    deployment = list(yaml.safe_load_all((DEPLOY / "deployment.yaml").read_text()))[1]
    agent = deployment["spec"]["template"]["spec"]["containers"][0]
    assert agent["args"][0] == "agent"
    given_by_test = ("-data-dir=", "-retry-join=")
    flags = [flag.replace("$(POD_IP)", "127.0.0.1") for flag in agent["args"][1:]]
    (node,) = [flag.removeprefix("-node=") for flag in flags if flag.startswith("-node=")]
    return node, [flag for flag in flags if not flag.startswith(given_by_test)]


async def register(consul: RealConsul, service: dict[str, Any]) -> None:
    """Register a service with an agent."""
    assert await consul.request("PUT", "/v1/agent/service/register", service) == (200, "")


async def instances(consul: RealConsul, name: str) -> list[dict[str, Any]]:
    """Return what the catalog holds of a service."""
    _, found = await consul.request("GET", f"/v1/catalog/service/{name}")
    return list(found or [])


async def test_services_outlive_a_restart_of_the_deployed_agent() -> None:
    """With the deployment's own flags a SIGTERM and a restart take no service out of the catalog."""
    node, flags = agent_flags()
    async with (
        real_consul(node="server") as server,
        real_consul(*flags, join=server.serf, node=node) as agent,
    ):
        await register(agent, {"ID": "pod--a--b", "Name": "pod--a--b", "Address": "192.0.2.1", "Port": 80})

        async def is_known() -> bool:
            return bool(await instances(server, "pod--a--b"))

        await until(is_known)
        (before,) = await instances(server, "pod--a--b")
        await agent.program.stop(signal.SIGTERM)
        await asyncio.sleep(1.5)  # a leave takes them out at once
        assert await instances(server, "pod--a--b") == [before]
        await agent.start()
        assert list((await agent.request("GET", "/v1/agent/services"))[1]) == ["pod--a--b"]
        (after,) = await instances(server, "pod--a--b")
        assert after["CreateIndex"] == before["CreateIndex"]
        assert (after["Node"], after["ID"]) == (node, before["ID"])


@pytest.mark.parametrize("name", ["prometheus.yml"])
def test_promtool_accepts_the_example(name: str) -> None:
    """The oldest Prometheus we name reads the file; 2.24 refuses any field that came later."""
    tools = prometheus_tools("consul_sd")
    done = subprocess.run(
        [tools.promtool, "check", "config", DEPLOY / name],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


POD_META = {
    "managed_by": "k8s-consul-registrar", "cluster": "c1", "kind": "pod", "namespace": "shop", "pod": "cart-0",
    "node": "n1", "metrics_path": "/stats", "scheme": "https", "param_format": "prometheus", "shard_path": "shard-1",
}  # fmt: skip
NODE_META = {
    "managed_by": "k8s-consul-registrar", "cluster": "c1", "kind": "node", "node": "n1", "scheme": "http",
    "metrics_path": "/api/v1/nodes/[2001:db8::1]:10250/metrics/cadvisor",
}  # fmt: skip


async def test_example_makes_the_targets_the_meta_describes() -> None:
    """Path, scheme, parameters, labels and IPv6 addresses come out right; what is not ours is dropped."""
    async with real_consul() as consul:
        pod = {"ID": "pod--shop--cart-0", "Name": "pod--shop--cart-0", "Address": "192.0.2.7", "Port": 9102}
        node = {
            "ID": "node--2001:db8::1",
            "Name": "node--2001:db8::1",
            "Address": "2001:db8::1",
            "Port": 31112,
        }
        await register(consul, {**pod, "Meta": POD_META})
        await register(consul, {**node, "Meta": NODE_META})
        await register(consul, {"ID": "db", "Name": "db", "Address": "192.0.2.9", "Port": 5432})
        config = (DEPLOY / "prometheus.yml").read_text().replace("localhost:8500", consul.address)
        async with real_prometheus(config) as prometheus:

            async def are_found() -> bool:
                return len(await prometheus.targets()) == 2

            await until(are_found)
            found = {each["labels"]["kind"]: each for each in await prometheus.targets()}
    assert found["pod"]["scrapeUrl"] == "https://192.0.2.7:9102/stats?format=prometheus"
    assert found["pod"]["labels"] == {
        "job": "kubernetes", "instance": "192.0.2.7:9102", "cluster": "c1", "kind": "pod", "namespace": "shop",
        "pod": "cart-0", "node": "n1",
    }  # fmt: skip
    url = found["node"]["scrapeUrl"].replace("%5B", "[").replace("%5D", "]")
    assert url == "http://[2001:db8::1]:31112/api/v1/nodes/[2001:db8::1]:10250/metrics/cadvisor"
    assert found["node"]["labels"] == {
        "job": "kubernetes", "instance": "[2001:db8::1]:31112", "cluster": "c1", "kind": "node", "node": "n1",
    }  # fmt: skip
