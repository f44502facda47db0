"""The daemon's own metrics: `/metrics`, and those of the process that every mode has."""

from collections.abc import Awaitable, Callable, Iterator

from aiohttp import web
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.exposition import choose_encoder
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from k8s_consul_registrar import __version__
from k8s_consul_registrar.rotating import LoadStatus


async def nothing() -> None:
    """Prepare nothing."""


def metrics_routes(
    registry: CollectorRegistry, prepare: Callable[[], Awaitable[None]] = nothing
) -> list[web.RouteDef]:
    """Return `/metrics`: the registry in the text format, or in OpenMetrics where `Accept` asks for it.

    `prepare` is awaited first: it counts what takes longer than the loop may stand still.
    """

    async def metrics(request: web.Request) -> web.Response:
        await prepare()
        encode, content_type = choose_encoder(",".join(request.headers.getall("Accept", [])))
        return web.Response(body=encode(registry), headers={"Content-Type": content_type})

    return [web.get("/metrics", metrics)]


def new_registry(mode: str) -> CollectorRegistry:
    """Return a registry that holds the metrics of the process."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    info = Gauge(
        "k8s_consul_registrar_build_info",
        "Always 1; its labels tell what runs.",
        ["version", "mode"],
        registry=registry,
    )
    info.labels(__version__, mode).set(1)
    registry.register(RotatingFilesCollector())
    return registry


class RotatingFilesCollector(Collector):
    """The gauge of everything that is loaded from files, or by a program, and renewed while we run."""

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the gauge, with a sample for each setting in use."""
        family = GaugeMetricFamily(
            "k8s_consul_registrar_rotating_file_ok",
            "1 while the files of a setting can be used as they are, 0 while the last good value stands in.",
            labels=["of"],
        )
        for of, problem in sorted(LoadStatus.problems().items()):
            family.add_metric([of], 0.0 if problem else 1.0)
        yield family
