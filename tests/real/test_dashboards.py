"""The dashboards on a real Prometheus that scrapes a registrar and a proxy: each panel has something to show."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from k8s_consul_registrar.sandbox.consul_release import NEWEST, ConsulOptions
from support.cluster import PROXY_RULES, REGISTRAR_RULES, rule
from support.files import DEPLOY
from support.lab import kubelet_path, running_lab, scrape
from support.processes import LOOPBACK
from support.real_servers import REAL, RealPrometheus, fetched_prometheus, real_prometheus
from support.waiting import until

pytestmark = [REAL, pytest.mark.long]

DASHBOARDS = ("grafana-registrar.json", "grafana-proxy.json")
SHOWN = {"Authorization": "Bearer what-prometheus-shows"}
VARIABLES = {"$__rate_interval": "1m", "$cluster": "lab", "$job": "ours", "$instance": ".+"}


def panels() -> Iterator[tuple[str, str]]:
    """Yield the title of each panel with a query as Grafana sends it, without the bound that hides zeros."""
    for name in DASHBOARDS:
        for panel in json.loads((DEPLOY / name).read_text())["panels"]:
            for target in panel.get("targets", ()):
                expression = target["expr"].removesuffix(" > 0")
                for variable, value in VARIABLES.items():
                    expression = expression.replace(variable, value)
                yield f"{name} {panel['title']}", expression


def config(ports: list[int]) -> str:
    """Return the configuration of a Prometheus that scrapes these ports each second and evaluates our rules."""
    targets = [{"targets": [f"{LOOPBACK}:{port}" for port in ports], "labels": {"cluster": "lab"}}]
    job = {"job_name": "ours", "static_configs": targets}
    settings: dict[str, Any] = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(DEPLOY / "alerts.yaml")],
        "scrape_configs": [job],
    }
    return yaml.safe_dump(settings)


async def empty_panels(prometheus: RealPrometheus) -> list[str]:
    """Return the panels whose query yields nothing."""
    return [f"{title}: {query}" for title, query in panels() if not await prometheus.query(query)]


async def test_every_panel_has_data_of_a_live_registrar_and_proxy() -> None:
    """Each query of both dashboards yields series once there are Pods, a Service, scrapes and events."""
    async with running_lab(ConsulOptions(NEWEST, is_server=False)) as lab:
        inbound = lab.folder / "inbound"
        inbound.write_text("what-prometheus-shows\n")
        pods, services = rule("list watch", "pods"), rule("list watch", "services endpointslices")
        lab.token_file.write_text(await lab.cluster.token([*REGISTRAR_RULES, *PROXY_RULES, pods, services]))
        kubelet = await lab.cluster.add_kubelet("node-a")
        await lab.cluster.add_pod("web-1")
        served = {"HTTP_SD_PORT": "0", "HTTP_SD_BEARER_TOKEN_FILE": str(inbound)}
        relayed = {"PROXY_PODS": "true", "PROXY_BEARER_TOKEN_FILE": str(inbound), "PROXY_WORKERS": "2"}
        async with (
            await lab.registrar(DISCOVER="pods,nodes,services", **served) as registrar,
            await lab.proxy(**relayed) as proxy,
        ):
            await registrar.ready()
            await proxy.ready()
            ports = [await one.port("admin_port") for one in (registrar, proxy)]
            async with real_prometheus(config(ports), tools=fetched_prometheus("2.53")) as prometheus:
                number = 2

                async def is_all_shown() -> bool:
                    nonlocal number
                    await lab.cluster.add_pod(f"web-{number}", ips=[f"198.51.100.{10 + number}"])
                    number += 1
                    assert (await scrape(proxy, kubelet_path(kubelet.port), SHOWN)).status == 200
                    return not await empty_panels(prometheus)

                try:
                    await until(is_all_shown, every=1.0)
                except TimeoutError:
                    assert await empty_panels(prometheus) == []
