"""Figures that are counted when somebody asks for them, as metrics."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from k8s_consul_registrar.registrar.metrics import PREFIX


@dataclass(frozen=True, slots=True)
class Figures:
    """The counts of one moment, each with every value its labels can have.

    `targets` are by kind and state, `rejections` by reason, `restarts` by kind and cause, `lists` by kind;
    `heard_at` is in seconds of the epoch by kind, 0 before anything was heard.
    """

    targets: Mapping[tuple[str, str], int] = field(default_factory=dict)
    rejections: Mapping[str, int] = field(default_factory=dict)
    restarts: Mapping[tuple[str, str], int] = field(default_factory=dict)
    lists: Mapping[str, int] = field(default_factory=dict)
    heard_at: Mapping[str, float] = field(default_factory=dict)


class RegistrarCollector(Collector):
    """Turns figures into metrics; they are read at each scrape."""

    def __init__(self, read: Callable[[], Figures]) -> None:
        self._read = read

    def describe(self) -> list[Metric]:
        """Return nothing: the figures are there only once the registrar has started."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield every figure of this moment."""
        figures = self._read()
        targets = GaugeMetricFamily(
            f"{PREFIX}_targets", "Targets, by kind and where they stand.", labels=["kind", "state"]
        )
        for labels, count in figures.targets.items():
            targets.add_metric(labels, count)
        rejections = GaugeMetricFamily(
            f"{PREFIX}_rejections", "Objects refused as targets, by reason.", labels=["reason"]
        )
        for reason, count in figures.rejections.items():
            rejections.add_metric([reason], count)
        restarts = CounterMetricFamily(
            f"{PREFIX}_watch_restarts", "Watches and lists that ended, by cause.", labels=["kind", "cause"]
        )
        for labels, count in figures.restarts.items():
            restarts.add_metric(labels, count)
        lists = CounterMetricFamily(f"{PREFIX}_lists", "Lists read to their end.", labels=["kind"])
        for kind, count in figures.lists.items():
            lists.add_metric([kind], count)
        heard = GaugeMetricFamily(
            f"{PREFIX}_last_heard_timestamp_seconds",
            "When the API server last told anything of a kind (the oldest of its namespaces).",
            labels=["kind"],
        )
        for kind, at in figures.heard_at.items():
            heard.add_metric([kind], at)
        yield from (targets, rejections, restarts, lists, heard)
