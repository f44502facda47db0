"""Prometheus finds in a real Consul what the registrar put there, and scrapes Nodes through the proxy."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import web

from support.cluster import PROXY_RULES, REGISTRAR_RULES, rule
from support.files import ROOT
from support.lab import Lab, running_lab_with
from support.processes import LOOPBACK, has_ipv6
from support.real_servers import REAL, RealPrometheus, real_consul, real_prometheus
from support.waiting import until

pytestmark = REAL

EXAMPLE = ROOT / "deploy" / "prometheus.yml"


def example_config(consul_address: str) -> str:
    """Return the example's text with the test's Consul, quick intervals and nothing else changed."""
    text = EXAMPLE.read_text()
    for old, new in (
        ("server: localhost:8500 #", f"server: {consul_address}\n        refresh_interval: 1s #"),
        ("scrape_interval: 30s", "scrape_interval: 1s"),
        ("scrape_timeout: 15s", "scrape_timeout: 1s"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


@contextlib.asynccontextmanager
async def an_application(
    asked: list[dict[str, str]], host: str = LOOPBACK, headers: list[dict[str, str]] | None = None
) -> AsyncIterator[int]:
    """Serve one metric under /stats on loopback, as a Pod's container would, and note what is asked for."""

    async def stats(request: web.Request) -> web.Response:
        asked.append(dict(request.query))
        if headers is not None:
            headers.append(dict(request.headers))
        return web.Response(text="an_application_metric 42\n")

    app = web.Application()
    app.router.add_get("/stats", stats)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, 0).start()
    try:
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


async def _are_up(prometheus: RealPrometheus, wanted: set[tuple[str, str]]) -> None:
    """Wait until just these targets (kind and instance) are there, and all of them are up."""
    found: list[dict[str, Any]] = []

    async def are_up() -> bool:
        nonlocal found
        found = await prometheus.targets()
        up = {
            (each["labels"]["kind"], each["labels"]["instance"]) for each in found if each["health"] == "up"
        }
        return up == wanted and len(found) == len(wanted)

    try:
        await until(are_up)
    except TimeoutError:
        told = [(each["scrapeUrl"], each["health"], each["lastError"]) for each in found]
        raise AssertionError(f"wanted {wanted}, got {told}") from None


async def _populate(lab: Lab, pod_port: int) -> list[str]:
    """Add a Pod on loopback and a Node with a kubelet in each family; return the Nodes' addresses."""
    annotations = {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(pod_port),
        "prometheus.io/path": "/stats?format=prometheus",
        "prometheus.io/param-depth": "a b&c",
    }
    await lab.cluster.add_pod(ips=[LOOPBACK], annotations=annotations)
    hosts = [LOOPBACK, *(["::1"] if has_ipv6() else [])]
    for number, host in enumerate(hosts):
        await lab.cluster.add_kubelet(f"node-{number}", host)
    return hosts


async def test_prometheus_scrapes_pods_and_nodes() -> None:
    """Pods directly and Nodes of both families through the proxy are up, and follow the cluster."""
    asked: list[dict[str, str]] = []
    async with (
        real_consul() as consul,
        running_lab_with(consul.address) as lab,
        an_application(asked) as pod_port,
    ):
        hosts = await _populate(lab, pod_port)
        lab.token_file.write_text(await lab.cluster.token([*REGISTRAR_RULES, *PROXY_RULES]))
        async with await lab.proxy() as proxy:
            port = await proxy.port("port")
            await proxy.ready()
            async with (
                await lab.registrar(PROXY_NODE_PORT=str(port)) as registrar,
                real_prometheus(example_config(consul.address)) as prometheus,
            ):
                await registrar.ready()
                pod = ("pod", f"{LOOPBACK}:{pod_port}")
                nodes = {("node", f"[{host}]:{port}" if ":" in host else f"{host}:{port}") for host in hosts}
                await _are_up(prometheus, {pod, *nodes})

                (sample,) = await prometheus.wait_for("an_application_metric == 42", 1)
                assert sample["metric"]["namespace"] == "shop"
                assert asked[-1] == {"depth": "a b&c", "format": "prometheus"}
                await prometheus.wait_for('up{job="kubernetes", cluster="lab", kind="node"} == 1', len(hosts))
                await prometheus.wait_for('scrape_samples_scraped{kind="node"} > 100', len(hosts))
                names = {each["metric"]["node"] for each in await prometheus.query('up{kind="node"}')}
                assert names == {f"node-{number}" for number in range(len(hosts))}

                await lab.cluster.delete_pod()
                await _are_up(prometheus, nodes)


async def test_prometheus_scrapes_a_pod_through_the_proxy_with_a_token(tmp_path: Path) -> None:
    """A Pod it could not reach is up at the proxy's port, by the token it shows, which the Pod never sees."""
    asked: list[dict[str, str]] = []
    headers: list[dict[str, str]] = []
    shown = tmp_path / "shown-by-prometheus"
    shown.write_text("what-prometheus-shows")
    async with (
        real_consul() as consul,
        running_lab_with(consul.address) as lab,
        an_application(asked, "127.0.0.2", headers) as pod_port,
    ):
        annotations = {
            "prometheus.io/scrape": "true",
            "prometheus.io/port": str(pod_port),
            "prometheus.io/path": "/stats?format=prometheus",
            "prometheus.io/param-depth": "a b&c",
        }
        await lab.cluster.add_pod(ips=["127.0.0.2"], host_ip=LOOPBACK, annotations=annotations)
        await lab.cluster.add_kubelet("node-a")
        rules = [*REGISTRAR_RULES, *PROXY_RULES, rule("list watch", "pods")]
        lab.token_file.write_text(await lab.cluster.token(rules))
        async with await lab.proxy(PROXY_PODS="true", PROXY_BEARER_TOKEN_FILE=str(shown)) as proxy:
            port = await proxy.port("port")
            await proxy.ready()
            config = example_config(consul.address).replace(
                "  - job_name: kubernetes\n",
                f"  - job_name: kubernetes\n    bearer_token_file: {shown}\n",
            )
            async with (
                await lab.registrar(PROXY_NODE_PORT=str(port), POD_ADDRESS="proxy") as registrar,
                real_prometheus(config) as prometheus,
            ):
                await registrar.ready()
                await _are_up(prometheus, {(kind, f"{LOOPBACK}:{port}") for kind in ("pod", "node")})
                (sample,) = await prometheus.wait_for("an_application_metric == 42", 1)
                assert (sample["metric"]["namespace"], sample["metric"]["pod"]) == ("shop", "web-1")
                assert asked[-1] == {"depth": "a b&c", "format": "prometheus"}
                assert all("Authorization" not in each for each in headers)
                shown.write_text("another")
                await prometheus.wait_for('up{job="kubernetes"} == 1', 2)
