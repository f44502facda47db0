"""The proxy's figures for the admin port, read from the relay's plain counts on each request."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from k8s_consul_registrar.proxy.stats import BOUNDS, ProxyStats

PREFIX = "k8s_consul_registrar_proxy"


class ProxyCollector(Collector):
    """Turns the relay's figures into metrics; no label per node, of which there may be thousands."""

    def __init__(
        self,
        stats: Callable[[], ProxyStats],
        blindness: Callable[[], Mapping[str, float]] = dict,
        contested: Callable[[], int] = int,
    ) -> None:
        """Read `blindness`, the seconds for which a kind is not followed, and `contested` addresses of Nodes."""
        self._stats = stats
        self._blindness = blindness
        self._contested = contested

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
            ("connections_evicted", "Connections of clients closed to make room for others.", stats.evicted),
            ("connections_denied", "Connections of clients closed at once, for lack of room.", stats.denied),
            ("kubelet_dials", "Connections opened to kubelets and Pods.", stats.dials),
            ("kubelet_reuses", "Scrapes sent over a kept connection.", stats.reuses),
            ("kubelet_retries", "Scrapes sent again since a kept connection had closed.", stats.retries),
        ):
            yield CounterMetricFamily(f"{PREFIX}_{name}", text, value=value)
        for name, text, value in (
            ("scrapes_in_flight", "Scrapes under way at kubelets and Pods.", stats.running),
            ("scrapes_waiting", "Scrapes that wait for a place.", stats.waiting),
            ("callers", "Open connections of callers.", stats.callers),
            ("kept_connections", "Idle connections to kubelets and Pods.", stats.kept),
            ("nodes", "Nodes that can be scraped.", stats.nodes),
            ("contested_addresses", "Addresses that several Nodes claim.", self._contested()),
            ("nodes_known", "Whether the Nodes are known.", int(stats.nodes_known)),
            ("pods", "Pods that can be scraped.", stats.pods),
            ("pods_known", "Whether the Pods are known.", int(stats.pods_known)),
        ):
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, value=value)
        if stats.workers is not None:
            yield GaugeMetricFamily(f"{PREFIX}_workers", "Workers that accept callers.", value=stats.workers)
            yield CounterMetricFamily(
                f"{PREFIX}_worker_deaths",
                "Workers that ended and were started again.",
                value=stats.worker_deaths,
            )
        yield from self._times(stats)
        blind = GaugeMetricFamily(
            f"{PREFIX}_blind_seconds",
            "For how long the API server is not followed, by kind; what was known last is served.",
            labels=["kind"],
        )
        for kind, seconds in self._blindness().items():
            blind.add_metric([kind], seconds)
        yield blind

    @staticmethod
    def _times(stats: ProxyStats) -> Iterator[Metric]:
        for name, text, times in (
            ("scrape_duration", "From a request to the end of its answer.", stats.durations),
            ("upstream_duration", "From asking a kubelet or Pod to its first byte.", stats.upstream_times),
        ):
            count = 0
            buckets = []
            for bound, held in zip((*map(str, BOUNDS), "+Inf"), times.counts, strict=True):
                count += held
                buckets.append((bound, float(count)))
            yield HistogramMetricFamily(
                f"{PREFIX}_{name}_seconds", text, buckets=buckets, sum_value=times.total
            )
