"""The registrar as its admin endpoints show it: desired and observed state joined."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from k8s_consul_registrar import __version__
from k8s_consul_registrar.admin.view import (
    EVERYTHING,
    Scope,
    SeenBrake,
    SeenConflict,
    SeenConsul,
    SeenLeader,
    SeenLostAgent,
    SeenPass,
    SeenSource,
    SeenTarget,
    Setting,
    Status,
    TargetState,
)
from k8s_consul_registrar.model import ObjectKey, Rejection, Service, Target
from k8s_consul_registrar.registrar.observed import AsDesired, Other
from k8s_consul_registrar.registrar.reporter import Progress
from k8s_consul_registrar.registrar.status import Activity, RegistrarStatus
from k8s_consul_registrar.settings.modes import RegistrarSettings
from k8s_consul_registrar.settings.naming import HASH
from k8s_consul_registrar.settings.option import REGISTRAR
from k8s_consul_registrar.settings.options import options_of
from k8s_consul_registrar.wiring.registrar import RegistrarParts

# Of what the brake holds this many are named.
SAMPLE = 20


@dataclass(frozen=True, slots=True)
class View:
    """What the status page, its API and http_sd read; nothing is copied before it is asked for."""

    settings: RegistrarSettings
    parts: RegistrarParts
    holder: Callable[[], str] | None = None
    started_at: float = field(default_factory=time.time)

    @property
    def status_now(self) -> RegistrarStatus:
        """The registrar's status at this moment."""
        return self.parts.controller.status

    @property
    def generation(self) -> int:
        """A number that moves whenever `targets` would yield anything else."""
        state = self.status_now
        odd = hash((frozenset(state.refused), frozenset(state.conflicts), state.is_standby))
        return hash((self.parts.desired.generation, self.parts.observed.generation, odd))

    def unlisted(self, scope: Scope = EVERYTHING) -> str:
        """Return which sources of a scope were never listed in this process and why, empty if all were."""
        missing = [
            f"{source} are not listed yet{': ' if status.problem else ''}{status.problem}"
            for source, status in self.parts.desired.store.statuses().items()
            if status.listed_at is None and scope.includes(source)
        ]
        return "; ".join(missing)

    def targets(self) -> Iterator[SeenTarget]:
        """Yield every target, each ID once."""
        claims = self.parts.desired.claims
        for service_id in tuple(claims):
            if asking := claims.get(service_id):
                yield self._seen(service_id, min(asking, key=lambda target: target.rank))
        for service_id in self.parts.observed.ids():
            if service_id not in claims and (kept := self._kept(service_id)) is not None:
                yield kept

    def states(self) -> Iterator[tuple[str, str]]:
        """Yield kind and state of each of `targets`, at a tenth of the cost."""
        claims = self.parts.desired.claims
        for service_id in tuple(claims):
            if asking := claims.get(service_id):
                yield asking[0].key.kind.value, self._state(service_id).value
        for service_id in self.parts.observed.ids():
            if service_id not in claims and (kept := self._kept(service_id)) is not None:
                yield kept.key.kind.value, TargetState.KEPT.value

    def progress(self) -> Progress | None:
        """Return how far the first sync is, None once it is done."""
        if self.status_now.has_synced:
            return None
        states = self.parts.desired.store.statuses().values()
        return Progress(
            listed=sum(one.objects for one in states),
            is_listed=all(one.listed_at is not None for one in states),
            targets=len(self.parts.desired.claims),
            registered=self.parts.observed.registered,
            rejected=len(self.parts.desired.rejections),
        )

    def rejections(self) -> list[Rejection]:
        """Return every object that asks to be scraped and cannot be."""
        return [*self.parts.desired.rejections.values(), *self.status_now.lost_rejections()]

    def status(self) -> Status:
        """Return the rest."""
        state = self.status_now
        boot = time.time() - time.monotonic()
        return Status(
            version=__version__,
            cluster=self.settings.cluster_name,
            instance=self.settings.instance,
            started_at=self.started_at,
            unready=state.readiness(),
            leader=self._leader(),
            consul=SeenConsul(
                self.settings.backend.backend,
                self.settings.consul.socket or self.settings.consul.url,
                is_up=not state.consul_problem,
                problem=state.consul_problem,
            ),
            sources=tuple(
                SeenSource(
                    str(source),
                    one.is_followed,
                    None if one.listed_at is None else boot + one.listed_at,
                    one.objects,
                    one.problem,
                )
                for source, one in self.parts.desired.store.statuses().items()
            ),
            conflicts=tuple(
                SeenConflict(service_id, one.key, one.holder) for service_id, one in state.conflicts.items()
            ),
            brakes=tuple(
                SeenBrake(str(one.source), len(one.ids), one.ids[:SAMPLE], boot + one.since, boot + one.due)
                for one in state.held
            ),
            lost_agents=tuple(
                SeenLostAgent(one.node, boot + one.since, boot + one.due, one.stays)
                for one in state.lost_agents
            ),
            passes=tuple(_seen_pass(activity) for activity in state.recent),
            settings=shown_settings(self.settings.common.environment),
        )

    def _leader(self) -> SeenLeader:
        if self.holder is None:
            return SeenLeader()
        return SeenLeader("standby" if self.status_now.is_standby else "leader", self.holder())

    def _seen(self, service_id: str, target: Target) -> SeenTarget:
        status, record = self.status_now, self.parts.observed.get(service_id)
        state = self._state(service_id)
        if isinstance(record, AsDesired):
            return SeenTarget(record.service(self.parts.rules.identity), record.target.key, state)
        detail = ""
        if service_id in status.conflicts:
            detail = f"held by {status.conflicts[service_id].holder}"
        elif service_id in status.refused:
            detail = status.refused[service_id]
        return SeenTarget(self._expected(service_id, target), target.key, state, detail)

    def _kept(self, service_id: str) -> SeenTarget | None:
        """Return a service that nothing asks for and that may not go yet, None if there is none."""
        record = self.parts.observed.get(service_id)
        if isinstance(record, AsDesired):
            service, key = record.service(self.parts.rules.identity), record.target.key
            return SeenTarget(service, key, TargetState.KEPT)
        if isinstance(record, Other) and record.service is not None and record.kind is not None:
            key = record.key or ObjectKey(record.kind, "", service_id)
            return SeenTarget(record.service, key, TargetState.KEPT)
        return None

    def _state(self, service_id: str) -> TargetState:
        """Return where the target of an ID that is asked for stands."""
        status = self.status_now
        if isinstance(self.parts.observed.get(service_id), AsDesired):
            return TargetState.REGISTERED
        if service_id in status.conflicts:
            return TargetState.CONFLICT
        if service_id in status.refused:
            return TargetState.REFUSED
        return TargetState.STANDBY if status.is_standby else TargetState.PENDING

    def _expected(self, service_id: str, target: Target) -> Service:
        """Build the service a target is to have; a shard that is still to be chosen at random stays open."""
        shard = self.parts.observed.shard(service_id)
        if shard or self.settings.naming.shard_strategy == HASH:
            shard = self.parts.rules.shards.choose(service_id, shard)
        return self.parts.rules.identity.service(target, shard, self.parts.desired.cluster_uid)


def shown_settings(environment: Mapping[str, str]) -> tuple[Setting, ...]:
    """Return every setting of the registrar as anybody may see it."""
    shown = []
    for option in options_of(REGISTRAR):
        given = environment.get(option.env, "").strip()
        if option.is_secret:
            shown.append(Setting.secret(option.env, is_set=bool(given)))
        else:
            shown.append(Setting(option.env, given or option.default))
    return tuple(shown)


def _seen_pass(activity: Activity) -> SeenPass:
    done = activity.counts
    counts = {
        "registered": done.registered,
        "updated": done.updated,
        "deregistered": done.deregistered,
        "unchanged": done.unchanged,
        "refused": done.refused,
    }
    return SeenPass(
        "full" if activity.is_resync else "changes", done.outcome, activity.at, done.seconds, counts
    )
