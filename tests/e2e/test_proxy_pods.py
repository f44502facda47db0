"""The proxy as a process with Pods, TLS and a watch: what changes in the cluster or in a file counts soon."""

import asyncio
import contextlib
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import trustme
from aiohttp import web

from k8s_consul_registrar.sandbox.certificates import Authority
from k8s_consul_registrar.sandbox.kubelet import recorded_metrics
from support.cluster import PROXY_RULES, kubeconfig, rule
from support.daemon import STOP_WITHIN, Daemon
from support.lab import LIMIT, SandboxLab, kubelet_door, kubelet_path, running_lab, scrape
from support.processes import LOOPBACK
from support.proxy_lab import Files, caller_context, pod_path

POD_HOST = "127.0.0.2"
SHOWN = {"Authorization": "Bearer what-prometheus-shows"}


@contextlib.asynccontextmanager
async def an_application(seen: list[web.Request], host: str = POD_HOST) -> AsyncIterator[int]:
    """Serve `a_metric` where a Pod of the tests has its address."""

    async def metrics(request: web.Request) -> web.Response:
        seen.append(request)
        return web.Response(text="a_metric 1\n")

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, 0).start()
    try:
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


async def pod_proxy(lab: SandboxLab, **environment: str) -> Daemon:
    """Return a proxy that relays Pods to clients that show the token."""
    lab.token_file.write_text(await lab.cluster.token([*PROXY_RULES, rule("list watch", "pods")]))
    file = lab.folder / "inbound"
    file.write_text("what-prometheus-shows\n")
    return await lab.proxy(PROXY_PODS="true", PROXY_BEARER_TOKEN_FILE=str(file), **environment)


def annotations(port: int) -> dict[str, str]:
    """Return those of a scraped Pod."""
    return {"prometheus.io/scrape": "true", "prometheus.io/port": str(port)}


async def status(daemon: Daemon, path: str) -> int:
    """Return the status of one scrape with the token."""
    return (await scrape(daemon, path, SHOWN)).status


async def test_pods_come_and_go() -> None:
    """A Pod is relayed as soon as it is annotated, and 404 as soon as it is gone or no longer asks for it."""
    seen: list[web.Request] = []
    async with running_lab() as lab, an_application(seen) as port, await pod_proxy(lab) as daemon:
        await daemon.ready()
        assert await status(daemon, pod_path()) == 404
        await lab.cluster.add_pod(ips=[POD_HOST], annotations=annotations(port))

        async def is_relayed() -> bool:
            return await status(daemon, pod_path()) == 200

        async def is_gone() -> bool:
            return await status(daemon, pod_path()) == 404

        await daemon.until(is_relayed)
        assert (await scrape(daemon, pod_path())).status == 401
        await lab.cluster.annotate_pod({"prometheus.io/scrape": "false"})
        await daemon.until(is_gone)
        await lab.cluster.annotate_pod({"prometheus.io/scrape": "true"})
        await daemon.until(is_relayed)
        assert await daemon.metric("proxy_pods") == 1
        await lab.cluster.delete_pod()
        await daemon.until(is_gone)
        assert not [one for one in seen if "Authorization" in one.headers]


async def test_without_the_permission_it_says_so() -> None:
    """Not ready, with the permission in words; Nodes are relayed all the same."""
    async with running_lab() as lab:
        kubelet = await lab.cluster.add_kubelet("node-a")
        lab.token_file.write_text(await lab.cluster.token(PROXY_RULES))
        environment = {"PROXY_PODS": "true", "PROXY_PODS_ANONYMOUS": "true"}
        async with await lab.proxy(**environment) as daemon:
            line = await daemon.until_said("cannot follow", "'kind': 'pod'")
            assert "pods" in line["problem"]

            async def is_said() -> bool:
                number, text = await daemon.admin("/readyz")
                return number == 503 and "pods" in text

            async def is_relayed() -> bool:
                return (await scrape(daemon, kubelet_path(kubelet.port))).status == 200

            await daemon.until(is_said)
            await daemon.until(is_relayed)  # the Nodes may still be on their first list
            assert (await scrape(daemon, pod_path())).status == 503


