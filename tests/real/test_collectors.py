"""The Prometheus and VictoriaMetrics of today find Pods by http_sd and scrape them through the proxy.

The Pods run the client libraries of Python and Go. A Python one serves its text with a length, another by the
library's own request handler, which ends the body by closing the connection; the Go one is a Prometheus.
"""

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from http.server import ThreadingHTTPServer
from typing import Any, NamedTuple, Protocol

import prometheus_client
import pytest
import yaml
from prometheus_client.exposition import MetricsHandler, choose_encoder

from support.cluster import PROXY_RULES, REGISTRAR_RULES, rule
from support.files import ROOT
from support.lab import running_lab
from support.processes import LOOPBACK
from support.real_servers import (
    NEWER,
    REAL,
    fetched_prometheus,
    fetched_victoria,
    real_prometheus,
    real_victoria,
)
from support.waiting import until

pytestmark = [REAL, pytest.mark.long]

POD_HOST = "127.0.0.2"
PROTOBUF = "application/vnd.google.protobuf"


class Collector(Protocol):
    """A running Prometheus or VictoriaMetrics."""

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the samples of an instant query."""
        ...

    async def targets(self) -> list[dict[str, Any]]:
        """Return the active targets."""
        ...


class Pod(MetricsHandler):
    """The client library's own handler: HTTP/1.0, and a body without a length, ended by close."""

    accepted: list[str]

    def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
        """Answer, and note what the collector accepts."""
        self.accepted.append(self.headers["Accept"])
        super().do_GET()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class PodWithLength(Pod):
    """The client library's text with a Content-Length, as its WSGI and ASGI applications send it."""

    def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
        """Answer, and note what the collector accepts."""
        self.accepted.append(self.headers["Accept"])
        encode, content_type = choose_encoder(self.headers["Accept"])
        body = encode(self.registry)
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Serving(NamedTuple):
    """A Pod that serves metrics: its port, and the samples of one that must be there."""

    port: int
    expression: str
    value: str


@contextlib.asynccontextmanager
async def python_pod(accepted: list[str], *, handler: type[Pod]) -> AsyncIterator[Serving]:
    """Run the Python client library at the address of the tests' Pod."""
    registry = prometheus_client.CollectorRegistry()
    prometheus_client.Gauge("a_gauge", "A gauge.", registry=registry).set(42)
    prometheus_client.Histogram("a_histogram", "A histogram.", registry=registry).observe(0.3)
    bound = type("Bound", (handler,), {"registry": registry, "accepted": accepted})
    with ThreadingHTTPServer((POD_HOST, 0), bound) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield Serving(server.server_port, "a_histogram_count", "1")
        finally:
            await asyncio.to_thread(server.shutdown)
            thread.join()


@contextlib.asynccontextmanager
async def go_pod(_: list[str]) -> AsyncIterator[Serving]:
    """Run the Go client library at the address of the tests' Pod; it answers in protobuf where asked to."""
    async with real_prometheus("{}", tools=fetched_prometheus("3.5"), host=POD_HOST) as server:
        yield Serving(server.port, "prometheus_ready", "1")


def prometheus(version: str, job: dict[str, Any]) -> AbstractAsyncContextManager[Collector]:
    """Run a Prometheus that asks for protobuf first."""
    protocols = ["PrometheusProto", "OpenMetricsText1.0.0", "PrometheusText0.0.4"]
    (discovery,) = job["http_sd_configs"]
    quick = {**job, "http_sd_configs": [{**discovery, "refresh_interval": "1s"}]}
    config = yaml.safe_dump({"scrape_configs": [{**quick, "scrape_protocols": protocols}]})
    return real_prometheus(config, tools=fetched_prometheus(version))


def victoria(job: dict[str, Any]) -> AbstractAsyncContextManager[Collector]:
    """Run a VictoriaMetrics, which reads text only."""
    return real_victoria(yaml.safe_dump({"scrape_configs": [job]}), binary=fetched_victoria(NEWER))


def job_of(sd_port: int, token_file: str) -> dict[str, Any]:
    """Return a job with the example's own relabelling that finds targets by http_sd."""
    example = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())
    discovery: dict[str, Any] = {"url": f"http://{LOOPBACK}:{sd_port}/sd/targets"}
    return {
        "job_name": "pods",
        "scrape_interval": "1s",
        "scrape_timeout": "1s",
        "authorization": {"type": "Bearer", "credentials_file": token_file},
        "http_sd_configs": [discovery],
        "relabel_configs": example["scrape_configs"][0]["relabel_configs"],
    }


COLLECTORS: dict[str, Callable[[dict[str, Any]], AbstractAsyncContextManager[Collector]]] = {
    "prometheus-2.53": functools.partial(prometheus, "2.53"),
    "prometheus-3.5": functools.partial(prometheus, "3.5"),
    "victoria-metrics-1.145": victoria,
}
PODS = [
    pytest.param(functools.partial(python_pod, handler=PodWithLength), id="python-with-length"),
    pytest.param(functools.partial(python_pod, handler=Pod), id="python-ended-by-close"),
    pytest.param(go_pod, id="go"),
]


@pytest.mark.parametrize("pod", PODS)
@pytest.mark.parametrize("name", COLLECTORS)
async def test_pod_found_by_http_sd_is_up_through_the_proxy(
    name: str, pod: Callable[[list[str]], AbstractAsyncContextManager[Serving]]
) -> None:
    """The target has the example's labels, `up` is 1, and the Pod's samples are there with their values."""
    accepted: list[str] = []
    async with running_lab() as lab, pod(accepted) as serving:
        annotations = {"prometheus.io/scrape": "true", "prometheus.io/port": str(serving.port)}
        await lab.cluster.add_pod(ips=[POD_HOST], host_ip=LOOPBACK, annotations=annotations)
        await lab.cluster.add_kubelet("node-a")
        token = lab.folder / "shown-by-collector"
        token.write_text("what-the-collector-shows")
        rules = [*REGISTRAR_RULES, *PROXY_RULES, rule("list watch", "pods")]
        lab.token_file.write_text(await lab.cluster.token(rules))
        async with (
            await lab.proxy(PROXY_PODS="true", PROXY_BEARER_TOKEN_FILE=str(token)) as proxy,
            await lab.registrar(
                CONSUL_BACKEND="none",
                HTTP_SD_PORT="0",
                DISCOVER="pods",
                POD_ADDRESS="proxy",
                PROXY_NODE_PORT=str(await proxy.port("port")),
            ) as registrar,
        ):
            await proxy.ready()
            await registrar.ready()
            job = job_of(await registrar.port("http_sd_port"), str(token))
            async with COLLECTORS[name](job) as collector:
                await _scrapes(collector, serving)
    assert {PROTOBUF in each for each in accepted} <= {name.startswith("prometheus")}


async def _scrapes(collector: Collector, serving: Serving) -> None:
    """Wait until the Pod is up and its samples are there; on a slow machine a scrape of a second may fail."""
    samples: list[dict[str, Any]] = []

    async def is_scraped() -> bool:
        samples[:] = await collector.query(serving.expression)
        ups = [one["value"][1] for one in await collector.query("up")]
        health = [one["health"] for one in await collector.targets()]
        return ups == ["1"] and health == ["up"] and len(samples) == 1

    await until(is_scraped)
    (sample,) = samples
    labels = {key: sample["metric"].get(key) for key in ("job", "kind", "namespace", "pod", "cluster")}
    assert labels == {"job": "pods", "kind": "pod", "namespace": "shop", "pod": "web-1", "cluster": "lab"}
    assert sample["value"][1] == serving.value
