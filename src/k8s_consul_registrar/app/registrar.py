"""Composition of the registrar: reads what was asked for, builds the parts and connects them."""

import time
from dataclasses import dataclass

from k8s_consul_registrar import __version__
from k8s_consul_registrar.admin.server import AdminServer
from k8s_consul_registrar.app.lifecycle import Stop, run_until_stopped
from k8s_consul_registrar.app.process import new_registry
from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.consul.access import ConsulAccess, ConsulAddress, ConsulToken, build_ssl_context
from k8s_consul_registrar.consul.agent import CONCURRENCY, AgentRegistry
from k8s_consul_registrar.consul.catalog import CONCURRENCY as TRANSACTIONS
from k8s_consul_registrar.consul.catalog import CatalogRegistry
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.kube.access import load_access
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.kube.cluster import FollowedCluster
from k8s_consul_registrar.kube.mirror import Verdict
from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.registrar.brake import BrakeRules
from k8s_consul_registrar.registrar.budget import FULL_READ_GAP, BudgetRules
from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.registrar.ports import Registry
from k8s_consul_registrar.registrar.reconciler import Reconciler
from k8s_consul_registrar.registrar.status import RegistrarStatus
from k8s_consul_registrar.settings.backend_options import CATALOG
from k8s_consul_registrar.settings.consul import ConsulSettings
from k8s_consul_registrar.settings.modes import RegistrarSettings
from k8s_consul_registrar.settings.naming import HASH
from k8s_consul_registrar.targets.sharding import HashShards, RandomShards, Shards
from k8s_consul_registrar.targets.targets import TargetRules, judge
from k8s_consul_registrar.telemetry import get_logger

# A loop that has not turned for so long, in seconds, hangs: no single request may take a tenth of it.
HANG = 600.0

log = get_logger("app")


@dataclass(frozen=True, slots=True)
class _Health:
    """Shows the reconciler's status to the probes."""

    status: RegistrarStatus

    def is_alive(self) -> bool:
        """Whether the loop has turned lately."""
        return time.monotonic() - self.status.ticked_at < HANG

    def readiness(self) -> str:
        """Return why not ready, empty when ready."""
        return self.status.readiness()


async def run_registrar(settings: RegistrarSettings, stop: Stop, timing: Timing | None = None) -> None:
    """Keep Consul equal to the cluster until a stop is asked for."""
    timing = timing or Timing()
    for warning in settings.common.warnings:
        log.warning(warning)
    access = load_access(settings.common.environment)
    registry = new_registry("registrar")
    rules = target_rules(settings)

    def verdict(item: Item) -> Verdict | None:
        return judge(item, rules)

    async with (
        KubeClient(access, timing) as kube,
        ConsulClient(consul_access(settings.consul), timing) as consul,
    ):
        cluster = FollowedCluster(
            kube,
            settings.selection.sources,
            verdict,
            period=settings.sync_period,
            timing=timing,
            follow=settings.backend.follows,
            selectors=settings.selection.selectors,
        )
        reconciler = Reconciler(
            cluster=cluster,
            registry=consul_registry(settings, consul, timing),
            identity=identity(settings),
            shards=shards(settings),
            rules=BrakeRules(
                confirm=settings.brake.confirm,
                confirm_start=settings.brake.confirm_start,
                allow_mass=settings.brake.allow_mass,
            ),
            period=settings.sync_period,
            timing=timing,
            metrics=RegistrarMetrics(registry),
            budget=BudgetRules(gap=min(FULL_READ_GAP, settings.sync_period)),
        )
        health = _Health(reconciler.status)
        async with AdminServer(port=settings.common.admin_port, health=health, registry=registry) as admin:
            log.info(
                "registrar starts",
                version=__version__,
                cluster=settings.cluster_name,
                instance=settings.instance,
                api_server=access.server,
                credentials=access.origin,
                consul=str(settings.consul.socket or settings.consul.url),
                admin_port=admin.port,
            )
            await run_until_stopped(stop, cluster.run(), reconciler.run())
            reconciler.status.is_draining = True
    log.info("registrar ends; what is registered stays")


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


def target_rules(settings: RegistrarSettings) -> TargetRules:
    """Say what becomes a target, and under which name."""
    selection, naming = settings.selection, settings.naming
    return TargetRules(
        annotation_prefix=selection.annotation_prefix,
        proxy_node_port=settings.proxy_node_port,
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
    is_tls = settings.url.startswith("https://")
    context = None
    if is_tls:
        context = build_ssl_context(
            ca_file=settings.ca_file,
            cert_file=settings.cert_file,
            key_file=settings.key_file,
            verify=settings.verify,
        )
    access = ConsulAccess(
        address=ConsulAddress(settings.url, settings.socket),
        token=settings.token,
        token_file=settings.token_file,
        ssl_context=context,
        tls_server_name=settings.tls_server_name,
        namespace=settings.namespace,
        partition=settings.partition,
    )
    ConsulToken(access).current()
    return access
