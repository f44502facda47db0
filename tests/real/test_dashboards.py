"""Dashboards and alerts on a real Prometheus that scrapes a registrar and a proxy."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from e2e.test_services import SERVICES, add_service, allow
from k8s_consul_registrar.sandbox.consul_release import NEWEST, ConsulOptions
from support.cluster import MERGE_PATCH, PROXY_RULES, REGISTRAR_RULES, rule
from support.files import DEPLOY
from support.lab import kubelet_path, running_lab, scrape
from support.processes import LOOPBACK
from support.real_servers import REAL, RealPrometheus, fetched_prometheus, real_prometheus
from support.waiting import until

pytestmark = [REAL, pytest.mark.long]

DASHBOARDS = ("grafana-registrar.json", "grafana-proxy.json")
SHOWN = {"Authorization": "Bearer what-prometheus-shows"}
VARIABLES = {"$__rate_interval": "1m", "$cluster": "lab", "$job": "ours", "$instance": ".+"}


class Query(NamedTuple):
    """A panel's title, its query, and the labels that its legend shows."""

    title: str
    expression: str
    legend: frozenset[str]


def queries() -> Iterator[Query]:
    """Yield each panel's queries as Grafana sends them, without the bound that hides zeros."""
    for name in DASHBOARDS:
        for panel in json.loads((DEPLOY / name).read_text())["panels"]:
            for target in panel.get("targets", ()):
                expression = target["expr"].removesuffix(" > 0")
                for variable, value in VARIABLES.items():
                    expression = expression.replace(variable, value)
                legend = frozenset(re.findall(r"{{\s*(\w+)\s*}}", target["legendFormat"]))
                yield Query(f"{name} {panel['title']}", expression, legend)


def config(ports: list[int], rules: Path = DEPLOY / "alerts.yaml") -> str:
    """Return the configuration of a Prometheus that scrapes these ports each second and evaluates rules."""
    targets = [{"targets": [f"{LOOPBACK}:{port}" for port in ports], "labels": {"cluster": "lab"}}]
    job = {"job_name": "ours", "static_configs": targets}
    settings: dict[str, Any] = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": [job],
    }
    return yaml.safe_dump(settings)


async def poor_panels(prometheus: RealPrometheus) -> list[str]:
    """Return the panels whose query yields nothing, or a series without a label that the legend shows."""
    found = []
    for one in queries():
        series = await prometheus.query(one.expression)
        if not series or not all(one.legend <= each["metric"].keys() for each in series):
            found.append(f"{one.title}: {one.expression}: {series}")
    return found


async def test_every_panel_has_data_of_a_live_registrar_and_proxy() -> None:
    """Each query of both dashboards yields series with the legend's labels once there are Pods, scrapes and events."""
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
                    return not await poor_panels(prometheus)

                try:
                    await until(is_all_shown, every=1.0)
                except TimeoutError:
                    assert await poor_panels(prometheus) == []


async def firing(prometheus: RealPrometheus) -> set[tuple[str, str]]:
    """Return the alerts that fire, each with the reason of a rejection or the kind it is about."""
    return {
        (labels["alertname"], labels.get("reason", labels.get("kind", "")))
        for labels in [one["metric"] for one in await prometheus.query('ALERTS{alertstate="firing"}')]
    }


async def test_alerts_tell_a_rejected_service_and_nothing_else(tmp_path: Path) -> None:
    """Without their waits no alert fires but those about the Service, and the proxy that does not run here."""
    at_once = tmp_path / "alerts.yaml"
    at_once.write_text(
        re.sub(r"^( +for:) .*", r"\1 0s", (DEPLOY / "alerts.yaml").read_text(), flags=re.MULTILINE)
    )
    absent = ("ProxyAbsent", "")
    async with running_lab(ConsulOptions(NEWEST, is_server=False)) as lab:
        await allow(lab)
        await add_service(lab, scheme="ftp")
        async with await lab.registrar(DISCOVER="pods,services") as registrar:
            await registrar.ready()
            settings = config([await registrar.port("admin_port")], at_once)
            async with real_prometheus(settings, tools=fetched_prometheus("2.53")) as prometheus:

                async def are(*expected: tuple[str, str]) -> None:
                    async def is_so() -> bool:
                        return await firing(prometheus) == {absent, *expected}

                    try:
                        await until(is_so, every=0.5)
                    except TimeoutError:
                        assert await firing(prometheus) == {absent, *expected}

                await are(("RegistrarRejections", "invalid_scheme"))
                repaired = {"metadata": {"annotations": {"prometheus.io/scheme": "http"}}}
                await lab.cluster.request("PATCH", f"{SERVICES}/web", repaired, content_type=MERGE_PATCH)
                await are()