async def test_new_node_is_known_at_once() -> None:
    """Nodes are watched: one that joins is relayed within a moment, one that leaves is not."""
    async with running_lab() as lab, await lab.proxy() as daemon:
        await daemon.ready()
        kubelet = await lab.cluster.add_kubelet("node-a")

        async def answers(number: int) -> bool:
            return (await scrape(daemon, kubelet_path(kubelet.port))).status == number

        await daemon.until(lambda: answers(200))
        await lab.cluster.delete_node("node-a")
        await daemon.until(lambda: answers(404))


async def test_stale_nodes_are_not_served() -> None:
    """After STALE_NODES_MAX without the API server 503, told by a metric before; 200 when it is back."""
    async with running_lab() as lab:
        kubelet = await lab.cluster.add_kubelet("node-a")
        async with await lab.proxy(STALE_NODES_MAX="4") as daemon:
            await daemon.ready()
            assert await daemon.metric('proxy_blind_seconds{kind="node"}') == 0
            lab.api_door.refuse()

            async def is_served_while_blind() -> bool:
                served = (await scrape(daemon, kubelet_path(kubelet.port))).status
                blind = await daemon.metric('proxy_blind_seconds{kind="node"}') or 0
                assert served == 200 or blind > 4
                return blind > 0

            await daemon.until(is_served_while_blind)

            async def answers(number: int) -> bool:
                return (await scrape(daemon, kubelet_path(kubelet.port))).status == number

            await daemon.until(lambda: answers(503))
            assert await daemon.is_ready(), "an outage is shown and takes no replica away"
            await lab.api_door.heal()
            await daemon.until(lambda: answers(200))


async def test_recent_failures_are_named_on_the_admin_port_only() -> None:
    """The admin port names the Node and the Pod that fail, and why; the metrics name neither."""
    async with running_lab() as lab, await kubelet_door(lab) as door:
        await lab.cluster.add_pod(ips=[POD_HOST], annotations=annotations(1))
        async with await pod_proxy(lab) as daemon:
            await daemon.ready()
            assert json.loads((await daemon.admin("/api/v1/failing"))[1])["failing"] == []
            door.refuse()
            for path in (kubelet_path(door.port), kubelet_path(door.port), pod_path()):
                assert await status(daemon, path) == 502
            number, text = await daemon.admin("/api/v1/failing")
            rows = json.loads(text)["failing"]
            assert number == 200
            told = {(row["kind"], row["name"], row["address"], row["failures"]) for row in rows}
            assert told == {
                ("node", "node-a", f"{LOOPBACK}:{door.port}", 2),
                ("pod", "shop/web-1", f"{POD_HOST}:1", 1),
            }
            assert {row["outcome"] for row in rows} == {"kubelet_unreachable", "pod_unreachable"}
            _, page = await daemon.admin("/metrics")
            assert "web-1" not in page
            assert "node-a" not in page
            assert "what-prometheus-shows" not in text + page


async def test_histograms() -> None:
    """Each scrape is in both histograms, whose buckets add up."""
    async with running_lab() as lab:
        kubelet = await lab.cluster.add_kubelet("node-a")
        async with await lab.proxy() as daemon:
            await daemon.ready()
            for _ in range(3):
                assert (await scrape(daemon, kubelet_path(kubelet.port))).status == 200
            for name in ("scrape_duration", "upstream_duration"):
                await daemon.measures(f'proxy_{name}_seconds_bucket{{le="+Inf"}}', 3)
                assert await daemon.metric(f"proxy_{name}_seconds_count") == 3
                assert 0 < (await daemon.metric(f"proxy_{name}_seconds_sum") or 0) < 10


async def https(daemon: Daemon, context: ssl.SSLContext, path: str) -> int:
    """Return the status of one scrape over TLS."""
    url = f"https://{LOOPBACK}:{await daemon.port('port')}{path}"
    async with aiohttp.ClientSession(timeout=LIMIT) as session, session.get(url, ssl=context) as response:
        await response.read()
        return response.status


