"""The parts of a registrar, each made of the settings it needs: shared by the commands that read or write Consul."""

import socket
from collections.abc import Callable
from pathlib import Path

from k8s_consul_registrar.admin.sd_server import HttpSdServer
from k8s_consul_registrar.admin.view import MetaNames, TargetsView
from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.bearer import BearerFile
from k8s_consul_registrar.consul.access import ConsulAccess, ConsulAddress, ConsulToken, followed_tls
from k8s_consul_registrar.consul.agent import CONCURRENCY, AgentRegistry
from k8s_consul_registrar.consul.catalog import CONCURRENCY as TRANSACTIONS
from k8s_consul_registrar.consul.catalog import CatalogRegistry
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.elsewhere import FormerPlace
from k8s_consul_registrar.consul.lost_agents import LostAgents
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.kube.cluster import FollowedCluster
from k8s_consul_registrar.kube.known import Verdict
from k8s_consul_registrar.kube.lease import LeaseClient, default_lease_name, new_identity, pod_namespace
from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.model import Service
from k8s_consul_registrar.registrar.brake import BrakeRules
from k8s_consul_registrar.registrar.elector import Elector
from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.registrar.ports import Cluster, Registry
from k8s_consul_registrar.registrar.sweeper import Sweeper, SweepRules
from k8s_consul_registrar.server_tls import ServerTls, TlsFiles
from k8s_consul_registrar.settings.backend_options import AGENT, CATALOG
from k8s_consul_registrar.settings.consul import ConsulSettings
from k8s_consul_registrar.settings.http_sd import HttpSdSettings
from k8s_consul_registrar.settings.modes import RegistrarSettings
from k8s_consul_registrar.settings.naming import HASH
from k8s_consul_registrar.targets.resolve import TargetRules, resolve
from k8s_consul_registrar.targets.sharding import HashShards, RandomShards, Shards


def followed_cluster(settings: RegistrarSettings, kube: KubeClient, timing: Timing) -> FollowedCluster:
    """Build the cluster's side."""
    rules = target_rules(settings)

    def verdict(item: Item) -> Verdict | None:
        return resolve(item, rules)

    return FollowedCluster(
        kube,
        settings.selection.sources,
        verdict,
        period=settings.sync_period,
        timing=timing,
        follow=settings.backend.follows,
        selectors=settings.selection.selectors,
    )


def new_elector(settings: RegistrarSettings, kube: KubeClient) -> Elector | None:
    """Build what takes part in the election, None where there is none; raises an `AccessError`."""
    election = settings.election
    if election is None:
        return None
    name = election.lease_name or default_lease_name(settings.cluster_name, settings.instance)
    leases = LeaseClient(kube, election.lease_namespace or pod_namespace(), name)
    return Elector(leases, new_identity(socket.gethostname()), election.timing)


def http_sd_server(settings: HttpSdSettings, view: TargetsView, meta_names: MetaNames) -> HttpSdServer:
    """Build what serves targets to collectors; raises an `AccessError` naming the setting at fault."""
    return HttpSdServer(
        port=settings.port,
        view=view,
        meta_names=meta_names,
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
        speaks_for_cluster=not settings.instance and settings.selection.is_whole_cluster,
        has_default_name=settings.has_default_name,
    )


def consul_registry(settings: RegistrarSettings, client: ConsulClient, timing: Timing) -> Registry:
    """Build the registry of the chosen backend."""
    backend, meta_keys = settings.backend, settings.naming.meta_keys
    if backend.backend == CATALOG:
        return CatalogRegistry(
            client,
            backend.node_name,
            concurrency=backend.concurrency or TRANSACTIONS,
            timing=timing,
            meta_keys=meta_keys,
        )
    return AgentRegistry(client, concurrency=backend.concurrency or CONCURRENCY, meta_keys=meta_keys)


def former_places(
    settings: RegistrarSettings, client: ConsulClient, timing: Timing, is_ours: Callable[[Service], bool]
) -> list[FormerPlace]:
    """Name the places that may still hold our services: the other backend's, and nodes of earlier settings."""
    backend, meta_keys = settings.backend, settings.naming.meta_keys
    current = backend.node_name.lower() if backend.backend == CATALOG else ""
    nodes = sorted(
        name for name in {backend.node_name, *backend.previous_node_names} if name.lower() != current
    )
    places = [
        FormerPlace(
            f"node {name}", CatalogRegistry(client, name, timing=timing, meta_keys=meta_keys), is_ours
        )
        for name in nodes
    ]
    if backend.backend == CATALOG:
        places.append(FormerPlace("agent", AgentRegistry(client, meta_keys=meta_keys), is_ours))
    return places


def sweeper(
    settings: RegistrarSettings,
    client: ConsulClient,
    cluster: Cluster,
    metrics: RegistrarMetrics,
    timing: Timing,
) -> Sweeper | None:
    """Build what clears nodes of lost agents, None where services do not belong to an agent."""
    if settings.backend.backend != AGENT:
        return None
    return Sweeper(
        LostAgents(client, timing, settings.naming.meta_keys),
        cluster=cluster,
        identity=identity(settings),
        rules=SweepRules(settings.orphan_after, timing.orphan_look, brake_rules(settings)),
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
        tls = followed_tls(
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
