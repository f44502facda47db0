"""The registrar as a process between an API server and a real Consul: endpoints of Services."""

from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import yaml

from e2e.test_services import DISCOVER, ONE, POINTS, SLICES, TWO, add_service, overlay_rules, slice_body
from real.test_prometheus import an_application
from support.cluster import NAMESPACE, REGISTRAR_RULES
from support.files import ROOT
from support.lab import running_lab_with
from support.processes import LOOPBACK
from support.real_servers import (
    NEWER,
    REAL,
    RealConsul,
    RealPrometheus,
    RealVictoria,
    fetched_prometheus,
    fetched_victoria,
    real_consul,
    real_prometheus,
    real_victoria,
)
from support.waiting import PATIENCE, until

pytestmark = REAL


async def instances(consul: RealConsul, name: str) -> dict[str, dict[str, Any]]:
    """Return the instances of a service in the catalog by ID."""
    _, found = await consul.request("GET", f"/v1/catalog/service/{name}")
    return {one["ServiceID"]: one for one in found}


@pytest.mark.parametrize("backend", ["agent", "catalog"])
async def test_endpoints_are_instances_of_one_service_name(backend: str) -> None:
    """Consul has each endpoint under the Service's name, and loses the one that leaves its slice."""
    async with real_consul() as consul, running_lab_with(consul.address) as lab:
        await lab.cluster.add_namespace(NAMESPACE)
        lab.token_file.write_text(await lab.cluster.token([*REGISTRAR_RULES, *overlay_rules()]))
        await add_service(lab, path="/stats")
        await lab.cluster.request("POST", SLICES, slice_body("web-a", POINTS))
        async with await lab.registrar(CONSUL_BACKEND=backend, SYNC_PERIOD="600", **DISCOVER) as daemon:
            await daemon.ready()
            found = await instances(consul, "svc--shop--web")
            assert found.keys() == {ONE, TWO}
            meta = found[ONE]["ServiceMeta"]
            assert (meta["kind"], meta["service"], meta["metrics_path"]) == ("endpoint", "web", "/stats")
            assert (found[ONE]["ServiceAddress"], found[ONE]["ServicePort"]) == ("198.51.100.10", 9102)
            await lab.cluster.request("PUT", f"{SLICES}/web-a", slice_body("web-a", POINTS[1:]))

            async def is_gone() -> bool:
                return (await instances(consul, "svc--shop--web")).keys() == {TWO}

            await daemon.until(is_gone)


# A job that says other than the annotations do, with the relabelling of the example.
RULES = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())["scrape_configs"][0][
    "relabel_configs"
]
TEAM = {"action": "labelmap", "regex": "__meta_consul_service_metadata_target_(.+)"}
JOB = {"job_name": "all", "scrape_interval": "10m", "scrape_timeout": "9s", "relabel_configs": [*RULES, TEAM]}


def collector(
    name: str, consul: str, sd_port: int
) -> AbstractAsyncContextManager[RealPrometheus | RealVictoria]:
    """Run a collector that finds targets in one way."""
    http = {"http_sd_configs": [{"url": f"http://{LOOPBACK}:{sd_port}/sd/targets"}]}
    config = yaml.safe_dump({"scrape_configs": [JOB | http]})
    if name == "prometheus by http_sd":
        return real_prometheus(config, tools=fetched_prometheus("2.53"), mechanism="http_sd")
    if name == "victoria by consul_sd":
        config = yaml.safe_dump({"scrape_configs": [JOB | {"consul_sd_configs": [{"server": consul}]}]})
    return real_victoria(config, binary=fetched_victoria(NEWER))


@pytest.mark.parametrize("name", ["prometheus by http_sd", "victoria by http_sd", "victoria by consul_sd"])
async def test_collectors_scrape_services_as_annotated(name: str) -> None:
    """Interval, timeout, path, parameters, scheme and labels of each set of annotations are the annotated ones."""
    asked: list[dict[str, str]] = []
    heads: list[dict[str, str]] = []
    async with (
        an_application(asked, headers=heads) as port,
        real_consul() as consul,
        running_lab_with(consul.address) as lab,
    ):
        await lab.cluster.add_namespace(NAMESPACE)
        lab.token_file.write_text(await lab.cluster.token([*REGISTRAR_RULES, *overlay_rules()]))
        first = {"path": "/stats?format=prom", "scrape-interval": "1s", "scrape-timeout": "700ms"}
        second = {"path2": "/b", "scheme2": "https", "scrape-interval2": "2m", "scrape_timeout2": "40s"}
        await add_service(lab, port=str(port), **first, **second, **{"label-team": "blue"})
        await lab.cluster.request("POST", SLICES, slice_body("web-a", [{"ip": LOOPBACK, "pod": "web-1"}]))
        settings = {"CONSUL_BACKEND": "catalog", "HTTP_SD_PORT": "0", "TARGET_LABELS": "team"}
        settings |= {"SCRAPE_INTERVAL_MIN": "1s", "SYNC_PERIOD": "600", **DISCOVER}
        async with (
            await lab.registrar(**settings) as daemon,
        ):
            await daemon.ready()
            async with collector(name, consul.address, await daemon.port("http_sd_port")) as running:

                async def is_up() -> bool:
                    return "up" in {one["health"] for one in await running.targets()}

                await until(is_up, within=2 * PATIENCE)
                # The job's own interval would allow one scrape.
                await until(lambda: len(asked) >= 4, within=2 * PATIENCE)
                assert asked[-1] == {"format": "prom"}
                assert heads[-1]["X-Prometheus-Scrape-Timeout-Seconds"] in {"0.7", "0.700"}
                found = {one["scrapeUrl"].partition(":")[0]: one for one in await running.targets()}
                labels = found["http"]["labels"]
                shown = [labels[one] for one in ("kind", "namespace", "pod", "team")]
                assert shown == ["endpoint", NAMESPACE, "web-1", "blue"]
                assert found["https"]["scrapeUrl"].partition("?")[0] == f"https://{LOOPBACK}:{port}/b"
                if isinstance(running, RealPrometheus):
                    times = [
                        (found[one]["scrapeInterval"], found[one]["scrapeTimeout"])
                        for one in ("http", "https")
                    ]
                    assert times == [("1s", "700ms"), ("2m", "40s")]
