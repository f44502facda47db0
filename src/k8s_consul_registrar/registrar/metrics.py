"""The registrar's metrics: every label value is known in advance and at zero from the start."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import product
from typing import Any, TypeVar

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from k8s_consul_registrar.kube.events import EventOutcome
from k8s_consul_registrar.model import Kind
from k8s_consul_registrar.registrar.decide import Kept
from k8s_consul_registrar.registrar.orphans import Stays
from k8s_consul_registrar.registrar.status import AgentProblem

PASS_OUTCOMES = ("success", "partial", "failure")
WRITE_VERBS = ("register", "update", "deregister")
WRITE_OUTCOMES = ("success", "refused")
PREFIX = "k8s_consul_registrar"

MetricT = TypeVar("MetricT", bound=MetricWrapperBase)


class RegistrarMetrics:
    """Counters and gauges of the reconciler, kept in the registry that is handed in."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def make(kind: type[MetricT], name: str, about: str, /, **labels: Iterable[str]) -> MetricT:
            """Make a metric, with the values that its labels can have."""
            metric = kind(f"{PREFIX}_{name}", about, tuple(labels), registry=registry)
            for values in product(*labels.values()) if labels else ():
                metric.labels(*values)
            return metric

        self.passes = make(
            Counter, "passes", "Resyncs, and batches that wrote something.", outcome=PASS_OUTCOMES
        )
        self.pass_seconds = Histogram(
            f"{PREFIX}_pass_duration_seconds",
            "Time that a resync or a batch took.",
            registry=registry,
            buckets=(0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120),
        )
        self.writes = make(
            Counter, "writes", "Services written to Consul.", verb=WRITE_VERBS, outcome=WRITE_OUTCOMES
        )
        self.event_lag = Histogram(
            f"{PREFIX}_event_lag_seconds",
            "Time from an event of the API server to Consul's acknowledgement of what it led to.",
            registry=registry,
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
        )
        self.last_success = make(
            Gauge, "last_success_timestamp_seconds", "When a resync or a batch last succeeded."
        )
        self.last_full_pass = make(
            Gauge, "last_full_pass_timestamp_seconds", "When everything was last compared."
        )
        self.conflicts = make(
            Gauge, "conflicts", "Service IDs that objects ask for and that belong to something else."
        )
        self.held = make(Gauge, "brake_held_services", "Removals held until lists agree.")
        self.kept = make(Gauge, "kept_services", "Unwanted services left alone, by why.", why=Kept)
        self.awaiting_proxy = make(
            Gauge,
            "awaiting_proxy_services",
            "Services that stay at their Pods' own addresses until the proxy serves Pods.",
        )
        self.orphans = make(
            Gauge, "orphaned_services", "Services that stay at nodes of lost agents, by why.", why=Stays
        )
        self.orphan_removals = make(
            Counter, "orphan_removals", "Services removed from nodes of lost agents.", outcome=WRITE_OUTCOMES
        )
        self.agent_problem = make(
            Gauge,
            "agent_problem",
            "1 while CONSUL_ADDRESS does not suit the agent backend, by why.",
            problem=AgentProblem,
        )
        self.ghosts = make(
            Gauge,
            "ghost_services",
            "Services that the agent left in the catalog and that could not be removed there.",
        )
        self.ghost_removals = make(
            Counter,
            "ghost_removals",
            "Services removed from the catalog after the agent left them there.",
            outcome=WRITE_OUTCOMES,
        )
        self.source_up = make(
            Gauge,
            "source_followed",
            "1 while a kind is listed completely and followed since (the worst of its namespaces).",
            kind=Kind,
        )
        self.leader = make(Gauge, "leader", "1 while this replica writes; always where there is no election.")
        self.consul_up = make(Gauge, "consul_up", "1 unless Consul's latest read or write failed.")
        self.shared_endpoints = make(
            Gauge,
            "shared_endpoints",
            "Addresses and ports that several living Pods claim; all of them stay registered.",
        )
        self.resyncs = make(Counter, "resyncs", "Complete comparisons with Consul.")
        self.internal_errors = make(
            Counter,
            "internal_errors",
            "Errors in this program, each confined to one service ID, source or task.",
        )
        self.kubernetes_events = make(
            Counter,
            "kubernetes_events",
            "Events about objects that were to be written to the API server, by outcome.",
            outcome=EventOutcome,
        )
        self._written = {verb: self.writes.labels(verb, "success") for verb in WRITE_VERBS}

    def follows(self, kind: Kind, is_followed: bool | None) -> None:  # noqa: FBT001 - a reading, not a switch
        """Show whether a kind is followed; nothing (None) of one that is not looked at, which would alarm."""
        if is_followed is None:
            with suppress(KeyError):
                self.source_up.remove(kind.value)
        else:
            self.source_up.labels(kind.value).set(is_followed)

    def wrote_event(self, outcome: EventOutcome) -> None:
        """Count an Event by what became of it."""
        self.kubernetes_events.labels(outcome.value).inc()

    def wrote(self, verb: str, done: int, refused: int) -> None:
        """Count a batch of writes."""
        self._written[verb].inc(done)
        if refused:
            self.writes.labels(verb, "refused").inc(refused)


