"""The proxy's figures for the admin port, read off the relay's plain counts when somebody asks."""

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from k8s_consul_registrar.proxy.outcomes import ProxyStats

PREFIX = "k8s_consul_registrar_proxy"


class ProxyCollector(Collector):
    """Turns the relay's figures into metrics; no label per node, of which there may be thousands."""

    def __init__(self, stats: Callable[[], ProxyStats]) -> None:
        self._stats = stats

    def describe(self) -> list[Metric]:
        """Return nothing: the figures are collected only once the relay has started."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield every figure of this moment."""
        stats = self._stats()
        scrapes = CounterMetricFamily(f"{PREFIX}_scrapes", "Requests, by how they ended.", labels=["outcome"])
        for outcome, count in stats.outcomes.items():
            scrapes.add_metric([outcome.value], count)
        yield scrapes
        for name, text, value in (
            ("body_bytes", "Bytes of bodies passed on.", stats.body_bytes),
            ("kubelet_dials", "Connections opened to kubelets.", stats.dials),
            ("kubelet_reuses", "Scrapes sent over a kept connection.", stats.reuses),
            ("kubelet_retries", "Scrapes sent again since a kept connection had closed.", stats.retries),
        ):
            yield CounterMetricFamily(f"{PREFIX}_{name}", text, value=value)
        for name, text, value in (
            ("scrapes_in_flight", "Scrapes under way at kubelets.", stats.running),
            ("scrapes_waiting", "Scrapes that wait for a place.", stats.waiting),
            ("callers", "Open connections of callers.", stats.callers),
            ("kept_connections", "Idle connections to kubelets.", stats.kept),
            ("nodes", "Nodes that can be scraped.", stats.nodes),
            ("nodes_known", "Whether the Nodes are known.", int(stats.nodes_known)),
        ):
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, value=value)