async def test_tls_and_client_certificates_as_files_change(tmp_path: Path) -> None:
    """Callers with a certificate of the present authority are served; a replaced one counts within seconds."""
    authority, clients, others = trustme.CA(), trustme.CA(), trustme.CA()
    files = Files(tmp_path, authority, clients)
    async with running_lab() as lab:
        kubelet = await lab.cluster.add_kubelet("node-a")
        settings = {
            "TLS_CERT_FILE": str(files.certificate),
            "TLS_KEY_FILE": str(files.key),
            "TLS_CLIENT_CA_FILE": str(files.client_ca),
        }
        async with await lab.proxy(**settings) as daemon:
            await daemon.ready()
            old, new = caller_context(authority, clients), caller_context(authority, others)
            path = kubelet_path(kubelet.port)
            assert await https(daemon, old, path) == 200
            with pytest.raises(aiohttp.ClientError):
                await https(daemon, new, path)
            files.trust(others)
            await daemon.until_said("a new certificate or authority for callers is in use")
            assert await https(daemon, new, path) == 200
            with pytest.raises(aiohttp.ClientError):
                await https(daemon, old, path)
            number, text = await daemon.admin("/healthz")
            assert (number, text) == (200, "ok\n"), "the admin port stays as it was"


async def test_load_of_scrapes_through_sigterm() -> None:
    """Nothing fails while it still accepts, and of those under way when it no longer does each one finishes."""
    async with (
        running_lab() as lab,
        await kubelet_door(lab) as door,
        await lab.proxy(DRAIN_DELAY="6", SCRAPE_CONCURRENCY_PER_NODE="64") as daemon,
    ):
        await daemon.ready()
        url = f"http://{LOOPBACK}:{await daemon.port('port')}{kubelet_path(door.port)}"
        async with aiohttp.ClientSession(timeout=LIMIT) as session:

            async def one() -> None:
                async with session.get(url) as response:
                    assert (response.status, await response.read()) == (200, recorded_metrics())

            async def on_and_on(until: float) -> int:
                count = 0
                while time.monotonic() < until:
                    await one()
                    count += 1
                return count

            load = [asyncio.create_task(on_and_on(time.monotonic() + 1.2)) for _ in range(8)]
            await asyncio.sleep(0.5)
            daemon.send(signal.SIGTERM)
            await daemon.until_said("draining")
            assert all(count > 0 for count in await asyncio.gather(*load))
            door.stall()
            under_way = [asyncio.create_task(one()) for _ in range(16)]
            await asyncio.sleep(0.6)
            await door.heal()
            await asyncio.gather(*under_way)
        assert await daemon.ended(STOP_WITHIN) == 0


@pytest.mark.parametrize(("files", "code"), [(500, 2), (2000, 0)])
def test_more_scrapes_than_the_system_has_files_for(tmp_path: Path, files: int, code: int) -> None:
    """A concurrency beyond the limit of open files is refused by name; where only connections are too many it runs."""
    config = tmp_path / "kubeconfig"
    config.write_text(kubeconfig("127.0.0.1:1", Authority(), {"token": "t"}))
    environment = {"PATH": os.environ["PATH"], "KUBECONFIG": str(config), "PORT": "0", "ADMIN_PORT": "0"}
    command = f"ulimit -n {files}; exec '{sys.executable}' -m k8s_consul_registrar proxy"
    said = ""
    with subprocess.Popen(
        ["sh", "-c", command], env={**environment, "DRAIN_DELAY": "0"}, stderr=subprocess.PIPE, text=True
    ) as proxy:
        assert proxy.stderr is not None
        for line in proxy.stderr:
            said += line
            if "proxy starts" in line:
                proxy.terminate()
    assert proxy.returncode == code, said
    assert ("SCRAPE_CONCURRENCY: 512 scrapes" in said) is bool(code)
    assert ("fewer connections are kept" in said) is not bool(code)