class Figures(msgspec.Struct, frozen=True):
    """The counts of one moment, each with every value its labels can have.

    `targets` are by kind and state, `rejections` by reason, `restarts` by kind and cause, `lists` by kind;
    `heard_at` is in seconds of the epoch by kind, 0 before the first message. `yielded` are endpoints of Services by
    winner, empty if no Services are followed; `notes` are targets by note, `withheld` writes by verb.
    """

    targets: Mapping[tuple[str, str], int] = msgspec.field(default_factory=dict)
    rejections: Mapping[str, int] = msgspec.field(default_factory=dict)
    restarts: Mapping[tuple[str, str], int] = msgspec.field(default_factory=dict)
    lists: Mapping[str, int] = msgspec.field(default_factory=dict)
    heard_at: Mapping[str, float] = msgspec.field(default_factory=dict)
    yielded: Mapping[str, int] = msgspec.field(default_factory=dict)
    notes: Mapping[str, int] = msgspec.field(default_factory=dict)
    withheld: dict[str, int] = msgspec.field(default_factory=dict)


class RegistrarCollector(Collector):
    """Turns figures into metrics; they are read at each scrape."""

    def __init__(self, read: Callable[[], Figures]) -> None:
        self._read = read

    def describe(self) -> list[Metric]:
        """Return nothing: the figures are there only once the registrar has started."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield every figure of this moment."""
        now = self._read()
        counter, gauge = CounterMetricFamily, GaugeMetricFamily
        heard = "When the API server last told anything of a kind (the oldest of its namespaces)."
        yielded = "Endpoints of Services at whose place something else is scraped, by what."
        adjusted = "Targets that differ from what is annotated, by why."
        withheld = "Writes that are due and that POLICY does not allow."
        ended = "Watches and lists that ended, by cause."
        rows: Sequence[
            tuple[
                type[CounterMetricFamily | GaugeMetricFamily], str, str, tuple[str, ...], Mapping[Any, float]
            ]
        ] = (
            (gauge, "targets", "Targets, by kind and where they stand.", ("kind", "state"), now.targets),
            (gauge, "rejections", "Objects refused as targets, by reason.", ("reason",), now.rejections),
            (counter, "watch_restarts", ended, ("kind", "cause"), now.restarts),
            (counter, "lists", "Lists read to their end.", ("kind",), now.lists),
            (gauge, "last_heard_timestamp_seconds", heard, ("kind",), now.heard_at),
            (gauge, "yielded_endpoints", yielded, ("winner",), now.yielded),
            (gauge, "adjusted_targets", adjusted, ("why",), now.notes),
            (gauge, "withheld_writes", withheld, ("verb",), dict.fromkeys(WRITE_VERBS, 0) | now.withheld),
        )
        for kind, name, about, labels, counts in rows:
            family = kind(f"{PREFIX}_{name}", about, labels=labels)
            for values, count in counts.items():
                family.add_metric([values] if isinstance(values, str) else values, count)
            yield family
