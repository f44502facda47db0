"""Composition of the registrar."""

import socket
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import cached_property, partial

from k8s_consul_registrar.admin.documents import Documents
from k8s_consul_registrar.admin.explain import Explainer
from k8s_consul_registrar.admin.saved_state import Origin
from k8s_consul_registrar.admin.target_groups import GroupEncoder
from k8s_consul_registrar.admin.view import Targets
from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.consul.agent import AgentRegistry
from k8s_consul_registrar.consul.catalog import CatalogRegistry
from k8s_consul_registrar.consul.client import ConsulClient, Fence
from k8s_consul_registrar.consul.ghosts import AgentGhosts
from k8s_consul_registrar.consul.lost_agents import LostAgents
from k8s_consul_registrar.kube.access import Access, load_access
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.kube.cluster import (
    ClusterUid,
    LeaseClient,
    default_lease_name,
    new_identity,
    pod_namespace,
)
from k8s_consul_registrar.kube.events import EventSender
from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.kube.reflector import Following, Reflectors
from k8s_consul_registrar.model import Kind
from k8s_consul_registrar.registrar.absences import Absences, SelectionRecord
from k8s_consul_registrar.registrar.audit import Audit
from k8s_consul_registrar.registrar.controller import Controller
from k8s_consul_registrar.registrar.decide import NameGuard, Rules
from k8s_consul_registrar.registrar.desired import DesiredState
from k8s_consul_registrar.registrar.elector import Elector
from k8s_consul_registrar.registrar.events import EventLimits, EventPlan, EventReporter, with_uid
from k8s_consul_registrar.registrar.ghosts import AgentWatch, GhostCollector
from k8s_consul_registrar.registrar.interfaces import (
    AlwaysAvailable,
    ClusterReads,
    MemoryRegistry,
    Registry,
    Upkeep,
)
from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from k8s_consul_registrar.registrar.observed import Contests, ObservedState
from k8s_consul_registrar.registrar.orphan_collector import OrphanCollector, OrphanRules
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.registrar.queue import WorkQueue
from k8s_consul_registrar.registrar.quota import LimitedState, quota_of
from k8s_consul_registrar.registrar.reconciler import Core, Reconciler
from k8s_consul_registrar.registrar.reporter import Reporter
from k8s_consul_registrar.registrar.resync import Resync
from k8s_consul_registrar.registrar.schedule import FULL_READ_GAP, GhostChecks, ScheduleRules
from k8s_consul_registrar.registrar.service_join import ServiceJoin
from k8s_consul_registrar.registrar.status import RegistrarStatus
from k8s_consul_registrar.settings.registrar import AT_HOST, RegistrarSettings, selection_digest
from k8s_consul_registrar.settings.selection import HASH
from k8s_consul_registrar.targets.endpoints import Value, resolve_item
from k8s_consul_registrar.targets.resolve import TargetRules, resolve
from k8s_consul_registrar.targets.service_names import (
    HashShards,
    RandomShards,
    Shards,
)
from k8s_consul_registrar.wiring.consul import consul_client, consul_registry


@dataclass(frozen=True, slots=True)
class RegistrarParts:
    """The parts of a registrar that other parts of the program read."""

    core: Core
    controller: Controller
    reconciler: Reconciler
    resync: Resync
    reflectors: Reflectors
    cluster_uid: ClusterUid
    selection: SelectionRecord
    cluster: ClusterReads
    events: EventSender | None


