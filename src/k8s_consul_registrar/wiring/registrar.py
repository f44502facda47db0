"""The parts of a registrar, each made of the settings it needs: shared by the commands that read or write Consul."""

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from k8s_consul_registrar.admin.http_sd import no_saved_targets
from k8s_consul_registrar.admin.sd_server import HttpSdServer
from k8s_consul_registrar.admin.view import MetaNames, SavedTargets, TargetsView
from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.bearer import BearerFile
from k8s_consul_registrar.consul.access import ConsulAccess, ConsulAddress, ConsulToken, rotating_tls
from k8s_consul_registrar.consul.agent import CONCURRENCY, AgentRegistry
from k8s_consul_registrar.consul.catalog import CONCURRENCY as TRANSACTIONS
from k8s_consul_registrar.consul.catalog import CatalogRegistry
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.lost_agents import LostAgents
from k8s_consul_registrar.consul.previous_location import PreviousLocation
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.kube.cluster_uid import ClusterUid
from k8s_consul_registrar.kube.lease import LeaseClient, default_lease_name, new_identity, pod_namespace
from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.kube.reflector import Reflectors
from k8s_consul_registrar.model import Kind, ObjectKey, Service, Source
from k8s_consul_registrar.registrar.absences import Absences
from k8s_consul_registrar.registrar.brake import BrakeRules
from k8s_consul_registrar.registrar.controller import Controller, Parts
from k8s_consul_registrar.registrar.decide import Rules
from k8s_consul_registrar.registrar.desired import DesiredState
from k8s_consul_registrar.registrar.elector import Elector
from k8s_consul_registrar.registrar.interfaces import Registry
from k8s_consul_registrar.registrar.memory_registry import AlwaysAvailable, MemoryRegistry
from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from k8s_consul_registrar.registrar.names import NameGuard, is_of_a_registrar
from k8s_consul_registrar.registrar.observed import Contests, ObservedState
from k8s_consul_registrar.registrar.orphan_collector import OrphanCollector, OrphanRules
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.registrar.queue import WorkQueue
from k8s_consul_registrar.registrar.reconciler import Reconciler
from k8s_consul_registrar.registrar.reporter import Reporter
from k8s_consul_registrar.registrar.resync import Resync
from k8s_consul_registrar.registrar.schedule import FULL_READ_GAP, ScheduleRules
from k8s_consul_registrar.registrar.selection import SelectionRecord
from k8s_consul_registrar.registrar.status import RegistrarStatus
from k8s_consul_registrar.settings.backend_options import AGENT, CATALOG
from k8s_consul_registrar.settings.consul import ConsulSettings
from k8s_consul_registrar.settings.digest import selection_digest
from k8s_consul_registrar.settings.http_sd import HttpSdSettings
from k8s_consul_registrar.settings.modes import RegistrarSettings
from k8s_consul_registrar.settings.naming import HASH
from k8s_consul_registrar.targets.resolve import TargetRules, resolve
from k8s_consul_registrar.targets.service_names import NODE_NAME, POD_NAME, HashShards, RandomShards, Shards
from k8s_consul_registrar.tls import ServerTls, TlsFiles


@dataclass(frozen=True, slots=True)
class RegistrarParts:
    """The parts of a registrar that other parts of the program read."""

    controller: Controller
    desired: DesiredState
    observed: ObservedState
    reflectors: Reflectors
    rules: Rules
    reporter: Reporter
    resync: Resync
    queue: WorkQueue
    registry: Registry
    reconciler: Reconciler
    names: NameGuard
    cluster_uid: ClusterUid
    selection: SelectionRecord


@dataclass(frozen=True, slots=True)
class _KubeCluster:
    """The API server, for what the reflectors do not tell."""

    kube: KubeClient
    reflectors: Reflectors
    selectors: Mapping[Kind, str]

    async def read_object(self, key: ObjectKey) -> Item | None:
        """Return an object as it is now, None if there is none; raises a `ClusterError`."""
        return await self.kube.read_object(key)

    async def is_selected(self, key: ObjectKey) -> bool:
        """Return whether lists show an object that exists; raises a `ClusterError`."""
        text = self.selectors.get(key.kind, "")
        return not text or await self.kube.read_object(key, label_selector=text) is not None

    def relist(self, source: Source, at: float) -> None:
        """Ask for a new complete list."""
        self.reflectors.relist(source, at)


