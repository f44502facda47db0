"""Shows a registrar to its admin endpoints: joins what the cluster asks for with what is known of Consul."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from k8s_consul_registrar import __version__
from k8s_consul_registrar.admin.view import (
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
from k8s_consul_registrar.kube.mirror import Mirror
from k8s_consul_registrar.model import Rejection, Service, Target
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.registrar.passes import Passes
from k8s_consul_registrar.registrar.progress import Progress
from k8s_consul_registrar.registrar.status import PassRecord, RegistrarStatus
from k8s_consul_registrar.settings.modes import RegistrarSettings
from k8s_consul_registrar.settings.naming import HASH
from k8s_consul_registrar.settings.option import REGISTRAR
from k8s_consul_registrar.settings.options import options_of
from k8s_consul_registrar.targets.sharding import Shards

# Of what the brake holds this many are named.
SAMPLE = 20


@dataclass(frozen=True, slots=True)
class View:
    """What the status page, its API and http_sd read; nothing is copied that is not asked for."""

    settings: RegistrarSettings
    mirror: Mirror
    passes: Passes
    status_of: RegistrarStatus
    identity: Identity
    shards: Shards
    holder: Callable[[], str] | None = None
    started_at: float = field(default_factory=time.time)

    @property
    def generation(self) -> int:
        """A number that moves whenever `targets` would yield anything else."""
        state = self.status_of
        odd = hash((frozenset(state.refused), frozenset(state.conflicts), state.is_standby))
        return hash((self.mirror.generation, self.passes.generation, odd))

    def unlisted(self) -> str:
        """Why the targets are not all known yet, empty once every source was listed."""
        missing = [
            f"{source} are not listed yet{': ' if state.problem else ''}{state.problem}"
            for source, state in self.mirror.states().items()
            if state.listed_at is None
        ]
        return "; ".join(missing)

    def targets(self) -> Iterator[SeenTarget]:
        """Yield every target, each ID once."""
        for service_id in tuple(self.mirror.claims):
            claims = self.mirror.claims.get(service_id)
            if claims:
                yield self._seen(service_id, min(claims, key=lambda target: target.rank))
        for entry in self.passes.unclaimed(self.mirror.claims):
            yield SeenTarget(entry.service(self.identity), entry.target.key, TargetState.KEPT)

    def states(self) -> Iterator[tuple[str, str]]:
        """Yield kind and state of each of `targets`, at a tenth of the cost."""
        for service_id in tuple(self.mirror.claims):
            if claims := self.mirror.claims.get(service_id):
                yield claims[0].key.kind.value, self._state(service_id).value
        for entry in self.passes.unclaimed(self.mirror.claims):
            yield entry.target.key.kind.value, TargetState.KEPT.value

    def progress(self) -> Progress | None:
        """Return how far the first sync is, None once it is done."""
        if self.status_of.has_synced:
            return None
        states = self.mirror.states().values()
        return Progress(
            listed=sum(one.objects for one in states),
            is_listed=all(one.listed_at is not None for one in states),
            targets=len(self.mirror.claims),
            registered=self.passes.registered,
            rejected=len(self.mirror.rejections),
        )

    def rejections(self) -> list[Rejection]:
        """Return every object that asks to be scraped and cannot be."""
        return [*self.mirror.rejections.values(), *self.status_of.lost.values()]

    def status(self) -> Status:
        """Return the rest."""
        state = self.status_of
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
                for source, one in self.mirror.states().items()
            ),
            conflicts=tuple(SeenConflict(one.id, one.key, one.holder) for one in state.conflicts.values()),
            brakes=tuple(
                SeenBrake(str(one.source), len(one.ids), one.ids[:SAMPLE], boot + one.since, boot + one.due)
                for one in state.held
            ),
            lost_agents=tuple(
                SeenLostAgent(one.node, boot + one.since, boot + one.due, one.stays)
                for one in state.lost_agents
            ),
            passes=tuple(_seen_pass(record) for record in state.recent),
            settings=shown_settings(self.settings.common.environment),
        )

    def _leader(self) -> SeenLeader:
        if self.holder is None:
            return SeenLeader()
        return SeenLeader("standby" if self.status_of.is_standby else "leader", self.holder())

    def _seen(self, service_id: str, target: Target) -> SeenTarget:
        state = self.status_of
        entry = self.passes.entry(service_id)
        if entry is not None:
            return SeenTarget(entry.service(self.identity), entry.target.key, TargetState.REGISTERED)
        service = self._expected(service_id, target)
        detail = ""
        if service_id in state.conflicts:
            detail = f"held by {state.conflicts[service_id].holder}"
        elif service_id in state.refused:
            detail = state.refused[service_id]
        return SeenTarget(service, target.key, self._state(service_id), detail)

    def _state(self, service_id: str) -> TargetState:
        """Return where the target of an ID that is asked for stands."""
        state = self.status_of
        if self.passes.entry(service_id) is not None:
            return TargetState.REGISTERED
        if service_id in state.conflicts:
            return TargetState.CONFLICT
        if service_id in state.refused:
            return TargetState.REFUSED
        return TargetState.STANDBY if state.is_standby else TargetState.PENDING

    def _expected(self, service_id: str, target: Target) -> Service:
        """Make the service a target is to have; a shard that chance is yet to choose stays open."""
        shard = self.passes.shard(service_id)
        if shard or self.settings.naming.shard_strategy == HASH:
            shard = self.shards.choose(service_id, shard)
        return self.identity.service(target, shard, self.mirror.cluster_uid)


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


def _seen_pass(record: PassRecord) -> SeenPass:
    report = record.report
    counts = {
        "registered": report.registered,
        "updated": report.updated,
        "deregistered": report.deregistered,
        "unchanged": report.unchanged,
        "refused": report.refused,
    }
    return SeenPass(
        "full" if record.is_full else "changes", report.outcome, record.at, report.seconds, counts
    )