class Wiring:
    """The parts of one registrar, each built from its settings in one place."""

    def __init__(self, settings: RegistrarSettings, timing: Timing | None = None) -> None:
        self.settings = settings
        self.timing = timing or Timing()

    @cached_property
    def identity(self) -> Identity:
        """The registrar's identity: which services are its own."""
        settings = self.settings
        return Identity(
            cluster=settings.cluster_name,
            instance=settings.instance,
            previous_clusters=settings.previous_cluster_names,
            previous_instances=settings.previous_instances,
            covers_cluster=not settings.instance and settings.selection.is_whole_cluster,
            has_default_name=settings.has_default_name,
        )

    @cached_property
    def shards(self) -> Shards:
        """The choice of shard paths."""
        naming = self.settings.naming
        strategy = HashShards if naming.shard_strategy == HASH else RandomShards
        return strategy(naming.shard_paths)

    @cached_property
    def targets(self) -> TargetRules:
        """The rules by which an object becomes targets."""
        settings, selection, naming = self.settings, self.settings.selection, self.settings.naming
        return TargetRules(
            annotation_prefix=selection.annotation_prefix,
            intervals=settings.intervals.rules,
            node_paths=selection.node_paths,
            proxy_node_port=settings.proxy_node_port,
            proxy_scheme=settings.proxy_scheme,
            pods_through_proxy=settings.pods_through_proxy,
            pods_at_host=settings.pod_address == AT_HOST,
            pod_ip_family=selection.ip_family,
            node_ip_family=settings.common.node_ip_family,
            cluster=settings.cluster_name,
            id_prefix=naming.id_prefix,
            pod_name=naming.pod_name,
            node_name=naming.node_name,
            endpoint_name=naming.endpoint_name,
            tags=naming.tags,
            labels=naming.labels,
            namespace_labels=naming.namespace_labels,
            node_labels=naming.node_labels,
            extra_meta=naming.extra_meta,
            annotations=naming.annotations,
            target_labels=naming.target_labels,
            node_address_types=selection.node_address_types,
            longest_shard=naming.longest_shard,
            has_readiness=settings.backend.has_readiness,
        )

    @cached_property
    def encoder(self) -> GroupEncoder:
        """The encoder of targets for collectors."""
        settings, naming = self.settings, self.settings.naming
        return GroupEncoder(
            naming.meta_keys,
            settings.selection.annotation_prefix,
            frozenset(one.name for one in naming.target_labels),
            self.targets.is_pod_elsewhere,
        )

    def documents(self, view: Targets) -> Documents:
        """Build the documents of service discovery."""
        return Documents(view, self.encoder)

    def explainer(self, parts: RegistrarParts) -> Explainer:
        """Build what explains objects."""
        selection = self.settings.selection
        return Explainer(
            parts.core, parts.cluster, self.encoder, selection.annotation_prefix, selection.selectors
        )

    @cached_property
    def digest(self) -> str:
        """The digest of the selection."""
        return selection_digest(self.settings)

    @cached_property
    def origin(self) -> Origin:
        """The origin of the targets that this registrar saves."""
        return Origin(self.settings.cluster_name, self.settings.instance, self.digest)

    @cached_property
    def access(self) -> Access:
        """The access to the API server; raises an `AccessError`."""
        return load_access(self.settings.common.environment)

    def kube(self) -> KubeClient:
        """Build the client of the API server; raises an `AccessError`."""
        return KubeClient(self.access, self.timing)

    def elector(self, kube: KubeClient) -> Elector | None:
        """Build what takes part in the election, None without one; raises an `AccessError`."""
        election = self.settings.election
        if election is None:
            return None
        leases = LeaseClient(kube, self.lease_namespace, self.lease_name)
        return Elector(leases, new_identity(socket.gethostname()), election.timing)

    @property
    def lease_namespace(self) -> str:
        """The namespace of the Lease; raises an `AccessError` if it is not set and this is not a Pod."""
        election = self.settings.election
        return (election and election.lease_namespace) or pod_namespace()

    @property
    def lease_name(self) -> str:
        """The name of the Lease."""
        settings, election = self.settings, self.settings.election
        return (election and election.lease_name) or default_lease_name(
            settings.cluster_name, settings.instance
        )

    def consul(self, elector: Elector | None = None) -> AbstractAsyncContextManager[ConsulClient]:
        """Open the client of Consul, which writes only while we lead; raises an `AccessError`."""
        return consul_client(self.settings.consul, self.timing, self._fence(elector))

    def _fence(self, elector: Elector | None) -> Fence | None:
        election = self.settings.election
        if not self.settings.policy.writes:
            return Fence(lambda: 0.0, 0.0, f"POLICY is {self.settings.policy}")
        if elector is None or election is None:
            return None

        def left() -> float:
            return elector.writes_until - time.monotonic() if elector.is_leader else 0.0

        return Fence(left, election.timing.lease_duration - election.timing.renew_deadline)

    def registry(self, client: ConsulClient | None) -> Registry:
        """Build the registry of the chosen backend."""
        return MemoryRegistry() if client is None else consul_registry(self.settings, client)

    def core(
        self,
        *,
        kube: KubeClient,
        client: ConsulClient | None,
        metrics: RegistrarMetrics,
        elector: Elector | None = None,
        saved_cluster_uid: str = "",
    ) -> RegistrarParts:
        """Build the core: reflectors, desired and observed state, and the controller between them.

        `saved_cluster_uid` is the cluster of which HTTP_SD_STATE_FILE holds targets of our selection.
        """
        settings, timing, status = self.settings, self.timing, RegistrarStatus()
        registry = self.registry(client)
        observed = LimitedState() if settings.quota else ObservedState()
        join = ServiceJoin(self.targets) if Kind.ENDPOINT in settings.selection.kinds else None
        has_parts = any(one.kind not in (Kind.POD, Kind.NODE) for one in settings.sources)
        resolve_one = resolve_item if has_parts else resolve
        resolve_item_of: Callable[[Item], Value | None] = partial(resolve_one, rules=self.targets)
        plan = self._event_plan()
        desired = DesiredState(
            settings.sources,
            resolve_item_of if plan is None else with_uid(resolve_item_of),
            observed,
            join=join,
            labels=self.targets.given_labels,
            selects_namespaces=bool(settings.selection.namespace_label_selector),
        )
        reporter = Reporter(metrics, status)
        events = None
        if plan is not None:
            reporter = EventReporter(metrics, status, plan, desired, tells_all=settings.emit_events == "all")
            events = EventSender(
                kube,
                plan,
                timing=timing,
                may_send=lambda: elector is None or elector.is_leader,
                count=metrics.wrote_event,
                on_internal_error=reporter.internal_error,
            )
        queue = WorkQueue(
            first=timing.retry_first, cap=settings.sync_period, min_interval=timing.write_interval
        )
        names = NameGuard(
            registry.is_name_taken,
            checked=settings.naming.kinds_with_template,
            unchecked=reporter.names_unchecked,
        )
        rules = Rules(self.identity, self.shards, names.names, policy=settings.policy)
        selection = SelectionRecord(
            self.digest,
            catalog=registry if isinstance(registry, CatalogRegistry) else None,
            cluster_uid=lambda: desired.cluster_uid,
            saved_cluster_uid=saved_cluster_uid,
        )
        cluster_uid = ClusterUid(kube, lambda uid: controller.on_cluster_uid(uid))  # noqa: PLW0108 - made later
        reflectors = Reflectors(
            settings.sources,
            desired.store,
            Following(
                kube,
                timing,
                settings.sync_period,
                watches=settings.backend.follows,
                selectors=settings.selection.selectors,
                cluster_uid=cluster_uid,
                on_internal_error=reporter.internal_error,
            ),
        )
        audit = Audit(status.removals, leader=elector.identity if elector else socket.gethostname())
        contests = Contests(settings.sync_period)
        quota = quota_of(settings.quota, observed, desired, status.blocked, removes=settings.quota_removes)
        core = Core(
            desired, observed, queue, registry, rules, names, contests, reporter, status, audit, quota
        )
        reconciler = Reconciler(core)
        chosen = settings.selection
        cluster = ClusterReads(kube, reflectors, chosen.selectors, chosen.excluded_namespaces)
        absences = Absences(desired, cluster, settings.brake, is_same_selection=selection.is_same)
        resync = Resync(core, absences, id_prefix=settings.naming.id_prefix)
        upkeep: tuple[Upkeep, ...] = ()
        # Only there a service has an agent to lose.
        if client is not None and isinstance(registry, AgentRegistry):
            watch = AgentWatch(metrics, status, accepts_server=settings.backend.accepts_server)
            registry.on_agents = watch.looked
            upkeep = (
                GhostCollector(
                    AgentGhosts(registry),
                    desired=desired,
                    decisions=rules,
                    cluster=cluster,
                    checks=GhostChecks(timing.ghost_first, timing.ghost_last),
                    audit=audit,
                    metrics=metrics,
                    is_steady=lambda: watch.is_steady,
                ),
                OrphanCollector(
                    LostAgents(client, settings.naming.meta_keys),
                    desired=desired,
                    decisions=rules,
                    rules=OrphanRules(settings.orphan_after, timing.orphan_look, settings.brake),
                    relist=reflectors.relist,
                    audit=audit,
                    metrics=metrics,
                ),
            )

        async def probe_consul(is_drained: bool) -> None:  # noqa: FBT001 - a reading, not a switch
            if client is not None:
                await client.probe(is_write_owed=not is_drained)

        controller = Controller(
            core,
            reconciler,
            resync,
            AlwaysAvailable() if client is None else client.health,
            schedule=ScheduleRules(
                period=settings.sync_period, probe=timing.probe, gap=min(FULL_READ_GAP, settings.sync_period)
            ),
            timing=timing,
            leadership=elector,
            upkeep=upkeep,
            probe_consul=probe_consul,
        )
        return RegistrarParts(
            core, controller, reconciler, resync, reflectors, cluster_uid, selection, cluster, events
        )

    def _event_plan(self) -> EventPlan | None:
        """Return what decides which Kubernetes Events are written, None if none are."""
        if self.settings.emit_events == "none":
            return None
        return EventPlan(EventLimits(interval=self.timing.event_interval))
