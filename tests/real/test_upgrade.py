"""The order in which docs/original-program.md replaces the original program, tried on real Consul agents."""

import asyncio
import contextlib
import json
import re
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator

import pytest

from real.test_deploy import agent_flags
from support.files import ROOT
from support.lab import Lab, running_lab
from support.real_servers import REAL, RealConsul, real_consul, real_prometheus
from support.waiting import PATIENCE, until

pytestmark = [REAL, pytest.mark.long]

MOVING = ROOT / "docs" / "original-program.md"
PODS = tuple(f"web-{number}" for number in range(8))
CLUSTER = "lab"
# As a user of the original has it: nothing is known of `managed_by`.
PROMETHEUS = """
global: {scrape_interval: 1h}
scrape_configs:
  - job_name: pods
    consul_sd_configs: [{server: '%s', refresh_interval: 1s}]
    relabel_configs:
      - {source_labels: [__meta_consul_service], regex: 'pod--.*', action: keep}
      - {source_labels: [__meta_consul_service_metadata_metrics_path], target_label: __metrics_path__}
      - {source_labels: [__meta_consul_service_metadata_namespace], target_label: namespace}
"""


def name_of(pod: str) -> str:
    """Return the service name of a Pod, which is also its ID."""
    return f"pod--shop--{pod}"


async def run_original(agent: RealConsul) -> None:
    """Register what the original program would."""
    for number, pod in enumerate(PODS):
        body = {
            "ID": name_of(pod),
            "Name": name_of(pod),
            "Address": f"198.51.100.{number + 1}",
            "Port": 9102,
            "Meta": {"cluster": CLUSTER, "namespace": "shop", "metrics_path": "/metrics"},
        }
        assert (await agent.request("PUT", "/v1/agent/service/register", body))[0] == 200


async def leave(agent: RealConsul, server: RealConsul) -> None:
    """End an agent as a Pod's end does; with Consul's defaults it leaves, for which it takes its time.

    While it does, its own anti-entropy may put its services back once more; the servers then remove them
    within a minute. Here the test removes them at once.
    """
    agent.program.send(signal.SIGTERM)
    await agent.program.ended(PATIENCE)
    assert (await server.request("PUT", "/v1/catalog/deregister", {"Node": agent.node}))[0] == 200


class Watch:
    """Looks at the catalog again and again, and remembers each service that was ever missing."""

    def __init__(self, server: RealConsul) -> None:
        self._server = server
        self.missing: set[str] = set()
        self.looks = 0

    async def names(self) -> set[str]:
        """Return the services of Pods in the catalog."""
        _, found = await self._server.request("GET", "/v1/catalog/services")
        return {name for name in found or {} if name.startswith("pod--")}

    async def holders(self) -> dict[str, set[str]]:
        """Return the nodes that hold each Pod's service."""
        nodes: dict[str, set[str]] = {}
        for pod in PODS:
            _, found = await self._server.request("GET", f"/v1/catalog/service/{name_of(pod)}")
            nodes[pod] = {each["Node"] for each in found or ()}
        return nodes

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            self.missing |= {name_of(pod) for pod in PODS} - await self.names()
            self.looks += 1
            await asyncio.sleep(0.03)

    @contextlib.asynccontextmanager
    async def looking(self) -> AsyncIterator[None]:
        """Look while the block runs."""
        task = asyncio.create_task(self.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def until_held_by(watch: Watch, *nodes: str) -> None:
    """Wait until these nodes, and no other, hold every service."""

    async def are_held() -> bool:
        return all(held == set(nodes) for held in (await watch.holders()).values())

    await until(are_held)


@contextlib.asynccontextmanager
async def cluster_of_pods() -> AsyncIterator[Lab]:
    """Run a cluster in which the Pods ask to be scraped."""
    async with running_lab() as lab:
        for number, pod in enumerate(PODS):
            await lab.cluster.add_pod(pod, ips=[f"198.51.100.{number + 1}"])
        yield lab


async def test_copy_of_the_original_bridges_the_upgrade() -> None:
    """Copy beside, replace, remove the copy: no look ever misses a service, and no target is doubled."""
    name, flags = agent_flags()
    async with cluster_of_pods() as lab, real_consul(node="server") as server:
        watch = Watch(server)
        async with (
            real_consul(join=server.serf, node="original") as original,
            real_consul(join=server.serf, node="copy") as copy,
        ):
            await run_original(original)
            await until_held_by(watch, "original")
            async with watch.looking(), real_prometheus(PROMETHEUS % server.address) as prometheus:
                await run_original(copy)
                await until_held_by(watch, "original", "copy")
                await leave(original, server)
                await until_held_by(watch, "copy")
                async with (
                    real_consul(*flags, join=server.serf, node=name) as agent,
                    await lab.registrar(CONSUL_ADDRESS=agent.address, CLUSTER_NAME=CLUSTER) as registrar,
                ):
                    await registrar.ready()
                    await until_held_by(watch, "copy", name)

                    async def has_each_once() -> bool:
                        return len(await prometheus.targets()) == len(PODS)

                    await until(has_each_once)
                    await leave(copy, server)
                    await until_held_by(watch, name)
                    await asyncio.sleep(1)
                    assert await has_each_once()
            assert watch.looks > 50
            assert watch.missing == set()


async def test_without_the_copy_there_is_a_gap() -> None:
    """Without a copy the original's agent takes its services along when it ends."""
    async with (
        real_consul(node="server") as server,
        real_consul(join=server.serf, node="original") as original,
    ):
        watch = Watch(server)
        await run_original(original)
        await until_held_by(watch, "original")
        async with watch.looking():
            await leave(original, server)
            await until(lambda: watch.missing == {name_of(pod) for pod in PODS})


def test_documented_copy_is_what_it_says() -> None:
    """The documented filter changes name, selector and labels, drops what the server added, and nothing else."""
    jq = shutil.which("jq")
    if jq is None:
        pytest.skip("jq is not on PATH")
    (written,) = re.findall(r"jq '(.*?)'", MOVING.read_text(), re.DOTALL)
    labels = {"app": "k8s-consul-registrar"}
    pod = {"serviceAccountName": "k8s-consul-registrar-sa", "containers": [{"name": "consul-agent"}]}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": "k8s-consul-registrar",
            "namespace": "default",
            "uid": "u",
            "resourceVersion": "1",
        },
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
        "status": {"replicas": 1},
    }
    done = subprocess.run(
        [jq, written], input=json.dumps(deployment), capture_output=True, text=True, check=True
    )
    labels = {"app": "k8s-consul-registrar-old"}
    assert json.loads(done.stdout) == {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "k8s-consul-registrar-old", "namespace": "default"},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
