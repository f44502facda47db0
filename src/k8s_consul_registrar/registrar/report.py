"""Says what a pass did: one log line a pass, one a thing an operator has to act on, and the figures."""

import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet

from k8s_consul_registrar.model import Kind, Service, Source, Target, Written
from k8s_consul_registrar.registrar.gathering import Gathering
from k8s_consul_registrar.registrar.lag import Lag
from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from k8s_consul_registrar.registrar.news import News
from k8s_consul_registrar.registrar.plan import Kept, Plan
from k8s_consul_registrar.registrar.status import PassRecord, PassReport, RegistrarStatus
from k8s_consul_registrar.targets.wanted import Wanted
from k8s_consul_registrar.telemetry import get_logger

# Of many things of one sort the log names these many; the rest is a count.
MOST_NAMED = 20

log = get_logger("registrar")


def conflicts_of(plan: Plan) -> dict[str, str]:
    """Put the conflicts of a plan into words, by service ID."""
    return {one.id: f"wanted by {one.key}, held by {one.holder}" for one in plan.conflicts}


class Reporter:
    """Turns passes into log lines, metrics and the status."""

    def __init__(
        self,
        metrics: RegistrarMetrics,
        status: RegistrarStatus,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._status = status
        self._clock = clock
        self._news = News()
        self._gathering = Gathering()
        # What is shown already need not be shown again 50 times a second.
        self._is_leading = self._is_reached = False
        self._shown_sources: Mapping[Source, tuple[bool, str]] | None = None
        self._lag = Lag(metrics.event_lag.observe)

    def sources(self, wanted: Wanted) -> None:
        """Show how well each source is known."""
        shown = {source: (state.is_followed, state.problem) for source, state in wanted.sources.items()}
        if shown == self._shown_sources:
            return
        self._shown_sources = shown
        problems = {str(source): state.problem for source, state in wanted.sources.items() if state.problem}
        for about in self._status.source_problems.keys() - problems.keys():
            log.info("can be listed again", source=about)
        self._status.source_problems = problems
        for about, text in self._news.fresh("sources", problems):
            log.warning("cannot list; nothing of it is deregistered meanwhile", source=about, problem=text)
        for kind in Kind:
            states = [state for source, state in wanted.sources.items() if source.kind is kind]
            self._metrics.follows(kind, all(one.is_followed for one in states) if states else None)

    def leads(self) -> None:
        """Show that this replica writes."""
        if not self._is_leading:
            self._is_leading = True
            self._status.is_standby = False
            self._metrics.leader.set(1)

    def stands_by(self, wanted: Wanted) -> None:
        """Show that another replica writes; a standby is ready once it knows the cluster."""
        self._is_leading = False
        self._status.is_standby = True
        self._metrics.leader.set(0)
        self.tell_all()
        self.sources(wanted)
        if all(state.listed_at is not None for state in wanted.sources.values()):
            self._status.has_synced = True

    def planned(self, plan: Plan) -> None:
        """Show what a full comparison leaves alone, and what the brake holds."""
        self._status.conflicts = {one.id: one for one in plan.conflicts}
        self._status.lost = {one.key: one for one in plan.rejections}
        self._status.held = plan.held
        self._metrics.conflicts.set(len(plan.conflicts))
        self._metrics.held.set(sum(len(held.ids) for held in plan.held))
        for why in Kept:
            self._metrics.kept.labels(why.value).set(plan.kept[why])
        self._conflicts(self._news.fresh("conflicts", conflicts_of(plan)))
        brakes = {
            str(held.source): f"{len(held.ids)} services are missing from the list; waiting for lists that "
            f"agree for {held.wait:g} s: {', '.join(held.ids[:MOST_NAMED])}"
            for held in plan.held
        }
        for about, text in self._news.fresh("brake", brakes):
            log.warning("brake: a mass removal is held", source=about, held=text)

    def begins(self, wanted: Wanted) -> None:
        """Take in what a pass is to bring to Consul."""
        self._lag.heard(wanted.heard)

    def owes(self, ids: AbstractSet[str]) -> None:
        """Take in of which services a write is still owed; of all others none is."""
        self._lag.still_owed(ids)

    def wrote(self, verb: str, services: Sequence[Service | Target], written: Written) -> None:
        """Count a batch of writes and name what Consul refused of it; a long pass is alive while it writes."""
        self._status.ticked_at = self._clock()
        self._metrics.wrote(verb, written.done, len(written.failures))
        for service in services[:MOST_NAMED]:
            log.debug(verb, service=service.id, address=service.address, port=service.port)
        refused = {failure.id: failure.problem for failure in written.failures}
        if self._status.refused:
            for service in services:
                self._status.refused.pop(service.id, None)
        self._status.refused.update(refused)
        missed = refused.keys() | set(written.stale)
        self._lag.written(service.id for service in services if service.id not in missed)
        self._news.over("refused", (service.id for service in services if service.id not in refused))
        for about, text in self._news.further("refused", refused)[:MOST_NAMED]:
            log.warning("Consul refuses a service", verb=verb, service=about, problem=text)

    def passed_over_all(self, wanted: Wanted, report: PassReport) -> None:
        """Take in a full comparison: every standing figure is renewed."""
        self.sources(wanted)
        self._rejections(wanted, report)
        if all(state.listed_at is not None for state in wanted.sources.values()):
            self._status.has_synced = True

    def passed_over_changes(self, wanted: Wanted, plan: Plan) -> None:
        """Take in a pass over a few changes: only what is new in it is said."""
        self.sources(wanted)
        if self._status.conflicts or self._status.lost:
            for service_id, claims in wanted.claims.items():
                self._status.conflicts.pop(service_id, None)
                for target in claims:
                    self._status.lost.pop(target.key, None)
        self._status.conflicts.update({one.id: one for one in plan.conflicts})
        self._status.lost.update({one.key: one for one in plan.rejections})
        self._metrics.conflicts.set(len(self._status.conflicts))
        self._conflicts(self._news.further("conflicts", conflicts_of(plan)))
        facts = {str(one.key): f"{one.reason}: {one.detail}" for one in plan.rejections}
        for about, text in self._news.further("rejections", facts)[:MOST_NAMED]:
            log.warning("rejected", object=about, reason=text)

    def failed(self, problem: str) -> None:
        """Report that Consul cannot be used: nothing that is registered changes by it."""
        self._metrics.passes.labels("failure").inc()
        self._metrics.consul_up.set(0)
        self._is_reached = False
        self._status.consul_problem = problem
        for _, text in self._news.fresh("consul", {"consul": problem}):
            log.error("Consul cannot be used; trying again", problem=text)

    def reached(self) -> None:
        """Report that Consul can be used."""
        if self._is_reached:
            return
        self._is_reached = True
        self._metrics.consul_up.set(1)
        if self._status.consul_problem:
            log.info("Consul can be used again")
        self._status.consul_problem = ""
        self._news.fresh("consul", {})

    def passed(self, report: PassReport, *, is_full: bool) -> None:
        """Report how a pass ended, its time taken included."""
        if is_full or report.writes or report.refused:
            self._status.recent.appendleft(PassRecord(is_full, time.time(), report))
        self._metrics.passes.labels(report.outcome).inc()
        self._metrics.pass_seconds.observe(report.seconds)
        if not report.refused:
            self._metrics.last_success.set(time.time())
        if is_full:
            self._metrics.last_full_pass.set(time.time())
        if is_full:
            self.tell_all()
            _say(log.info, "pass", report)
        elif not report.writes:
            _say(log.debug, "changes", report)
        else:
            self._gathering.add(report)
            if self._status.has_synced:
                self.tell()
            else:
                self.tell_all()

    @property
    def tell_due(self) -> float:
        """When `tell` has something to tell, in seconds of the clock."""
        return self._gathering.due

    def tell(self) -> None:
        """Log what passes over changes did, if that is due."""
        if (gathered := self._gathering.take(self._clock())) is not None:
            _say(log.info, "changes", gathered.report, passes=gathered.passes)

    def tell_all(self) -> None:
        """Log the same, due or not."""
        if (gathered := self._gathering.rest()) is not None:
            _say(log.info, "changes", gathered.report, passes=gathered.passes)

    def _conflicts(self, facts: list[tuple[str, str]]) -> None:
        for about, text in facts[:MOST_NAMED]:
            log.warning("conflict: the service ID is not ours to write", service=about, problem=text)

    def _rejections(self, wanted: Wanted, report: PassReport) -> None:
        rejections = (*wanted.rejections.values(), *report.rejections)
        facts = {str(rejection.key): f"{rejection.reason}: {rejection.detail}" for rejection in rejections}
        for about, text in self._news.fresh("rejections", facts)[:MOST_NAMED]:
            log.warning("rejected", object=about, reason=text)


def _say(say: Callable[..., object], event: str, report: PassReport, **more: int) -> None:
    say(
        event,
        registered=report.registered,
        updated=report.updated,
        deregistered=report.deregistered,
        unchanged=report.unchanged,
        refused=report.refused,
        rejected=report.rejected,
        conflicts=len(report.conflicts),
        held=sum(len(held.ids) for held in report.held),
        seconds=round(report.seconds, 3),
        **more,
    )
