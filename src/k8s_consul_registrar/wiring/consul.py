"""Consul's side of a registrar: access, the registry of the chosen backend, and earlier locations."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.consul.access import ConsulAccess, ConsulAddress, ConsulTokenFile
from k8s_consul_registrar.consul.agent import CONCURRENCY, AgentRegistry
from k8s_consul_registrar.consul.catalog import CONCURRENCY as TRANSACTIONS
from k8s_consul_registrar.consul.catalog import CatalogRegistry
from k8s_consul_registrar.consul.client import ConsulClient, Fence
from k8s_consul_registrar.consul.login import AuthMethod, Login
from k8s_consul_registrar.consul.previous_location import PreviousLocation
from k8s_consul_registrar.model import Service
from k8s_consul_registrar.registrar.interfaces import Registry
from k8s_consul_registrar.registrar.ownership import is_of_a_registrar
from k8s_consul_registrar.settings.consul import CATALOG, ConsulSettings
from k8s_consul_registrar.settings.registrar import RegistrarSettings, selection_digest
from k8s_consul_registrar.tls import CONSUL, client_tls


def consul_access(settings: ConsulSettings) -> ConsulAccess:
    """Load what a connection to Consul needs; raises an `AccessError` naming the file at fault."""
    tls = None
    if settings.url.startswith("https://"):
        tls = client_tls(
            CONSUL, settings.ca_file, settings.cert_file, settings.key_file, is_verified=settings.verify
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
    if access.token_file:
        ConsulTokenFile(access.token_file).current()  # one that cannot be read ends the start
    return access


@asynccontextmanager
async def consul_client(
    settings: ConsulSettings, timing: Timing, fence: Fence | None = None
) -> AsyncIterator[ConsulClient]:
    """Open the client of Consul, and log out at its end where it logs in; raises an `AccessError`."""
    access = consul_access(settings)
    if settings.login is None:
        async with ConsulClient(access, timing, fence=fence) as client:
            yield client
        return
    method = AuthMethod(
        settings.login.auth_method,
        settings.login.bearer_token_file,
        dict(settings.login.meta),
        settings.login.datacenter,
        settings.login.namespace,
    )
    login = Login(method, access, timing)
    try:
        async with ConsulClient(access, timing, fence=fence, tokens=login) as client:
            yield client
    finally:
        await login.close()


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
    may_go: Callable[[Service], bool | None],
) -> list[PreviousLocation]:
    """Return the places that may still hold our services: the other backend's, and nodes of earlier settings."""
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
