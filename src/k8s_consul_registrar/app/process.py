"""What every mode shows about its own process."""

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from k8s_consul_registrar import __version__


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
    return registry
