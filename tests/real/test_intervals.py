"""A real Prometheus and a real VictoriaMetrics take annotated intervals and timeouts by HTTP service discovery."""

from typing import Any

import yaml

from k8s_consul_registrar.admin.http_sd import SD_PATH, HttpSdServer
from k8s_consul_registrar.model import Kind, ObjectKey
from k8s_consul_registrar.targets.resolve import TargetRules, resolve
from support.builders import annotated, make_pod
from support.files import ROOT
from support.real_servers import (
    NEWER,
    REAL,
    fetched_prometheus,
    fetched_victoria,
    real_prometheus,
    real_victoria,
)
from support.seen import Registrar, pod_target
from support.waiting import PATIENCE, until

pytestmark = REAL

RULES: list[dict[str, object]] = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())[
    "scrape_configs"
][0]["relabel_configs"]


def registrar() -> Registrar:
    """Return a registrar of one Pod with three sets of annotations."""
    given = annotated(port="9102", path="/a", path2="/b?x=1", scheme2="https", port3="9103")
    given |= {"prometheus.io/scrape-interval": "10s", "prometheus.io/scrape-interval2": "2m"}
    given |= {"prometheus.io/scrape-timeout2": "40s", "prometheus.io/scrape-slow3": "true"}
    resolved = resolve(make_pod(annotations=given), TargetRules())
    assert isinstance(resolved, tuple), resolved
    shown = Registrar()
    for number, target in enumerate(resolved):
        meta = dict(target.meta) | {"pod": f"web-{number}"}
        shown.put(pod_target(f"web-{number}", address=target.address, port=target.port, meta=meta))
    assert {row.key for row in shown.held.values()} == {
        ObjectKey(Kind.POD, "shop", f"web-{n}") for n in range(3)
    }
    return shown


def job(port: int) -> str:
    """Return a configuration whose timeout is longer than the first annotated interval."""
    return yaml.safe_dump(
        {
            "scrape_configs": [
                {
                    "job_name": "pods",
                    "scrape_interval": "30s",
                    "scrape_timeout": "15s",
                    "http_sd_configs": [{"url": f"http://localhost:{port}{SD_PATH}"}],
                    "relabel_configs": RULES,
                }
            ]
        }
    )


async def test_prometheus_scrapes_as_annotated() -> None:
    """Interval, timeout, path and scheme of each set are the annotated ones, and no target is dropped."""
    async with (
        HttpSdServer(port=0, view=registrar()) as server,
        real_prometheus(
            job(server.port), tools=fetched_prometheus("2.53"), mechanism="http_sd"
        ) as prometheus,
    ):

        async def are_there() -> bool:
            return len(await prometheus.targets()) == 3

        await until(are_there, within=2 * PATIENCE)
        found = sorted(await prometheus.targets(), key=lambda one: one["labels"]["pod"])
        assert [(one["scrapeInterval"], one["scrapeTimeout"], one["scrapeUrl"]) for one in found] == [
            ("10s", "10s", "http://198.51.100.10:9102/a"),
            ("2m", "40s", "https://198.51.100.10:9102/b?x=1"),
            ("5m", "30s", "http://198.51.100.10:9103/a"),
        ]


async def test_victoria_metrics_scrapes_as_annotated() -> None:
    """Its own reading of the same labels keeps every target, with the annotated interval and timeout."""
    async with (
        HttpSdServer(port=0, view=registrar()) as server,
        real_victoria(job(server.port), binary=fetched_victoria(NEWER)) as victoria,
    ):

        async def are_there() -> bool:
            return len(await victoria.targets()) == 3

        await until(are_there, within=2 * PATIENCE)
        found: list[dict[str, Any]] = await victoria.targets()
        shown = {one["labels"]["pod"]: one for one in found}
        assert {pod: one["scrapeUrl"].partition("?")[0] for pod, one in shown.items()} == {
            "web-0": "http://198.51.100.10:9102/a",
            "web-1": "https://198.51.100.10:9102/b",
            "web-2": "http://198.51.100.10:9103/a",
        }
        discovered = {pod: one["discoveredLabels"] for pod, one in shown.items()}
        times = {
            pod: (labels.get("__scrape_interval__"), labels.get("__scrape_timeout__"))
            for pod, labels in discovered.items()
        }
        assert times["web-1"] == ("2m", "40s")
        assert times["web-2"] == ("5m", "30s")