def build_registrar(
    settings: RegistrarSettings,
    *,
    kube: KubeClient,
    client: ConsulClient | None,
    metrics: RegistrarMetrics,
    timing: Timing,
    elector: Elector | None = None,
    saved_cluster_uid: str = "",
) -> RegistrarParts:
    """Build the registrar's core: reflectors, the two states, and the controller between them.

    `saved_cluster_uid` is the cluster of which HTTP_SD_STATE_FILE holds targets of our selection.
    """
    registry: Registry = MemoryRegistry() if client is None else consul_registry(settings, client)
    target = target_rules(settings)
    status = RegistrarStatus()
    reporter = Reporter(metrics, status)
    observed = ObservedState()
    desired = DesiredState(settings.selection.sources, partial(resolve, rules=target), observed)
    queue = WorkQueue(first=timing.retry_first, cap=settings.sync_period, min_interval=timing.write_interval)
    names = NameGuard(registry.is_name_taken, checked=_kinds_with_template(settings))
    rules = Rules(identity(settings), shards(settings), names.status)
    contests = Contests(settings.sync_period)
    selection = SelectionRecord(
        selection_digest(settings),
        catalog=registry if isinstance(registry, CatalogRegistry) else None,
        cluster_uid=lambda: desired.cluster_uid,
        saved_cluster_uid=saved_cluster_uid,
    )
    cluster_uid = ClusterUid(kube, lambda uid: controller.on_cluster_uid(uid))  # noqa: PLW0108 - made later
    reflectors = Reflectors(
        settings.selection.sources,
        desired.store,
        kube,
        timing=timing,
        period=settings.sync_period,
        watches=settings.backend.follows,
        selectors=settings.selection.selectors,
        cluster_uid=cluster_uid,
        on_internal_error=reporter.internal_error,
    )
    reconciler = Reconciler(
        desired=desired,
        observed=observed,
        queue=queue,
        registry=registry,
        rules=rules,
        names=names,
        contests=contests,
        reporter=reporter,
    )
    resync = Resync(
        desired=desired,
        observed=observed,
        queue=queue,
        registry=registry,
        rules=rules,
        names=names,
        contests=contests,
        absences=Absences(
            desired,
            _KubeCluster(kube, reflectors, settings.selection.selectors),
            brake_rules(settings),
            is_same_selection=selection.is_same,
        ),
        reporter=reporter,
        id_prefix=settings.naming.id_prefix,
    )
    collector = (
        None
        if client is None
        else orphan_collector(
            settings,
            client=client,
            desired=desired,
            rules=rules,
            reflectors=reflectors,
            metrics=metrics,
            timing=timing,
        )
    )

    async def probe_consul(is_drained: bool) -> None:  # noqa: FBT001 - a reading, not a switch
        if client is not None:
            await client.probe(is_write_owed=not is_drained)

    controller = Controller(
        Parts(
            desired,
            observed,
            queue,
            registry,
            reconciler,
            resync,
            reporter,
            status,
            AlwaysAvailable() if client is None else client.health,
        ),
        schedule=ScheduleRules(
            period=settings.sync_period, probe=timing.probe, gap=min(FULL_READ_GAP, settings.sync_period)
        ),
        timing=timing,
        leadership=elector,
        orphans=collector,
        probe_consul=probe_consul,
    )
    return RegistrarParts(
        controller,
        desired,
        observed,
        reflectors,
        rules,
        reporter,
        resync,
        queue,
        registry,
        reconciler,
        names,
        cluster_uid,
        selection,
    )


def _kinds_with_template(settings: RegistrarSettings) -> frozenset[Kind]:
    """Return the kinds whose service names are not the default, which contains the object's own name."""
    templates = {
        Kind.POD: settings.naming.pod_name != POD_NAME,
        Kind.NODE: settings.naming.node_name != NODE_NAME,
    }
    return frozenset(kind for kind, is_template in templates.items() if is_template)


def new_elector(settings: RegistrarSettings, kube: KubeClient) -> Elector | None:
    """Build what takes part in the election, None where there is none; raises an `AccessError`."""
    election = settings.election
    if election is None:
        return None
    name = election.lease_name or default_lease_name(settings.cluster_name, settings.instance)
    leases = LeaseClient(kube, election.lease_namespace or pod_namespace(), name)
    return Elector(leases, new_identity(socket.gethostname()), election.timing)


def http_sd_server(
    settings: HttpSdSettings,
    view: TargetsView,
    meta_names: MetaNames,
    saved: Callable[[], SavedTargets | None] = no_saved_targets,
) -> HttpSdServer:
    """Build what serves targets to collectors; raises an `AccessError` naming the setting at fault."""
    return HttpSdServer(
        port=settings.port,
        view=view,
        meta_names=meta_names,
        saved=saved,
        bearer=http_sd_bearer(settings) if settings.bearer_token_file else None,
        tls=http_sd_tls(settings) if settings.cert_file else None,
    )


def http_sd_bearer(settings: HttpSdSettings) -> BearerFile:
    """Read the token of collectors; raises an `AccessError`."""
    return BearerFile(Path(settings.bearer_token_file), setting="HTTP_SD_BEARER_TOKEN_FILE")


