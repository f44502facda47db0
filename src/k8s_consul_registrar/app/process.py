"""What every mode shows about its own process."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from k8s_consul_registrar import __version__
from k8s_consul_registrar.rotating import LoadStatus


def new_registry(mode: str) -> CollectorRegistry:
    """Make the registry of a mode's figures, with those of the process in it."""
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
