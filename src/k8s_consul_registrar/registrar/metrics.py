"""The registrar's metrics: every label value is known in advance and at zero from the start."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
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


class RegistrarMetrics:
    """Counters and gauges of the reconciler, kept in the registry that is handed in."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.passes = Counter(
            f"{PREFIX}_passes", "Resyncs, and batches that wrote something.", ["outcome"], registry=registry
        )
        self.pass_seconds = Histogram(
            f"{PREFIX}_pass_duration_seconds",
            "Time that a resync or a batch took.",
            registry=registry,
            buckets=(0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120),
        )
        self.writes = Counter(
            f"{PREFIX}_writes", "Services written to Consul.", ["verb", "outcome"], registry=registry
        )
        self.event_lag = Histogram(
            f"{PREFIX}_event_lag_seconds",
            "Time from an event of the API server to Consul's acknowledgement of what it led to.",
            registry=registry,
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
        )
        self.last_success = Gauge(
            f"{PREFIX}_last_success_timestamp_seconds",
            "When a resync or a batch last succeeded.",
            registry=registry,
        )
        self.last_full_pass = Gauge(
            f"{PREFIX}_last_full_pass_timestamp_seconds",
            "When everything was last compared.",
            registry=registry,
        )
        self.conflicts = Gauge(
            f"{PREFIX}_conflicts",
            "Service IDs that objects ask for and that belong to something else.",
            registry=registry,
        )
        self.held = Gauge(
            f"{PREFIX}_brake_held_services", "Removals held until lists agree.", registry=registry
        )
        self.kept = Gauge(
            f"{PREFIX}_kept_services", "Unwanted services left alone, by why.", ["why"], registry=registry
        )
        self.awaiting_proxy = Gauge(
            f"{PREFIX}_awaiting_proxy_services",
            "Services that stay at their Pods' own addresses until the proxy serves Pods.",
            registry=registry,
        )
        self.orphans = Gauge(
            f"{PREFIX}_orphaned_services",
            "Services that stay at nodes of lost agents, by why.",
            ["why"],
            registry=registry,
        )
        self.orphan_removals = Counter(
            f"{PREFIX}_orphan_removals",
            "Services removed from nodes of lost agents.",
            ["outcome"],
            registry=registry,
        )
        self.agent_problem = Gauge(
            f"{PREFIX}_agent_problem",
            "1 while CONSUL_ADDRESS does not suit the agent backend, by why.",
            ["problem"],
            registry=registry,
        )
        self.ghosts = Gauge(
            f"{PREFIX}_ghost_services",
            "Services that the agent left in the catalog and that could not be removed there.",
            registry=registry,
        )
        self.ghost_removals = Counter(
            f"{PREFIX}_ghost_removals",
            "Services removed from the catalog after the agent left them there.",
            ["outcome"],
            registry=registry,
        )
        self.source_up = Gauge(
            f"{PREFIX}_source_followed",
            "1 while a kind is listed completely and followed since (the worst of its namespaces).",
            ["kind"],
            registry=registry,
        )
        self.leader = Gauge(
            f"{PREFIX}_leader",
            "1 while this replica writes; always where there is no election.",
            registry=registry,
        )
        self.consul_up = Gauge(
            f"{PREFIX}_consul_up", "1 unless Consul's latest read or write failed.", registry=registry
        )
        self.shared_endpoints = Gauge(
            f"{PREFIX}_shared_endpoints",
            "Addresses and ports that several living Pods claim; all of them stay registered.",
            registry=registry,
        )
        self.resyncs = Counter(f"{PREFIX}_resyncs", "Complete comparisons with Consul.", registry=registry)
        self.internal_errors = Counter(
            f"{PREFIX}_internal_errors",
            "Errors in this program, each confined to one service ID, source or task.",
            registry=registry,
        )
        self.kubernetes_events = Counter(
            f"{PREFIX}_kubernetes_events",
            "Events about objects that were to be written to the API server, by outcome.",
            ["outcome"],
            registry=registry,
        )
        self._zero()
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

    def _zero(self) -> None:
        for kind in Kind:
            self.source_up.labels(kind.value)
        for outcome in PASS_OUTCOMES:
            self.passes.labels(outcome)
        for verb in WRITE_VERBS:
            for outcome in WRITE_OUTCOMES:
                self.writes.labels(verb, outcome)
        for outcome in WRITE_OUTCOMES:
            self.orphan_removals.labels(outcome)
            self.ghost_removals.labels(outcome)
        for outcome in EventOutcome:
            self.kubernetes_events.labels(outcome.value)
        for problem in AgentProblem:
            self.agent_problem.labels(problem.value)
        for why in Kept:
            self.kept.labels(why.value)
        for stays in Stays:
            self.orphans.labels(stays.value)


class Figures(msgspec.Struct, frozen=True):
    """The counts of one moment, each with every value its labels can have.

    `targets` are by kind and state, `rejections` by reason, `restarts` by kind and cause, `lists` by kind;
    `heard_at` is in seconds of the epoch by kind, 0 before the first message. `yielded` are endpoints of Services by
    winner, empty if no Services are followed; `notes` are targets by note.
    """

    targets: Mapping[tuple[str, str], int] = msgspec.field(default_factory=dict)
    rejections: Mapping[str, int] = msgspec.field(default_factory=dict)
    restarts: Mapping[tuple[str, str], int] = msgspec.field(default_factory=dict)
    lists: Mapping[str, int] = msgspec.field(default_factory=dict)
    heard_at: Mapping[str, float] = msgspec.field(default_factory=dict)
    yielded: Mapping[str, int] = msgspec.field(default_factory=dict)
    notes: Mapping[str, int] = msgspec.field(default_factory=dict)


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
        yielded = GaugeMetricFamily(
            f"{PREFIX}_yielded_endpoints",
            "Endpoints of Services at whose place something else is scraped, by what.",
            labels=["winner"],
        )
        for winner, count in figures.yielded.items():
            yielded.add_metric([winner], count)
        adjusted = GaugeMetricFamily(
            f"{PREFIX}_adjusted_targets",
            "Targets that differ from what is annotated, by why.",
            labels=["why"],
        )
        for note, count in figures.notes.items():
            adjusted.add_metric([note], count)
        yield from (targets, rejections, restarts, lists, heard, yielded, adjusted)
