"""The registrar's own figures, every label known in advance and at zero from the start."""

from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from k8s_consul_registrar.model import Kind
from k8s_consul_registrar.registrar.orphans import Stays
from k8s_consul_registrar.registrar.plan import Kept

PASS_OUTCOMES = ("success", "partial", "failure")
WRITE_VERBS = ("register", "update", "deregister")
WRITE_OUTCOMES = ("success", "refused")
PREFIX = "k8s_consul_registrar"


class RegistrarMetrics:
    """Counters and gauges of the reconciler, kept in the registry that is handed in."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.passes = Counter(
            f"{PREFIX}_passes", "Passes over Consul, by outcome.", ["outcome"], registry=registry
        )
        self.pass_seconds = Histogram(
            f"{PREFIX}_pass_duration_seconds",
            "Time a pass took.",
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
            f"{PREFIX}_last_success_timestamp_seconds", "When a pass last succeeded.", registry=registry
        )
        self.last_full_pass = Gauge(
            f"{PREFIX}_last_full_pass_timestamp_seconds",
            "When everything was last compared.",
            registry=registry,
        )
        self.conflicts = Gauge(
            f"{PREFIX}_conflicts", "Service IDs we want that somebody else holds.", registry=registry
        )
        self.held = Gauge(
            f"{PREFIX}_brake_held_services", "Removals held until lists agree.", registry=registry
        )
        self.kept = Gauge(
            f"{PREFIX}_kept_services", "Unwanted services left alone, by why.", ["why"], registry=registry
        )
        self.orphans = Gauge(
            f"{PREFIX}_orphaned_services",
            "Services of ours that stay at nodes of lost agents, by why.",
            ["why"],
            registry=registry,
        )
        self.orphan_removals = Counter(
            f"{PREFIX}_orphan_removals",
            "Services removed from nodes of lost agents.",
            ["outcome"],
            registry=registry,
        )
        self.source_up = Gauge(
            f"{PREFIX}_source_followed",
            "Whether a kind is listed completely and followed since (the worst of its namespaces).",
            ["kind"],
            registry=registry,
        )
        self.leader = Gauge(
            f"{PREFIX}_leader",
            "Whether this replica writes; always where there is no election.",
            registry=registry,
        )
        self.consul_up = Gauge(
            f"{PREFIX}_consul_up", "Whether the last pass could use Consul.", registry=registry
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
        for why in Kept:
            self.kept.labels(why.value)
        for stays in Stays:
            self.orphans.labels(stays.value)