def http_sd_tls(settings: HttpSdSettings) -> ServerTls:
    """Read the files of TLS towards collectors; raises an `AccessError`."""
    client_ca = Path(settings.client_ca_file) if settings.client_ca_file else None
    return ServerTls(TlsFiles(Path(settings.cert_file), Path(settings.key_file), client_ca))


def brake_rules(settings: RegistrarSettings) -> BrakeRules:
    """Say when a removal is held."""
    brake = settings.brake
    return BrakeRules(confirm=brake.confirm, confirm_start=brake.confirm_start, allow_mass=brake.allow_mass)


def identity(settings: RegistrarSettings) -> Identity:
    """Say who this registrar is."""
    return Identity(
        cluster=settings.cluster_name,
        instance=settings.instance,
        previous_clusters=settings.previous_cluster_names,
        previous_instances=settings.previous_instances,
        covers_cluster=not settings.instance and settings.selection.is_whole_cluster,
        has_default_name=settings.has_default_name,
    )


def consul_registry(settings: RegistrarSettings, client: ConsulClient) -> Registry:
    """Build the registry of the chosen backend."""
    backend, meta_keys = settings.backend, settings.naming.meta_keys
    if backend.backend == CATALOG:
        return CatalogRegistry(
            client,
            backend.node_name,
            concurrency=backend.concurrency or TRANSACTIONS,
            meta_keys=meta_keys,
            is_of_a_registrar=is_of_a_registrar,
            selection=selection_digest(settings),
        )
    return AgentRegistry(
        client,
        concurrency=backend.concurrency or CONCURRENCY,
        meta_keys=meta_keys,
        is_of_a_registrar=is_of_a_registrar,
    )


def previous_locations(
    settings: RegistrarSettings,
    client: ConsulClient,
    is_ours: Callable[[Service], bool],
    may_go: Callable[[Service], bool],
) -> list[PreviousLocation]:
    """Name the places that may still hold our services: the other backend's, and nodes of earlier settings."""
    backend, meta_keys = settings.backend, settings.naming.meta_keys
    current = backend.node_name.lower() if backend.backend == CATALOG else ""
    nodes = sorted(
        name for name in {backend.node_name, *backend.previous_node_names} if name.lower() != current
    )
    places = [
        PreviousLocation(f"node {name}", CatalogRegistry(client, name, meta_keys=meta_keys), is_ours, may_go)
        for name in nodes
    ]
    if backend.backend == CATALOG:
        places.append(PreviousLocation("agent", AgentRegistry(client, meta_keys=meta_keys), is_ours, may_go))
    return places


def orphan_collector(
    settings: RegistrarSettings,
    *,
    client: ConsulClient,
    desired: DesiredState,
    rules: Rules,
    reflectors: Reflectors,
    metrics: RegistrarMetrics,
    timing: Timing,
) -> OrphanCollector | None:
    """Build what clears nodes of lost agents, None where services do not belong to an agent."""
    if settings.backend.backend != AGENT:
        return None
    return OrphanCollector(
        LostAgents(client, settings.naming.meta_keys),
        desired=desired,
        decisions=rules,
        rules=OrphanRules(settings.orphan_after, timing.orphan_look, brake_rules(settings)),
        relist=reflectors.relist,
        metrics=metrics,
    )


def target_rules(settings: RegistrarSettings) -> TargetRules:
    """Say what becomes a target, and under which name."""
    selection, naming = settings.selection, settings.naming
    return TargetRules(
        annotation_prefix=selection.annotation_prefix,
        proxy_node_port=settings.proxy_node_port,
        proxy_scheme=settings.proxy_scheme,
        pods_through_proxy=settings.pods_through_proxy,
        cluster=settings.cluster_name,
        id_prefix=naming.id_prefix,
        pod_name=naming.pod_name,
        node_name=naming.node_name,
        tags=naming.tags,
        labels=naming.labels,
        node_address_types=selection.node_address_types,
        longest_shard=naming.longest_shard,
        has_readiness=settings.backend.has_readiness,
    )


def shards(settings: RegistrarSettings) -> Shards:
    """Say how services get their shard paths."""
    naming = settings.naming
    return (
        HashShards(naming.shard_paths) if naming.shard_strategy == HASH else RandomShards(naming.shard_paths)
    )


def consul_access(settings: ConsulSettings) -> ConsulAccess:
    """Load what a connection to Consul needs; raises an `AccessError` naming the file at fault."""
    tls = None
    if settings.url.startswith("https://"):
        tls = rotating_tls(
            ca_file=settings.ca_file,
            cert_file=settings.cert_file,
            key_file=settings.key_file,
            verify=settings.verify,
        )
    access = ConsulAccess(
        address=ConsulAddress(settings.url, settings.socket),
        token=settings.token,
        token_file=settings.token_file,
        tls=tls,
        tls_server_name=settings.tls_server_name,
        namespace=settings.namespace,
        partition=settings.partition,
    )
    ConsulToken(access).current()
    return access
